"""Weights of training sources: the best ones under caps, where changes add up over a mixture, and whole rows from weights."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog


def best_weights(change: np.ndarray, budgets: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray | None:
    """The mixture that keeps the worst domain as far as can be within its budget.

    A linear programme: minimise t over weights w, with `w @ change - t <= budgets`, `sum(w) = 1` and `low <= w <= high`.

    Args:
        change: that training on one source alone makes in one domain, `(n_sources, n_domains)`; of a mixture, its weighted mean.
        budgets: that each domain may change, in the same unit, `(n_domains,)`.
        low: least weight of each source, `(n_sources,)`, in [0, 1].
        high: largest weight, `(n_sources,)`, in [0, 1].

    Returns:
        Weights, `(n_sources,)`, that sum to 1; None if none are allowed.

    """
    n_sources, n_domains = change.shape
    found = linprog(
        [*[0.0] * n_sources, 1.0],
        A_ub=np.column_stack([change.T, np.full(n_domains, -1.0)]),
        b_ub=budgets,
        A_eq=[[*[1.0] * n_sources, 0.0]],
        b_eq=[1.0],
        bounds=[*zip(low, high, strict=True), (None, None)],
    )
    return None if found.x is None else np.clip(found.x[:-1], low, high)


def apportioned(weights: np.ndarray, n: int) -> list[int]:
    """Whole rows in proportion to weights: rounded down, what is left goes to the largest remainders (Hamilton's method).

    Args:
        weights: at least 0, not all 0, `(n_sources,)`.
        n: rows in all.

    """
    exact = n * weights / weights.sum()
    rows = np.floor(exact + 1e-9).astype(int)  # a weight that is a whole number of rows but for its last bit
    rows[np.argsort(rows - exact, kind="stable")[: n - rows.sum()]] += 1
    return [int(count) for count in rows]
