"""Agreement between the processes of a run: what one decides alone, such as by the clock, would leave the others waiting for it.

Without other processes each of these gives back what it was given. All processes must call them, in the same order.
"""

from __future__ import annotations

import torch
from torch import distributed


def from_first(value: bool) -> bool:
    """What the first process says."""
    return bool(_shared(value, first=True))


def worst(value: int) -> int:
    """The largest value of all processes."""
    return _shared(value, first=False)


def _shared(value: int, *, first: bool) -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    device = "cuda" if "nccl" in distributed.get_backend() else "cpu"
    shared = torch.tensor(int(value), device=device)
    if first:
        distributed.broadcast(shared, src=0)
    else:
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)
