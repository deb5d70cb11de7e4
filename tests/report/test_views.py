"""Forecast, rehearsal and check on the screen: the verdict first, one table, what it rests on, what to do. Nothing twice."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samples import GO, answers, domain_drift, domain_forecast, estimate, forecast, rehearsal, snapshot
from sts_callback.cli import parser
from sts_callback.config import PolicyConfig
from sts_callback.policy import judge_drift, judge_forecast, judge_rehearsal
from sts_callback.records import Check, DriftSnapshot, Estimate, Forecast, TokenAccuracy, Verdict
from sts_callback.records.run import Given
from sts_callback.report.advice import advice_on
from sts_callback.report.headline import alarms_since
from sts_callback.report.terminal.check import check_view
from sts_callback.report.terminal.forecast import forecast_view
from sts_callback.report.terminal.rehearsal import not_rehearsed, rehearsal_view
from sts_callback.training.arguments import budgets_in

POLICY = PolicyConfig({"law": 0.1, "code": 0.1})
NAN = float("nan")
GIVEN = Given(
    f"my models/base --x/{'long/' * 20}",
    "saes/layer 12",
    "it's.jsonl",
    {},
    learning_rate=2e-3,
    steps=300,
    batch_size=4,
    lora_r=8,
    probes={"n_queries": 28},
)
NAMES = ("code", "everyday", "law", "health", "translation")


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal that runs the tests wants."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def before(record: Forecast, policy: PolicyConfig = POLICY, **options: Any) -> str:
    return forecast_view(record, judge_forecast(record, policy), policy, **{"colour": False, **options})


def harmed(law: float = 0.5, code: float = 0.0, step: int = 20, **changes: Any) -> DriftSnapshot:
    moved = {"relative_drift": 0.3, **changes}
    return snapshot(step, domain_drift("law", **moved, **answers(law, 0.05)), domain_drift("code", **answers(code, 0.01)))


def during(check: DriftSnapshot, policy: PolicyConfig = POLICY, **options: Any) -> str:
    return check_view(check, judge_drift([check], policy), policy.budgets, **{"colour": False, **options})


def told_rehearsal(law: float = 0.5, max_overhead: float = 1.0, **changes: Any) -> str:
    found, record = rehearsal(harmed(law, step=5), **changes), forecast(domain_forecast("law"), domain_forecast("code"))
    judged = judge_rehearsal(found, POLICY)
    in_context = judge_forecast(record, POLICY)
    return rehearsal_view(found, judged, record, in_context, POLICY.budgets, max_overhead=max_overhead, colour=False)


def rows(text: str) -> dict[str, str]:
    """Of the table, by the domain: the rest of its row."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("domain "))
    found = {}
    for line in lines[head + 1 :]:
        if not (made := re.match(r"[! ] (\S+)(.*)", line)):
            break
        found[made[1]] = " ".join(made[2].split())
    return found


def titles(text: str) -> list[str]:
    return re.split(
        r"\s{2,}| (?=moves|moved|now|budget|in context|after)", next(x for x in text.splitlines() if x[:7] == "domain ")
    )


WILD = {"nll_change": estimate(-12.25, -113.0, 11.0)}
SHOWN: dict[str, Callable[[], str]] = {
    "forecast": lambda: before(forecast(*(domain_forecast(name) for name in NAMES))),
    "forecast with past runs": lambda: before(
        forecast(domain_forecast("law"), domain_forecast("code")), expected={"law": estimate(1)}
    ),
    "threatening forecast": lambda: before(forecast(domain_forecast("law", nll_change=0.5), domain_forecast("code"))),
    "rehearsal": lambda: told_rehearsal(expected={"law": estimate(0.7, 0.2, 1.2)}),
    "check": lambda: during(harmed(0.0)),
    "alarm": lambda: during(harmed(), output_dir=Path("runs/a-folder-with-a-long-name/" * 3)),
    "wild numbers": lambda: during(snapshot(20, domain_drift("law", **WILD), domain_drift("code", **WILD))),
}


@pytest.mark.parametrize("what", SHOWN)
def test_the_verdict_comes_first_then_one_narrow_table_of_at_most_six_columns(what: str) -> None:
    text = SHOWN[what]()
    first, *rest = text.splitlines()
    assert re.match(r"STS (forecast|rehearsal|step 20): (GO|NO-GO|ALARM|CANNOT TELL), ", first)
    assert sum(line.startswith("domain ") for line in rest) == 1
    assert len(titles(text)) <= 6
    option = re.compile(r" +--[a-z-]+ \S+")  # of a command: it stays with its value, however long that is
    assert [line for line in text.splitlines() if len(line) > 80 and not option.fullmatch(line)] == []
    numbers = re.findall(r"[-+]\d+\.\d+ \[", text)
    assert len(numbers) == len(set(numbers)) or what in ("wild numbers", "rehearsal")  # the table has them, and nothing else


