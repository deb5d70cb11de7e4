"""Leave the user's model as it was: mode, state, random state and configuration are restored on every exit."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from sts_callback.model.products import by_onednn

# Settings by which a configuration asks every forward for more, and their values for ours: logits only.
_LOGITS_ALONE = {"_output_attentions": False, "output_hidden_states": False, "output_router_logits": False, "return_dict": True}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode without gradients. On every exit, mode, state and random state are restored.

    Training must be bit-identical with and without us. So the random states of Python, NumPy, the CPU and every GPU are restored,
    and each module's own `training` flag: TRL chooses its log bucket by it.
    """
    flags = [(module, module.training) for module in model.modules()]
    default_dtype = torch.get_default_dtype()
    with random_state_kept():
        try:
            for module, _ in flags:
                module.training = False
            torch.set_default_dtype(torch.float32)  # sums take no less, whatever the user's new tensors are
            with (
                _on_cpu(),
                by_onednn(),
                _state_aside(model),
                _logits_alone(model),
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
            ):
                yield
        finally:
            for module, flag in flags:
                module.training = flag
            torch.set_default_dtype(default_dtype)


def _on_cpu() -> contextlib.AbstractContextManager[object]:
    """Make new tensors on the CPU unless their device is said, whatever the user's default is."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """On exit, the random state of Python, NumPy, the CPU and every device is as it was."""
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device: Any = _device_in_use()
    on_all = hasattr(device, "get_rng_state_all")  # of CUDA and its like; Apple's GPU is one
    states = None if device is None else device.get_rng_state_all() if on_all else device.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if device is not None:
            (device.set_rng_state_all if on_all else device.set_rng_state)(states)


def _device_in_use() -> Any:
    """What torch knows of the accelerator that has been used by now, if any: asking one for its state would start it."""
    kind = None
    with contextlib.suppress(RuntimeError):  # torch 2.6 raises it where there is no accelerator; later versions return None
        kind = torch.accelerator.current_accelerator()
    device = None if kind is None else torch.get_device_module(kind)
    return device if device is not None and getattr(device, "is_initialized", lambda: True)() else None


@contextlib.contextmanager
def _state_aside(model: nn.Module) -> Iterator[None]:
    """Set aside the state that modules keep between forwards. On exit it is restored.

    Qwen2-VL keeps the positions of its last images, Griffin its recurrent state, dynamic RoPE its table. Our forwards must not
    read the state of the user's forwards, nor leave their own. A tensor that a method assigns is None in a new model.
    """
    named = [(module, _state_names(type(module))) for module in model.modules()]  # type: ignore[arg-type]  # classes are hashable
    before = [(_state(module, names), dict(module._buffers)) for module, names in named]
    n_writes = writes_to_weights(model)
    try:
        for (module, _), (state, _) in zip(named, before, strict=True):
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    vars(module)[name] = None
        yield
    finally:
        if writes_to_weights(model) == n_writes:  # else the state belongs to the new weights
            for (module, names), (state, buffers) in zip(named, before, strict=True):
                for name in (names & vars(module).keys()) - state.keys():
                    del vars(module)[name]
                vars(module).update(state)
                module._buffers.clear()
                module._buffers.update(buffers)


def _state(module: nn.Module, names: frozenset[str]) -> dict[str, Any]:
    """The attributes with these names, and numbers beside buffers, which describe them (the length of a table)."""
    return {
        name: value
        for name, value in vars(module).items()
        if name in names or (module._buffers and isinstance(value, (int, float)))
    }


@functools.cache
def _state_names(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the attributes that methods other than `__init__` assign."""
    methods = [
        inspect.unwrap(method).__code__
        for cls in kind.__mro__
        if not cls.__module__.startswith(("torch.", "builtins"))
        for name, method in vars(cls).items()
        if name != "__init__" and inspect.isfunction(inspect.unwrap(method))
    ]
    return frozenset(i.argval for code in methods for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")


def writes_to_weights(model: nn.Module) -> int:
    """Count in-place writes to weights. A forward that leaves the weights alone does not change the count."""
    return sum(p._version for p in model.parameters() if not p.is_inference())


@contextlib.contextmanager
def _logits_alone(model: nn.Module) -> Iterator[None]:
    """Make a model's configurations ask for logits only: no attentions, no router losses. On exit they are restored."""
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): vars(config) for config in found if isinstance(config, PretrainedConfig)}.values()
    before = [{name: config[name] for name in _LOGITS_ALONE if name in config} for config in configs]
    try:
        for config, asked in zip(configs, before, strict=True):
            config.update((name, _LOGITS_ALONE[name]) for name in asked)
        yield
    finally:
        for config, asked in zip(configs, before, strict=True):
            config.update(asked)
