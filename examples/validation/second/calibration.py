"""The calibration from five steps to the end, chosen on the first round's runs. No model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import sts_callback
from sts_callback.metrics.calibration import Pair, fit
from validation import plan
from validation.alarms import auroc
from validation.data import DOMAINS
from validation.plan import rounded, stored
from validation.scores import is_clear, is_harmed, ratio, right_signs
from validation.second.plan import CALIBRATION

SHIPPED = Path(sts_callback.__file__).parent / "runs" / "rehearsed.json"
N_CHECKED = 16  # measured questions that join a check's own; the others measure the end
MOST_FALSE = 0.02
N_PARAMETERS = 268_098_176  # of Gemma 3 270M, embedding and head counted once
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Known:
    """All pairs of the first round, as columns `(n_pairs,)`."""

    pairs: list[Pair]
    error: np.ndarray
    """Of the change at the end."""

    def column(self, name: str) -> np.ndarray:
        return np.array([getattr(pair, name) for pair in self.pairs])

    def where(self, keep: np.ndarray) -> Known:
        return Known([pair for pair, kept in zip(self.pairs, keep, strict=True) if kept], self.error[keep])


def known() -> Known:
    """Of each run and domain of the first round."""
    runs, zero = {run["run"]: run for run in stored(plan.RUNS)}, json.loads(plan.STEP_ZERO.read_text())

    def rehearsed(fine_tune: str, setting: str, seed: int, domain: str) -> float:
        """After five steps, in the run of the other seed where there is one."""
        run = runs.get(f"{fine_tune}/{setting}/{1 - seed}") or runs[f"{fine_tune}/{setting}/{seed}"]
        checked, asked = run["checks"][0]["domains"][domain], run["on_the_way"]["5"][domain][:N_CHECKED]
        changes = [*checked["query_changes"], *np.subtract(asked, zero[domain]["nll"][: len(asked)])]
        return ratio(np.array(changes), np.array([*checked["query_answer_tokens"], *zero[domain]["n"][: len(asked)]], float))[0]

    pairs, errors = [], []
    for run in runs.values():
        for name in DOMAINS:
            own = rehearsed(run["fine_tune"], run["setting"], run["seed"], name)
            tenfold = rehearsed(run["fine_tune"], "harsh", run["seed"], name) if run["setting"] == "gentle" else math.nan
            change = np.subtract(run["after"][name]["nll"], zero[name]["nll"])[N_CHECKED:]
            end, error = ratio(change, np.array(zero[name]["n"][N_CHECKED:], dtype=float))
            pairs.append(Pair(run["fine_tune"], own, tenfold, end))
            errors.append(error)
    return Known(pairs, np.array(errors))


def choose() -> None:
    """Write the pairs that the package ships, and what the candidates do for fine-tunes that were left out."""
    data = known()
    two = np.isfinite(data.column("at_multiple"))
    gentle = data.where(two)
    table = {
        "all runs": {"as it is": _judged(data, data.column("own")), "line": _judged(data, _left_out(data, ["own"]))},
        "gentle runs, which have a tenfold dose": {
            "as it is": _judged(gentle, gentle.column("own")),
            "line": _judged(gentle, _left_out(gentle, ["own"])),
            "plane": _judged(gentle, _left_out(gentle, ["own", "at_multiple"])),
            "plane, ridge": _judged(gentle, _ridge(gentle)),
        },
    }
    expected = data.column("own")
    expected[two] = _left_out(gentle, ["own", "at_multiple"])
    found = {
        "candidates": table,
        "intervals": {
            "one dose, all runs": _covered(data, two_doses=False),
            "two doses, gentle runs": _covered(gentle, two_doses=True),
        },
        "threshold": _threshold(data, expected),
    }
    CALIBRATION.write_text(json.dumps(rounded(found), indent=1) + "\n")
    pairs = [rounded(list(pair)) for pair in data.pairs]
    lines = ",\n".join(json.dumps([None if v != v else v for v in pair]) for pair in pairs)
    SHIPPED.write_text(
        f'{{"model": "google/gemma-3-270m", "n_parameters": {N_PARAMETERS}, "n_steps": {plan.SETTINGS["training"]["steps"]},\n'
        f'"columns": {json.dumps(Pair._fields)},\n"pairs": [\n{lines}\n]}}\n'
    )


def _judged(data: Known, expected: np.ndarray) -> dict[str, float]:
    """Fine-tunes have equal weights in the error, domains in the others."""
    end, groups = data.column("end"), data.column("group")
    harmed = is_harmed(end, data.error)
    squares = [np.mean((end - expected)[groups == name] ** 2) for name in np.unique(groups)]
    return {
        "root mean square error": math.sqrt(np.mean(squares)),
        "mean error": float(np.mean(end - expected)),
        "sign": float(np.mean(right_signs(expected, end, data.error))),
        "of clear changes": int(is_clear(end, data.error).sum()),
        "AUROC": auroc(expected, harmed),
    }


def _left_out(data: Known, columns: list[str], penalty: float = 0.0) -> np.ndarray:
    """What a fit on the others expects of each fine-tune."""
    return _each_left_out(data, lambda rest: _fitted(rest, columns, penalty), columns)


def _ridge(data: Known) -> np.ndarray:
    columns = ["own", "at_multiple"]

    def inner(rest: Known) -> np.ndarray:
        best = min(PENALTIES, key=lambda p: _judged(rest, _left_out(rest, columns, p))["root mean square error"])
        return _fitted(rest, columns, best)

    return _each_left_out(data, inner, columns)


def _each_left_out(data: Known, fitted: Callable[[Known], np.ndarray], columns: list[str]) -> np.ndarray:
    groups, expected = data.column("group"), np.empty(len(data.pairs))
    for name in np.unique(groups):
        out = groups == name
        expected[out] = _design(data.where(out), columns) @ fitted(data.where(~out))
    return expected


def _fitted(data: Known, columns: list[str], penalty: float) -> np.ndarray:
    """Least squares with fine-tunes of equal weight; the penalty spares the intercept."""
    x, groups = _design(data, columns), data.column("group")
    weighted = x / np.array([np.sum(groups == name) for name in groups])[:, None]
    found: np.ndarray = np.linalg.solve(
        weighted.T @ x + penalty * np.diag([0.0, *[1.0] * len(columns)]), weighted.T @ data.column("end")
    )
    return found


def _design(data: Known, columns: list[str]) -> np.ndarray:
    return np.stack([np.ones(len(data.pairs)), *(data.column(name) for name in columns)], axis=1)


def _covered(data: Known, *, two_doses: bool) -> dict[str, float]:
    """The package's own intervals, of fine-tunes left out."""
    groups, shares, widths = data.column("group"), [], []
    for name in np.unique(groups):
        out = groups == name
        calibration = fit(data.where(~out).pairs, two_doses=two_doses)
        assert calibration is not None
        ends = [(calibration.expected(p.own, p.at_multiple), p.end) for p in data.where(out).pairs]
        shares.append(np.mean([e.low <= end <= e.high for e, end in ends]))
        widths += [e.high - e.low for e, _ in ends]
    return {
        "covered": float(np.mean(shares)),
        "least of a fine-tune": float(min(shares)),
        "median width": float(np.median(widths)),
    }


def _threshold(data: Known, expected: np.ndarray) -> dict[str, float]:
    """Of the fitted rule: the smallest at which few enough domains without harm are named."""
    harmed = is_harmed(data.column("end"), data.error)
    free = np.sort(expected[~harmed])[::-1]
    n_allowed = math.floor(MOST_FALSE * len(free))
    value = math.ceil(1000 * float(free[n_allowed])) / 1000
    named: Mapping[str, Any] = {"harmed": expected[harmed] >= value, "others": expected[~harmed] >= value}
    return {"value": value} | {f"{key}, named": int(v.sum()) for key, v in named.items()} | {k: len(v) for k, v in named.items()}
