"""How sure a number is: bootstrap over queries and draws of demonstrations, and the t test of an alarm.

Tokens of one text are not independent, and neither are queries that saw the same demonstrations. What is resampled is therefore
whole groups: the queries of one draw where demonstrations matter, single queries where they do not.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy import stats

from sts_callback.metrics.sums import token_mean

N_RESAMPLES = 2000
"""Bootstrap resamples; the Monte Carlo error of a standard error is then about 2 %."""
LEVEL = 0.95
"""Coverage that intervals aim at."""


def resampled_ratios(
    numerator: torch.Tensor, denominator: torch.Tensor, group: torch.Tensor, *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> torch.Tensor:
    """Bootstrap a ratio of sums over queries.

    Groups are resampled with replacement, one fewer than there are, which makes the variance unbiased also for few groups.
    With one seed, the same groups are taken for every domain, so that resamples of two domains can be compared pair by pair.

    Args:
        numerator: sums per query, `(n_queries,)`.
        denominator: the same, of what is divided by.
        group: the group of each query, `(n_queries,)`, from 0.
        n_resamples: how many.
        seed: of the draws.

    Returns:
        `(n_resamples,)`, float64; NaN with fewer than two groups.

    Source: J. N. K. Rao and C. F. J. Wu, Resampling inference with complex survey data, JASA 83, 1988.

    """
    n_groups = int(group.max()) + 1
    if n_groups < 2:
        return torch.full((n_resamples,), math.nan, dtype=torch.float64)
    counts = np.random.default_rng(seed).multinomial(n_groups - 1, np.full(n_groups, 1 / n_groups), size=n_resamples)
    weights = torch.from_numpy(counts).double()
    above, below = (torch.zeros(n_groups, dtype=torch.float64).index_add_(0, group, x.double()) for x in (numerator, denominator))
    return (weights @ above) / (weights @ below)


def interval(value: float, resamples: torch.Tensor, n_groups: int) -> tuple[float, float]:
    """Confidence interval: the bootstrap's standard error with Student's quantile, as few groups demand.

    Args:
        value: the estimate itself.
        resamples: from `resampled_ratios`.
        n_groups: independent groups behind it.

    Returns:
        Both ends; NaN with fewer than two groups.

    """
    if n_groups < 2:
        return math.nan, math.nan
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n_groups - 1)) * float(resamples.std())
    return value - reach, value + reach


def p_above(change: Sequence[float], weight: Sequence[float], threshold: float) -> float:
    """One-sided p-value that a change, by weight, lies above a threshold: Student's t over queries.

    Args:
        change: after minus before, per query, `(n_queries,)`, in nats, bits or points.
        weight: what it is divided by, tokens or bytes of each query's answer, `(n_queries,)`.
        threshold: of the sum of the changes over that of the weights.

    Returns:
        In [0, 1], low where the change is above. Where all queries lie above or below by the same, 0 or 1. NaN with fewer than
        two queries or a number that is not finite.

    Source: Student, The Probable Error of a Mean, Biometrika 6, 1908, of `change - threshold * weight`, whose mean is above 0
    exactly where the ratio of sums is above the threshold; computed by `scipy.stats.ttest_1samp`.

    """
    changed, n = np.asarray(change, dtype=float), np.asarray(weight, dtype=float)
    excess = changed - threshold * n
    if len(excess) < 2 or not np.isfinite(excess).all():
        return math.nan
    rounding = 64 * np.finfo(float).eps * max(np.abs(changed).max(), np.abs(threshold * n).max())
    if np.ptp(excess) <= rounding:  # no spread to be unsure by
        return float(excess.mean() <= rounding)
    return float(stats.ttest_1samp(excess, 0.0, alternative="greater").pvalue)


def fewest_for_t(level: float) -> int:
    """The fewest queries with which a one-sided t test asks for at most twice what it would if the spread were known.

    With fewer, nearly all that the test asks for is the price of not knowing the spread, and no rise of a likely size can pay it.

    Args:
        level: of the test, above 0, under 1.

    """
    known = abs(float(stats.norm.isf(level)))
    return next(n for n in itertools.count(2) if abs(float(stats.t.isf(level, n - 1))) <= 2 * known)


def detectable_rise(standard_error: float, n_queries: int, alpha: float, power: float = 0.8) -> float:
    """The smallest true rise that a one-sided test at `alpha` finds with probability `power`.

    Args:
        standard_error: of the mean change over queries.
        n_queries: behind it.
        alpha: of the test, after correction for the number of domains.
        power: wanted.

    Returns:
        In the unit of the standard error; NaN with fewer than two queries.

    """
    if n_queries < 2:
        return math.nan
    quantiles = stats.t.ppf([1 - alpha, power], n_queries - 1)
    return float(quantiles.sum() * standard_error)


def queries_for_rise(rise: float, standard_error: float, n_queries: int, alpha: float, power: float = 0.8) -> int:
    """The fewest queries with which a true rise is detectable, if their changes scatter as those that were measured.

    Args:
        rise: to be found, above 0.
        standard_error: of the mean change over the queries that were measured.
        n_queries: that were measured.
        alpha: of the test, after correction for the number of domains.
        power: wanted.

    """

    def is_enough(n: int) -> bool:
        return detectable_rise(standard_error * math.sqrt(n_queries / n), n, alpha, power) <= rise

    most = 2
    while not is_enough(most):
        most *= 2
    return bisect.bisect_left(range(most), True, lo=2, key=is_enough)


def rank_ranges(resamples: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Between which ranks each of several domains lies, 1 being the largest, at `LEVEL`.

    Args:
        resamples: per domain, of one seed, `(n_resamples,)`.

    Returns:
        Lowest and highest rank that the middle of the resamples takes; what is NaN comes last.

    """
    table = torch.stack(list(resamples.values())).nan_to_num(nan=-math.inf)
    ranks = (table.unsqueeze(0) > table.unsqueeze(1)).sum(dim=1) + 1
    ends = torch.quantile(ranks.double(), torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).double(), dim=1).round().int()
    return {name: (int(low), int(high)) for name, low, high in zip(resamples, *ends.tolist(), strict=True)}


