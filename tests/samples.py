"""Records with plausible numbers, each open to change: what tests of policy, run log and terminal decide on.

Where a record has an estimate or a score, a plain number may be given: it is then known exactly, between the anchors 0 and 1.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, get_type_hints

from scipy import stats

from sts_callback.records import (
    DomainDrift,
    DomainForecast,
    DriftSnapshot,
    Estimate,
    Forecast,
    Identity,
    Record,
    Score,
    Verdict,
)
from sts_callback.records.rehearsal import Dose, Rehearsal

R = TypeVar("R", bound=Record)

IDENTITY = Identity("m" * 64, "tiny-llama", "s" * 64, "tiny-sae", "blocks.2.hook_resid_post", "p" * 64)


def estimate(value: float, low: float | None = None, high: float | None = None) -> Estimate:
    """A number, known exactly unless its interval is given."""
    return Estimate(value, value if low is None else low, value if high is None else high)


def score(value: float, low: float | None = None, high: float | None = None, *, random: float = 0.0, own: float = 1.0) -> Score:
    """The same between two anchors."""
    return Score(value, value if low is None else low, value if high is None else high, random, own)


def _made(kind: type[R], fields: dict[str, Any]) -> R:
    """A record, with numbers turned into what its fields hold."""
    makers = {Estimate: estimate, Score: score}
    kinds = get_type_hints(kind)
    plain = {n: v for n, v in fields.items() if kinds.get(n) in makers and isinstance(v, float | int)}
    return kind(**(fields | {name: makers[kinds[name]](value) for name, value in plain.items()}))


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
        "sts_cross": 0.25,
        "sts_net": 0.125,
        "rank": (1, 1),
        "p_above_next": 0.75,
        "relative_shift": 0.0625,
        "raw_shift": 0.03125,
        "raw_over_prose": 1.25,
        "sae_error_share": 0.25,
        "cosine": 0.5,
        "nll": 2.5,
        "nll_change": 0.0,
        "gradient_change": -0.25,
        "bits_change": 0.0,
        "accuracy": 0.5,
        "accuracy_change": 0.0,
    }
    return _made(DomainForecast, fields | changes)


def forecast(*domains: DomainForecast, train: DomainForecast | None = None, **changes: Any) -> Forecast:
    """A forecast of these domains."""
    fields: dict[str, Any] = {
        "identity": IDENTITY,
        "features": (7, 3, 11),
        "features_share": 0.5,
        "median_norm": 12.5,
        "fvu": 0.25,
        "checks": (),
        "noise_floor": 0.0,
        "train": train or domain_forecast("train", sts_net=1.0, rank=(0, 0), cosine=1.0, gradient_change=-1.0),
        "domains": {d.name: d for d in domains},
        "seconds": 1.5,
        "seconds_by_part": {"readings": 1.0, "scores": 0.25},
    }
    return Forecast(**(fields | changes))


def domain_drift(name: str = "law", **changes: Any) -> DomainDrift:
    """A domain that has not moved."""
    fields: dict[str, Any] = {
        "name": name,
        "n_queries": 8,
        "n_tokens": 200,
        "n_masked": 1,
        "relative_drift": 0.01,
        "raw_drift": 0.01,
        "sae_error_share": 0.25,
        "share_on_forecast": 0.75,
        "top_features": ((7, 0.5), (3, 0.25)),
        "sts_act": 3.0,
        "sts_icl": 0.5,
        "sts_rel": 0.25,
        "sts_cross": 0.125,
        "sts_net": 0.0625,
        "nll": 2.5,
        "nll_change": 0.0,
        "p_worse": 0.5,
        "query_changes": (0.25, -0.25),
        "query_answer_tokens": (20, 20),
        "bits_change": 0.0,
        "query_answer_bytes": (80, 80),
    }
    return _made(DomainDrift, fields | changes)


def answers(change: float, spread: float = 0.0, n_queries: int = 32, n_tokens: int = 4) -> dict[str, Any]:
    """What a check says of a domain's answers that have changed so, nats a token; half of them `spread` more and half less.

    The interval is Student's, which the bootstrap stands in for where answers differ in length.
    """
    signs = [1.0 if i % 2 else -1.0 for i in range(n_queries)]
    reach = float(stats.t.ppf(0.975, n_queries - 1)) * spread / math.sqrt(n_queries - 1)
    return {
        "n_queries": n_queries,
        "nll_change": estimate(change, change - reach, change + reach),
        "query_changes": tuple(n_tokens * (change + spread * sign) for sign in signs),
        "query_answer_tokens": (n_tokens,) * n_queries,
    }


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


def rehearsal(*checks: DriftSnapshot, **changes: Any) -> Rehearsal:
    """One whose first dose is at the run's own rate, any second one at 4 times that; each with its check."""
    multiples = (1.0, 4.0)
    fields: dict[str, Any] = {
        "doses": tuple(Dose(m, m * 1e-3, 5, check) for m, check in zip(multiples, checks, strict=False)),
        "steps_planned": 60,
        "rate_sum": 0.0625,
        "seconds": 12.5,
        "step_s": 0.25,
    }
    return Rehearsal(**(fields | changes))


GO = Verdict("go", (), {"law": "has not moved."}, 0)


EXAMINED = [
    "explained variance",
    "layer",
    "L0",
    "silent features",
    "trained on",
    "attention sinks",
    "noise floor",
    "alarm power",
    "cost",
    "processes",
]
"""Names of the checks of a whole examination, in their order."""


def timeless(record: Record) -> dict[str, Any]:
    """What a record holds, without what it took, which no two measurements share; NaN, which is not itself, as None."""
    return {name: value for name, value in record.to_dict().items() if name not in ("seconds", "seconds_by_part")}
