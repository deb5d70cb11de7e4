"""What a trainer does inside the fence leaves no trace: each kind of trace is left outside it, and gone behind it."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

from guest.runs import Shelf, made_trainer, same
from sts_callback.training.fence import put_back


class Collator(DataCollatorForSeq2Seq):
    """Draws numbers from generators of its own, and counts."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.generators = [random.Random(0), np.random.default_rng(0), np.random.RandomState(0), torch.Generator()]
        self.seen: dict[str, list[int]] = {"rows": []}


class CountingLoss:
    """A loss function with a state."""

    n_calls = 0

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.n_calls += 1
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Over(Exception):  # noqa: N818  # not an error
    """Enough has been seen."""


class AtTheBeginning(TrainerCallback):
    """Does something when training begins, and ends it."""

    def __init__(self, work: Callable[[Trainer], None]) -> None:
        self.trainer: Trainer
        self.work = work

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.work(self.trainer)
        raise Over


def in_training(tmp_path: Path, work: Callable[[Trainer], None], *, lora: bool = False) -> None:
    """Do something to a trainer that has just begun to train, with a gradient scaler as for float16."""
    begin = AtTheBeginning(work)
    trainer = made_trainer("SFT", Shelf.filled(tmp_path / "shelf"), tmp_path / "out", [begin], lora=lora, max_steps=1)
    trainer.data_collator = Collator(trainer.processing_class)
    trainer.compute_loss_func = CountingLoss()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    trainer.model.register_buffer("table", torch.arange(4.0))
    trainer.model.kept = ["a"]
    begin.trainer = trainer
    with pytest.raises(Over):
        trainer.train()


def trained(trainer: Any) -> None:
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i] for i in range(2)]
    trainer.training_step(
        trainer.model, trainer.data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows]), None
    )


def stepped(trainer: Any) -> None:
    trained(trainer)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.accelerator.scaler.step(optimizer)
    trainer.accelerator.scaler.update()


def draw(trainer: Any) -> None:
    python, numpy, old, of_torch = trainer.data_collator.generators
    _ = python.random(), numpy.random(), old.random(), torch.rand(1, generator=of_torch)


def everything(trainer: Any) -> dict[str, Any]:
    """All that a trace could be left in."""
    model, accelerator, collator = trainer.model, trainer.accelerator, trainer.data_collator
    python, numpy, old, of_torch = collator.generators
    scaler = {n: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for n, v in vars(accelerator.scaler).items()}
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: p.grad is None for name, p in model.named_parameters()},
        "trained": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "modules": [(name, m.training, sorted(vars(m)), len(m._forward_hooks)) for name, m in model.named_modules()],
        "kept": list(model.kept),
        "config": copy.deepcopy(model.config.to_dict()),
        "trainer": {n: v for n, v in vars(trainer).items() if isinstance(v, (int, float, str, type(None)))},
        "attributes": sorted(vars(trainer)),
        "metrics": copy.deepcopy(trainer._metrics),
        "state": copy.deepcopy({n: v for n, v in vars(trainer.state).items()}),
        "control": dict(vars(trainer.control)),
        "report_to": list(trainer.args.report_to),
        "own": [id(trainer.optimizer), id(trainer.lr_scheduler), len(trainer.optimizer.state)],
        "lists": [len(getattr(accelerator, f"_{name}")) for name in ("models", "optimizers", "dataloaders", "schedulers")],
        "sync": accelerator.gradient_state.sync_gradients,
        "scaler": {n: v for n, v in scaler.items() if not n.startswith("_per")},
        "scaler's optimizers": len(accelerator.scaler._per_optimizer_states),
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "collator": [
            collator.seen["rows"][:],
            python.getstate(),
            numpy.bit_generator.state,
            old.get_state(),
            of_torch.get_state(),
        ],
        "loss function": trainer.compute_loss_func.n_calls,
    }


