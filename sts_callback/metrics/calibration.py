"""From what a few rehearsed steps change to what is expected at the end of a run, by runs of which both are known. No model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Coverage that intervals aim at."""
FEWEST_GROUPS = 4
"""Of pairs, for an interval to say anything of the next one."""
_FLOOR = 0.2
"""Nats a token that are added to an expected change for the scale of its error; chosen on the validation's first round."""


class Pair(NamedTuple):
    """A domain's change in a rehearsal and at the end of the run, in nats a token; above 0 is worse."""

    group: str
    """What it shares its error with: pairs of one fine-tune."""
    own: float
    """After a few steps at the run's own peak rate."""
    at_multiple: float
    """After as many more at a multiple of it; NaN if that was not rehearsed."""
    end: float
    """At the end of the run."""


class Expected(NamedTuple):
    """A change at the end in nats a token, with the interval for a single domain of a new run."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """Weights of the rehearsed changes, and how far runs that were left out missed what these said."""

    intercept: float
    """Nats a token."""
    own: float
    at_multiple: float
    """0 where only the run's own rate counts; a rehearsal at a multiple is then not asked for."""
    mean_error: float
    """Change at the end less what was expected, over `|expected| + 0.2`; the mean over groups."""
    spread: float
    """Of these errors about their mean, root mean square over groups."""
    n_groups: int

    def expected(self, own: float, at_multiple: float = math.nan) -> Expected:
        """What is expected of one domain.

        Args:
            own: its change in nats a token after a few steps at the run's own peak rate.
            at_multiple: after as many more at a multiple; needed by a calibration that weighs it.

        Returns:
            NaN throughout where what is needed is NaN.

        """
        value = self.intercept + self.own * own + (self.at_multiple * at_multiple if self.at_multiple else 0.0)
        reach = float(stats.t.ppf((1 + LEVEL) / 2, self.n_groups - 1)) * self.spread
        low, high = (value + (self.mean_error + side * reach) * (abs(value) + _FLOOR) for side in (-1, 1))
        return Expected(value, low, high)


def fit(pairs: Sequence[Pair], *, two_doses: bool) -> Calibration | None:
    """Calibrate on pairs; groups have equal weights.

    With one dose the change is expected to stay as it is: no line through it foretold left-out fine-tunes better. With two,
    a plane by least squares. Errors are of groups left out one by one.

    Args:
        pairs: of models of one size.
        two_doses: whether rehearsals at a multiple count too; pairs without one are left out then.

    Returns:
        None with fewer than `FEWEST_GROUPS` groups.

    """
    usable = [p for p in pairs if math.isfinite(p.own + p.end + (p.at_multiple if two_doses else 0.0))]
    groups = np.array([p.group for p in usable])
    names = list(dict.fromkeys(groups.tolist()))
    if len(names) < FEWEST_GROUPS:
        return None
    x, end = _rehearsed(usable, two_doses=two_doses), np.array([p.end for p in usable])
    weights = np.array([1.0 / np.sum(groups == name) for name in groups])
    errors = np.empty(len(usable))
    for name in names:
        out = groups == name
        expected = x[out] @ _weights(x[~out], end[~out], weights[~out])
        errors[out] = (end[out] - expected) / (np.abs(expected) + _FLOOR)
    mean = float(np.average(errors, weights=weights))
    spread = math.sqrt(float(np.average((errors - mean) ** 2, weights=weights)))
    intercept, own, *rest = _weights(x, end, weights).tolist()
    return Calibration(intercept, own, rest[0] if rest else 0.0, mean, spread, len(names))


def _rehearsed(pairs: Sequence[Pair], *, two_doses: bool) -> np.ndarray:
    """`(n_pairs, 2)`, or 3 columns with two doses: ones, own, at a multiple."""
    columns = [np.ones(len(pairs)), np.array([p.own for p in pairs])]
    return np.stack([*columns, np.array([p.at_multiple for p in pairs])] if two_doses else columns, axis=1)


def _weights(x: np.ndarray, end: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Intercept and weights of the doses."""
    if x.shape[1] == 2:
        return np.array([0.0, 1.0])
    root = np.sqrt(weights)[:, None]
    found: np.ndarray = np.linalg.lstsq(x * root, end * root[:, 0], rcond=None)[0]
    return found
