"""The identity of a measurement: model, SAE and probes. Only measurements of the same identity are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_callback.config import ProbeConfig
from sts_callback.data.probes import ProbeSet
from sts_callback.model.encoder import Encoder
from sts_callback.model.hooks import model_name, text_config
from sts_callback.records import Identity

if TYPE_CHECKING:
    from torch import nn


def identity_of(model: nn.Module, encoder: Encoder, config: ProbeConfig, sets: Sequence[ProbeSet], precision: str) -> Identity:
    """Make the identity of a measurement of these sets, in the precision that the self-test found."""
    shape = text_config(model).to_dict()  # type: ignore[attr-defined]
    for volatile in ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures"):
        shape.pop(volatile, None)
    return Identity(
        model=_sha256(shape),
        model_name=Path(model_name(model)).name,
        sae=encoder.fingerprint,
        sae_name=encoder.name,
        hook_name=encoder.hook_name,
        probes=_sha256([[s.fingerprint for s in sets], asdict(config)]),
        precision=precision,
    )


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
