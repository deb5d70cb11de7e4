"""Planned checks of a run, and what each may spend of the error that the run's test may make."""

from __future__ import annotations

import dataclasses
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from samples import answers, domain_drift, snapshot
from sts_callback.config import PolicyConfig
from sts_callback.records import DriftSnapshot
from sts_callback.records.run import Looks
from sts_callback.training.looks import History, plan, resumed, unspent

POLICY = PolicyConfig({"law": 0.25})


def planned(check_on: Any = "save", *, max_steps: int = 60, batches: Any = range(30), **args: Any) -> Looks:
    defaults = {"save_strategy": "steps", "eval_strategy": "no", "gradient_accumulation_steps": 1}
    state: Any = SimpleNamespace(max_steps=max_steps, save_steps=25, eval_steps=40)
    return plan(SimpleNamespace(**(defaults | args)), state, check_on, batches)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("last_step", "between"),
    [
        (1, (1,)),
        (4, (1, 2)),
        (5, (1, 2, 5)),
        (9, (1, 2, 5)),
        (100, (1, 2, 5, 10, 20, 50, 100)),
        (499, (1, 2, 5, 10, 20, 50, 100, 200)),
    ],
)
def test_checks_come_by_themselves_evenly_on_a_log_scale(last_step: int, between: tuple[int, ...]) -> None:
    assert Looks(last_step).between == between
    assert Looks(last_step).steps == tuple(sorted({*between, last_step}))


def test_the_users_own_and_the_end_are_planned_too_each_step_once() -> None:
    assert Looks(60, 25).steps == (1, 2, 5, 10, 20, 25, 50, 60)
    assert Looks(60, 20).steps == (1, 2, 5, 10, 20, 40, 50, 60)
    assert Looks(60, 100).steps == (1, 2, 5, 10, 20, 50, 60)
    assert Looks(60, 25, after=20).steps == (25, 50, 60)


@pytest.mark.parametrize(
    ("check_on", "args", "every"),
    [
        (7, {}, 7),
        ("save", {}, 25),
        ("save", {"save_strategy": "no"}, 0),
        ("save", {"save_strategy": "epoch"}, 30),
        ("save", {"save_strategy": "epoch", "gradient_accumulation_steps": 4}, 8),  # 7.5 steps, the last of two batches
        ("save", {"save_strategy": "best", "eval_strategy": "steps"}, 40),
        ("save", {"save_strategy": "best", "eval_strategy": "epoch"}, 30),
        ("evaluate", {}, 0),
        ("evaluate", {"eval_strategy": "steps"}, 40),
        ("evaluate", {"eval_strategy": "epoch"}, 30),
        ("save", {"save_strategy": "epoch", "batches": None}, 0),  # not known beforehand
        ("save", {"save_strategy": "epoch", "batches": iter(())}, 0),
    ],
)
def test_a_plan_follows_what_the_trainer_will_do(check_on: Any, args: dict[str, Any], every: int) -> None:
    assert planned(check_on, **args) == Looks(60, every)


def test_each_planned_check_spends_an_equal_part_and_all_together_spend_it_all() -> None:
    looks = Looks(60, 25)
    assert [unspent(looks, n, step) for n, step in enumerate(looks.steps)] == [1] * 8


def test_a_check_spends_the_parts_of_those_that_were_skipped() -> None:
    looks = Looks(60)  # 1, 2, 5, 10, 20, 50, 60
    assert unspent(looks, 0, 10) == 4
    assert unspent(looks, 4, 60) == 3
    assert unspent(looks, 0, 60) == 7  # the only one


def test_a_check_beyond_the_planned_ones_may_alarm_only_in_place_of_skipped_ones() -> None:
    looks = Looks(60)
    assert unspent(looks, 3, 7) == 0  # after 1, 2 and 5
    assert unspent(looks, 2, 7) == 1  # one of them was skipped
    assert unspent(looks, 3, 10) == 1


def test_the_last_check_of_a_run_that_ends_early_takes_the_parts_of_those_that_will_not_come() -> None:
    looks = Looks(60)
    assert unspent(looks, 4, 15) == 0
    assert unspent(looks, 4, 15, is_last=True) == 3
    assert unspent(looks, 7, 61, is_last=True) == 0  # nothing is left


