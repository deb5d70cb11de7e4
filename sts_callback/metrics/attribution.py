"""Score training rows by how much they activate the features of a domain, and find those that stand out."""

from __future__ import annotations

import math

import torch
from scipy import stats

MANY_DEVIATIONS = 4.0
"""Our choice: if scores are normally distributed, one row in 30,000 is as far above the median."""
LEAST_SCORE = 0.1
"""A row stands out only if it differs clearly from an average row in the domain's direction, however similar the others are. Our
choice."""
LEAST_LIKENESS = 0.5
"""A row stands out only if its score is at least this share of that of the domain's own texts: one word from the domain in a row
of another kind is not enough. Our choice."""

FEWEST_ROWS = 10
"""The fewest rows of a training source whose mean score is told. Our choice: below, the interval is wider than what differs."""

_ROUNDING = 1e-5  # of the average row's length: what float32 sums differ by if they are added up in another order


def roots(activity: torch.Tensor) -> torch.Tensor:
    """Square roots of activations, in float64. Negative activations, which few kinds of SAE have, count as 0."""
    return activity.double().clamp_min(0).sqrt()


def contributions(mean_activity: torch.Tensor, domain_activity: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
    """Compute what each feature adds to the score of each text.

    The score of a text is the sum of its contributions. It is the cosine between two differences from an average row, that of the
    text and that of the domain. Square roots of activations keep a few strong features from deciding alone.

    Args:
        mean_activity: mean activation of each feature over each text's own tokens, `(n_texts, n_features)`.
        domain_activity: mean activation of each feature over all tokens of the domain, `(n_features,)`.
        average: mean of `roots` over all training rows, `(n_features,)`.

    Returns:
        `(n_texts, n_features)`, float64. Sums over features are in [-1, 1]: 1 is like the domain, 0 like an average row. NaN if
        the domain does not differ from an average row.

    """
    texts, domain = (_beyond_rounding(roots(activity) - average, average) for activity in (mean_activity, domain_activity))
    lengths = texts.norm(dim=1, keepdim=True) * domain.norm()
    return texts * domain / torch.where((lengths == 0) & (domain.norm() > 0), 1.0, lengths)


def _beyond_rounding(difference: torch.Tensor, average: torch.Tensor) -> torch.Tensor:
    """A difference from the average, exactly 0 where it may be one of rounding."""
    differs = difference.norm(dim=-1, keepdim=True) > _ROUNDING * average.norm()
    return torch.where(differs, difference, 0.0)


def mean_and_interval(scores: torch.Tensor) -> tuple[float, float, float]:
    """Compute the mean of some rows' scores and its 95 % interval by Student's t, `(mean, low, high)`.

    Args:
        scores: of the rows, `(n_rows,)`.

    Returns:
        NaN for fewer rows than `FEWEST_ROWS`.

    """
    if len(scores) < FEWEST_ROWS:
        return math.nan, math.nan, math.nan
    mean = float(scores.mean())
    half = float(stats.t.ppf(0.975, len(scores) - 1) * scores.std() / math.sqrt(len(scores)))
    return mean, mean - half, mean + half


def limit_of_scores(scores: torch.Tensor, own_score: float) -> float:
    """Compute the score above which a row stands out.

    Args:
        scores: scores of all rows, `(n_rows,)`.
        own_score: score of the domain's own texts.

    Returns:
        The median plus `MANY_DEVIATIONS` median absolute deviations, scaled to the standard deviation of a normal
        distribution; at least `LEAST_SCORE`, and at least `LEAST_LIKENESS` of the domain's own score.

    Source: F. R. Hampel, The influence curve and its role in robust estimation, JASA 69, 1974.

    """
    deviation = float(stats.median_abs_deviation(scores.numpy(), scale="normal"))
    return max(float(scores.quantile(0.5)) + MANY_DEVIATIONS * deviation, LEAST_SCORE, LEAST_LIKENESS * own_score)
