"""A fingerprint of a model's weights, by which another model of the same shape is known from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sts_callback.errors import ModelError

_CHUNK = 2**20
"""Weights summed at a time; the sum does not depend on it."""


@dataclass(frozen=True)
class Weights:
    """What a model computes with, beside its configuration."""

    fingerprint: str
    """SHA-256 over all weights; the same for weights that are held in a wider dtype than they were saved in."""
    dtype: str
    """Of the first parameter, such as `torch.float32`."""


def weights_of(model: nn.Module) -> Weights:
    """Fingerprint all weights of a model that is whole on this process.

    Of each tensor, the bits of all elements as float32 are summed as integers, each times an odd number of its place. Such a
    sum is exact on every device and in any order. It changes when any one element does, by however little, and reads a tensor
    once: seconds, where a forecast takes minutes. Of quantised weights, the packed tensors are summed.

    Args:
        model: with parameters and saved buffers; not altered.

    Raises:
        ModelError: if a weight is not whole here, or cannot be read.

    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # quantised models keep other things there too
            continue
        if tensor.is_meta or hasattr(tensor, "device_mesh"):
            raise ModelError(f"model: {name} is not whole on this process; load the model without sharding or offloading.")
        try:
            for part in _parts(tensor):
                digest.update(f"{name} {tuple(part.shape)} {_checksum(part)}\n".encode())
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}"
            raise ModelError(
                f"model: {name} is a {kind}, which cannot be fingerprinted ({error}); dequantise the model."
            ) from error
    return Weights(digest.hexdigest(), str(next(model.parameters()).dtype))


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Plain tensors that a tensor is made of: itself, or what a subclass packs (values, scales, zero points)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in sorted(tensor.__tensor_flatten__()[0]):
        if getattr(tensor, name) is not None:
            yield from _parts(getattr(tensor, name))


def _checksum(tensor: torch.Tensor) -> int:
    """Modulo 2 to the 64th; an odd factor keeps the change of one element from vanishing there."""
    flat = tensor.detach().reshape(-1)
    factors = torch.arange(1, 2 * min(_CHUNK, flat.numel()) + 1, 2, device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(torch.split(flat, _CHUNK)):
        # Packed integers use all their bits, of which float32 would keep 24.
        bits = chunk.to(torch.float32).view(torch.int32) if chunk.is_floating_point() else chunk
        total += (bits.to(torch.int64) * (factors[: len(bits)] + 2 * _CHUNK * number)).sum()
    return int(total)
