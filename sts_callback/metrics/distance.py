"""How far two samples of texts lie apart, freed of the distance that any two samples of the same texts have."""

from __future__ import annotations

import math

import numpy as np
import torch

from sts_callback.metrics.resample import N_RESAMPLES
from sts_callback.metrics.sums import token_mean


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
    """How often each text is drawn, one draw fewer than texts, as in `resample.resampled_ratios`; scaled to be as many."""
    counts = draw.multinomial(n_texts - 1, np.full(n_texts, 1 / n_texts), size=n_resamples)
    return torch.from_numpy(counts).double() * n_texts / (n_texts - 1)
