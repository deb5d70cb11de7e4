"""Training rows by how strongly they fire given features, and which of them stand out."""

from __future__ import annotations

import torch
from scipy import stats

MANY_DEVIATIONS = 4.0
"""Our choice: of rows with normally distributed scores, one in 30,000 lies as far above the median."""
LEAST_SCORE = 1.5
"""A row stands out only if it fires at least half as much again as an average one, however alike the others are: our choice."""
LEAST_LIKENESS = 0.5
"""A row stands out only if it fires at least this share of what the domain's own texts do. Where a feature is rare among the
rows, a single word makes many times the average, which is no row of the domain's kind. Our choice."""


def contributions(mean_activity: torch.Tensor, average: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What each feature adds to the score of each text.

    A score, the sum of a text's contributions, is the weighted mean over features of its activation as a multiple of an average
    row's; the mean of all rows' scores is 1. Features that no row fires say nothing, and the others' weights fill their place.

    Args:
        mean_activity: mean activation of each feature over each text's own tokens, `(n_texts, n_features)`.
        average: the mean of that over all training rows, `(n_features,)`.
        weights: of each feature, at least 0, `(n_features,)`.

    Returns:
        `(n_texts, n_features)`, float64, at least 0; NaN if no feature with a weight fires.

    """
    heard = torch.where(average > 0, weights.double(), 0.0)
    return heard / heard.sum() * mean_activity.double() / torch.where(average > 0, average.double(), 1.0)


def limit_of_scores(scores: torch.Tensor, domain_score: float) -> float:
    """Above which score a row stands out.

    Args:
        scores: of all rows, `(n_rows,)`.
        domain_score: what the domain's own texts would have.

    Returns:
        The median plus `MANY_DEVIATIONS` median absolute deviations, each scaled to be the standard deviation of a normal
        distribution; at least `LEAST_SCORE`, and at least `LEAST_LIKENESS` of the domain's score.

    Source: F. R. Hampel, The influence curve and its role in robust estimation, JASA 69, 1974.

    """
    deviation = float(stats.median_abs_deviation(scores.numpy(), scale="normal"))
    return max(float(scores.quantile(0.5)) + MANY_DEVIATIONS * deviation, LEAST_SCORE, LEAST_LIKENESS * domain_score)
