"""What rehearsals said and what runs did, from stored lines to numbers by domain. No model.

Arrays are `(n_domains,)` in the order of the settings' domains; changes are in nats a token, above 0 is worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sts_callback.metrics.calibration import Calibration
from sts_callback.metrics.statistics import holm, p_above
from sts_callback.records import DriftSnapshot
from validation.scores import is_clear, is_harmed, ratio
from validation.second.plan import SETTINGS

Line = Mapping[str, Any]
DOMAINS: tuple[str, ...] = tuple(SETTINGS["domains"])
BUDGET: float = SETTINGS["budget"]


@dataclass(frozen=True)
class Tested:
    """One check's answers by the rules: half the budget, Student's t, Holm over domains."""

    change: np.ndarray
    passed: np.ndarray
    """Booleans: above half the budget for sure."""

    @classmethod
    def of(cls, check: Line, zero: Line, level: float) -> Tested:
        """Test a check.

        Args:
            check: by domain, NLL of each answer.
            zero: the same untuned, with the answers' tokens.
            level: the check's share of the error.

        """
        pairs = {name: _changes(check[name], zero[name]) for name in DOMAINS}
        p_values = {name: p_above(*pair, BUDGET / 2) for name, pair in pairs.items()}
        corrected = holm(p_values)
        change = np.array([ratio(*pair)[0] for pair in pairs.values()])
        return cls(change, np.array([corrected[name] <= level for name in DOMAINS]))

    @property
    def over(self) -> np.ndarray:
        over: np.ndarray = self.passed & (self.change >= BUDGET)
        return over


@dataclass(frozen=True)
class Rehearsed:
    """What is known of a run before its first step."""

    own: Tested
    """After five steps at the run's own peak rate, at the whole error: it is one check."""
    at_multiple: np.ndarray
    """Change after five more at the multiple; NaN where that was not rehearsed."""
    expected: np.ndarray
    """Change at the end, by the calibration."""
    low: np.ndarray
    high: np.ndarray
    drift: np.ndarray
    """Relative feature drift after the run's own dose."""
    divergence: np.ndarray
    """KL(untuned || now) of the check answers then, nats a token."""
    divergence_taught: float
    """The same on training rows."""
    features: frozenset[int]
    """That moved most on training rows then."""

    @classmethod
    def of(cls, line: Line, zero: Line, one: Calibration, two: Calibration) -> Rehearsed:
        """Read a line of `rehearsals.jsonl`.

        Args:
            line: it.
            zero: `step_zero.json`.
            one: for a rehearsal of the run's own rate alone.
            two: for one at a multiple too.

        """
        doses, check_zero = line["doses"], zero["check"]
        own = Tested.of(doses[0]["check"], check_zero, SETTINGS["alpha"])
        multiple = np.full(len(DOMAINS), math.nan)
        if len(doses) > 1:
            multiple = Tested.of(doses[1]["check"], check_zero, SETTINGS["alpha"]).change
        calibration = two if len(doses) > 1 else one
        expected = np.array([calibration.expected(*pair) for pair in zip(own.change, multiple, strict=True)])
        kl = [sum(doses[0]["check"][name]["kl"]) / sum(check_zero[name]["n"]) for name in DOMAINS]
        taught = sum(doses[0]["taught"]["kl"]) / sum(zero["taught"][line["fine_tune"]]["n"])
        features = frozenset(doses[0]["snapshot"]["realised_features"])
        return cls(own, multiple, *expected.T, _drifts(doses[0]["snapshot"]), np.array(kl), taught, features)


@dataclass(frozen=True)
class Happened:
    """A run and what it did."""

    key: str
    fine_tune: str
    setting: str
    n_steps: int
    change: np.ndarray
    """Of the measured questions at the end."""
    error: np.ndarray
    crossing: np.ndarray
    """Step at which the questions that are measured on the way first reach the budget; NaN where they never do."""
    drift: np.ndarray
    looks: dict[int, Tested]
    """Each check, at its share of the run's error."""
    gained: np.ndarray
    """Right answer tokens of the measured questions, at the end less untuned."""
    divergence_taught: float
    """KL(untuned || now) on training rows at the end, nats a token."""
    features: frozenset[int]

    @classmethod
    def of(cls, line: Line, zero: Line) -> Happened:
        """Read a line of `runs.jsonl`.

        Args:
            line: it.
            zero: `step_zero.json`.

        """
        looks = line["looks"]
        end, measured = looks[-1], zero["measured"]
        changes = np.array([ratio(*_changes(end["measured"][name], measured[name])) for name in DOMAINS])
        level = SETTINGS["alpha"] / len(looks)
        gained = [sum(end["measured"][name]["right"]) - sum(measured[name]["right"]) for name in DOMAINS]
        return cls(
            line["key"],
            line["fine_tune"],
            line["setting"],
            end["step"],
            *changes.T,
            np.array([_crossing(looks, measured, name) for name in DOMAINS]),
            _drifts(line["snapshot"]),
            {look["step"]: Tested.of(look["check"], zero["check"], level) for look in looks},
            np.array(gained),
            sum(end["taught"]["kl"]) / sum(zero["taught"][line["fine_tune"]]["n"]),
            frozenset(line["snapshot"]["realised_features"]),
        )

    @property
    def harmed(self) -> np.ndarray:
        return is_harmed(self.change, self.error)

    @property
    def clear(self) -> np.ndarray:
        return is_clear(self.change, self.error)

    @property
    def crossed(self) -> np.ndarray:
        """The first crossing, of a domain that never does the last step."""
        return np.nan_to_num(self.crossing, nan=self.n_steps)

    @property
    def alarmed(self) -> np.ndarray:
        """Step of the first alarm in training; NaN without one."""
        first = np.full(len(DOMAINS), math.nan)
        for step, look in self.looks.items():
            first = np.where(np.isnan(first) & look.passed, step, first)
        return first


def _changes(now: Line, zero: Line) -> tuple[np.ndarray, np.ndarray]:
    """Of the questions that were asked now: change of NLL in nats, and answer tokens, each `(n_questions,)`."""
    n = len(now["nll"])
    return np.subtract(now["nll"], zero["nll"][:n]), np.array(zero["n"][:n], dtype=float)


def _crossing(looks: Sequence[Line], zero: Line, name: str) -> float:
    """By straight lines from (0, 0) through the checks, of the same questions throughout."""
    measured = [look for look in looks if "measured" in look]
    n = min(len(look["measured"][name]["nll"]) for look in measured)
    step, change = 0.0, 0.0
    for look in measured:
        found = ratio(*_changes({"nll": look["measured"][name]["nll"][:n]}, zero[name]))[0]
        if found >= BUDGET:
            return step + (look["step"] - step) * (BUDGET - change) / (found - change)
        step, change = look["step"], found
    return math.nan


def _drifts(snapshot: Line) -> np.ndarray:
    domains = DriftSnapshot.from_dict(snapshot).domains
    return np.array([domains[name].relative_drift.value for name in DOMAINS])