def test_a_forecast_says_how_each_domain_stands_against_its_budget() -> None:
    policy = PolicyConfig({"law": 0.1, "code": "2 points", "health": 0.3})
    record = forecast(
        domain_forecast("law", nll_change=estimate(0.5, 0.4, 0.6), sts_net=0.25),
        domain_forecast("code", accuracy_change=estimate(-0.03, -0.04, -0.02)),
        domain_forecast("health", nll_change=estimate(0.35, -0.1, 0.8)),
        domain_forecast("prose", nll_change=0.9),
    )
    text = before(record, policy)
    assert text.startswith("STS forecast: NO-GO, training is expected to make law and code worse\n")
    assert rows(text) == {
        "law": "+0.50 [+0.40, +0.60] 25% over 0.10",
        "code": "+3.0 [+2.0, +4.0] 12% over 2 points",
        "health": "+0.35 [-0.10, +0.80] 12% cannot tell",
        "prose": "+0.90 [+0.90, +0.90] 12%",
    }
    assert "By 8 queries a domain, training examples in context; rate and length unknown." in text


def test_past_runs_add_a_column() -> None:
    record = forecast(domain_forecast("law"), domain_forecast("code"))
    text = before(record, expected={"law": estimate(0.2, 0.1, 0.3)})
    assert "expected at the end" in text
    assert "Expected: by past runs of like length and rate, 80% intervals." in " ".join(text.split())
    assert rows(text)["law"].startswith("+0.20 [+0.10, +0.30] 0.00 [0.00, 0.00]")
    assert "xpected" not in before(record)


def test_nobody_protected_means_nothing_judged_and_no_column_for_it() -> None:
    text = before(forecast(domain_forecast("law")), PolicyConfig())
    assert text.splitlines()[0] == "STS forecast: no domain is protected, so there is nothing to judge"
    assert "budget" not in text
    assert rows(text) == {"law": "0.00 [0.00, 0.00] 12%"}


def test_what_weakens_a_forecast_stands_below_it() -> None:
    checks = (Check("L0", "warn", "120 active features a token, 47 nominal", "take another"), Check("layer", "pass", "12", ""))
    for source, n_lines in (("own rollouts", 1), ("reference answers", 0)):
        text = before(forecast(domain_forecast("law"), domain_forecast("code"), checks=checks, train_source=source))
        assert text.count("best-rewarded rollouts") == n_lines
        assert "\nL0: 120 active features a token, 47 nominal; take another." in text
        assert "layer: 12" not in text
    unknown = Check("layer", "warn", "the fit at other layers is unknown", "")
    assert (
        "\nlayer: the fit at other layers is unknown.\n"
        in before(forecast(domain_forecast("law"), domain_forecast("code"), checks=(unknown,))) + "\n"
    )


def test_where_it_cannot_be_told_the_reason_stands_and_no_advice() -> None:
    text = before(forecast(domain_forecast("law", nll_change=estimate(0.2, -0.1, 0.3)), domain_forecast("code")))
    assert "\nlaw: direction unsure" in text and "\ncode: " not in text
    assert "What to do" not in text
    many = {f"d{i}": 0.1 for i in range(5)}
    verdict = Verdict("cannot tell", tuple(many), dict.fromkeys(many, "why."), 0)
    shown = forecast_view(forecast(*map(domain_forecast, many)), verdict, PolicyConfig(many), colour=False)
    assert shown.count(": why.") == 3 and "2 more domains likewise." in shown


def test_a_rehearsal_has_what_is_expected_what_was_found_and_what_it_rests_on() -> None:
    text = told_rehearsal(expected={"law": estimate(0.7, 0.2, 1.2)})
    assert text.startswith("STS rehearsal: NO-GO, training is expected to make law worse\n")
    assert rows(text)["law"] == "+0.70 [+0.20, +1.20] +0.50 [+0.48, +0.52] 30.0% over 0.10"
    assert rows(text)["code"] == "0.00 [0.00, 0.00] 1.0% within 0.10"
    assert [*rows(text)] == ["law", "code", "train"]
    flat = " ".join(text.split())
    assert "By 5 steps at the peak rate of 0.001, put back; 60 are planned; 32 queries a domain; 12 s." in flat
    assert (
        "The forecast, by examples in context, said: go. It does not know the rate. The forecast named 2 of the 3 features"
        in flat
    )
    assert "Go back to" not in text  # nothing has happened yet
    assert "A check takes as long as 10 steps of training." in flat  # 2.5 s against 0.25 s
    assert "expected at the end" not in told_rehearsal()


