"""Whether a model's weights are spread over processes, and what that allows."""

from __future__ import annotations

from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP, ZeRO-3, tensor parallel). Only whole forwards are safe there."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()) or any(
        hasattr(m, "_fsdp_wrapped_module") for m in model.modules()
    )


def may_differ(model: nn.Module) -> bool:
    """Whether each process may run its own batch. It may not where all processes compute one batch (tensor parallelism)."""
    if (getattr(model, "tp_size", None) or 1) > 1 or getattr(model, "ds_autotp_parsed", False):  # transformers' and DeepSpeed's
        return False
    meshes = [p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")]
    if not meshes:
        return True
    from torch.distributed.fsdp import FSDPModule  # missing if torch is built without distributed

    return any(isinstance(module, FSDPModule) for module in model.modules()) and all(mesh.ndim == 1 for mesh in meshes)