def mean_distance(
    now: torch.Tensor,
    n_now: torch.Tensor,
    then: torch.Tensor,
    n_then: torch.Tensor,
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> tuple[float, torch.Tensor]:
    """Squared distance of two means over tokens, as a share of the square of the second.

    The mean of few texts strays from that of many, each sample its own way; what that adds to the distance is subtracted.

    Args:
        now: sums per text, `(n_texts, n_columns)`.
        n_now: tokens of each, `(n_texts,)`.
        then: the same of the other sample, of texts of its own.
        n_then: likewise.
        n_resamples: how many.
        seed: of the draws.

    Returns:
        The share, 0 on average (and so also below) where both are texts of one kind; and resamples of it over the texts of both,
        `(n_resamples,)`, float64. NaN with fewer than two texts in a sample or no activity at all.

    """
    if min(len(now), len(then)) < 2 or not (n_now.any() and n_then.any()):
        return math.nan, torch.full((n_resamples,), math.nan, dtype=torch.float64)
    means = torch.stack([token_mean(now, n_now), token_mean(then, n_then)])
    strays = _strays(now, n_now), _strays(then, n_then)
    noise_now, noise_then = map(_noise, strays)
    # Squares of resampled means are quadratic forms of few vectors: none of these means need be made.
    vectors = torch.cat([means, *strays])
    products = vectors @ vectors.T
    draw = np.random.default_rng(seed)
    mean_now = torch.zeros(n_resamples, len(vectors), dtype=torch.float64)
    mean_then = mean_now.clone()
    mean_now[:, 0], mean_now[:, 2 : 2 + len(now)] = 1.0, _weights(draw, len(now), n_resamples)
    mean_then[:, 1], mean_then[:, 2 + len(now) :] = 1.0, _weights(draw, len(then), n_resamples)

    def squares(of: torch.Tensor) -> torch.Tensor:
        return ((of @ products) * of).sum(dim=1)

    value = _ratio((means[0] - means[1]).square().sum() - noise_now - noise_then, means[1].square().sum() - noise_then)
    # A resample strays from a mean that strays itself.
    apart = squares(mean_now - mean_then) - 2 * (noise_now + noise_then)
    return float(value), _ratio(apart, squares(mean_then) - 2 * noise_then)


def _ratio(distance: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Their quotient; NaN where nothing is left of the size."""
    return torch.where(size > 0, distance / size, math.nan)


def _strays(sums: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
    """By how much each text pulls the mean away, `(n_texts, n_columns)`, float64; all together by nothing."""
    mean, n = token_mean(sums, n_tokens), n_tokens.double()
    return (sums.double() - n.unsqueeze(1) * mean) / n.sum()


def _noise(strays: torch.Tensor) -> float:
    """Expected squared distance between the mean of these texts and that of all texts like them."""
    return float(strays.square().sum()) * len(strays) / (len(strays) - 1)


def _weights(draw: np.random.Generator, n_texts: int, n_resamples: int) -> torch.Tensor:
    """How often each text is drawn, one draw fewer than texts, as in `resampled_ratios`; scaled to be as many."""
    counts = draw.multinomial(n_texts - 1, np.full(n_texts, 1 / n_texts), size=n_resamples)
    return torch.from_numpy(counts).double() * n_texts / (n_texts - 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values of several tests so that the chance of any false alarm stays what it is for one.

    Args:
        p_values: by name; NaN where there was no test.

    Returns:
        Adjusted p-values, at most 1; NaN stays NaN and counts as no test.

    Source: S. Holm, Scandinavian Journal of Statistics 6, 1979.

    """
    known = sorted((name for name, p in p_values.items() if not math.isnan(p)), key=lambda name: p_values[name])
    adjusted, so_far = dict.fromkeys(p_values, math.nan), 0.0
    for rank, name in enumerate(known):
        so_far = max(so_far, min(1.0, (len(known) - rank) * p_values[name]))
        adjusted[name] = so_far
    return adjusted