WIDE = estimate(0.7, -0.2, 1.6)


def decides(text: str) -> str:
    """What stands between the table and what it rests on."""
    below = text.split("\n  train ")[1]
    return " ".join(below[below.index("\n") : below.index("\nBy ")].split())


def test_where_another_figure_seems_to_say_otherwise_one_line_says_which_decides() -> None:
    measured = "law: the change after 5 steps decides, not the expected one."
    assert decides(told_rehearsal(expected={"law": WIDE})) == measured  # a no-go, whose expected interval holds 0
    assert decides(told_rehearsal(expected={"law": estimate(-0.3, -0.5, -0.1)})) == measured  # a no-go, expected to get better
    assert decides(told_rehearsal(0.0, expected={"law": estimate(0.2, 0.1, 0.3)})) == measured  # a go, expected over the budget
    assert decides(told_rehearsal(expected={"law": estimate(0.7, 0.2, 1.2)})) == ""
    assert decides(told_rehearsal(0.0, expected={"law": estimate(0.0, -0.29, 0.44)})) == measured  # a go, perhaps over the budget
    assert decides(told_rehearsal(0.0, expected={"law": estimate(0.02, -0.2, 0.09)})) == ""
    assert decides(during(harmed(), expected={"law": WIDE})) == "law: the change now decides, not the expected one."
    assert decides(during(harmed(), expected={})) == decides(during(harmed())) == ""


def test_a_watch_by_the_expected_change_says_so() -> None:
    check = harmed(0.0, step=5)
    made = rehearsal(check, check, expected={"law": WIDE})
    found = dataclasses.replace(made, doses=(made.doses[0], dataclasses.replace(made.doses[1], multiple=10.0)))
    judged = judge_rehearsal(found, POLICY)
    text = rehearsal_view(found, judged, forecast(domain_forecast("law")), GO, POLICY.budgets, colour=False)
    assert text.startswith("STS rehearsal: WATCH, law may pass a budget by the end of training\n")
    assert decides(text) == "law: the expected change decides, not that after 5 steps."


def test_where_a_test_is_surer_than_the_interval_it_says_that_it_is_a_test() -> None:
    check = snapshot(20, domain_drift("law", **answers(0.5, 1.43)), domain_drift("code"))
    text = during(check, PolicyConfig({"law": 0.1}))
    assert text.startswith("STS step 20: WATCH, ")
    assert decides(text) == "law: a one-sided test against half the budget decides, not the interval."


@pytest.mark.parametrize(
    ("max_overhead", "told"),
    [
        (
            0.01,
            "; max_overhead=0.01 leaves no time for a check before the last one, max_overhead=None checks whenever asked.",
        ),  # 60 planned steps pay for 0.06 checks
        (0.2, "; max_overhead=0.2 leaves time for 1 check before the last one, max_overhead=None checks whenever asked."),
        (0.5, "; max_overhead=0.5 leaves time for 3 checks before the last one, max_overhead=None checks whenever asked."),
        (1.0, "."),
    ],
)
def test_a_rehearsal_says_how_many_checks_the_training_pays_for(max_overhead: float, told: str) -> None:
    flat = " ".join(told_rehearsal(max_overhead=max_overhead).split())
    assert f"A check takes as long as 10 steps of training{told}" in flat


def test_a_long_training_pays_for_all_checks() -> None:
    assert "10 steps of training." in " ".join(told_rehearsal(max_overhead=0.2, steps_planned=500).split())


@pytest.mark.parametrize(("low", "is_told"), [(0.01, True), (0.0, False), (-0.01, False)])
def test_training_that_harms_its_own_data_is_told(low: float, is_told: bool) -> None:
    train = domain_drift("train", nll_change=estimate(0.25, low, 0.5))
    check = dataclasses.replace(harmed(), train=train)
    record = forecast(domain_forecast("law"))
    told = "The training data itself has got worse: the learning rate is too high to learn."
    before = rehearsal_view(rehearsal(check), GO, record, GO, POLICY.budgets, colour=False)
    policy_writes = dataclasses.replace(check, output_drift=estimate(0.1, 0.0, 0.2))
    assert (told in " ".join(during(check).split())) == (told in " ".join(before.split())) == is_told
    assert told not in " ".join(during(policy_writes).split())  # a policy's own rollouts are no aim of training


