"""Scores: answers found by hand, and the equations of arXiv 2603.02908 written out once more in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sts_callback.metrics.scores import activity_score, n_shared, net_share, shift_score, shift_share, shifted_features
from sts_callback.metrics.sums import QuerySums, token_mean

Acts = NDArray[np.float64]
N_QUERIES, N_TOKENS, D_SAE, N_FEATURES = 6, 60, 40, 7
MEAN = torch.tensor([0.5, 4.0, 0.0, 1.5, 2.0])


def test_shifted_features_come_largest_first() -> None:
    assert shifted_features(MEAN, 3) == (1, 4, 3)
    assert shifted_features(MEAN, 1) == (1,)


def test_fewer_features_come_back_when_few_shift() -> None:
    assert shifted_features(MEAN, 100) == (1, 4, 3, 0)  # 2 does not shift
    assert shifted_features(torch.tensor([0.0, 1.0, 0.0]), 2) == (1,)
    assert shifted_features(torch.zeros(5), 3) == ()


def test_ties_keep_the_order_of_the_features() -> None:
    tied = torch.ones(500)
    tied[400] = 2.0
    assert shifted_features(tied, 5) == (400, 0, 1, 2, 3)


def test_no_feature_shifts_where_no_token_was_measured() -> None:
    assert shifted_features(torch.full((4,), float("nan")), 2) == ()


def test_scores_add_up_the_shifted_features_only() -> None:
    assert activity_score(MEAN, (1, 3)) == 5.5
    assert shift_score(MEAN, (1, 3)) == 5.5
    assert shift_share(MEAN, (1, 3)) == 5.5 / 8


def test_scores_of_no_feature_are_zero() -> None:
    assert activity_score(MEAN, ()) == shift_score(MEAN, ()) == shift_share(MEAN, ()) == net_share(MEAN, MEAN, ()) == 0.0


def test_share_is_nan_where_nothing_shifts() -> None:
    assert math.isnan(shift_share(torch.zeros(3), (0, 1)))
    assert math.isnan(shift_share(torch.full((3,), float("nan")), (0, 1)))
    assert math.isnan(net_share(torch.zeros(3), torch.zeros(3), (0, 1)))


def test_net_share_is_the_share_less_that_of_plain_prose() -> None:
    assert net_share(MEAN, torch.zeros(5), (1, 3)) == shift_share(MEAN, (1, 3))
    assert net_share(MEAN, MEAN, (1, 3)) == 0.0
    assert net_share(MEAN, torch.tensor([0.0, 6.0, 0.0, 2.0, 9.0]), (1, 3)) == (5.5 - 8.0) / 8


def test_shares_lie_between_nothing_and_all_and_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        mean = torch.rand(D_SAE, generator=generator, dtype=torch.float64)
        features = shifted_features(mean, N_FEATURES)
        others = tuple(set(range(D_SAE)) - set(features))
        assert N_FEATURES / D_SAE < shift_share(mean, features) < 1  # the top N hold more than N of any
        assert shift_share(mean, features) + shift_share(mean, others) == pytest.approx(1, abs=1e-12)
    assert shift_share(mean, tuple(range(D_SAE))) == 1.0


def test_shared_features_are_counted_whatever_their_order() -> None:
    assert n_shared((1, 2, 3), (3, 9, 1)) == 2
    assert n_shared((1, 2), (3, 4)) == 0
    assert n_shared((), (1,)) == 0


def test_scores_are_python_floats_and_features_python_ints() -> None:
    features = shifted_features(MEAN, 2)
    assert [type(f) for f in features] == [int, int]
    for score in (activity_score(MEAN, features), shift_score(MEAN, features), shift_share(MEAN, features)):
        assert type(score) is float


@pytest.fixture
def draw() -> Callable[[], Acts]:
    """Draws activations of a set's query tokens, sparse and never negative, `(N_TOKENS, D_SAE)`."""
    rng = np.random.default_rng(0)
    return lambda: np.maximum(rng.normal(size=(N_TOKENS, D_SAE)) * rng.uniform(0.1, 3, size=D_SAE), 0)


def _streamed_mean(values: Acts) -> torch.Tensor:
    """The package's way to a mean: sums per query, batch by batch."""
    query, sums = torch.arange(N_TOKENS) % N_QUERIES, QuerySums(N_QUERIES, D_SAE, torch.device("cpu"))
    for part, index in zip(torch.from_numpy(values).split(13), query.split(13), strict=True):
        sums.add(part, index)
    return token_mean(sums.result, torch.bincount(query))


def test_every_score_equals_its_equation(draw: Callable[[], Acts]) -> None:
    train, train_in_context = draw(), draw()
    domain, domain_after_own, domain_after_train = draw(), draw(), draw()

    # arXiv 2603.02908, section 3.2: shift_j = mean over query tokens of (h_j(x) - h_j(demos, x))^2; D_N = the N largest
    shift = ((train - train_in_context) ** 2).mean(axis=0)
    d_n = np.argsort(-shift, kind="stable")[:N_FEATURES]
    features = shifted_features(_streamed_mean((train_in_context - train) ** 2), N_FEATURES)
    assert features == tuple(d_n.tolist())

    # section 4.1: mean over tokens of the sum over j in D_N
    own, cross = (domain_after_own - domain) ** 2, (domain_after_train - domain) ** 2
    assert activity_score(_streamed_mean(domain), features) == pytest.approx(domain[:, d_n].sum(axis=1).mean(), rel=1e-5)
    assert shift_score(_streamed_mean(own), features) == pytest.approx(own[:, d_n].sum(axis=1).mean(), rel=1e-5)

    # ours: the share of a shift that falls on D_N, for the domain's own and for the training demonstrations
    sts_rel, sts_cross = own[:, d_n].sum() / own.sum(), cross[:, d_n].sum() / cross.sum()
    assert shift_share(_streamed_mean(own), features) == pytest.approx(sts_rel, rel=1e-5)
    assert shift_share(_streamed_mean(cross), features) == pytest.approx(sts_cross, rel=1e-5)
    assert abs(sts_rel - sts_cross) > 1e-3  # else one could stand for the other unseen
