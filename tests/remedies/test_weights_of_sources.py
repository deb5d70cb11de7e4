"""Weights under caps against a search of all, and rows that sum to what was asked for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sts_callback.remedies.mixture import apportioned, best_weights


def worst(weights: np.ndarray, change: np.ndarray, budgets: np.ndarray) -> float:
    return float((weights @ change - budgets).max())


@pytest.mark.parametrize("seed", range(5))
def test_the_best_weights_are_those_of_a_search_of_all(seed: int) -> None:
    draw = np.random.default_rng(seed)
    change, budgets = draw.normal(size=(4, 5)), draw.uniform(0.05, 0.2, size=5)
    low, high = np.array([0.5, 0, 0, 0]), np.array([0.5, 0.3, 0.5, 0.2])
    found = best_weights(change, budgets, low, high)
    assert found is not None
    assert found.sum() == pytest.approx(1)
    assert (found >= low).all() and (found <= high).all()
    grid = [
        np.array([0.5, *rest]) for rest in itertools.product(np.linspace(0, 0.5, 51), repeat=3) if abs(sum(rest) - 0.5) < 1e-9
    ]
    allowed = [weights for weights in grid if (weights <= high + 1e-9).all()]
    assert len(allowed) > 50
    nearest = min(worst(weights, change, budgets) for weights in allowed)
    assert worst(found, change, budgets) <= nearest + 1e-9
    assert worst(found, change, budgets) > nearest - 0.05  # and no better than a fine search allows


def test_a_budget_of_its_own_weighs_as_much_as_a_change() -> None:
    change = np.array([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]])
    free = best_weights(change, np.array([0.1, 0.1]), np.array([0.5, 0, 0]), np.array([0.5, 1, 1]))
    wide = best_weights(change, np.array([0.1, 5.0]), np.array([0.5, 0, 0]), np.array([0.5, 1, 1]))
    np.testing.assert_allclose(free, [0.5, 0.25, 0.25], atol=1e-9)
    np.testing.assert_allclose(wide, [0.5, 0.5, 0.0], atol=1e-9)


def test_caps_that_leave_nothing_give_none() -> None:
    assert best_weights(np.ones((2, 1)), np.ones(1), np.array([0.5, 0]), np.array([0.5, 0.3])) is None


@pytest.mark.parametrize(
    ("weights", "n", "rows"),
    [
        ([0.5, 0.25, 0.25], 4, [2, 1, 1]),
        ([1 / 3, 1 / 3, 1 / 3], 100, [34, 33, 33]),
        ([0.3, 0.1, 0.6], 10, [3, 1, 6]),
        ([0.0, 1.0], 7, [0, 7]),
        ([2.0, 6.0], 8, [2, 6]),
        ([0.26, 0.74], 1, [0, 1]),
    ],
)
def test_rows_are_whole_and_as_many_as_asked_for(weights: list[float], n: int, rows: list[int]) -> None:
    assert apportioned(np.array(weights), n) == rows
