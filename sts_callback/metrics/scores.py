"""Transferability scores: which features shift, and how much of a domain lives on them.

All take means over tokens (`metrics.sums.token_mean`) and return Python floats. Symbols are those of Zhang et al., ICLR 2026,
arXiv 2603.02908, sections 3.2 and 4.1.
"""

from __future__ import annotations

import numpy as np
import torch

N_SETS = 30
"""Random sets behind a null: their mean is then known to a fifth of their spread."""
_N_NEAREST = 20  # candidates for each place in a set


def shifted_features(mean_shift: torch.Tensor, n_features: int) -> tuple[int, ...]:
    """The features with the largest mean squared shift: D_N.

    Args:
        mean_shift: mean over tokens of (activation with context - without)^2, or of drift, `(d_sae,)`.
        n_features: N. Features that do not shift at all are left out, so fewer may be returned.

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
    return float(mean_activity[list(features)].sum())


def shift_score(mean_shift: torch.Tensor, features: tuple[int, ...]) -> float:
    """STS_ICL: mean squared in-context shift of a domain summed over the shifted features.

    Args:
        mean_shift: mean squared shift that the domain's own demonstrations cause in its queries, `(d_sae,)`.
        features: D_N.

    Returns:
        At least 0, in squared units of activation; larger means more affected, without direction.

    Source: arXiv 2603.02908, section 4.1.

    """
    return float(mean_shift[list(features)].sum())


def shift_share(mean_shift: torch.Tensor, features: tuple[int, ...]) -> float:
    """The share of a shift that falls on the shifted features.

    STS_rel with the shift that the domain's own demonstrations cause; STS_cross with the one that the training data's cause.

    Args:
        mean_shift: `(d_sae,)`.
        features: D_N.

    Returns:
        In [0, 1]; NaN where nothing shifts.

    """
    total = float(mean_shift.sum())
    return shift_score(mean_shift, features) / total if total > 0 else float("nan")


def net_share(mean_shift: torch.Tensor, filler_shift: torch.Tensor, features: tuple[int, ...]) -> float:
    """STS_net: what the training demonstrations shift on the shifted features beyond plain prose, as a share of all they shift.

    Args:
        mean_shift: mean squared shift that the training demonstrations cause, `(d_sae,)`.
        filler_shift: the same by plain prose of equal length, `(d_sae,)`.
        features: D_N.

    Returns:
        At most 1, below 0 where plain prose shifts more; NaN where nothing shifts.

    """
    total = float(mean_shift.sum())
    return shift_score(mean_shift - filler_shift, features) / total if total > 0 else float("nan")


def n_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many features two sets share."""
    return len(set(one) & set(other))


def matched_sets(activity: torch.Tensor, features: tuple[int, ...], *, n_sets: int = N_SETS, seed: int = 0) -> torch.Tensor:
    """Draw sets of other features with like activity.

    In place of each feature stands one of those nearest to it in the order of activity. Where the features are the most active of
    all, the sets are made of the next most active.

    Args:
        activity: mean activation of each feature, `(d_sae,)`.
        features: the set that is to be matched; at most half of all.
        n_sets: how many.
        seed: of the draws.

    Returns:
        Feature indices, `(n_sets, len(features))`, none of them in `features`, none twice in a set.

    """
    level = activity.double().numpy()
    others = np.setdiff1d(np.argsort(level, kind="stable"), features, assume_unique=True)  # keeps the order of activity
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
    """Mean over random sets of the sum of a value over each, in the value's unit.

    Args:
        values: per feature, `(d_sae,)`.
        sets: from `matched_sets`.

    """
    return float(values[sets].sum(dim=1).mean())
