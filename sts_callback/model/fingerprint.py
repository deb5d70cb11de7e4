"""A fingerprint of a model's weights, which tells models of the same shape apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sts_callback.errors import ModelError

_CHUNK = 2**20
"""Number of weights that are summed at a time. The sum does not depend on it."""


@dataclass(frozen=True)
class Weights:
    """Identifies the weights of a model."""

    fingerprint: str
    """SHA-256 over all weights. It stays the same if weights are loaded in a wider dtype."""
    dtype: str
    """Dtype of the first parameter, such as `torch.float32`."""


def weights_of(model: nn.Module) -> Weights:
    """Fingerprint all weights of a model that is whole on this process.

    For each tensor, the bits of all elements in float32 are taken as integers, multiplied by an odd number that depends on the
    position, and added up. The sum is exact on every device and in any order. Any change of one element changes it. It reads each
    tensor once, which takes seconds. For quantised weights, the packed tensors are summed.

    Args:
        model: the model; not altered. Parameters and saved buffers count.

    Raises:
        ModelError: if a weight is not whole on this process or cannot be read.

    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # quantised models store other things here too
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
    """Yield the plain tensors that make up a tensor: itself, or what a subclass packs (values, scales, zero points)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in sorted(tensor.__tensor_flatten__()[0]):
        if getattr(tensor, name) is not None:
            yield from _parts(getattr(tensor, name))


def _checksum(tensor: torch.Tensor) -> int:
    """Weighted sum modulo 2 to the 64th. As the factors are odd, the change of one element cannot vanish."""
    flat = tensor.detach().reshape(-1)
    factors = torch.arange(1, 2 * min(_CHUNK, flat.numel()) + 1, 2, device=flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(torch.split(flat, _CHUNK)):
        # Packed integers use all their bits; float32 would keep only 24.
        bits = chunk.to(torch.float32).view(torch.int32) if chunk.is_floating_point() else chunk
        total += (bits.to(torch.int64) * (factors[: len(bits)] + 2 * _CHUNK * number)).sum()
    return int(total)
