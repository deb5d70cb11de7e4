"""What two processes do together in tests; importable, so that it can be sent to them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from sts_callback.training.overhead import Overhead
from test_callback import PROBES, made_callback, made_trainer

OPTIONS: dict[str, Any] = {"ddp_backend": "gloo", "save_strategy": "no", "eval_strategy": "no", "max_steps": 4}


def disagree_on_cost(rank: int, out: Path) -> None:
    """By its own clock each process would check at other steps."""
    answers = iter([False, True, False] if rank == 0 else [True, False, True])  # after 1, 2, 5 and all 7 steps nobody is asked
    Overhead.affords_check = property(lambda overhead: next(answers))  # type: ignore[assignment,method-assign]
    _train(rank, out, 0.5, max_steps=7)


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
    _train(rank, out, None)


def _train(rank: int, out: Path, max_overhead: float | None, **options: Any) -> None:
    probes = dataclasses.replace(PROBES, batch_tokens=100)  # several batches a set, so that each process has some
    callback = made_callback(check_on=1, max_overhead=max_overhead, probes=probes)
    trainer = made_trainer("plain", out, [callback], **(OPTIONS | options))
    trainer.train()
    (out / f"{rank}.json").write_text(json.dumps([r["step"] for r in trainer.state.log_history if "sts/near/drift" in r]))


def learn_by_rewards(rank: int, out: Path) -> None:
    """Each process hears its own half of what is written."""
    from guest.runs import Shelf, taste
    from guest.runs import made_trainer as made_guest

    heard: list[str] = []

    def hearing(prompts: list[str], completions: list[str], trainer_state: Any, **others: Any) -> list[float]:
        heard.extend(dict.fromkeys(prompts) if trainer_state.global_step == 0 else ())
        return taste(completions)

    shelf = Shelf.filled(out / f"shelf-{rank}")
    callback = shelf.callback(max_overhead=None)
    rewards = callback.tap(hearing)
    options: dict[str, Any] = {"per_device_train_batch_size": 10, "max_steps": 2, "ddp_backend": "gloo"}
    made_guest("GRPO", shelf, out, [callback], rewards=rewards, **options).train()
    assert callback.forecast is not None
    told = {**callback.forecast.to_dict(), "seconds": 0, "seconds_by_part": {}}
    (out / f"{rank}.json").write_text(json.dumps({"forecast": told, "heard": heard}))