@pytest.mark.parametrize("seed", range(30))
def test_whichever_checks_are_made_they_spend_no_more_than_all_and_planned_ones_never_go_short(seed: int) -> None:
    draw = random.Random(seed)
    looks = Looks(draw.randrange(1, 300), draw.choice([0, 1, 7, 50]))
    made = [step for step in range(1, looks.last_step + 1) if draw.random() < draw.choice([0.1, 0.5, 0.9])]
    n_spent = 0
    for step in made:
        n_parts = unspent(looks, n_spent, step, is_last=step == made[-1])
        assert n_parts > 0 or step not in looks.steps
        n_spent += n_parts
    assert n_spent <= len(looks.steps)
    assert not made or n_spent == len(looks.steps)  # and the last check leaves none


def test_a_resumed_run_keeps_its_plan_unless_it_is_to_go_on_beyond_it() -> None:
    kept, now = Looks(60, 25), Looks(60, 10)
    assert resumed(kept, now, 30) == kept
    assert resumed(kept, Looks(40), 30) == kept
    assert resumed(None, now, 30) == now
    assert resumed(kept, Looks(200, 50), 30) == Looks(200, 50, after=30)
    assert resumed(kept, Looks(200, 50), 30).steps == (50, 100, 150, 200)


def check(step: int, change: float = 0.5, **changes: Any) -> DriftSnapshot:
    return snapshot(step, domain_drift("law", **(answers(change, 0.125) | changes)))


def test_a_history_judges_each_check_at_its_own_level() -> None:
    history = History(Looks(60), POLICY)
    assert history.newest is None
    for step, part, decision in ((1, 0.05 / 7, "no-go"), (2, 0.05 / 7, "no-go"), (3, 0.0, "watch"), (5, 0.05 / 7, "no-go")):
        history.add(check(step), is_last=False)
        verdict = history.verdict()
        assert (verdict.level, verdict.decision) == (pytest.approx(part), decision)
        assert history.newest == check(step)
    assert list(history.worst_shares) == [1, 2, 3, 5]


def test_a_threat_holds_over_as_many_checks_as_patience_says() -> None:
    history = History(Looks(60), dataclasses.replace(POLICY, patience=2))
    decisions = []
    for step, change in ((1, 0.5), (2, 0.5), (5, 0.0), (10, 0.5), (20, 0.5)):
        history.add(check(step, change), is_last=False)
        decisions.append(history.verdict().decision)
    assert decisions == ["watch", "no-go", "go", "watch", "no-go"]


@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_history_that_is_taken_up_goes_on_as_if_never_left(cut: int, patience: int) -> None:
    policy = dataclasses.replace(POLICY, patience=patience)
    steps = (1, 2, 3, 5, 7, 10, 20)
    whole = History(Looks(60), policy)
    verdicts = []
    for step in steps:
        whole.add(check(step), is_last=False)
        verdicts.append(whole.verdict())
    parts = History(Looks(60), policy)
    parts.take_up(Looks(60), [(check(step), verdict) for step, verdict in zip(steps[:cut], verdicts, strict=False)])
    for step, verdict in list(zip(steps, verdicts, strict=True))[cut:]:
        parts.add(check(step), is_last=False)
        assert parts.verdict() == verdict
    assert parts.worst_shares == whole.worst_shares


def test_a_run_that_goes_on_beyond_its_plan_has_an_error_of_its_own_for_that() -> None:
    history = History(Looks(5), POLICY)
    made = []
    for step in (1, 2, 5):
        history.add(check(step), is_last=step == 5)
        made.append((check(step), history.verdict()))
    longer = resumed(history.looks, Looks(20), 5)
    history.take_up(longer, made)
    for step in (10, 20):
        history.add(check(step), is_last=step == 20)
        assert history.verdict().level == pytest.approx(0.05 / 2)


def test_a_check_of_an_earlier_version_has_spent_nothing() -> None:
    history = History(Looks(5), POLICY)
    history.add(check(1), is_last=False)
    earlier = dataclasses.replace(history.verdict(), level=0.0)
    history.take_up(Looks(5), [(check(1), earlier)])
    levels = []
    for step in itertools.islice(itertools.count(2), 4):
        history.add(check(step), is_last=step == 5)
        levels.append(history.verdict().level)
    assert sum(levels) == pytest.approx(0.05)
