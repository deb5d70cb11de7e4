"""How much of other data to mix into the training data, so that protected domains keep their budgets.

Each source is measured once, by a forecast of its own. What a mixture would do is extrapolated from these by weight, so that all
mixtures can be searched at once. How far that holds in real training is in examples/validation/RESULTS.md.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sts_callback.config import MAX_REPEATS, MAX_REPLAY, PolicyConfig, ProbeConfig
from sts_callback.domains.reader import Row, Source, read_rows
from sts_callback.errors import ConfigError
from sts_callback.metrics.mixing import apportioned, best_weights
from sts_callback.model.encoder import SaeSource
from sts_callback.monitor import TRAIN, Monitor
from sts_callback.policy import cannot_read, judge_budget
from sts_callback.records import Estimate, Forecast
from sts_callback.remedies import BudgetFinding, Mix, MixedDomain, MixPoint, gravest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

STEP = 0.05
"""Of the share of the training data, from mixture to mixture."""


@dataclass(frozen=True)
class Caps:
    """What a mixture may be made of."""

    rows: int | None = None
    """Rows in all; by default as many as the training data has."""
    max_replay: float = MAX_REPLAY
    """Largest share of all sources but the training data together."""
    max_repeats: float = MAX_REPEATS
    """How often a row may come."""
    max_share: Mapping[str, float] = field(default_factory=dict)
    """Largest share of single sources."""

    def __post_init__(self) -> None:
        """Refuse what allows nothing."""
        for name, value in {"max_replay": self.max_replay, **{f"max_share {n}": v for n, v in self.max_share.items()}}.items():
            if not 0 < value <= 1:
                raise ConfigError(f"{name}: got {value}; allowed is above 0, up to 1.")
        if not self.max_repeats >= 1:
            raise ConfigError(f"max_repeats: got {self.max_repeats}; allowed is 1 or more.")
        if self.rows is not None and self.rows < 1:
            raise ConfigError(f"rows: got {self.rows}; allowed is 1 or more.")


def mix(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sae: SaeSource,
    train_data: Source,
    replay: Mapping[str, Source],
    domains: Mapping[str, Source],
    policy: PolicyConfig,
    caps: Caps | None = None,
    config: ProbeConfig | None = None,
    progress: bool = True,
) -> Mix:
    """Forecast each source alone, then search the mixtures.

    Args:
        model: a decoder-only transformers model, wrapped or not.
        tokenizer: its tokenizer; not altered.
        sae: see `model.encoder.SaeSource`.
        train_data: answered training examples, see `domains.reader`.
        replay: name to source of what may be mixed in.
        domains: name to source; only protected ones are measured. Of rows that a source has too, half are asked and half teach.
        policy: whose budgets are to be kept.
        caps: what a mixture may be made of.
        config: numbers, limits and seed.
        progress: whether to show progress bars.

    Raises:
        ConfigError: if nothing is protected or may be mixed in, a name is taken twice, or a cap names no source.
        DataError, SaeError, ModelError, CannotTell: as for a forecast.

    """
    started, caps = time.monotonic(), caps or Caps()
    if not policy.budgets:
        raise ConfigError("protect: got none; name at least one domain that must not suffer.")
    if not replay or TRAIN in replay:
        raise ConfigError(f"replay: got {sorted(replay)}; give at least one source, and none by the name of {TRAIN!r}.")
    if unknown := caps.max_share.keys() - replay.keys():
        raise ConfigError(f"max_share: got {sorted(unknown)}; allowed are {sorted(replay)}.")
    rows = {TRAIN: read_rows(train_data, "train_data"), **{n: read_rows(s, f"replay[{n!r}]") for n, s in replay.items()}}
    n_rows = {name: len(own) for name, own in rows.items()}
    high = _highest(caps, n_rows)
    protected = {name: read_rows(domains[name], f"domains[{name!r}]") for name in policy.budgets}
    teaching, asking = _apart(rows, protected)
    forecasts = {
        name: Monitor(model, tokenizer, sae=sae, train_data=own, domains=asking, config=config, progress=progress).forecast()
        for name, own in teaching.items()
    }
    points = search(forecasts, policy, caps.rows or n_rows[TRAIN], caps.max_replay, high)
    return Mix(forecasts, n_rows, points, time.monotonic() - started)


def _apart(
    sources: Mapping[str, Sequence[Row]], domains: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, Sequence[Row]], dict[str, Sequence[Row]]]:
    """Rows to teach with and rows to ask: of those in both, every other one is asked and taught by no source."""
    sourced = {_key(row) for rows in sources.values() for row in rows}
    asked: set[str] = set()
    asking: dict[str, Sequence[Row]] = {}
    for name, rows in domains.items():
        shared = [key for key in map(_key, rows) if key in sourced]
        asked |= set(shared[::2])
        teaching = set(shared[1::2])
        asking[name] = [row for row in rows if _key(row) not in teaching]
    return {name: [row for row in rows if _key(row) not in asked] for name, rows in sources.items()}, asking


def _key(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _highest(caps: Caps, n_rows: Mapping[str, int]) -> dict[str, float]:
    """Largest weight of each source: by its share, and by how often its rows may come."""
    rows = caps.rows or n_rows[TRAIN]
    if rows > caps.max_repeats * n_rows[TRAIN]:
        raise ConfigError(
            f"rows: got {rows}; allowed are up to {math.floor(caps.max_repeats * n_rows[TRAIN])}, the training data "
            f"{caps.max_repeats:g} times over. Give fewer, or raise max_repeats."
        )
    return {name: min(caps.max_share.get(name, 1.0), caps.max_repeats * n / rows) for name, n in n_rows.items()}


def search(
    forecasts: Mapping[str, Forecast], policy: PolicyConfig, rows: int, max_replay: float, high: Mapping[str, float]
) -> tuple[MixPoint, ...]:
    """The best mixture for each share of the training data, as far down as the caps allow.

    Args:
        forecasts: of each source, the training data first.
        policy: budgets and thresholds.
        rows: of a mixture.
        max_replay: largest share of what is no training data.
        high: largest weight of each source.

    """
    sources, names = list(forecasts), list(policy.budgets)
    change = np.array([[forecasts[s].domains[d].nll_change.high for d in names] for s in sources])
    budgets = np.array([policy.budgets[d] for d in names])
    steering = np.flatnonzero(np.isfinite(change).all(axis=0))  # what cannot be read is judged but does not steer
    if not len(steering):
        return (_point(forecasts, {source: float(source == sources[0]) for source in sources}, policy, rows),)
    points = []
    for replay in np.arange(0, max_replay + STEP / 2, STEP):
        low, most = np.zeros(len(sources)), np.array([high[s] for s in sources])
        low[0] = most[0] = 1 - replay
        weights = best_weights(change[:, steering], budgets[steering], low, most)
        if weights is None:
            break
        points.append(_point(forecasts, dict(zip(sources, weights.tolist(), strict=True)), policy, rows))
    return tuple(points)


def _point(forecasts: Mapping[str, Forecast], weights: Mapping[str, float], policy: PolicyConfig, rows: int) -> MixPoint:
    used = {source: weight for source, weight in weights.items() if weight > 0}
    domains = {}
    for name, budget in policy.budgets.items():
        changes = {source: forecasts[source].domains[name].nll_change for source in used}
        change = Estimate(
            *(sum(weight * getattr(changes[source], end) for source, weight in used.items()) for end in ("value", "low", "high"))
        )
        finding = _finding({source: forecasts[source] for source in used}, name, change, policy)
        domains[name] = MixedDomain(name, change, budget, finding)
    counts = apportioned(np.array(list(weights.values())), rows)
    finding = gravest(domain.finding for domain in domains.values())
    return MixPoint(dict(weights), dict(zip(weights, counts, strict=True)), finding, domains)


def _finding(used: Mapping[str, Forecast], name: str, change: Estimate, policy: PolicyConfig) -> BudgetFinding:
    if any(cannot_read(forecast, name, policy) for forecast in used.values()):
        return "cannot tell"
    finding = judge_budget(change, policy.budgets[name])
    unseen = any(forecast.domains[name].unseen > policy.max_unseen for forecast in used.values())
    return "cannot tell" if finding == "within" and unseen else finding


def plan(found: Mix, point: MixPoint, files: Mapping[str, str], seed: int) -> str:
    """A mixture as JSON, which `datasets.interleave_datasets` takes.

    Args:
        found: what it was chosen from.
        point: the mixture.
        files: where each source is.
        seed: of the interleaving.

    Returns:
        JSON whose `files` are to be loaded in their order, interleaved with `interleave_datasets` as keywords, and cut to `rows`.

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
        "measured": {
            source: {name: domain.nll_change.to_dict() for name, domain in forecast.domains.items()}
            for source, forecast in found.forecasts.items()
        },
        "meaning": found.meaning,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
