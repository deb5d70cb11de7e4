"""Verdicts: each threshold from both sides, and what outweighs what."""

from __future__ import annotations

from typing import Any

import pytest

from samples import domain_drift, domain_forecast, forecast, snapshot
from sts_callback.config import PolicyConfig
from sts_callback.policy import judge_drift, judge_forecast
from sts_callback.records import Decision, Verdict

NAN = float("nan")
# Powers of two throughout: sums and ratios at a threshold are exact.
POLICY = PolicyConfig(
    {"law": 0.25}, min_drift=0.0625, min_transfer=0.5, patience=1, n_standard_errors=2.0, max_masked_share=0.125
)
HARM = {"nll_change": 0.5, "nll_change_se": 0.0625}
UNSURE = {"nll_change": 0.25, "nll_change_se": 0.25}


def judged_forecast(**domain: Any) -> Verdict:
    """Verdict on one protected domain; the training data's own STS_cross is 0.5, so from 0.25 on it is expected to move."""
    return judge_forecast(forecast(domain_forecast("law", **domain)), POLICY)


def judged_drift(**domain: Any) -> Verdict:
    return judge_drift([snapshot(10, domain_drift("law", **domain))], POLICY)


# What decides between harm, none and unsure, with a budget of 0.25 and 2 standard errors; the same for both judges.
HARM_CASES: list[tuple[float, float, Decision]] = [
    (0.25, 0.125, "no-go"),  # at the budget, and just 2 standard errors away from nothing
    (0.25, 0.126, "cannot tell"),  # not so sure
    (0.249, 0.0, "go"),  # within the budget
    (0.125, 0.0624, "go"),  # surely within: 0.125 + 2 * 0.0624 < 0.25
    (0.125, 0.0625, "cannot tell"),  # could be at the budget
    (0.5, 0.25, "no-go"),
    (0.5, 0.26, "cannot tell"),
    (-1.0, 0.5, "go"),  # better
    (-1.0, 0.625, "cannot tell"),  # better, but could be at the budget
    (NAN, 0.1, "cannot tell"),
    (0.5, NAN, "cannot tell"),
    (NAN, NAN, "cannot tell"),
]


@pytest.mark.parametrize(("change", "error", "decision"), HARM_CASES)
def test_harm_from_both_sides(change: float, error: float, decision: Decision) -> None:
    answer = {"nll_change": change, "nll_change_se": error}
    assert judged_forecast(sts_cross=0.5, **answer).decision == decision
    assert judged_drift(relative_drift=0.5, **answer).decision == decision


@pytest.mark.parametrize("answer", [HARM, UNSURE, {"nll_change": NAN, "nll_change_se": NAN}])
def test_what_does_not_move_is_no_threat_whatever_its_likelihood(answer: dict[str, float]) -> None:
    assert judged_forecast(sts_cross=0.2499, **answer).decision == "go"
    assert judged_drift(relative_drift=0.0624, **answer).decision == "go"


def test_what_just_moves_is_a_threat_if_it_worsens() -> None:
    assert judged_forecast(sts_cross=0.25, **HARM).decision == "no-go"
    assert judged_drift(relative_drift=0.0625, **HARM).decision == "no-go"


@pytest.mark.parametrize(("n_masked", "decision"), [(25, "no-go"), (26, "cannot tell")])  # of 200: 12.5 % and 13 %
def test_too_many_sinks_make_a_forecast_unsure(n_masked: int, decision: Decision) -> None:
    verdict = judged_forecast(sts_cross=0.5, n_masked=n_masked, n_tokens=200 - n_masked, **HARM)
    assert verdict.decision == decision
    assert ("13% of its tokens are attention sinks, more than 12%" in verdict.reasons["law"]) == (decision == "cannot tell")


def test_a_domain_without_any_token_can_not_be_forecast() -> None:
    verdict = judged_forecast(sts_cross=NAN, n_tokens=0, n_masked=0, **HARM)
    assert verdict.decision == "cannot tell"
    assert "nothing shifted in context" in verdict.reasons["law"]


@pytest.mark.parametrize("train_cross", [0.0, NAN])
def test_without_a_shift_of_the_training_data_nothing_can_be_forecast(train_cross: float) -> None:
    record = forecast(domain_forecast("law", sts_cross=0.5, **HARM), train=domain_forecast("train", sts_cross=train_cross))
    verdict = judge_forecast(record, POLICY)
    assert verdict == Verdict("cannot tell", ("law",), {"law": "nothing shifted in context, so no transfer can be read off."}, 0)


def test_drift_that_could_not_be_compared_is_unsure() -> None:
    verdict = judged_drift(relative_drift=NAN, **HARM)
    assert verdict == Verdict("cannot tell", ("law",), {"law": "no token could be compared with step 0."}, 10)


def test_reasons_name_the_domain_and_the_numbers() -> None:
    assert judged_forecast(sts_cross=0.375, **HARM).reasons == {
        "law": "expected to move (75% of the training data's own transfer, at least 50%) and to worsen "
        "(answer NLL +0.50 ± 0.06 nats a token, budget 0.25)."
    }
    assert judged_forecast(sts_cross=0.125).reasons == {
        "law": "expected to stay (25% of the training data's own transfer, under 50%)."
    }
    assert judged_drift(relative_drift=0.5, **HARM).reasons == {
        "law": "has moved (drift 50.0%, at least 6%) and worsened (answer NLL +0.50 ± 0.06 nats a token, budget 0.25)."
    }
    assert judged_drift(relative_drift=0.5).reasons["law"].startswith("has moved (drift 50.0%, at least 6%) without harm (")
    assert judged_drift(relative_drift=0.01).reasons["law"].startswith("has not moved (drift 1.0%, under 6%; ")
    assert "direction unsure" in judged_drift(relative_drift=0.5, **UNSURE).reasons["law"]
    assert "in an unknown direction" in judged_forecast(sts_cross=0.5, **UNSURE).reasons["law"]


