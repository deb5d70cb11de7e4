"""A fingerprint of a model's weights, by which another model of the same shape is known from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

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
    once: seconds, where a forecast takes minutes.

    Args:
        model: with parameters and saved buffers; not altered.

    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):  # quantised models keep other things there too
            digest.update(f"{name} {tuple(tensor.shape)} {_checksum(tensor)}\n".encode())
    return Weights(digest.hexdigest(), str(next(model.parameters()).dtype))


def _checksum(tensor: torch.Tensor) -> int:
    """Modulo 2 to the 64th; an odd factor keeps the change of one element from vanishing there."""
    flat = tensor.detach().reshape(-1)
    factors = torch.arange(1, 2 * min(_CHUNK, flat.numel()) + 1, 2, device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(torch.split(flat, _CHUNK)):
        bits = chunk.to(torch.float32).view(torch.int32).to(torch.int64)
        total += (bits * (factors[: len(bits)] + 2 * _CHUNK * number)).sum()
    return int(total)
