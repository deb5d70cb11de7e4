"""What a report says, from whole runs and from what is left of others."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from logs import EMPTY, SETTINGS, check, verdict, whole_run, words
from samples import answers, domain_drift, domain_forecast, forecast, snapshot
from sts_callback.records import Check, Decision, Snippet, State, Status
from sts_callback.records.run import Fault, JudgedCheck, TimeSpent
from sts_callback.report.data import ReportData, build
from sts_callback.report.headline import alarm_rule, headline

NAN = math.nan


@pytest.mark.parametrize(
    ("decision", "threatened", "sentence"),
    [
        ("go", (), "No sign of harm to law and code before training."),
        ("no-go", ("law",), "Training is expected to make law worse."),
        (
            "not covered",
            ("code",),
            "Nothing speaks against code, but most of the change there lies outside the SAE.",
        ),
        ("cannot tell", ("law", "code"), "The evidence does not suffice for law and code."),
    ],
)
def test_a_forecast_in_a_sentence(decision: Decision, threatened: tuple[str, ...], sentence: str) -> None:
    told = headline(dataclasses.replace(EMPTY, forecast=forecast(), forecast_verdict=verdict(decision, *threatened)))
    assert (told.decision, told.step, told.sentence) == (decision, 0, sentence)
    assert "not what training did" in told.notes[0]


@pytest.mark.parametrize(
    ("decision", "threatened", "sentence"),
    [
        ("go", (), "At step 7, within budget: law and code."),
        ("watch", ("law",), "At step 7, law may be on course to pass a budget: not surely, or not for long enough to alarm."),
        ("no-go", ("law", "code"), "At step 7, the first check, law and code have got worse."),
        (
            "not covered",
            ("law",),
            "At step 7, nothing speaks against law, but most of the change there lies outside the SAE.",
        ),
        ("cannot tell", ("law",), "At step 7, the evidence does not suffice for law."),
    ],
)
def test_a_check_without_states_in_a_sentence(decision: Decision, threatened: tuple[str, ...], sentence: str) -> None:
    told = headline(dataclasses.replace(EMPTY, checks=(check(7, verdict(decision, *threatened, step=7)),)))
    assert (told.decision, told.step, told.sentence) == (decision, 7, sentence)
    about = set(threatened) or {"law", "code"}
    assert set(told.reasons) == about
    assert set(told.other_reasons) == {"law", "code"} - about


@pytest.mark.parametrize(
    ("states", "sentence"),
    [
        ({"law": "over"}, "At step 7, the first check, law is over its budget."),
        ({"law": "on course"}, "At step 7, the first check, law is on course to pass its budget."),
        (
            {"law": "over", "code": "on course"},
            "At step 7, the first check, law is over its budget, and code is on course to pass its budget.",
        ),
        ({"law": "over", "code": "over"}, "At step 7, the first check, law and code are over their budgets."),
        (
            {"law": "on course", "code": "on course"},
            "At step 7, the first check, law and code are on course to pass their budgets.",
        ),
    ],
)
def test_an_alarm_says_who_is_over_and_who_on_course(states: dict[str, State], sentence: str) -> None:
    found = verdict("no-go", *states, step=7, states={"law": "within", "code": "within"} | states)
    assert headline(dataclasses.replace(EMPTY, checks=(check(7, found),))).sentence == sentence
    later = headline(dataclasses.replace(EMPTY, checks=(check(6), check(7, found)))).sentence
    assert later == sentence.replace("the first check, ", "")


def test_the_best_checkpoint_on_disk_is_named_with_what_it_costs() -> None:
    law, code = domain_drift("law", **answers(0.025)), domain_drift("code", **answers(0.0))
    found = JudgedCheck(snapshot(20, law, code), verdict("go", step=20), None)
    note = "Best checkpoint on disk: checkpoint-20; the domain worst off there had used up 25% of its budget."
    assert note in headline(whole_run(checks=(found, check(30)), best_checkpoint=20)).notes
    assert not any("checkpoint" in note for note in headline(whole_run(checks=(found,))).notes)


@pytest.mark.parametrize(("status", "is_told"), [("warn", True), ("pass", False)])
def test_too_few_queries_are_told_beside_a_verdict_that_is_no_alarm(status: Status, is_told: bool) -> None:
    weak = Check("alarm power", status, "smallest harm: law 0.19", "more queries for law, whose budget is smaller")
    note = "alarm power: smallest harm: law 0.19; more queries for law, whose budget is smaller."
    made = forecast(domain_forecast("law"), checks=(weak,))
    for run in (whole_run(forecast=made, checks=()), whole_run(forecast=made, checks=(check(10, verdict("go", step=10)),))):
        assert (note in headline(run).notes) == is_told
    assert note not in headline(whole_run(forecast=made)).notes  # the harm has been found


def test_an_alarm_is_told_by_the_rule_that_it_followed() -> None:
    now = alarm_rule(SETTINGS, (1, 2, 5, 10, 20, 30))
    assert "surely above half the budget (one-sided t test over queries), at one check" in now
    assert "err in 5.0% of runs, over all protected domains and 6 planned checks together" in now
    assert now.endswith("6 planned checks together.")
    assert alarm_rule(SETTINGS, (7, 30)).endswith("6 planned checks together, of which 1 was made.")  # 7 was not planned
    assert "permutation test at 0.05" in alarm_rule(dataclasses.replace(SETTINGS, looks=None), ())


def test_no_sign_of_harm_by_a_rehearsal_is_one_after_its_steps() -> None:
    assert headline(whole_run(checks=())).sentence == "No sign of harm to law and code after the rehearsed steps."
    forecast_alone = whole_run(checks=(), rehearsal=None, rehearsal_verdict=None)
    assert headline(forecast_alone).sentence == "No sign of harm to law and code before training."


def test_where_nothing_was_protected_nothing_is_judged() -> None:
    told = headline(dataclasses.replace(EMPTY, checks=(check(7, verdict("go", step=7, about=())),)))
    assert told.decision is None
    assert "nothing to judge" in told.sentence


def test_what_bears_on_the_verdict_is_noted() -> None:
    lost = Fault(40, "drift check, 1024 tokens a batch", "MemoryError()", "")
    ended = check(40, verdict("go", step=40))
    notes = " ".join(headline(whole_run(faults=(lost,))).notes)
    assert "Before training, the rehearsal said: go. In context, without any step, the forecast said: go." in notes
    assert "Before training, the forecast said: go." in headline(whole_run(rehearsal_verdict=None)).notes
    assert "A drift check at step 40 failed" in notes
    notes = " ".join(headline(whole_run(checks=(*whole_run().checks, ended), unreadable=("x is cut.",))).notes)
    assert re.search(r"[Aa]larm .*\blaw\b.*step 30\b", notes)
    assert "2 failures of ours" in notes
    assert "x is cut." in notes
    own = forecast(domain_forecast(), train_source="own rollouts")
    assert "own best-rewarded rollouts" in " ".join(headline(whole_run(forecast=own)).notes)


def test_series_follow_the_checks_and_tell_alarms() -> None:
    drift = build(whole_run()).drift
    assert drift is not None
    assert drift.steps == (10, 20, 30)
    assert list(drift.series) == ["train", "law", "code"]
    assert [e.value for e in drift.series["law"].drift] == [0.125, 0.25, 0.5]
    assert (drift.series["law"].alarmed_at, drift.series["law"].watched_at) == ((30,), (20,))
    assert (drift.series["code"].alarmed_at, drift.series["code"].watched_at) == ((), ())
    assert drift.superseded_at == 30


def test_a_domain_that_a_check_lacks_is_unknown_there() -> None:
    drift = build(whole_run(checks=(dataclasses.replace(check(10), snapshot=snapshot(10)), check(20)))).drift
    assert drift is not None
    assert math.isnan(drift.series["law"].drift[0].value)
    assert drift.series["law"].drift[1].value == 0.125


def test_the_same_verdict_in_a_row_is_told_once() -> None:
    judged = [verdict("go"), verdict("go"), verdict("watch", "law"), verdict("watch", "code"), verdict("go")]
    drift = build(whole_run(checks=tuple(check(s, dataclasses.replace(v, step=s)) for s, v in enumerate(judged, 1)))).drift
    assert drift is not None
    assert [(s.decision, s.threatened, s.first_step, s.last_step, s.n_checks) for s in drift.verdicts] == [
        ("go", (), 1, 2, 2),
        ("watch", ("law",), 3, 3, 1),
        ("watch", ("code",), 4, 4, 1),
        ("go", (), 5, 5, 1),
    ]


def test_the_threatened_come_first_then_the_protected_then_what_moves_most() -> None:
    crosses = {"art": 0.9, "law": 0.1, "code": 0.2, "maths": 0.95, "void": NAN}
    expected = forecast(*(domain_forecast(name, sts_net=cross) for name, cross in crosses.items()))
    logged = whole_run(forecast=expected, rehearsal_verdict=verdict("no-go", "law"), checks=())
    assert build(logged).domains == ("law", "code", "maths", "art", "void")


def test_budgets_are_unknown_without_settings() -> None:
    assert build(whole_run()).budgets == {"law": 0.1, "code": 0.2}
    unknown = build(whole_run(settings=None)).budgets
    assert list(unknown) == ["law", "code"]
    assert all(math.isnan(budget) for budget in unknown.values())


def test_features_of_the_forecast_and_of_the_drift_are_told_in_turn() -> None:
    told = build(whole_run(top_examples=(words(99), words(3), words(7), words(11), words(4))))
    assert [(f.words.feature, f.forecast_rank, f.moved_rank) for f in told.features] == [(7, 1, 1), (3, 2, 2), (11, 3, 0)]
    assert told.n_features_untold == 2


def test_features_alone_are_told_too() -> None:
    assert [f.words.feature for f in build(dataclasses.replace(EMPTY, top_examples=(words(99), words(3)))).features] == [99, 3]


def test_long_quotations_are_shortened_around_what_fires() -> None:
    long = words(7, snippets={"train": (Snippet("a" * 500 + "!", "t" * 500, "!" + "b" * 500, 1.0),)})
    (snippet,) = build(whole_run(top_examples=(long,))).features[0].words.snippets["train"]
    assert snippet.before.endswith("a!") and snippet.after.startswith("!b")
    assert len(snippet.before) == len(snippet.after) == 90
    assert len(snippet.token) == 40


def test_time_is_summed_over_sessions() -> None:
    cost = build(whole_run()).cost
    assert cost.training_s == 125
    assert cost.overhead_share == 3 / 125
    assert (cost.n_checks, cost.checks_s, cost.longest_check_s) == (3, 7.5, 2.5)


@pytest.mark.parametrize("time", [None, TimeSpent(1.0, 0.0)])
def test_an_overhead_that_is_not_known_is_none(time: TimeSpent | None) -> None:
    assert math.isnan(build(whole_run(checks=(check(10, time=time),))).cost.overhead_share)


def test_a_fault_that_comes_again_is_told_once() -> None:
    (fault,) = build(whole_run()).faults
    assert (fault.first.step, fault.n_times, fault.last_step) == (5, 2, 6)


def test_several_saes_are_told_side_by_side() -> None:
    other = forecast(domain_forecast("law", sts_net=0.5), domain_forecast("code"))
    transfers = build(whole_run(other_forecasts=(other,))).transfers
    assert [by["law"] for by in transfers.values()] == [0.75, 0.5]
    assert len(transfers) == 2
    assert build(whole_run()).transfers == {}


@pytest.mark.parametrize("logged", [whole_run(), whole_run(checks=()), whole_run(forecast=None), EMPTY])
def test_the_story_as_json_is_strict_has_a_version_and_comes_back(logged: object) -> None:
    story = build(logged)  # type: ignore[arg-type]
    text = story.to_json()
    assert json.loads(text)["schema_version"] == 1
    assert ReportData.from_json(text).to_json() == text
