"""The simulation of false alarms: cases whose answer is known, and the figures that are told of it."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import false_alarms
from false_alarms import N_QUERIES, alarms, centred, could_alarm, first_alarms, forgetting, p_values, remembering, sizes
from samples import domain_drift, snapshot
from sts_callback.metrics.statistics import p_of_rise
from validation.data import DOMAINS

EXAMPLES = Path(false_alarms.__file__).parent
CHECK = snapshot(5, *(domain_drift(name, n_queries=N_QUERIES) for name in DOMAINS))
SHAPE = (300, 20, N_QUERIES)
Walk = Callable[[float, int, tuple[int, ...], np.random.Generator], Iterator[np.ndarray]]


def test_what_is_centred_has_not_changed_as_a_whole() -> None:
    rng = np.random.default_rng(0)
    changes, n_tokens = rng.normal(2, 3, (4, 60)), rng.integers(3, 40, (4, 60)).astype(float)
    assert centred(changes, n_tokens).sum(axis=1).tolist() == pytest.approx([0] * 4, abs=1e-9)
    assert np.abs(centred(0.3 * n_tokens, n_tokens)).max() < 1e-9


def test_p_values_of_many_rows_are_those_of_the_package() -> None:
    rows = np.random.default_rng(0).integers(-3, 6, (20, N_QUERIES)).astype(float)  # with many ties
    assert p_values(rows).tolist() == [p_of_rise(torch.from_numpy(row)) for row in rows]


def test_the_size_is_right_for_even_changes_and_as_reckoned_for_the_most_skewed() -> None:
    """One of 60 questions falls far and all others rise a little: unless it is drawn, all signs are alike and the test passes."""
    even = np.tile(np.arange(1.0, 31.0), 2) * np.repeat([1.0, -1.0], 30)
    skewed = np.append(np.ones(59), -59.0)
    found = sizes(np.stack([*[even] * 9, skewed]), np.random.default_rng(0))
    assert found[0] == pytest.approx((59 / 60) ** N_QUERIES, abs=0.06)
    assert np.mean(found[1:]) == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize(("walk", "expected"), [(forgetting, [0.8, 0.64, 0.512]), (remembering, [0.8, 0.8, 0.8])])
def test_noise_is_forgotten_or_remembered_as_said(walk: Walk, expected: list[float]) -> None:
    of_question = np.random.default_rng(1).normal(size=60)
    first, *later = (of_question[shown] for shown in itertools.islice(walk(0.8, 60, SHAPE, np.random.default_rng(0)), 4))
    assert [np.corrcoef(first.ravel(), then.ravel())[0, 1] for then in later] == pytest.approx(expected, abs=0.01)


def test_no_check_that_alarms_is_passed_over() -> None:
    rng = np.random.default_rng(0)
    changes = rng.normal(
        rng.choice([0.0, 1.0, 2.0], (150, len(DOMAINS), 1), p=[0.9, 0.06, 0.04]), 1, (150, len(DOMAINS), N_QUERIES)
    )
    n_tokens = np.full(changes.shape, 5.0)
    alarmed = np.array([alarms(CHECK, *pair) for pair in zip(changes, n_tokens, strict=True)])
    possible = could_alarm(changes, n_tokens)
    assert 0 < alarmed.sum() < len(alarmed) and not possible.all()
    assert not (alarmed & ~possible).any()


def test_a_run_is_false_from_its_first_alarm_on() -> None:
    changes, n_tokens = np.zeros((3, len(DOMAINS), 2)), np.full((3, len(DOMAINS), 2), 10.0)
    changes[:2, 4, 1] = 2.0, 0.9  # of the second question, in one domain: 0.2 and 0.09 nats a token, where 0.1 are allowed
    shown = (np.full((3, len(DOMAINS), N_QUERIES), int(check >= 3)) for check in itertools.count(1))
    assert first_alarms([CHECK] * 3, changes, n_tokens, shown, 5).tolist() == [3, math.inf, math.inf]


def test_what_is_told_of_false_alarms_is_what_was_simulated() -> None:
    told = (EXAMPLES.parent / "README.md").read_text()
    found = json.loads((EXAMPLES / "false_alarms.json").read_text())
    in_all, skewed = (f"{share:.1%}".replace("%", " %") for share in (found["size"]["all"], found["size"]["by_tenth"][0]))
    assert f"passes at its 1 % in {in_all} of cases, in the most left-skewed tenth of domains in {skewed}." in " ".join(
        told.split()
    )
    _, table = told.split("| | 1 check | 10 checks | 50 checks |\n|---|---|---|---|\n")
    rows = [[int(n) for n in re.findall(r"(\d+) (?=to|%)", row)] for row in table[: table.index("\n\n")].splitlines()]
    simulated: dict[tuple[float, str], list[dict[str, float]]] = {}
    for line in found["false_runs"]:
        simulated.setdefault((line["true_change"], line["rate"]), []).append(line["within_checks"])
    assert rows == [
        [percent for n in ("1", "10", "50") for percent in sorted({round(100 * within[n]) for within in simulated[kind]})]
        for kind in sorted(simulated)
    ]
