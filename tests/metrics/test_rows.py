"""Scores of training rows and what stands out, by hand."""

from __future__ import annotations

import pytest
import torch

from sts_callback.metrics.rows import LEAST_LIKENESS, LEAST_SCORE, contributions, limit_of_scores

ACTS = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 2.0]])
AVERAGE = ACTS.mean(dim=0)


def test_a_contribution_is_a_weight_times_a_multiple_of_the_average() -> None:
    found = contributions(ACTS, AVERAGE, torch.tensor([0.75, 0.0, 0.25]))
    torch.testing.assert_close(found, torch.tensor([[0.375, 0, 0], [1.125, 0, 0.5]]).double())
    assert float(found.sum(dim=1).mean()) == pytest.approx(1)


def test_the_weight_of_a_silent_feature_goes_to_the_others() -> None:
    found = contributions(ACTS, AVERAGE, torch.tensor([0.25, 0.5, 0.25]))
    torch.testing.assert_close(found, torch.tensor([[0.25, 0, 0], [0.75, 0, 1.0]]).double())


def test_there_are_no_scores_where_only_silent_features_weigh() -> None:
    assert contributions(ACTS, AVERAGE, torch.tensor([0.0, 1.0, 0.0])).isnan().all()


def test_what_stands_out_lies_four_scaled_deviations_above_the_median() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]).double()  # median 3, median deviation 1
    assert limit_of_scores(scores, 1.0) == pytest.approx(3 + 4 * 1.4826, abs=1e-3)


def test_rows_that_are_alike_do_not_stand_out_by_next_to_nothing() -> None:
    assert limit_of_scores(torch.ones(5).double(), 1.0) == LEAST_SCORE


def test_a_row_must_resemble_the_domain() -> None:
    assert limit_of_scores(torch.ones(5).double(), 20.0) == LEAST_LIKENESS * 20
