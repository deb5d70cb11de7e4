"""Float32 products on a CPU, by the library that makes them faster, if it makes them as exactly."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch

_LEFT_TO_TORCH = ("none", "ieee")  # every other value is the user's own choice
_ROUNDED = "bf16"
_OF_ALL_DEVICES = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
# Torch and oneDNN each keep the code they have made for a size of product, by default for 1,024 sizes, about a gigabyte.
_CAPACITIES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
_MOST_KEPT = 128
_MOST_ERROR = 1e-5  # float32 gives about 5e-7 at these sizes, bfloat16 2e-3


@contextlib.contextmanager
def by_onednn() -> Iterator[None]:
    """Let oneDNN make the float32 products of a CPU, where it does so in float32. On exit torch's setting is as it was.

    Torch leaves them to MKL, which keeps AMD's processors at half of their speed, unless rounding to bfloat16 is allowed. Then
    oneDNN makes them, and it rounds nothing on processors without AMX. Whether this is one of them a few test products tell.
    """
    switch = _switch()
    if switch is not None and switch.fp32_precision in _LEFT_TO_TORCH and are_exact():
        with _set_to(_ROUNDED, switch):
            yield
    else:
        yield


@functools.cache
def are_exact() -> bool:
    """Whether products are made in float32 on this machine although torch allows their rounding to bfloat16."""
    switch = _switch()
    if switch is None:
        return False
    seeded = torch.Generator("cpu").manual_seed(0)
    with _set_to(_ROUNDED, switch), _less_kept():
        return all(_error(n, seeded) < _MOST_ERROR for n in (1, 16, 256))  # one row, some, and as many as a batch has


def rounded_to(device_type: str) -> str | None:
    """What torch's settings let float32 products be rounded to on a kind of device: `tf32`, `bf16`, or None for nothing."""
    onednn: Any = torch.backends.mkldnn
    if device_type == "cpu" and (not onednn.is_available() or are_exact()):
        return None
    stated = getattr(_switch() if device_type == "cpu" else torch.backends.cuda.matmul, "fp32_precision", None)
    if stated is None:  # before torch 2.9 there was one setting for all devices
        stated = _OF_ALL_DEVICES[torch.get_float32_matmul_precision()]
    return None if stated in _LEFT_TO_TORCH else str(stated)


def _switch() -> Any:
    """What torch sets for the products that oneDNN makes; None in versions before 2.9, or without oneDNN."""
    onednn: Any = torch.backends.mkldnn
    return getattr(onednn, "matmul", None) if onednn.is_available() else None


@contextlib.contextmanager
def _set_to(value: str, switch: Any) -> Iterator[None]:
    before = switch.fp32_precision
    switch.fp32_precision = value
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextlib.contextmanager
def _less_kept() -> Iterator[None]:
    """Let less code be kept. The environment is read at the first product of a process, and is as it was on exit."""
    if any(name in os.environ for name in _CAPACITIES):  # the user's own choice
        yield
        return
    os.environ.update(dict.fromkeys(_CAPACITIES, str(_MOST_KEPT)))
    try:
        yield
    finally:
        for name in _CAPACITIES:
            del os.environ[name]


def _error(n: int, seeded: torch.Generator) -> float:
    """Relative error of a product of `n` rows by all shapes of a forward and a backward: with a bias, and without."""
    x, weight, bias = (
        torch.randn(shape, generator=seeded, dtype=torch.float32, device="cpu") for shape in ((n, 512), (768, 512), (768,))
    )
    exact = x.double() @ weight.double().T
    found = (x @ weight.T, (weight @ x.T).T, torch.nn.functional.linear(x, weight, bias) - bias)
    return max(float((one.double() - exact).norm() / exact.norm()) for one in found)
