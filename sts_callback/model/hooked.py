"""Read and replace the tensor at a hook point, by PyTorch's hooks with keyword arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sts_callback.errors import ModelError
from sts_callback.model.hooks import HookPoint


def hooked(point: HookPoint, hook: Callable[..., Any]) -> RemovableHandle:
    """Register a forward (pre-)hook at a hook point."""
    if point.side == "input":
        return point.module.register_forward_pre_hook(hook, with_kwargs=True)
    return point.module.register_forward_hook(hook, with_kwargs=True)


def tensor_at(point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> torch.Tensor:
    """Find the point's tensor in what its module took or gave.

    Raises:
        ModelError: if it is no tensor.

    """
    value = (args[0] if args else kwargs["hidden_states"]) if point.side == "input" else output[0]
    if isinstance(value, (tuple, list)):  # GPT-1's blocks return lists
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise ModelError(
            f"hook_name: {point.name} gives a {type(value).__name__}, not a tensor; take an SAE that reads inside a layer, such "
            "as blocks.N.hook_mlp_out."
        )
    return value


def with_tensor(x: torch.Tensor, point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
    """What a forward (pre-)hook returns to put a tensor in a point's place."""
    if point.side == "output":
        return x if isinstance(output[0], torch.Tensor) else type(output[0])((x, *output[0][1:]))
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


@contextlib.contextmanager
def replaced(point: HookPoint, by: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, forwards go on with something else than what they have at a hook point.

    Args:
        point: where.
        by: gives it from what is there, in the same shape and dtype.

    """

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        return with_tensor(by(tensor_at(point, args, kwargs, *output)), point, args, kwargs, *output)

    handle = hooked(point, replace)
    try:
        yield
    finally:
        handle.remove()
