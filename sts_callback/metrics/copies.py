"""Copies from the host to a device for which the host need not wait."""

from __future__ import annotations

import torch


def sent(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to a device. From a GPU's point of view in order, while the host goes on: only pinned memory allows that.

    Args:
        x: on the CPU; not to be written to afterwards.
        device: where to.

    """
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
