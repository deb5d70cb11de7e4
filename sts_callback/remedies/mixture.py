"""Find how much other data to mix into the training data so that protected domains keep their budgets.

A short run on each source alone measures its effect (`pilot_effects`). The effect of a mixture is extrapolated by weight, so all
mixtures can be searched at once. examples/validation/RESULTS.md says how far that holds in real training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linprog

from sts_callback.config import MAX_REPEATS, MAX_REPLAY, PolicyConfig, finite, require, require_protected, whole
from sts_callback.errors import ConfigError
from sts_callback.policy import judge_budget
from sts_callback.records import TRAIN, Estimate, Identity
from sts_callback.records.remedies import BudgetFinding, Mix, MixedDomain, MixPoint, SourceEffect, gravest
from sts_callback.runs.directory import run_directory_in

STEP = 0.05
"""Step of the training data's share from one mixture to the next."""


@dataclass(frozen=True)
class MixtureConstraints:
    """Constraints on a mixture."""

    rows: int | None = None
    """Total number of rows; by default that of the training data."""
    max_replay: float = MAX_REPLAY
    """Largest share of all other sources together."""
    max_repeats: float = MAX_REPEATS
    """How often a row may be repeated."""
    max_share: Mapping[str, float] = field(default_factory=dict)
    """Largest share of a source, by its name."""

    def __post_init__(self) -> None:
        """Refuse constraints that no mixture meets."""
        for name, value in {"max_replay": self.max_replay, **{f"max_share {n}": v for n, v in self.max_share.items()}}.items():
            allowed = "above 0, up to 1"
            require(0 < finite(value, name, allowed) <= 1, name, value, allowed)
        require(finite(self.max_repeats, "max_repeats", "1 or more") >= 1, "max_repeats", self.max_repeats, "1 or more")
        if self.rows is not None:
            whole(self.rows, "rows", "1 or more", least=1)

    def weights(self, n_rows: Mapping[str, int]) -> dict[str, float]:
        """Compute the largest weight of each source, from its share and from how often its rows may be repeated.

        Args:
            n_rows: number of rows of each source, including the training data.

        Raises:
            ConfigError: if a cap names no source, or the training data have too few rows.

        """
        replay = sorted(n_rows.keys() - {TRAIN})
        if unknown := self.max_share.keys() - set(replay):
            raise ConfigError(f"max_share: got {sorted(unknown)}; allowed are {replay}.")
        rows = self.rows or n_rows[TRAIN]
        if rows > self.max_repeats * n_rows[TRAIN]:
            raise ConfigError(
                f"rows: got {rows}; allowed are up to {math.floor(self.max_repeats * n_rows[TRAIN])}, the training data "
                f"{self.max_repeats:g} times over. Give fewer, or raise max_repeats."
            )
        return {name: min(self.max_share.get(name, 1.0), self.max_repeats * n / rows) for name, n in n_rows.items()}


def require_sources(replay: Mapping[str, Any], policy: PolicyConfig) -> None:
    """Refuse a search without sources or protected domains.

    Args:
        replay: the sources that may be mixed in, by name.
        policy: the budgets to keep.

    Raises:
        ConfigError: if nothing is protected or may be mixed in, a name is taken, or a budget is not in nats a token.

    """
    require_protected(policy.budgets)
    for name, budget in policy.limits.items():
        allowed = "a number of nats a token: what is extrapolated to mixtures is the NLL by tokens alone"
        require(budget.unit == "nats/token", f"protect[{name!r}]", budget.plain, allowed)
    if not replay or TRAIN in replay:
        raise ConfigError(f"replay: got {sorted(replay)}; give at least one source, and none by the name of {TRAIN!r}.")


def pilot_effects(
    pilots: Mapping[str, str | Path], n_rows: Mapping[str, int], policy: PolicyConfig
) -> tuple[Identity, dict[str, SourceEffect]]:
    """Read the effects of short runs on one source each, from their last drift checks.

    Args:
        pilots: the `output_dir` of each source's run with a callback.
        n_rows: number of rows of each source, the training data first.
        policy: the budgets to keep.

    Returns:
        The identity of the measurements, and the effect of each source.

    Raises:
        ConfigError: if a source has no run or a run no check, they differ in model, SAE or steps, or one did not watch a
            protected domain.

    """
    if pilots.keys() != n_rows.keys():
        raise ConfigError(f"pilot: got {sorted(pilots)}; give one for each source, {sorted(n_rows)}.")
    effects, made_with, steps = {}, {}, {}
    for name, n in n_rows.items():
        log = run_directory_in(Path(pilots[name]))
        logged = log.read_all()
        if logged.forecast is None or not logged.checks:
            raise ConfigError(f"pilot {name}: {log.folder} holds no drift check; give the output_dir of a run with STSCallback.")
        check = logged.checks[-1].snapshot
        if missing := policy.budgets.keys() - check.domains.keys():
            raise ConfigError(f"pilot {name}: {log.folder} did not watch {sorted(missing)}; it watched {sorted(check.domains)}.")
        made_with[name], steps[name] = logged.forecast.identity, check.step
        domains = [check.domains[domain] for domain in policy.budgets]
        effects[name] = SourceEffect(n, {d.name: d.nll_change for d in domains}, {d.name: d.sae_error_share for d in domains})
    if len(set(steps.values())) > 1:
        raise ConfigError(f"pilot: last checks are of steps {steps}; they must be of the same step.")
    first = made_with[TRAIN]
    for name, identity in made_with.items():
        if (identity.model, identity.sae, identity.hook_name) != (first.model, first.sae, first.hook_name):
            raise ConfigError(
                f"pilot {name}: its model, SAE or layer is not that of {TRAIN}; only runs with the same can be compared."
            )
    return first, effects


