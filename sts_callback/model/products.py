"""Float32 products on a CPU, by the library that makes them faster, if it makes them as exactly."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

_LEFT_TO_TORCH = ("none", "ieee")  # every other value is the user's own choice
_ROUNDED = "bf16"
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
    with _set_to(_ROUNDED, switch):
        return all(_error(n, seeded) < _MOST_ERROR for n in (1, 16, 256))  # one row, some, and as many as a batch has


def are_float32() -> bool:
    """Whether torch's settings let no product of float32 be rounded, on any device, but for what `by_onednn` has set."""
    switch = _switch()
    ours = switch is not None and switch.fp32_precision == _ROUNDED and are_exact()
    with _set_to(_LEFT_TO_TORCH[0], switch) if ours else contextlib.nullcontext():
        try:
            return torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # the precision is set for each backend
            return False


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


def _error(n: int, seeded: torch.Generator) -> float:
    """Relative error of a product of `n` rows by all shapes of a forward and a backward: with a bias, and without."""
    x, weight, bias = (
        torch.randn(shape, generator=seeded, dtype=torch.float32, device="cpu") for shape in ((n, 512), (768, 512), (768,))
    )
    exact = x.double() @ weight.double().T
    found = (x @ weight.T, (weight @ x.T).T, torch.nn.functional.linear(x, weight, bias) - bias)
    return max(float((one.double() - exact).norm() / exact.norm()) for one in found)
