"""Which tokens count, on norms chosen by hand."""

from __future__ import annotations

import torch

from sts_callback.metrics.sums import is_not_outlier


def test_tokens_below_the_multiple_count_and_those_at_or_above_it_do_not() -> None:
    norms = torch.tensor([0.0, 1.0, 5.9, 6.0, 6.1, 100.0])
    assert is_not_outlier(norms, median_norm=2.0, multiple=3.0).tolist() == [True, True, True, False, False, False]


def test_the_limit_scales_with_the_median_and_with_the_multiple() -> None:
    norms = torch.tensor([5.0, 15.0, 25.0])
    assert is_not_outlier(norms, 2.0, 3.0).tolist() == [True, False, False]
    assert is_not_outlier(norms, 4.0, 5.0).tolist() == [True, True, False]
    assert is_not_outlier(norms, 10.0, 3.0).tolist() == [True, True, True]


def test_norms_that_are_no_numbers_do_not_count() -> None:
    assert is_not_outlier(torch.tensor([float("nan"), float("inf"), 1.0]), 2.0, 3.0).tolist() == [False, False, True]


def test_no_tokens_give_no_answers() -> None:
    answer = is_not_outlier(torch.empty(0), 2.0, 3.0)
    assert answer.shape == (0,)
    assert answer.dtype == torch.bool
