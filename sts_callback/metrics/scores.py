"""Transferability scores: which features shift, and how much a domain uses them.

Functions take means over tokens (`metrics.sums.token_mean`) and return Python floats. Symbols are those of Zhang et al., ICLR
2026, arXiv 2603.02908, sections 3.2 and 4.1.
"""

from __future__ import annotations

import numpy as np
import torch

N_SETS = 30
"""Number of random sets for a null: it gives their mean to a fifth of their spread."""
_N_NEAREST = 20  # candidates to replace each feature of a set


def shifted_features(mean_shift: torch.Tensor, n_features: int) -> tuple[int, ...]:
    """Select the features with the largest mean squared shift: D_N.

    Args:
        mean_shift: mean over tokens of (activation with context - without)^2, or of squared drift, `(d_sae,)`.
        n_features: N. Features that do not shift are left out, so fewer may be returned.

    Returns:
        Feature indices, largest shift first.

    Source: arXiv 2603.02908, section 3.2.

    """
    values, features = torch.sort(mean_shift, descending=True, stable=True)
    return tuple(features[:n_features][values[:n_features] > 0].tolist())


def activity_score(mean_activity: torch.Tensor, features: tuple[int, ...]) -> float:
    """STS_act: mean activation of a domain summed over the shifted features.

    Args:
        mean_activity: mean activation of each feature over the domain's query tokens, `(d_sae,)`.
        features: D_N.

    Returns:
        At least 0 for non-negative activations, in units of activation; larger means more affected, without direction.

    Source: arXiv 2603.02908, section 4.1.

    """
    return float(mean_activity[list(features)].sum()) if len(mean_activity) else float("nan")


def shift_score(mean_shift: torch.Tensor, features: tuple[int, ...]) -> float:
    """STS_ICL: mean squared in-context shift of a domain summed over the shifted features.

    Args:
        mean_shift: mean squared shift that the domain's own demonstrations cause in its queries, `(d_sae,)`.
        features: D_N.

    Returns:
        At least 0, in squared units of activation; larger means more affected, without direction.

    Source: arXiv 2603.02908, section 4.1.

    """
    return float(mean_shift[list(features)].sum()) if len(mean_shift) else float("nan")


def shift_share(mean_shift: torch.Tensor, features: tuple[int, ...]) -> float:
    """The share of a shift that is on the shifted features.

    It is STS_rel for the shift that the domain's own demonstrations cause, and STS_cross for the shift that the training
    demonstrations cause.

    Args:
        mean_shift: `(d_sae,)`.
        features: D_N.

    Returns:
        In [0, 1]; NaN if nothing shifts.

    """
    total = float(mean_shift.sum())
    return shift_score(mean_shift, features) / total if total > 0 else float("nan")


def net_share(mean_shift: torch.Tensor, filler_shift: torch.Tensor, features: tuple[int, ...]) -> float:
    """STS_net: shift by training demonstrations less shift by plain prose, on the shifted features, over all of the former.

    Args:
        mean_shift: mean squared shift that the training demonstrations cause, `(d_sae,)`.
        filler_shift: mean squared shift that plain prose of equal length causes, `(d_sae,)`.
        features: D_N.

    Returns:
        At most 1; below 0 if plain prose shifts more; NaN if nothing shifts.

    """
    total = float(mean_shift.sum())
    return shift_score(mean_shift - filler_shift, features) / total if total > 0 else float("nan")


def n_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Number of features that two sets share."""
    return len(set(one) & set(other))


def matched_sets(activity: torch.Tensor, features: tuple[int, ...], *, n_sets: int = N_SETS, seed: int = 0) -> torch.Tensor:
    """Draw random sets of other features with similar activity.

    Each feature is replaced by one of those nearest to it in the order of activity. If the features are the most active of all,
    the sets consist of the next most active ones.

    Args:
        activity: mean activation of each feature, `(d_sae,)`.
        features: the set to match; at most half of all features.
        n_sets: number of sets.
        seed: seed of the draws.

    Returns:
        Feature indices, `(n_sets, len(features))`. None is in `features`, and none is twice in a set.

    """
    level = activity.double().numpy()
    others = np.setdiff1d(
        np.argsort(level, kind="stable"), features, assume_unique=True
    )  # keeps features in the order of activity
    generator = np.random.default_rng(seed)
    sets = np.empty((n_sets, len(features)), dtype=np.int64)
    for one in sets:
        left = others
        for place, feature in enumerate(features):
            nearest = np.searchsorted(level[left], level[feature]) - _N_NEAREST // 2
            start = int(np.clip(nearest, 0, max(0, len(left) - _N_NEAREST)))
            at = generator.integers(start, min(len(left), start + _N_NEAREST))
            one[place] = left[at]
            left = np.delete(left, at)
    return torch.from_numpy(sets)


def mean_over_sets(values: torch.Tensor, sets: torch.Tensor) -> float:
    """Sum a value over each random set and return the mean of the sums, in the value's unit.

    Args:
        values: one value per feature, `(d_sae,)`.
        sets: sets from `matched_sets`.

    """
    return float(values[sets].sum(dim=1).mean())
