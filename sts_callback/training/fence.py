"""A fence around steps that a trainer takes only to be measured: on every exit, what they touch is as it was, to the bit."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig

from sts_callback.model.undisturbed import random_state_kept

if TYPE_CHECKING:
    from transformers import Trainer

Undo = list[Callable[[], object]]


@contextlib.contextmanager
def put_back(trainer: Trainer) -> Iterator[None]:
    """Inside, the trainer may train its model; on every exit, both are as they were.

    Put back are: parameters that are trained and all buffers, from copies on the CPU; gradients; each module's mode, attributes
    and hooks, and which parameters are trained; attributes of the trainer and of what it holds (state, control, accelerator,
    collator and so on) with what stands in their lists and mappings, such as the running metrics of TRL; the gradient scaler;
    random numbers of Python, NumPy, the CPU, every device and of generators that these hold. Nothing is reported meanwhile.
    What a loss function, a collator or a data set keeps elsewhere, in a global or a file, is beyond it.

    Args:
        trainer: in training. Its own optimizer and scheduler are not to be stepped; another optimizer may take their place.

    """
    undo: Undo = []
    model: Any = trainer.model
    with random_state_kept():
        try:
            _keep_weights(model, undo)
            _keep_modules(trainer, undo)
            _keep_trainer(trainer, undo)
            trainer.args.report_to = []  # TRL reports how long its parts take as soon as they are done
            vars(trainer)["log"] = lambda *args, **kwargs: None
            yield
        finally:
            with torch.no_grad():
                for put in reversed(undo):
                    put()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what the optimizer inside has held


def _keep_weights(model: nn.Module, undo: Undo) -> None:
    def keep_flags(parameter: nn.Parameter) -> None:
        trained, gradient = parameter.requires_grad, parameter.grad

        def put() -> None:
            parameter.requires_grad, parameter.grad = trained, gradient

        undo.append(put)

    for parameter in model.parameters():
        keep_flags(parameter)
        parameter.grad = None
        if parameter.requires_grad:
            _keep_tensor(parameter, undo)
    for buffer in model.buffers():
        _keep_tensor(buffer, undo)


def _keep_modules(trainer: Trainer, undo: Undo) -> None:
    """Of the model, of what it is wrapped in, and of models beside it: a reference, a teacher."""
    models = [value for value in vars(trainer).values() if isinstance(value, nn.Module)]
    modules = {id(module): module for model in models for module in model.modules()}.values()
    settings = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, (PretrainedConfig, GenerationConfig))}
    for one in (*modules, *settings.values()):
        _keep_members(vars(one), undo)
        for value in vars(one).values():
            _keep_members(value, undo)


def _keep_trainer(trainer: Trainer, undo: Undo) -> None:
    datasets = [trainer.train_dataset, trainer.eval_dataset]
    not_touched = [trainer.callback_handler, trainer.optimizer, trainer.lr_scheduler]
    seen = {id(one): (one, 2) for one in (*datasets, *not_touched)}
    for one in (trainer, trainer.accelerator.gradient_state, trainer.accelerator.scaler):
        _keep(one, undo, seen, depth=2)
    for dataset in datasets:  # whose lists may be its rows
        if hasattr(dataset, "__dict__"):
            _keep_members(vars(dataset), undo)
            for value in vars(dataset).values():
                _keep_generator(value, undo)


def _keep(value: Any, undo: Undo, seen: dict[int, tuple[Any, int]], depth: int) -> None:
    """What stands in a value: members of lists and mappings, all the way down; attributes of objects, as deep as asked."""
    if id(value) in seen and seen[id(value)][1] >= depth:
        return
    seen[id(value)] = value, depth
    if isinstance(value, torch.Tensor):
        if not isinstance(value, nn.Parameter):
            _keep_tensor(value, undo)
        return
    _keep_members(value, undo)
    _keep_generator(value, undo)
    if isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, (list, tuple, deque)):
        inner = list(value)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, ModuleType)):
        inner, depth = [vars(value)], depth - 1
    else:
        return
    for one in inner:
        _keep(one, undo, seen, depth)


def _keep_members(value: Any, undo: Undo) -> None:
    """What is in a list or mapping; it stays the same one, others may hold it."""
    if isinstance(value, (dict, set)):
        mapping = dict(value) if isinstance(value, dict) else set(value)
        undo.append(lambda: (value.clear(), value.update(mapping)))
    elif isinstance(value, (list, deque)):
        members = list(value)
        undo.append(lambda: (value.clear(), value.extend(members)))


def _keep_tensor(tensor: torch.Tensor, undo: Undo) -> None:
    copy = tensor.detach().to("cpu", copy=True)
    undo.append(lambda: tensor.detach().copy_(copy))


def _keep_generator(value: Any, undo: Undo) -> None:
    if isinstance(value, random.Random):
        python = value.getstate()
        undo.append(lambda: value.setstate(python))
    elif isinstance(value, np.random.RandomState):
        old = value.get_state()
        undo.append(lambda: value.set_state(old))
    elif isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        undo.append(lambda: setattr(value.bit_generator, "state", bits))
    elif isinstance(value, torch.Generator):
        state = value.get_state()
        undo.append(lambda: value.set_state(state))
