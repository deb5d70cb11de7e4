"""Random feature sets: of the right size, apart from the set they match, and like it in activity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sts_callback.metrics.scores import N_SETS, matched_sets, mean_over_sets

D_SAE = 1000
LEVELS = torch.from_numpy(np.random.default_rng(0).permutation(np.geomspace(1e-4, 10, D_SAE)))
BY_RANK = LEVELS.argsort().tolist()
SETS = {
    "spread": tuple(BY_RANK[10::50]),
    "middle": tuple(BY_RANK[400:440]),
    "least active": tuple(BY_RANK[:40]),
    "most active": tuple(BY_RANK[-40:]),
    "half of all": tuple(range(0, D_SAE, 2)),
}


@pytest.mark.parametrize("features", SETS.values(), ids=SETS)
def test_sets_are_of_equal_size_without_a_member_of_the_set_and_none_twice(features: tuple[int, ...]) -> None:
    sets = matched_sets(LEVELS, features)
    assert sets.shape == (N_SETS, len(features))
    assert not set(sets.flatten().tolist()) & set(features)
    assert all(len(set(one)) == len(features) for one in sets.tolist())
    assert 0 <= int(sets.min()) <= int(sets.max()) < D_SAE


@pytest.mark.parametrize("name", ["spread", "middle"])
def test_each_place_is_taken_by_a_feature_of_like_activity(name: str) -> None:
    """Levels rise by 1.2 % a rank; the set itself, what is taken already and 20 candidates reach 80 ranks at most."""
    features = SETS[name]
    ratios = LEVELS[matched_sets(LEVELS, features)] / LEVELS[list(features)]
    assert 1 / 2.5 < float(ratios.min()) < float(ratios.max()) < 2.5
    assert float(ratios.log().mean()) == pytest.approx(0, abs=0.05)


def test_sets_of_any_features_would_not_be_like_in_activity() -> None:
    features = SETS["middle"]
    ratios = LEVELS[matched_sets(LEVELS.roll(1), features)] / LEVELS[list(features)]
    assert float(ratios.min()) < 1 / 10


def test_in_place_of_the_most_active_stand_the_next_most_active() -> None:
    sets = matched_sets(LEVELS, SETS["most active"])
    assert set(sets.flatten().tolist()) <= set(BY_RANK[-100:-40])
    assert all(set(BY_RANK[-60:-40]) & set(one) for one in sets.tolist())


def test_of_four_features_two_leave_two() -> None:
    sets = matched_sets(torch.tensor([0.1, 0.2, 0.3, 0.4]), (3, 0))
    assert {tuple(sorted(one)) for one in sets.tolist()} == {(1, 2)}


def test_no_feature_has_empty_sets_whose_sum_is_zero() -> None:
    sets = matched_sets(LEVELS, ())
    assert sets.shape == (N_SETS, 0)
    assert mean_over_sets(LEVELS, sets) == 0.0


def test_features_that_are_all_silent_are_matched_by_silent_ones() -> None:
    activity = torch.cat([torch.zeros(100), torch.ones(100)])
    sets = matched_sets(activity, (3, 50, 7))
    assert float(activity[sets].max()) == 0.0


def test_draws_are_the_same_at_every_visit_and_differ_between_sets_and_seeds() -> None:
    sets = matched_sets(LEVELS, SETS["middle"])
    assert torch.equal(sets, matched_sets(LEVELS, SETS["middle"]))
    assert not torch.equal(sets, matched_sets(LEVELS, SETS["middle"], seed=1))
    assert len({tuple(sorted(one)) for one in sets.tolist()}) == N_SETS


def test_mean_over_sets_adds_up_each_and_averages() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert mean_over_sets(values, torch.tensor([[0, 1], [2, 3], [0, 3]])) == (3 + 12 + 9) / 3


def test_what_has_no_content_scores_as_the_null_does() -> None:
    """Values that depend on activity alone: a set stands for any other of like activity."""
    features = SETS["spread"]
    values = LEVELS * torch.from_numpy(np.random.default_rng(1).uniform(0.8, 1.2, D_SAE))
    assert mean_over_sets(values, matched_sets(LEVELS, features)) == pytest.approx(float(values[list(features)].sum()), rel=0.1)
