"""What a score would be without content: feature sets drawn at random, equal in size and like in activity."""

from __future__ import annotations

import numpy as np
import torch

N_SETS = 30
"""Random sets behind a null: their mean is then known to a fifth of their spread."""
_N_NEAREST = 20  # candidates for each place in a set


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
