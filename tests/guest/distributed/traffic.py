"""What one check moves between processes, counted on gloo: a script, not a test.

PYTHONPATH=.:tests python tests/guest/distributed/traffic.py

Trains a tiny model with DDP in 1, 2 and 4 processes on a CPU, and counts each gathering and broadcast of objects between the
start and the end of the check after its second step. Bytes are those that a process receives from the others. The gathering of
objects pads all to the longest, so a process receives `(n - 1)` times the longest, whoever has something to say.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from guest.distributed.launch import launch, seen
from sts_callback import ProbeConfig, STSCallback
from sts_callback.training.session import Session
from tiny import rotated_sae, rows, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

CASES = {
    "2 domains, 8 queries, 8 features": {"n_domains": 2, "n_queries": 8, "n_features": 8},
    "4 domains, 8 queries, 8 features": {"n_domains": 4, "n_queries": 8, "n_features": 8},
    "2 domains, 16 queries, 8 features": {"n_domains": 2, "n_queries": 16, "n_features": 8},
    "2 domains, 8 queries, 16 features": {"n_domains": 2, "n_queries": 8, "n_features": 16},
}
COUNTED = (1, 2, 4)
ON_PAPER = (8, 16, 64)
CHECK = 2
SIZE = 8
"""Bytes of the length that goes ahead of each object."""


class Count:
    """Wraps the two calls by which processes meet."""

    def __init__(self) -> None:
        self.is_on = False
        self.longest: list[int] = []
        """Of each gathering, the longest object in bytes."""
        self.broadcasts: list[int] = []
        self._gather, self._broadcast = distributed.all_gather_object, distributed.broadcast_object_list

    def gather(self, told: list[Any], mine: Any, *args: Any, **kwargs: Any) -> None:
        self._gather(told, mine, *args, **kwargs)
        if self.is_on:
            self.longest.append(max(len(pickle.dumps(one)) for one in told))

    def broadcast(self, told: list[Any], *args: Any, **kwargs: Any) -> None:
        self._broadcast(told, *args, **kwargs)
        if self.is_on:
            self.broadcasts.append(sum(len(pickle.dumps(one)) for one in told))


def count(out: Path, n_domains: int, n_queries: int, n_features: int) -> dict[str, list[int]]:
    """Train two steps, and count what the check after the second takes."""
    made, tokenizer, check = Count(), tiny_tokenizer(), Session.check

    def counted(session: Session, state: Any, *args: Any, **kwargs: Any) -> None:
        made.is_on = state.global_step == CHECK
        check(session, state, *args, **kwargs)
        made.is_on = False

    callback = STSCallback(
        sae=rotated_sae(),
        domains={f"domain {i}": rows(40, "poems" if i % 2 else "sums", seed=50 + i) for i in range(n_domains)},
        train_data=rows(40),
        probes=ProbeConfig(n_queries=n_queries, n_features=n_features),
        check_on=1,
        max_overhead=None,
    )
    args = TrainingArguments(**tiny_arguments(out, max_steps=CHECK, ddp_backend="gloo"))
    data, collator = tokenised(rows(40), tokenizer), DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(tiny_model("llama"), args, collator, data, processing_class=tokenizer, callbacks=[callback])
    with (
        mock.patch.object(Session, "check", counted),
        mock.patch.object(distributed, "all_gather_object", made.gather),
        mock.patch.object(distributed, "broadcast_object_list", made.broadcast),
    ):
        trainer.train()
    return {"longest": made.longest, "broadcasts": made.broadcasts}


def received(counted: dict[str, list[int]], n: int) -> int:
    """Bytes that one process but the first receives in a check by `n` processes, of what was counted with several."""
    return (n - 1) * sum(SIZE + one for one in counted["longest"]) + (n > 1) * sum(SIZE + one for one in counted["broadcasts"])


def work(folder: Path) -> None:
    """What each process does."""
    rank = int(os.environ["RANK"])
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        place = folder / name
        place.mkdir(exist_ok=True)
        torch.save(count(place / f"rank-{rank}", **case), place / f"seen-{rank}.pt")


def main() -> None:
    """Print a table: calls, the longest objects, bytes received by a process."""
    for n in COUNTED:
        with tempfile.TemporaryDirectory() as place:
            launch(Path(place), CASES, seconds=200, n_ranks=n, worker=Path(__file__))
            for name in CASES:
                counted = seen(Path(place), name, n)[-1]
                print(  # noqa: T201
                    f"{n} processes, {name}: {len(counted['longest'])} gatherings, {len(counted['broadcasts'])} broadcasts, "
                    f"{received(counted, n):,} bytes received by each; the longest objects {sorted(counted['longest'])[-5:]}",
                    flush=True,
                )
                if n == COUNTED[-1]:
                    on_paper = "; ".join(f"{more} processes {received(counted, more):,}" for more in ON_PAPER)
                    print(f"  on paper: {on_paper}")  # noqa: T201


if __name__ == "__main__":
    work(Path(sys.argv[1])) if sys.argv[1:] else main()