def test_at_the_last_check_the_end_is_no_longer_expected() -> None:
    expected = {"law": estimate(0.5, 0.25, 0.75)}
    assert "expected at the end" in during(harmed(), expected=expected, next_step=50)
    last = during(harmed(), expected=expected)
    assert "was expected" in last and "expected at the end" not in last


def test_a_rehearsal_says_at_which_rates_and_leaves_out_a_cost_that_is_not_known() -> None:
    check = harmed(step=5)
    found = rehearsal(check, check, step_s=math.nan)
    made = rehearsal_view(found, GO, forecast(domain_forecast("law")), GO, POLICY.budgets, colour=False)
    flat = " ".join(made.split())
    assert "By 5 steps at the peak rate of 0.001, then 5 at 0.004, put back; 60 are planned" in flat
    assert "A check takes" not in flat


def test_why_there_is_no_rehearsal_is_told_in_a_line() -> None:
    shown = not_rehearsed(rehearsal(skipped="its model is sharded."), colour=False)
    assert shown == "STS: this run is not rehearsed: its model is sharded."


def test_an_alarm_says_what_happened_since_when_and_what_to_do_once() -> None:
    accuracy = TokenAccuracy(0.46, 0.44, estimate(-0.02, -0.03, -0.01), 41, 3, 17, (-2, 0))
    checks = [harmed(step=step, accuracy=accuracy) for step in (10, 20)]
    verdicts = [dataclasses.replace(judge_drift([check], POLICY), best_checkpoint=5) for check in checks]
    first, second = (
        check_view(
            check,
            verdict,
            POLICY.budgets,
            since=alarms_since(verdicts[:n]),
            output_dir=Path("runs/first"),
            given=GIVEN,
            colour=False,
        )
        for n, (check, verdict) in enumerate(zip(checks, verdicts, strict=True), 1)
    )
    assert first.startswith("STS step 10: ALARM, law is over its budget\n")
    assert "\nlaw: token accuracy 46.0% to 44.0%.\n" in first
    assert "Go back to runs/first/checkpoint-5, the best on disk." in " ".join(first.split())
    assert second.startswith("STS step 20: ALARM, law is over its budget since step 10\n")
    assert "What to do" not in second  # it was said when the alarm began


def typed(text: str) -> list[argparse.Namespace]:
    """The commands in a text, as the program reads them from a shell."""
    lines = [line for line in text.replace(" \\\n", "").splitlines() if "sts-callback" in line]
    return [parser().parse_args(shlex.split(line)[1:]) for line in lines]


def test_the_commands_of_an_alarm_can_be_typed_as_they_stand() -> None:
    text = during(harmed(), output_dir=Path("runs/my run"), given=GIVEN)
    blame, rehearse = typed(text)
    assert [command.run.__module__.rpartition(".")[2] for command in (blame, rehearse)] == ["blame", "rehearse"]
    assert blame.run_dir == Path("runs/my run") and blame.protect == ["law"]
    for command in (blame, rehearse):
        assert (command.model, command.sae, command.train) == (GIVEN.model, GIVEN.sae, GIVEN.train)
    assert rehearse.learning_rate == [0.0002, 0.0007]
    assert (rehearse.lora_r, rehearse.full, rehearse.batch_size, rehearse.steps_planned) == (8, False, 4, 300)
    assert (rehearse.n_queries, rehearse.max_tokens) == (28, None)
    flat = " ".join(text.split())
    assert "Find a rate that keeps the budget: sts-callback rehearse" in flat and "Replace " not in flat
    assert "No checkpoint of an earlier check keeps the budgets" in flat  # there is none on disk
    *_, full = typed(during(harmed(), given=dataclasses.replace(GIVEN, lora_r=0)))
    assert (full.lora_r, full.full) == (None, True)


def test_the_commands_of_an_alarm_ask_for_the_budgets_of_the_run() -> None:
    policy = PolicyConfig({"law": 0.05, "code": "2 points", "health": 0.1})
    check = harmed()
    check = dataclasses.replace(check, domains=check.domains | {"health": domain_drift("health")})
    _, rehearse = typed(during(check, policy, given=GIVEN))
    asked = ["law=0.05", "code=2 points", "health"]
    assert rehearse.protect == asked and budgets_in(asked, "--protect") == policy.budgets


