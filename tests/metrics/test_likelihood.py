"""Change of likelihood and its standard error, against answers found by hand and in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sts_callback.metrics.likelihood import change_per_token, mean_per_token


def test_mean_is_per_token_not_per_query() -> None:
    assert mean_per_token(torch.tensor([6.0, 2.0]), torch.tensor([3, 1])) == 2.0
    assert mean_per_token(torch.tensor([9.0, 1.0]), torch.tensor([1, 4])) == 2.0  # the mean of 9 and 1/4 would be 4.6


def test_change_and_error_by_hand() -> None:
    # Changes 1 and 5 over 1 and 2 tokens: mean 6 / 3 = 2; residuals 1 - 2 = -1 and 5 - 4 = 1;
    # squared error (1 + 1) * 2 / (2 - 1) / 3^2 = 4 / 9.
    change, error = change_per_token(torch.tensor([3.0, 9.0]), torch.tensor([2.0, 4.0]), torch.tensor([1, 2]))
    assert change == 2.0
    assert error == pytest.approx(2 / 3, rel=1e-12)


def test_worse_answers_give_a_change_above_zero() -> None:
    low, high, n = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([2, 2])
    assert change_per_token(high, low, n)[0] == 0.75
    assert change_per_token(low, high, n)[0] == -0.75


def test_longer_answers_weigh_more() -> None:
    after, before = torch.tensor([10.0, 0.0]), torch.tensor([0.0, 0.0])
    assert change_per_token(after, before, torch.tensor([8, 2]))[0] == 1.0
    # The same change of 2 nats a token, on an answer of 1 or of 9 among 10 tokens.
    few = change_per_token(torch.tensor([2.0, 0.0]), before, torch.tensor([1, 9]))[0]
    many = change_per_token(torch.tensor([18.0, 0.0]), before, torch.tensor([9, 1]))[0]
    assert few == pytest.approx(0.2)
    assert many == pytest.approx(1.8)


def test_equal_change_of_every_token_has_no_error() -> None:
    n = torch.tensor([1, 2, 5])
    assert change_per_token(n * 0.5, torch.zeros(3), n) == (0.5, 0.0)


def test_one_query_gives_a_change_without_error() -> None:
    change, error = change_per_token(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([4]))
    assert change == 0.5
    assert math.isnan(error)


def test_unknown_likelihood_gives_no_number() -> None:
    unknown = torch.full((3,), float("nan"))
    assert all(math.isnan(x) for x in change_per_token(unknown, unknown, torch.tensor([1, 2, 3])))


def _random_answers(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n_answer = rng.integers(2, 30, size=n)
    before = rng.normal(2, 0.5, size=n) * n_answer
    return before + rng.normal(0.1, 0.3, size=n) * n_answer, before, n_answer


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_is_that_of_a_linearised_ratio(seed: int) -> None:
    after, before, n_answer = _random_answers(seed, 40)
    ratio = (after - before).sum() / n_answer.sum()
    influence = (after - before - ratio * n_answer) / n_answer.mean()
    expected = np.sqrt(influence.var(ddof=1) / len(n_answer))
    change, error = change_per_token(torch.tensor(after), torch.tensor(before), torch.tensor(n_answer))
    assert change == pytest.approx(ratio, rel=1e-10)
    assert error == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_error_is_close_to_that_of_leaving_out_one_query_at_a_time(seed: int) -> None:
    after, before, n_answer = _random_answers(seed, 200)
    difference, k = after - before, len(n_answer)
    left_out = (difference.sum() - difference) / (n_answer.sum() - n_answer)
    jackknife = np.sqrt((k - 1) / k * ((left_out - left_out.mean()) ** 2).sum())
    error = change_per_token(torch.tensor(after), torch.tensor(before), torch.tensor(n_answer))[1]
    assert error == pytest.approx(jackknife, rel=0.02)


def test_with_answers_of_equal_length_the_error_is_that_of_a_mean() -> None:
    after, before, _ = _random_answers(3, 25)
    n_answer = torch.full((25,), 4)
    expected = ((after - before) / 4).std(ddof=1) / np.sqrt(25)
    assert change_per_token(torch.tensor(after), torch.tensor(before), n_answer)[1] == pytest.approx(expected, rel=1e-10)
