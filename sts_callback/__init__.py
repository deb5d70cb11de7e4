"""Forecast which domains a fine-tune will move, then watch it happen: SAE-based transferability scores as a trainer callback.

Importing the package is cheap: torch, transformers and SAELens are loaded on first use of what needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sts_callback.callback import STSCallback as STSCallback
    from sts_callback.config import PolicyConfig as PolicyConfig
    from sts_callback.config import ProbeConfig as ProbeConfig
    from sts_callback.measure.monitor import Monitor as Monitor
    from sts_callback.policy import judge_drift as judge_drift
    from sts_callback.policy import judge_forecast as judge_forecast
    from sts_callback.report.card import add_to_card as add_to_card
    from sts_callback.training.arguments import STSArguments as STSArguments

__version__ = "0.1.0"

_HOME = {
    "STSCallback": "callback",
    "add_to_card": "report.card",
    "STSArguments": "training.arguments",
    "Monitor": "measure.monitor",
    "ProbeConfig": "config",
    "PolicyConfig": "config",
    "judge_forecast": "policy",
    "judge_drift": "policy",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        if name in ("STSCallback", "Monitor"):  # here, before imports fail for want of a newer version
            importlib.import_module("sts_callback.versions").require_versions()
        return getattr(importlib.import_module(f"sts_callback.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sts_callback' has no attribute {name!r}")
