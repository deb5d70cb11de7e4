"""Fine-tunes on mixtures of rows: which there are, and how far they do what their sources do alone. No model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sts_callback.records import DomainForecast
from sts_callback.remedies.mixture import apportioned


@dataclass(frozen=True)
class Mixture:
    """One fine-tune on rows of several sources."""

    name: str
    setting: str
    seed: int
    rows: Mapping[str, int]
    """Of each source."""

    @property
    def run(self) -> str:
        """Its name among all."""
        return f"{self.name}/{self.setting}/{self.seed}"


def planned(settings: Mapping[str, Any], forecasts: Mapping[str, Any]) -> list[Mixture]:
    """All mixtures.

    Args:
        settings: settings.yaml.
        forecasts: lines of `forecasts.jsonl`, by fine-tune.

    """
    wanted, total = settings["mixtures"], settings["training"]["steps"] * settings["training"]["rows"]
    halves = [
        Mixture("+".join(pair), setting, 0, dict(zip(pair, apportioned(np.ones(2), total), strict=True)))
        for setting in ("harsh", "gentle")
        for pair in wanted["halves"]
    ]
    replay = wanted["replay"]
    n_replay = round(replay["share"] * total)
    found, domains = forecasts[replay["base"]]["domains"], replay["domains"]
    order = sorted(domains, key=lambda name: -_transfer(found[name]))
    splits = {"even": domains, "most expected": order[: len(order) // 2], "least expected": order[len(order) // 2 :]}
    return halves + [
        Mixture(
            f"{replay['base']} and replay, {split}",
            replay["setting"],
            seed,
            {
                replay["base"]: total - n_replay,
                **dict(zip(some, apportioned(np.ones(len(some)), n_replay), strict=True)),
            },
        )
        for seed in replay["seeds"]
        for split, some in splits.items()
    ]


def _transfer(domain: Mapping[str, Any]) -> float:
    return DomainForecast.from_dict(domain).sts_cross.normalised.value


def additivity(mixed: np.ndarray, alone: np.ndarray) -> dict[str, float]:
    """How far what a mixture did is the mean of what its sources did alone.

    Args:
        mixed: change of each domain, `(n_domains,)`.
        alone: of each source's own run, `(n_sources, n_domains)`; in equal parts.

    Returns:
        Pearson's r of the mean with what was measured, the typical (median) miss of that mean, and beside it that of the best
        single source's change.

    """
    mean = alone.mean(axis=0)
    return {
        "r": float(np.corrcoef(mean, mixed)[0, 1]),
        "miss": float(np.median(np.abs(mean - mixed))),
        "miss of one source": float(min(np.median(np.abs(one - mixed)) for one in alone)),
    }
