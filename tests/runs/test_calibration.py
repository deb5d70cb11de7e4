"""What is expected at the end of a run by its rehearsal: from runs of the same size alone, those that ship and the user's own."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from samples import domain_drift, domain_forecast, forecast, rehearsal, snapshot
from sts_callback.records import Estimate
from sts_callback.records.rehearsal import Rehearsal
from sts_callback.runs.calibration import SHIPPED, expected_changes
from sts_callback.runs.ledger import Entry

GEMMA = 268_098_176


def rehearsed(change: float, n_parameters: int, at_multiple: float | None = None) -> Rehearsal:
    checks = [snapshot(5, domain_drift("law", nll_change=change))]
    if at_multiple is None:
        return rehearsal(*checks, n_parameters=n_parameters)
    found = rehearsal(*checks, snapshot(10, domain_drift("law", nll_change=at_multiple)), n_parameters=n_parameters)
    own, further = found.doses
    return Rehearsal(**vars(found) | {"doses": (own, type(further)(**vars(further) | {"multiple": 10.0}))})


def run(own: float, end: float, training_set: str, n_parameters: int = 10**9) -> Entry:
    """A run of a model that no shipped run is of."""
    before = forecast(domain_forecast("law"))
    last = snapshot(40, domain_drift("law", nll_change=end))
    made = Entry.of(before, last, rehearsed(own, n_parameters))
    return Entry(**vars(made) | {"identity": type(made.identity)(**vars(made.identity) | {"probes": training_set})})


def test_the_shipped_runs_count_for_a_model_of_their_size_alone() -> None:
    assert json.loads(SHIPPED.read_text())["n_parameters"] == GEMMA
    within = expected_changes(rehearsed(0.2, int(GEMMA * 1.05)), ())["law"]
    assert within.value == pytest.approx(0.2)
    assert within.low < within.value < within.high
    assert expected_changes(rehearsed(0.2, 4 * GEMMA), ()) == {}
    assert expected_changes(rehearsed(0.2, 0), ()) == {}


def test_a_dose_at_ten_times_the_rate_narrows_the_interval() -> None:
    one = expected_changes(rehearsed(0.02, GEMMA), ())["law"]
    two = expected_changes(rehearsed(0.02, GEMMA, 0.2), ())["law"]
    assert two.high - two.low < one.high - one.low


@pytest.mark.parametrize("n_sets", [3, 4])
def test_the_ledger_counts_from_four_training_sets_on(n_sets: int) -> None:
    entries = [run(0.1 * i, 0.1 * i + 0.01, f"set {i}") for i in range(n_sets)]
    entries += [run(0.5, 9.0, f"other {i}", n_parameters=3 * 10**9) for i in range(4)]  # of another size
    found = expected_changes(rehearsed(0.3, 10**9), entries)
    if n_sets < 4:
        assert found == {}
    else:
        assert found["law"].value == pytest.approx(0.3)
        assert 0.3 < found["law"].high < 0.6


def test_runs_that_were_not_rehearsed_tell_nothing() -> None:
    before, last = forecast(domain_forecast("law")), snapshot(40, domain_drift("law", nll_change=0.1))
    plain: Any = [Entry.of(before, last)] * 5
    assert expected_changes(rehearsed(0.3, 10**9), plain) == {}
    assert expected_changes(rehearsal(skipped="its model is sharded."), plain) == {}
    assert math.isnan(rehearsal().rate_sum) is False


def test_what_is_expected_is_told_in_a_budgets_unit() -> None:
    answered = {"query_changes": (0.0, 0.0), "query_answer_tokens": (10, 10), "query_answer_bytes": (40, 40)}
    made = rehearsal(snapshot(5, domain_drift("law", **answered)), expected={"law": Estimate(math.log(2), 0.0, math.log(4))})
    assert made.expected_in("nats/token", "law") == made.expected["law"]
    assert vars(made.expected_in("bits/byte", "law")) == pytest.approx({"value": 0.25, "low": 0.0, "high": 0.5})
    assert math.isnan(made.expected_in("points", "law").value)
    without = rehearsal(snapshot(5, domain_drift("law")))
    assert math.isnan(without.expected_in("nats/token", "law").value)
    assert math.isnan(without.expected_in("bits/byte", "law").value)
