"""What one check moves between processes, counted on gloo: a script, not a test.

PYTHONPATH=.:tests python tests/guest/distributed/traffic.py

Trains a tiny model with DDP and with FSDP2 in 1, 2 and 4 processes on a CPU, and counts each gathering and broadcast of objects
between the start and the end of the check after its second step, and the weights that FSDP2 gathers meanwhile. Bytes are those
that a process receives from the others. The gathering of objects pads all to the longest, so a process receives `(n - 1)` times
the longest, whoever has something to say.
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
from transformers import DataCollatorForSeq2Seq, Trainer

from guest.distributed.launch import launch, seen
from guest.distributed.worker import arguments
from sts_callback import ProbeConfig, STSCallback
from sts_callback.training.checks import Checks
from tiny import rotated_sae, rows, tiny_model, tiny_tokenizer, tokenised

CASES = {
    "2 domains, 8 queries, 8 features": {"n_domains": 2, "n_queries": 8, "n_features": 8},
    "FSDP2, 2 domains, 8 queries, 8 features": {"mode": "fsdp2", "n_domains": 2, "n_queries": 8, "n_features": 8},
    "4 domains, 8 queries, 8 features": {"n_domains": 4, "n_queries": 8, "n_features": 8},
    "2 domains, 16 queries, 8 features": {"n_domains": 2, "n_queries": 16, "n_features": 8},
    "2 domains, 8 queries, 16 features": {"n_domains": 2, "n_queries": 8, "n_features": 16},
}
COUNTED = (1, 2, 4)
ON_PAPER = (8, 16, 64)
CHECK = 2
GATHERS_WEIGHTS = next(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(distributed, name))
"""How FSDP2 gathers weights; renamed in later versions of torch."""
SIZE = 8
"""Bytes of the length that goes ahead of each object."""


class Count:
    """Wraps the two calls by which processes meet, and the one by which FSDP2 gathers weights."""

    def __init__(self) -> None:
        self.is_on = False
        self.longest: list[int] = []
        """Of each gathering, the longest object in bytes."""
        self.broadcasts: list[int] = []
        self.weights: list[int] = []
        """Of each gathering of weights, what a process receives, in bytes."""
        self.n_forwards = 0
        self._gather, self._broadcast = distributed.all_gather_object, distributed.broadcast_object_list
        self._gather_tensors = getattr(distributed, GATHERS_WEIGHTS)

    def gather(self, told: list[Any], mine: Any, *args: Any, **kwargs: Any) -> None:
        self._gather(told, mine, *args, **kwargs)
        if self.is_on:
            self.longest.append(max(len(pickle.dumps(one)) for one in told))

    def broadcast(self, told: list[Any], *args: Any, **kwargs: Any) -> None:
        self._broadcast(told, *args, **kwargs)
        if self.is_on:
            self.broadcasts.append(sum(len(pickle.dumps(one)) for one in told))

    def forward(self, module: torch.nn.Module, args: Any) -> None:
        self.n_forwards += self.is_on

    def gather_tensors(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_on:
            self.weights.append(output_tensor.nbytes - input_tensor.nbytes)
        return self._gather_tensors(output_tensor, input_tensor, *args, **kwargs)


def count(out: Path, n_domains: int, n_queries: int, n_features: int, mode: str = "ddp") -> dict[str, Any]:
    """Train two steps, and count what the check after the second takes."""
    made, tokenizer, check, model = Count(), tiny_tokenizer(), Checks.check, tiny_model("llama")
    n_bytes = sum(p.nbytes for p in model.parameters())  # before they are sharded

    def counted(checks: Checks, state: Any, *args: Any, **kwargs: Any) -> None:
        made.is_on = state.global_step == CHECK
        check(checks, state, *args, **kwargs)
        made.is_on = False

    callback = STSCallback(
        sae=rotated_sae(),
        domains={f"domain {i}": rows(40, "poems" if i % 2 else "sums", seed=50 + i) for i in range(n_domains)},
        train_data=rows(40),
        probes=ProbeConfig(n_queries=n_queries, n_features=n_features),
        check_on=1,
        max_overhead=None,
    )
    args = arguments(mode, out, {"max_steps": CHECK})
    data, collator = tokenised(rows(40), tokenizer), DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model, args, collator, data, processing_class=tokenizer, callbacks=[callback])
    model.register_forward_pre_hook(made.forward)
    with (
        mock.patch.object(Checks, "check", counted),
        mock.patch.object(distributed, "all_gather_object", made.gather),
        mock.patch.object(distributed, "broadcast_object_list", made.broadcast),
        mock.patch.object(distributed, GATHERS_WEIGHTS, made.gather_tensors),
    ):
        trainer.train()
    return {
        "longest": made.longest,
        "broadcasts": made.broadcasts,
        "weights": made.weights,
        "model": n_bytes,
        "forwards": made.n_forwards,
    }


def received(counted: dict[str, Any], n: int) -> int:
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
                if counted["weights"]:
                    print(  # noqa: T201
                        f"  weights: {len(counted['weights'])} gatherings in {counted['forwards']} forwards, "
                        f"{sum(counted['weights']):,} bytes received by each, of a model of {counted['model']:,} bytes",
                        flush=True,
                    )
                if n == COUNTED[-1]:
                    on_paper = "; ".join(f"{more} processes {received(counted, more):,}" for more in ON_PAPER)
                    print(f"  on paper: {on_paper}")  # noqa: T201


if __name__ == "__main__":
    work(Path(sys.argv[1])) if sys.argv[1:] else main()
