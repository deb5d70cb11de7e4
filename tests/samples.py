"""Records with plausible numbers, each open to change: what tests of policy, run log and terminal decide on."""

from __future__ import annotations

from typing import Any

from sts_callback.records import DomainDrift, DomainForecast, DriftSnapshot, Forecast, Identity, Verdict

IDENTITY = Identity("m" * 64, "tiny-llama", "s" * 64, "tiny-sae", "blocks.2.hook_resid_post", "p" * 64)


def domain_forecast(name: str = "law", **changes: Any) -> DomainForecast:
    """A domain that is expected to stay as it is."""
    fields: dict[str, Any] = {
        "name": name,
        "n_queries": 8,
        "n_tokens": 200,
        "n_masked": 2,
        "n_cut": 0,
        "n_answer_tokens": 80,
        "sts_act": 3.25,
        "sts_icl": 0.5,
        "sts_rel": 0.25,
        "sts_cross": 0.125,
        "relative_shift": 0.0625,
        "nll": 2.5,
        "nll_change": 0.0,
        "nll_change_se": 0.01,
    }
    return DomainForecast(**(fields | changes))


def forecast(*domains: DomainForecast, train: DomainForecast | None = None, **changes: Any) -> Forecast:
    """A forecast of these domains; the training data's own STS_cross is 0.5."""
    fields: dict[str, Any] = {
        "identity": IDENTITY,
        "features": (7, 3, 11),
        "features_share": 0.5,
        "median_norm": 12.5,
        "unexplained": 0.25,
        "train": train or domain_forecast("train", sts_cross=0.5),
        "domains": {d.name: d for d in domains},
        "seconds": 1.5,
    }
    return Forecast(**(fields | changes))


def domain_drift(name: str = "law", **changes: Any) -> DomainDrift:
    """A domain that has not moved."""
    fields: dict[str, Any] = {
        "name": name,
        "n_tokens": 200,
        "n_masked": 1,
        "relative_drift": 0.01,
        "share_on_forecast": 0.75,
        "top_features": ((7, 0.5), (3, 0.25)),
        "sts_act": 3.0,
        "sts_icl": 0.5,
        "sts_rel": 0.25,
        "sts_cross": 0.125,
        "nll": 2.5,
        "nll_change": 0.0,
        "nll_change_se": 0.01,
    }
    return DomainDrift(**(fields | changes))


def snapshot(step: int, *domains: DomainDrift, **changes: Any) -> DriftSnapshot:
    """A drift check of these domains."""
    fields: dict[str, Any] = {
        "step": step,
        "realised_features": (7, 4, 11),
        "n_shared": 2,
        "train": domain_drift("train", relative_drift=0.3),
        "domains": {d.name: d for d in domains},
        "seconds": 2.5,
    }
    return DriftSnapshot(**(fields | changes))


GO = Verdict("go", (), {"law": "has not moved."}, 0)
