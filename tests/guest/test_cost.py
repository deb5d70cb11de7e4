"""What watching costs: it is measured, told, and kept within the limit; and it does not grow."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import ranked
from killable import together
from sts_callback.errors import ConfigError
from sts_callback.training import overhead
from sts_callback.training.overhead import Overhead, first_guess
from test_callback import checked_steps, made_callback, made_trainer


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(overhead, "time", made)
    yield made


def test_checks_keep_within_their_share_of_training_time(clock: Clock) -> None:
    spent = Overhead(0.1, expected_s=2.0)
    made = []
    for second in range(1, 101):
        clock.now += 1
        if spent.affords_check:
            with spent.counted():
                clock.now += 4
                spent.learn(4.0)  # twice the guess: from now on that is expected
            made.append(second)
    assert made == [20, 80]
    assert spent.spent_s == 8
    assert spent.training_s == 100
    assert spent.share == 0.08


def test_time_of_a_check_that_runs_counts_already(clock: Clock) -> None:
    spent = Overhead(0.5, expected_s=1.0)
    clock.now += 10
    with spent.counted():
        clock.now += 3
        assert (spent.spent_s, spent.training_s) == (3, 10)
        clock.now += 1
    assert (spent.spent_s, spent.training_s, spent.share) == (4, 10, 0.4)


def test_time_of_a_check_that_fails_counts(clock: Clock) -> None:
    spent = Overhead(0.5, expected_s=1.0)
    with pytest.raises(KeyError), spent.counted():
        clock.now += 3
        raise KeyError
    assert spent.spent_s == 3


def test_there_is_no_limit_from_one_on(clock: Clock) -> None:
    assert not Overhead(0.99, expected_s=1.0).affords_check
    assert Overhead(1.0, expected_s=1.0).affords_check


def test_the_first_guess_is_no_less_than_a_check(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes with the tokens that the model reads."""
    monkeypatch.setattr("sts_callback.measure.monitor.time", clock)

    def read(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        clock.now += kwargs["input_ids"].numel()

    callback = made_callback(check_on=1)
    trainer = made_trainer("plain", tmp_path, [callback], max_steps=2, save_strategy="no", eval_strategy="no")
    trainer.model.register_forward_pre_hook(read, with_kwargs=True)
    trainer.train()
    assert callback.forecast is not None
    guess = first_guess(callback.forecast.seconds_by_part["readings"])
    took = min(row["snapshot"]["seconds"] for row in lines(tmp_path / "sts" / "drift.jsonl"))
    assert 0 < took <= guess < 2 * took


class Slow(TrainerCallback):
    """Makes each step last a while, by the clock."""

    def __init__(self, seconds: float, passes: Callable[[float], object]) -> None:
        self.seconds, self.passes = seconds, passes

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.passes(self.seconds)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def watched_run(
    out: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, max_overhead: float | None, check_on: int = 1, **options: Any
) -> Any:
    """20 steps of 10 s each; a check is due at each and takes 3 s, by the clock."""
    from sts_callback.measure.monitor import Monitor

    check = Monitor.check

    def slow_check(monitor: Monitor, step: int, **kwargs: Any) -> Any:
        clock.now += 3
        return check(monitor, step, **kwargs)

    monkeypatch.setattr(Monitor, "check", slow_check)
    monkeypatch.setattr("sts_callback.training.session.first_guess", lambda readings_s: 5.0)

    def passes(seconds: float) -> None:
        clock.now += seconds

    callback = made_callback(check_on=check_on, max_overhead=max_overhead)
    options = {"max_steps": 20, "save_strategy": "no", "eval_strategy": "no", "gradient_accumulation_steps": 1} | options
    trainer = made_trainer("plain", out, [Slow(10.0, passes), callback], **options)
    trainer.train()
    return trainer


def test_due_checks_are_put_off_until_affordable_and_that_is_told(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = watched_run(tmp_path, clock, monkeypatch, max_overhead=0.07)
    # After 1, 2 and 5 steps whatever it takes. Then the whole training, 200 s, pays for one more, and 4 * 3 s are 7 % of 172 s.
    assert checked_steps(tmp_path) == [1, 2, 5, 10, 20]
    postponed = lines(tmp_path / "sts" / "skipped.jsonl")
    assert [row["step"] for row in postponed] == [3, 6, 11]
    assert "takes about 3.0 s and 6.0 s went into checks so far" in postponed[0]["reason"]
    assert caplog.text.count("is skipped") == 3
    told = [row for row in trainer.state.log_history if "sts/overhead_s" in row]
    assert [row["sts/overhead_s"] for row in told] == [3, 6, 9, 12, 15]
    assert [round(row["sts/overhead_share"], 4) for row in told] == [3 / 10, 6 / 20, 9 / 50, 12 / 100, 15 / 200]
    assert all(type(row["sts/overhead_share"]) is float for row in told)


def test_a_due_check_comes_as_soon_as_it_is_affordable(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watched_run(tmp_path, clock, monkeypatch, max_overhead=0.08, max_steps=40)
    # After 5 steps 9 s are spent; the whole training, 400 s, pays for one at 10 and one at 20, and each step for one that is due.
    assert checked_steps(tmp_path) == [1, 2, 5, 10, 19, 20, 27, 30, 34, 38, 40]


def test_without_a_limit_every_due_check_is_made(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watched_run(tmp_path, clock, monkeypatch, max_overhead=None, max_steps=4)
    assert checked_steps(tmp_path) == [1, 2, 3, 4]
    assert not (tmp_path / "sts" / "skipped.jsonl").exists()


@pytest.mark.parametrize(
    ("limit", "options", "checked"),
    [
        (0.03, {}, [1, 2, 5, 10, 40]),  # 12 s are 3 % of 400 s, 15 s are more
        (0.029, {}, [1, 2, 5, 40]),  # not even 12 s; since nobody asked for it, nothing is said
        (None, {}, [1, 2, 5, 10, 20, 40]),
        (None, {"check_on": 15}, [1, 2, 5, 10, 15, 20, 30, 40]),
    ],
)
def test_checks_come_by_themselves_if_the_whole_training_pays_for_them(
    limit: float | None,
    options: dict[str, Any],
    checked: list[int],
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched_run(tmp_path, clock, monkeypatch, limit, **{"check_on": 1000, "max_steps": 40, **options})
    assert checked_steps(tmp_path) == checked
    assert not (tmp_path / "sts" / "skipped.jsonl").exists()


def test_a_check_between_and_a_save_at_the_same_step_are_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 22, "save_steps": 20, "eval_strategy": "no", "gradient_accumulation_steps": 1}
    made_trainer("plain", tmp_path, [made_callback()], **options).train()
    assert checked_steps(tmp_path) == [1, 2, 5, 10, 20, 22]


def test_by_default_one_per_cent_is_the_limit(tmp_path: Path) -> None:
    """Tiny training takes next to no time, so only the first checks and the last are made; it is said that others were not."""
    from sts_callback import STSCallback
    from test_callback import PROBES, TINY_DOMAINS
    from tiny import rotated_sae

    callback = STSCallback(rotated_sae(), ["near"], domains=TINY_DOMAINS, probes=PROBES)
    made_trainer("plain", tmp_path, [callback]).train()
    assert checked_steps(tmp_path) == [1, 2, 5, 6]
    assert [row["step"] for row in lines(tmp_path / "sts" / "skipped.jsonl")] == [4]


def test_a_check_put_off_before_a_kill_is_not_made_up_for(tmp_path: Path) -> None:
    made_trainer("plain", tmp_path, [made_callback(max_overhead=0.001)], save_steps=3).train()
    (tmp_path / "sts" / "drift.jsonl").unlink()
    callback = made_callback(max_overhead=0.001)
    made_trainer("plain", tmp_path, [callback], save_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert checked_steps(tmp_path) == [5, 6]


@pytest.mark.parametrize("value", [0, -0.1, float("nan")])
def test_a_limit_that_allows_nothing_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="max_overhead: got"):
        made_callback(max_overhead=value)


def told_by_both(out: Path) -> list[Any]:
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.timeout(150)
def test_the_first_process_decides_which_checks_are_affordable(tmp_path: Path) -> None:
    together(ranked.disagree_on_cost, tmp_path)
    assert told_by_both(tmp_path) == [[1, 2, 4, 5, 7]] * 2
    assert checked_steps(tmp_path) == [1, 2, 4, 5, 7]


@pytest.mark.timeout(150)
def test_a_check_that_fails_on_one_process_is_left_out_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together(ranked.fail_on_one, tmp_path)
    assert told_by_both(tmp_path) == [[1, 3, 4]] * 2
    assert checked_steps(tmp_path) == [1, 3, 4]
    (fault,) = lines(tmp_path / "sts" / "faults.jsonl")
    assert (fault["step"], fault["what"]) == (2, "drift check")
    assert "process 1 failed with ZeroDivisionError" in fault["error"]


class Footprint(TrainerCallback):
    """What lives before each step, in tensors but for the step's batch, which are integers: their number and their bytes."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.seen: list[tuple[int, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.steps:
            return
        gc.collect()
        alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.is_floating_point()]
        self.seen.append((len(alive), sum(t.numel() * t.element_size() for t in alive)))


def test_memory_after_twenty_checks_is_that_after_one(tmp_path: Path) -> None:
    footprint = Footprint(2, 21)  # from the second step on the optimizer has its state
    callback = made_callback(check_on=1)
    options: dict[str, Any] = {"max_steps": 22, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    made_trainer("plain", tmp_path, [callback, footprint], **options).train()
    assert len(checked_steps(tmp_path)) == 22
    after_two, after_more = footprint.seen
    assert after_more == after_two


def test_the_footprint_sees_what_is_kept(tmp_path: Path) -> None:
    kept = []

    class Hoarder(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            kept.append(torch.zeros(3))

    footprint = Footprint(2, 4)
    options: dict[str, Any] = {"max_steps": 5, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no"}
    made_trainer("plain", tmp_path, [Hoarder(), footprint], **options).train()
    (n_before, bytes_before), (n_after, bytes_after) = footprint.seen
    assert (n_after - n_before, bytes_after - bytes_before) == (2, 24)
