"""Scores of training rows and what stands out, by hand."""

from __future__ import annotations

import pytest
import torch

from sts_callback.metrics.attribution import LEAST_LIKENESS, LEAST_SCORE, contributions, limit_of_scores, roots

AVERAGE = torch.tensor([1.0, 2.0, 1.0]).double()  # of roots
DOMAIN = torch.tensor([16.0, 0.0, 1.0])  # departs by 3, -2, 0


def test_a_score_is_the_cosine_of_departures_from_an_average_row() -> None:
    texts = torch.tensor([[25.0, 1.0, 4.0], [0.0, 9.0, 1.0]])  # departs by 4, -1, 1 and by -1, 1, 0
    found = contributions(texts, DOMAIN, AVERAGE)
    lengths = [18**0.5 * 13**0.5, 2**0.5 * 13**0.5]
    wanted = torch.tensor([[12 / lengths[0], 2 / lengths[0], 0], [-3 / lengths[1], -2 / lengths[1], 0]]).double()
    torch.testing.assert_close(found, wanted)


def test_a_text_like_the_domain_scores_one_its_opposite_less_and_an_average_one_nothing() -> None:
    texts = torch.stack([DOMAIN, torch.tensor([0.0, 9.0, 1.0]), AVERAGE.square().float()])
    like, opposite, average = contributions(texts, DOMAIN, AVERAGE).sum(dim=1).tolist()
    assert (like, average) == (pytest.approx(1), 0)
    assert opposite < -0.9


def test_there_are_no_scores_where_the_domain_is_an_average_row() -> None:
    assert contributions(torch.ones(2, 3), AVERAGE.square(), AVERAGE).isnan().all()


def test_what_stands_out_lies_four_scaled_deviations_above_the_median() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4, 1.0]).double()  # median 0.3, median deviation 0.1
    assert limit_of_scores(scores, 0.5) == pytest.approx(0.3 + 0.4 * 1.4826, abs=1e-4)


def test_rows_that_are_alike_do_not_stand_out_by_next_to_nothing() -> None:
    assert limit_of_scores(torch.full((5,), -0.5).double(), -0.25) == LEAST_SCORE


def test_a_row_must_resemble_the_domain() -> None:
    assert limit_of_scores(torch.zeros(5).double(), 0.75) == LEAST_LIKENESS * 0.75


def test_what_is_below_zero_counts_as_none() -> None:
    assert roots(torch.tensor([-4.0, 0.0, 4.0])).tolist() == [0, 0, 2]