def test_a_forecast_is_of_step_0_and_a_check_of_its_own() -> None:
    assert judged_forecast().step == 0
    assert judge_drift([snapshot(step, domain_drift("law")) for step in (10, 20)], POLICY).step == 20


def _history(*moves: bool) -> list[Any]:
    return [
        snapshot(10 * i, domain_drift("law", relative_drift=0.5 if moved else 0.01, **HARM)) for i, moved in enumerate(moves, 1)
    ]


@pytest.mark.parametrize(
    ("patience", "threat_at", "decision"),
    [
        (1, (True,), "no-go"),
        (1, (True, False), "go"),
        (2, (True,), "watch"),
        (2, (True, True), "no-go"),
        (2, (False, True), "watch"),
        (2, (True, False, True), "watch"),
        (2, (True, True, False), "go"),
        (3, (True, True), "watch"),
        (3, (False, True, True), "watch"),
        (3, (False, True, True, True), "no-go"),
    ],
)
def test_a_threat_alarms_once_it_has_held(patience: int, threat_at: tuple[bool, ...], decision: Decision) -> None:
    policy = PolicyConfig({"law": 0.25}, min_drift=0.0625, patience=patience)
    assert judge_drift(_history(*threat_at), policy).decision == decision


def test_an_unsure_check_breaks_a_threat() -> None:
    sure, unsure = domain_drift("law", relative_drift=0.5, **HARM), domain_drift("law", relative_drift=0.5, **UNSURE)
    policy = PolicyConfig({"law": 0.25}, patience=2)
    assert judge_drift([snapshot(1, unsure), snapshot(2, sure)], policy).decision == "watch"
    assert judge_drift([snapshot(1, sure), snapshot(2, unsure)], policy).decision == "cannot tell"


DRIFTS: dict[Decision, dict[str, float]] = {
    "no-go": {"relative_drift": 0.5, **HARM},
    "cannot tell": {"relative_drift": 0.5, **UNSURE},
    "go": {"relative_drift": 0.01},
}


def _two_checks(*decisions: Decision) -> Verdict:
    """Verdict on domains a, b, ... that each deserve one decision; a watched one has become a threat only now."""
    names = "abcdef"[: len(decisions)]
    checks = []
    for newest in (False, True):
        kinds = ["no-go" if d == "watch" and newest else "go" if d == "watch" else d for d in decisions]
        checks.append(snapshot(1 + newest, *(domain_drift(n, **DRIFTS[k]) for n, k in zip(names, kinds, strict=True))))
    return judge_drift(checks, PolicyConfig(dict.fromkeys(names, 0.25), patience=2))


@pytest.mark.parametrize(
    ("decisions", "expected", "threatened"),
    [
        (("go", "cannot tell", "watch", "no-go"), "no-go", ("d",)),
        (("go", "cannot tell", "watch"), "watch", ("c",)),
        (("go", "cannot tell"), "cannot tell", ("b",)),
        (("go", "go"), "go", ()),
        (("no-go", "go", "no-go"), "no-go", ("a", "c")),
        (("cannot tell", "watch", "cannot tell"), "watch", ("b",)),
    ],
)
def test_the_gravest_of_several_domains_decides(
    decisions: tuple[Decision, ...], expected: Decision, threatened: tuple[str, ...]
) -> None:
    verdict = _two_checks(*decisions)
    assert verdict.decision == expected
    assert verdict.threatened == threatened
    assert list(verdict.reasons) == list("abcdef"[: len(decisions)])


def test_the_gravest_of_several_domains_decides_a_forecast() -> None:
    worse, unsure = domain_forecast("a", sts_cross=0.5, **HARM), domain_forecast("b", sts_cross=0.5, **UNSURE)
    stays, budgets = domain_forecast("c"), {"a": 0.25, "b": 0.25, "c": 0.25}
    found = judge_forecast(forecast(worse, unsure, stays), PolicyConfig(budgets))
    assert (found.decision, found.threatened, len(found.reasons)) == ("no-go", ("a",), 3)
    found = judge_forecast(forecast(unsure, stays), PolicyConfig({"b": 0.25, "c": 0.25}))
    assert (found.decision, found.threatened, len(found.reasons)) == ("cannot tell", ("b",), 2)


def test_each_domain_has_its_own_budget() -> None:
    domains = [domain_forecast(name, sts_cross=0.5, nll_change=0.5, nll_change_se=0.0) for name in ("a", "b")]
    assert judge_forecast(forecast(*domains), PolicyConfig({"a": 0.75, "b": 0.5})).threatened == ("b",)


def test_domains_that_are_not_protected_decide_nothing() -> None:
    record = forecast(domain_forecast("law"), domain_forecast("code", sts_cross=0.5, **HARM))
    assert judge_forecast(record, POLICY).decision == "go"
    assert judge_drift([snapshot(1, domain_drift("law"), domain_drift("code", **DRIFTS["no-go"]))], POLICY).decision == "go"
    assert judge_forecast(record, PolicyConfig()) == Verdict("go", (), {}, 0)
