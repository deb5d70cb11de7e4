"""The distance of two samples of texts: nothing where they are of one kind, the truth where they are not."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from sts_callback.metrics.statistics import interval, mean_distance

N_TEXTS, N_COLUMNS, N_TOKENS = 32, 20, 10


def drawn(generator: torch.Generator, offset: float, n_texts: int = N_TEXTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the tokens of texts, each with a tone of its own, about a mean that is 1 in every column but for an offset."""
    mean = torch.ones(N_COLUMNS)
    mean[0] += offset
    n_tokens = torch.randint(1, 2 * N_TOKENS, (n_texts,), generator=generator)
    tones = mean + torch.randn(n_texts, N_COLUMNS, generator=generator)
    return tones * n_tokens.unsqueeze(1), n_tokens


@functools.cache
def found(offset: float, n_trials: int = 200) -> tuple[list[float], list[tuple[float, float]]]:
    values, intervals = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_trials):
        value, resamples = mean_distance(*drawn(generator, offset), *drawn(generator, 0.0))
        values.append(value)
        intervals.append(interval(value, resamples, N_TEXTS))
    return values, intervals


@pytest.mark.parametrize("offset", [0.0, 1.0, 4.0])
def test_on_average_it_is_the_truth_and_its_interval_covers_it(offset: float) -> None:
    truth = offset**2 / N_COLUMNS
    values, intervals = found(offset)
    mean, spread = torch.tensor(values).mean().item(), torch.tensor(values).std().item()
    assert abs(mean - truth) < 4 * spread / math.sqrt(len(values)) + 0.03 * truth
    assert sum(low <= truth <= high for low, high in intervals) >= 0.92 * len(intervals)


def test_without_the_correction_texts_of_one_kind_would_lie_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    (now, n_now), (then, n_then) = drawn(generator, 0.0), drawn(generator, 0.0)
    means = now.sum(dim=0) / n_now.sum(), then.sum(dim=0) / n_then.sum()
    plain = float((means[0] - means[1]).square().sum() / means[1].square().sum())
    assert plain > 0.04
    assert mean_distance(now, n_now, then, n_then)[0] < plain / 2


def test_a_real_move_is_told_from_none() -> None:
    assert all(low > 0 for low, _ in found(4.0, 20)[1])
    assert sum(low > 0 for low, _ in found(0.0)[1]) <= 0.05 * 200


def test_it_is_the_plain_distance_where_all_texts_are_alike() -> None:
    now, then, n = torch.tensor([[2.0, 4.0]] * 3), torch.tensor([[2.0, 0.0]] * 2), torch.tensor([2, 2, 2])
    value, resamples = mean_distance(now, n, then, n[:2])
    assert value == 4.0
    assert resamples.tolist() == [4.0] * len(resamples)


@pytest.mark.parametrize(("n_texts", "n_tokens"), [(1, 3), (4, 0)])
def test_too_little_to_compare_gives_nan(n_texts: int, n_tokens: int) -> None:
    sums, n = torch.ones(n_texts, 2) * n_tokens, torch.full((n_texts,), n_tokens)
    value, resamples = mean_distance(sums, n, torch.ones(4, 2), torch.ones(4).long())
    assert math.isnan(value)
    assert resamples.isnan().all()
