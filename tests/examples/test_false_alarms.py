"""The simulation of false alarms: cases whose answer is known, and the figures that are told of it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import false_alarms
from false_alarms import N_QUERIES, POLICY, Noise, alarmed, centred, forgetting, p_values, remembering, sizes
from pages import page
from samples import domain_drift, estimate, snapshot
from sts_callback.metrics.statistics import p_above
from sts_callback.policy import judge_drift
from validation.data import DOMAINS

EXAMPLES = Path(false_alarms.__file__).parent
SHAPE = (300, 20, N_QUERIES)
Walk = Callable[[float, int, tuple[int, ...], np.random.Generator], Iterator[np.ndarray]]


def test_what_is_centred_has_not_changed_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    changes, n_tokens = rng.normal(2, 3, (4, 60)), rng.integers(3, 40, (4, 60)).astype(float)
    assert centred(changes, n_tokens).sum(axis=1).tolist() == pytest.approx([0] * 4, abs=1e-9)
    assert np.abs(centred(0.3 * n_tokens, n_tokens)).max() < 1e-9


def test_p_values_of_many_rows_are_those_of_the_package() -> None:
    rng = np.random.default_rng(0)
    rows, n_tokens = rng.integers(-3, 6, (2, 5, N_QUERIES)).astype(float), rng.integers(1, 40, (2, 5, N_QUERIES)).astype(float)
    expected = [[p_above(*pair, 0.05) for pair in zip(*some, strict=True)] for some in zip(rows, n_tokens, strict=True)]
    assert p_values(rows, n_tokens) == pytest.approx(np.array(expected), abs=1e-12)


def test_the_size_is_right_for_even_changes_and_as_reckoned_for_the_most_skewed() -> None:
    """One of 60 questions falls far and all others rise a little: unless it is drawn, hardly any spread is seen and it passes."""
    even = np.tile(np.arange(1.0, 31.0), 2) * np.repeat([1.0, -1.0], 30)
    skewed = np.append(np.ones(59) + 1e-6 * even[:59], -59.0)
    changes = np.stack([*[even] * 9, skewed])
    found = sizes(changes, np.ones_like(changes), 0.01, np.random.default_rng(0))
    assert found[0] == pytest.approx((59 / 60) ** N_QUERIES, abs=0.06)
    assert np.mean(found[1:]) == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize(("walk", "expected"), [(forgetting, [0.8, 0.64, 0.512]), (remembering, [0.8, 0.8, 0.8])])
def test_noise_is_forgotten_or_remembered_as_said(walk: Walk, expected: list[float]) -> None:
    of_question = np.random.default_rng(1).normal(size=60)
    first, *later = (of_question[shown] for shown in itertools.islice(walk(0.8, 60, SHAPE, np.random.default_rng(0)), 4))
    assert [np.corrcoef(first.ravel(), then.ravel())[0, 1] for then in later] == pytest.approx(expected, abs=0.01)


def test_a_simulated_run_alarms_where_the_package_would() -> None:
    rng, n_runs, n_checks = np.random.default_rng(0), 12, 3
    still = rng.normal(0, 4, (2, len(DOMAINS), 40))
    n_tokens = rng.integers(3, 40, still.shape[1:]).astype(float)
    noise = Noise(still, n_tokens, {"forget": 0.5})
    rise = np.where(np.arange(len(DOMAINS)) == 7, 0.15, 0.0)[:, None]
    found = noise.p_values(rise, N_QUERIES, "forget", n_checks, n_runs)
    assert found.shape == (n_checks, n_runs, len(DOMAINS))

    def by_the_package(run: int) -> bool:
        for at_check in found[:, run]:
            level = POLICY.alpha / n_checks
            domains = [domain_drift(name, **answers_with(p)) for name, p in zip(DOMAINS, at_check, strict=True)]
            if judge_drift([snapshot(1, *domains)], POLICY, [level]).alarmed:
                return True
        return False

    expected = [by_the_package(run) for run in range(n_runs)]
    assert alarmed(found, n_checks).tolist() == expected
    assert 0 < sum(expected) < n_runs


def answers_with(p_value: float) -> dict[str, Any]:
    """Answers of a domain whose change is above half the budget by that p-value."""
    excess = np.resize([1.0, -1.0], N_QUERIES) + float(stats.t.isf(p_value, N_QUERIES - 1)) / math.sqrt(N_QUERIES - 1)
    changes = tuple((excess + 0.05).tolist())
    value = float(np.mean(changes))
    return {
        "n_queries": N_QUERIES,
        "nll_change": estimate(value, value - 1, value + 1),
        "query_changes": changes,
        "query_answer_tokens": (1,) * N_QUERIES,
    }


def test_more_checks_share_the_error_of_a_run() -> None:
    found = np.full((10, 2, len(DOMAINS)), 0.5)
    found[1, 0, 3] = 0.05 / 2 / len(DOMAINS)
    assert alarmed(found, 2).tolist() == [True, False]
    assert alarmed(found, 3).tolist() == [False, False]
    assert alarmed(found, 1).tolist() == [False, False]


def percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}".replace("%", " %")


def test_what_is_told_of_false_alarms_is_what_was_simulated() -> None:
    told = page("docs/how-it-was-validated.md")
    found = json.loads((EXAMPLES / "false_alarms.json").read_text())
    flat = " ".join(told.split())
    overall = [percent(found["size"][level]["all"], 1) for level in ("0.01", "0.001")]
    worst = [percent(found["size"][level]["by_tenth"][0], 1) for level in ("0.01", "0.001")]
    assert f"at 1 % in {overall[0]} of cases, in the most left-skewed tenth of domains in {worst[0]};" in flat
    assert f"at 0.1 % in {overall[1]} and {worst[1]}." in flat
    _, table = told.split("| | 1 check | 10 checks | 50 checks |\n|---|---|---|---|\n")
    rows = [[int(n) for n in re.findall(r"(\d+) (?=to|%)", row)] for row in table[: table.index("\n\n")].splitlines()]
    simulated: dict[tuple[float, str], list[dict[str, float]]] = {}
    for line in found["false_runs"]:
        simulated.setdefault((line["true_change"], line["rate"]), []).append(line["within_checks"])
    assert rows == [
        [share for n in ("1", "10", "50") for share in sorted({round(100 * within[n]) for within in simulated[kind]})]
        for kind in sorted(simulated)
    ]
    power = {(one["rate"], one["n_queries"], one["true_change"]): percent(one["ten"]) for one in found["power"]}
    for n_queries in (12, 28, 32):
        row = (power[rate, n_queries, harm] for rate in ("gentle", "harsh") for harm in (0.1, 0.2, 0.3))
        assert f"| {n_queries} queries | {' | '.join(row)} |" in told
