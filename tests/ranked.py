"""What two processes do together in tests; importable, so that it can be sent to them."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from guest.runs import PROBES
from sts_callback.overhead import Overhead
from test_callback import made_callback, made_trainer

OPTIONS: dict[str, Any] = {"ddp_backend": "gloo", "save_strategy": "no", "eval_strategy": "no", "max_steps": 4}


def disagree_on_cost(rank: int, out: Path) -> None:
    """By its own clock each process would check at other steps."""
    answers = iter([False, True, False, True] if rank == 0 else [True, False, True, False])
    Overhead.affords_check = property(lambda overhead: next(answers))  # type: ignore[assignment,method-assign]
    _train(rank, out, 0.5)


def fail_on_one(rank: int, out: Path) -> None:
    """Our passes fail on the second process only, from its third optimizer step on."""
    forward, n_steps = LlamaForCausalLM.forward, [0]

    def failing(model: Any, *args: Any, **kwargs: Any) -> Any:
        n_steps[0] += model.training
        if rank == 1 and not model.training and 4 <= n_steps[0] < 6:  # two forwards a step
            raise ZeroDivisionError("on one process only")
        return forward(model, *args, **kwargs)

    failing.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    LlamaForCausalLM.forward = failing  # type: ignore[method-assign]
    _train(rank, out, None, probes=replace(PROBES, batch_tokens=128))  # batches for both


def _train(rank: int, out: Path, max_overhead: float | None, **options: Any) -> None:
    callback = made_callback(check_on=1, max_overhead=max_overhead, **options)
    trainer = made_trainer("plain", out, [callback], **OPTIONS)
    trainer.train()
    (out / f"{rank}.json").write_text(json.dumps([r["step"] for r in trainer.state.log_history if "sts/near/drift" in r]))
