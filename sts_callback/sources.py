"""What training data of several sources does to protected domains, each alone, by examples in context: before any training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.domains.reader import Row
from sts_callback.model.encoder import SaeSource
from sts_callback.monitor import Monitor
from sts_callback.policy import cannot_read
from sts_callback.records import Forecast, Identity
from sts_callback.remedies import SourceEffect

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def context_effects(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sae: SaeSource,
    sources: Mapping[str, Sequence[Row]],
    domains: Mapping[str, Sequence[Row]],
    policy: PolicyConfig,
    config: ProbeConfig | None = None,
    progress: bool = True,
) -> tuple[Identity, dict[str, SourceEffect]]:
    """Forecast each source by itself.

    Args:
        model: a decoder-only transformers model, wrapped or not.
        tokenizer: its tokenizer; not altered.
        sae: see `model.encoder.SaeSource`.
        sources: name to answered training examples, the training data first.
        domains: name to rows of the protected domains. Of rows that a source has too, half are asked and half teach.
        policy: whose thresholds say what can be read.
        config: numbers, limits and seed.
        progress: whether to show progress bars.

    Returns:
        What the first forecast was made with, and the effect of each source.

    Raises:
        DataError, SaeError, ModelError, CannotTell: as for a forecast.

    """
    teaching, asking = _apart(sources, domains)
    forecasts = {
        name: Monitor(model, tokenizer, sae=sae, train_data=rows, domains=asking, config=config, progress=progress).forecast()
        for name, rows in teaching.items()
    }
    effects = {name: _effect(forecast, len(sources[name]), policy) for name, forecast in forecasts.items()}
    return next(iter(forecasts.values())).identity, effects


def _effect(forecast: Forecast, n_rows: int, policy: PolicyConfig) -> SourceEffect:
    domains, doubts = forecast.domains, {name: cannot_read(forecast, name, policy) for name in forecast.domains}
    return SourceEffect(
        n_rows,
        {name: domain.nll_change for name, domain in domains.items()},
        {name: domain.unseen for name, domain in domains.items()},
        {name: doubt for name, doubt in doubts.items() if doubt},
    )


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