def search(effects: Mapping[str, SourceEffect], policy: PolicyConfig, constraints: MixtureConstraints) -> tuple[MixPoint, ...]:
    """Find the best mixture for each share of the training data that the constraints allow.

    Args:
        effects: effect of each source, the training data first.
        policy: budgets and thresholds.
        constraints: constraints on a mixture.

    """
    sources, names = list(effects), list(policy.budgets)
    high = constraints.weights({name: effect.n_rows for name, effect in effects.items()})
    rows = constraints.rows or effects[TRAIN].n_rows
    change = np.array([[effect.nll_change[d].high for d in names] for effect in effects.values()])
    budgets = np.array([budget.value for budget in policy.limits.values()])
    steering = np.flatnonzero(np.isfinite(change).all(axis=0))  # what cannot be told is judged but does not steer
    if not len(steering):
        return (_point(effects, {source: float(source == TRAIN) for source in sources}, policy, rows),)
    points = []
    for replay in np.arange(0, constraints.max_replay + STEP / 2, STEP):
        low, most = np.zeros(len(sources)), np.array([high[s] for s in sources])
        low[0] = most[0] = 1 - replay
        weights = best_weights(change[:, steering], budgets[steering], low, most)
        if weights is None:
            break
        points.append(_point(effects, dict(zip(sources, weights.tolist(), strict=True)), policy, rows))
    return tuple(points)


def _point(effects: Mapping[str, SourceEffect], weights: Mapping[str, float], policy: PolicyConfig, rows: int) -> MixPoint:
    used = {source: weight for source, weight in weights.items() if weight > 0}
    domains = {}
    for name, budget in policy.limits.items():
        changes = {source: effects[source].nll_change[name] for source in used}
        change = Estimate(
            *(sum(weight * getattr(changes[source], end) for source, weight in used.items()) for end in ("value", "low", "high"))
        )
        finding = _finding([effects[source] for source in used], name, change, policy)
        domains[name] = MixedDomain(name, change, budget.value, finding)
    counts = apportioned(np.array(list(weights.values())), rows)
    worst = gravest(domain.finding for domain in domains.values())
    return MixPoint(dict(weights), dict(zip(weights, counts, strict=True)), worst, domains)


def _finding(used: list[SourceEffect], name: str, change: Estimate, policy: PolicyConfig) -> BudgetFinding:
    finding = judge_budget(change, policy.limits[name])
    uncovered = any(effect.sae_error_share[name] > policy.max_unseen for effect in used)
    return "cannot tell" if finding == "within" and uncovered else finding


def plan(found: Mix, point: MixPoint, files: Mapping[str, str], seed: int) -> str:
    """Convert a mixture to JSON for `datasets.interleave_datasets`.

    Args:
        found: the search that the mixture comes from.
        point: the mixture.
        files: file of each source.
        seed: seed of the interleaving.

    Returns:
        JSON. Load its `files` in their order, interleave them with `interleave_datasets` as keywords, and cut to `rows`.

    """
    used = [name for name, n in point.rows.items() if n]
    total = sum(point.rows.values())
    content: dict[str, Any] = {
        "files": [files[name] for name in used],
        "interleave_datasets": {
            "probabilities": [point.rows[name] / total for name in used],
            "seed": seed,
            "stopping_strategy": "all_exhausted",
        },
        "rows": total,
        "rows_by_source": {name: point.rows[name] for name in used},
        "finding": point.finding,
        "extrapolated": {name: domain.to_dict() for name, domain in point.domains.items()},
        "measured": {source: effect.to_dict() for source, effect in found.sources.items()},
        "meaning": found.meaning,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def best_weights(change: np.ndarray, budgets: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """Find the mixture whose worst domain has the most of its budget left.

    A linear programme: minimise t over weights w, with `w @ change - t <= budgets`, `sum(w) = 1` and `low <= w <= high`.

    Args:
        change: change in each domain by training on each source alone, `(n_sources, n_domains)`. A mixture has the weighted mean.
        budgets: largest change of each domain, in the same unit, `(n_domains,)`.
        low: smallest weight of each source, `(n_sources,)`, in [0, 1].
        high: largest weight, `(n_sources,)`, in [0, 1].

    Returns:
        Weights, `(n_sources,)`, that sum to 1. None if no weights are allowed.

    """
    n_sources, n_domains = change.shape
    found = linprog(
        [*[0.0] * n_sources, 1.0],
        A_ub=np.column_stack([change.T, np.full(n_domains, -1.0)]),
        b_ub=budgets,
        A_eq=[[*[1.0] * n_sources, 0.0]],
        b_eq=[1.0],
        bounds=[*zip(low, high, strict=True), (None, None)],
    )
    return None if found.x is None else np.clip(found.x[:-1], low, high)


def apportioned(weights: np.ndarray, n: int) -> list[int]:
    """Split rows in proportion to weights. Shares are rounded down; the rest goes to the largest remainders (Hamilton's method).

    Args:
        weights: weights, at least 0, not all 0, `(n_sources,)`.
        n: total number of rows.

    """
    exact = n * weights / weights.sum()
    rows = np.floor(exact + 1e-9).astype(int)  # rounding may put a whole number of rows just below it
    rows[np.argsort(rows - exact, kind="stable")[: n - rows.sum()]] += 1
    return [int(count) for count in rows]