def test_what_is_not_known_of_a_run_is_left_open_and_one_line_says_what_to_put_there() -> None:
    text = during(harmed(), given=Given())
    assert [(one.model, one.sae, one.train) for one in typed(text.replace("RATE", "1e-3"))] == [("MODEL", "SAE", "FILE")] * 2
    flat = " ".join(text.split())
    assert "keeps the budget; add --lora-r, --batch-size and --steps-planned as in your run:" in flat
    assert flat.count("Replace ") == 1
    assert flat.endswith(
        "Replace MODEL by the model's folder or hub id, SAE by the SAE's folder or name, FILE by a file of your rows, as "
        "Dataset.to_json writes it and RATE by rates below the run's own."
    )
    assert "Replace FILE by a file of your rows, as Dataset.to_json writes it." in " ".join(
        during(harmed(), given=dataclasses.replace(GIVEN, train="")).split()
    )


def test_an_alarm_at_the_first_check_says_that_there_was_none_before() -> None:
    assert during(harmed(), is_first=True).startswith("STS step 20: ALARM at the first check, law is over its budget\n")
    assert during(harmed(0.0), is_first=True).startswith("STS step 20: GO, within budget: law and code\n")


def test_an_alarm_that_another_domain_joins_says_again_what_to_do() -> None:
    both = harmed(code=0.6)
    text = during(both, since={"law": 10, "code": 20})
    assert text.startswith("STS step 20: ALARM, law and code are over their budgets since step 10 and 20\n")
    assert "--protect law --protect code" in " ".join(text.replace("\\\n", "").split())


def test_a_check_says_when_the_next_one_comes() -> None:
    assert "Next planned check: step 50." in during(harmed(0.0), next_step=50)
    assert "Next planned check" not in during(harmed(0.0))


def test_a_check_shows_the_worst_first_the_training_data_last_and_few_that_nobody_protects() -> None:
    others = [domain_drift(f"d{i}", nll_change=i / 10) for i in range(9)]
    check = snapshot(20, *others, domain_drift("law", **answers(0.0, 0.1)), domain_drift("code", **answers(0.5, 0.1)))
    text = during(check)
    assert [*rows(text)] == ["code", "law", "d8", "d7", "d6", "d5", "d4", "d3", "train"]
    assert "3 more domains that nobody protects: in the report." in " ".join(text.split())


def test_a_domain_without_a_number_moves_no_other() -> None:
    changes = {"a": 0.1, "b": NAN, "c": 0.3}
    text = before(forecast(*(domain_forecast(name, nll_change=change) for name, change in changes.items())), PolicyConfig())
    assert [*rows(text)] == ["c", "a", "b"]
    assert rows(text)["b"].startswith("\N{EN DASH} ")


def test_what_the_table_has_no_column_for_is_told_where_it_is_known() -> None:
    check = harmed(0.0)
    assert "policy writes" not in during(check)
    assert "has moved by 12.5% [-6.2%, 25.0%]." in during(dataclasses.replace(check, output_drift=Estimate(0.125, -0.0625, 0.25)))
    broken = dataclasses.replace(check, train=domain_drift("train", n_not_finite=3))
    assert "Training has diverged: the model gives NaN or infinite numbers on train." in " ".join(during(broken).split())


@pytest.mark.parametrize("name", ["my law: v2", "code[py]", "[bold]"])
def test_names_are_shown_as_they_are_whatever_they_hold(name: str) -> None:
    text = before(forecast(domain_forecast(name, nll_change=0.5)), PolicyConfig({name: 0.1}))
    assert f"\n! {name} " in text and f"make {name} worse" in text


def test_colour_shows_only_on_a_terminal_that_wants_it_and_changes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    record = forecast(domain_forecast("law", nll_change=0.5), domain_forecast("code"))
    plain = before(record)
    assert "\x1b[" not in plain and "\x1b[" not in before(record, colour=None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured = before(record, colour=None)
    assert "\x1b[" in coloured
    assert "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert before(record, colour=None) == plain


def test_advice_has_the_file_of_a_domain_of_ones_own_alone_and_a_new_rate_must_suit_all() -> None:
    verdict = Verdict("no-go", ("bikes", "law"), {"bikes": "over", "law": "over", "code": "within"}, 0)

    def domains(given: Given) -> list[list[str]]:
        commands = [one.command[1:] for one in advice_on(verdict, Path("run"), 0, given, {}, has_sae=True) if one.command]
        blame, rehearse = map(parser().parse_args, commands)
        assert (blame.protect, rehearse.protect) == (["bikes", "law"], ["bikes", "law", "code"])
        return [blame.domain, rehearse.domain]

    assert domains(GIVEN) == [["bikes=FILE"]] * 2
    own = {"bikes": "my bikes.jsonl", "law": "", "code": "code.jsonl"}  # two of them in the place of shipped ones
    found = ["bikes=my bikes.jsonl", "law=FILE"]
    assert domains(dataclasses.replace(GIVEN, domains=own)) == [found, [*found, "code=code.jsonl"]]