TRACES: dict[str, Callable[[Any], object]] = {
    "a step of training": stepped,
    "gradients": trained,
    "a weight": lambda t: next(t.model.parameters()).data.add_(1e-3),
    "a weight moved to other memory": lambda t: setattr(next(t.model.parameters()), "data", torch.zeros(300, 32)),
    "a buffer": lambda t: t.model.table.add_(1),
    "another buffer in its place": lambda t: setattr(t.model, "table", torch.zeros(4)),
    "a frozen parameter": lambda t: next(t.model.parameters()).requires_grad_(False),
    "evaluation mode": lambda t: t.model.model.layers[0].train(not t.model.model.layers[0].training),
    "a hook": lambda t: t.model.model.register_forward_hook(lambda *args: None),
    "an attribute of a module": lambda t: setattr(t.model.model, "rope_deltas", torch.ones(1)),
    "a list of a module": lambda t: t.model.kept.append("b"),
    "the configuration": lambda t: setattr(t.model.config, "use_cache", not t.model.config.use_cache),
    "metrics": lambda t: t._metrics["train"]["entropy"].append(1.0),
    "a counter": lambda t: setattr(t, "_total_train_tokens", 7),
    "a new attribute": lambda t: setattr(t, "current_gradient_accumulation_steps", 3),
    "tokens seen": lambda t: setattr(t.state, "num_input_tokens_seen", 7),
    "a row of the log": lambda t: t.log({"loss": 1.0}),
    "a wish": lambda t: setattr(t.control, "should_save", True),
    "another optimizer": lambda t: setattr(t, "optimizer", torch.optim.SGD(t.model.parameters(), lr=1.0)),
    "a prepared optimizer": lambda t: t.accelerator.prepare(torch.optim.SGD(t.model.parameters(), lr=1.0)),
    "gradients that are not to be shared yet": lambda t: t.accelerator.gradient_state._set_sync_gradients(False),
    "random numbers": lambda t: (random.random(), np.random.rand(), torch.rand(1)),
    "random numbers of the collator": draw,
    "rows seen by the collator": lambda t: t.data_collator.seen["rows"].append(1),
    "a call of the loss function": lambda t: setattr(t.compute_loss_func, "n_calls", 9),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_gone(name: str, tmp_path: Path) -> None:
    seen: dict[str, dict[str, Any]] = {}

    def work(trainer: Trainer) -> None:
        seen["before"] = everything(trainer)
        with put_back(trainer):
            TRACES[name](trainer)
        seen["behind the fence"] = everything(trainer)
        with pytest.raises(ZeroDivisionError), put_back(trainer):
            TRACES[name](trainer)
            _ = 1 / 0
        seen["after an error"] = everything(trainer)
        TRACES[name](trainer)
        seen["without a fence"] = everything(trainer)

    in_training(tmp_path, work)
    differences = {where: [k for k in found if not same(seen["before"][k], found[k])] for where, found in seen.items()}
    assert differences.pop("without a fence")
    assert differences == {"before": [], "behind the fence": [], "after an error": []}


def test_metrics_stay_the_same_object(tmp_path: Path) -> None:
    """Somebody else may hold it."""

    def work(trainer: Any) -> None:
        held = trainer._metrics["train"]
        with put_back(trainer):
            trainer._metrics["train"]["entropy"].append(1.0)
        assert trainer._metrics["train"] is held
        assert held == {}

    in_training(tmp_path, work)


def n_bytes_held() -> int:
    """Of all tensors that there are, each memory once."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@pytest.mark.parametrize("lora", [False, True])
def test_it_holds_a_copy_of_what_is_trained_and_no_more(lora: bool, tmp_path: Path) -> None:
    found: list[int] = []

    def work(trainer: Any) -> None:
        copied = [p for p in trainer.model.parameters() if p.requires_grad] + list(trainer.model.buffers())
        before = n_bytes_held()
        with put_back(trainer):
            inside = n_bytes_held()
        found.extend([inside - before, sum(tensor.nbytes for tensor in copied), n_bytes_held() - before])

    in_training(tmp_path, work, lora=lora)
    held, expected, left = found
    random_states = 2 * torch.get_rng_state().nbytes  # torch's and the collator's
    assert expected + random_states <= held <= expected + random_states + 100  # and the trainer's own sums of losses
    assert left == 0
