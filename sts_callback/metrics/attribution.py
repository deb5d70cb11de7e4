"""Training rows by how far they activate what a domain activates, and which of them stand out."""

from __future__ import annotations

import torch
from scipy import stats

MANY_DEVIATIONS = 4.0
"""Our choice: of rows with normally distributed scores, one in 30,000 lies as far above the median."""
LEAST_SCORE = 0.1
"""A row stands out only if it departs from an average row in the domain's direction at all, however alike the others are: our
choice."""
LEAST_LIKENESS = 0.5
"""A row stands out only if it scores at least this share of what the domain's own texts do: a word of the domain's in a row of
another kind is not enough. Our choice."""


def roots(activity: torch.Tensor) -> torch.Tensor:
    """Square roots of activations, in float64; one below zero, which few kinds of SAE have, counts as none."""
    return activity.double().clamp_min(0).sqrt()


def contributions(mean_activity: torch.Tensor, domain_activity: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
    """What each feature adds to the score of each text.

    A score, the sum of a text's contributions, is the cosine between how the text and how the domain depart from an average
    row, in square roots of activations: so no few features that are strong everywhere decide.

    Args:
        mean_activity: mean activation of each feature over each text's own tokens, `(n_texts, n_features)`.
        domain_activity: the same over all tokens of the domain, `(n_features,)`.
        average: the mean over all training rows of the `roots` of theirs, `(n_features,)`.

    Returns:
        `(n_texts, n_features)`, float64, whose sums are in [-1, 1]: 1 as the domain, 0 as an average row. NaN if the domain does
        not depart from an average row.

    """
    texts, domain = (roots(activity) - average for activity in (mean_activity, domain_activity))
    lengths = texts.norm(dim=1, keepdim=True) * domain.norm()
    return texts * domain / torch.where((lengths == 0) & (domain.norm() > 0), 1.0, lengths)


def limit_of_scores(scores: torch.Tensor, own_score: float) -> float:
    """Above which score a row stands out.

    Args:
        scores: of all rows, `(n_rows,)`.
        own_score: what the domain's own texts have.

    Returns:
        The median plus `MANY_DEVIATIONS` median absolute deviations, each scaled to be the standard deviation of a normal
        distribution; at least `LEAST_SCORE`, and at least `LEAST_LIKENESS` of the domain's own score.

    Source: F. R. Hampel, The influence curve and its role in robust estimation, JASA 69, 1974.

    """
    deviation = float(stats.median_abs_deviation(scores.numpy(), scale="normal"))
    return max(float(scores.quantile(0.5)) + MANY_DEVIATIONS * deviation, LEAST_SCORE, LEAST_LIKENESS * own_score)
