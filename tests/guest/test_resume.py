"""A run that is killed at any moment and resumed is the run that was never killed: same training, same baseline, same log."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import TrainerCallback

from guest.runs import same
from killable import Run, outcome, session, whole_checkpoints
from sts_callback.errors import CannotTell
from sts_callback.measure.step_zero import StepZeroReference
from test_callback import StopAt, checked_steps, made_callback, made_trainer
from tiny import tiny_model

pytestmark = pytest.mark.timeout(180)

RUNS = {
    "plain, each save": Run("plain", check_on="save"),
    "sft, lora, each save": Run("sft", lora=True, check_on="save", restore=True),
    "plain, lora, each step": Run("plain", lora=True, check_on=1, restore=True),
    "sft, each evaluation": Run("sft", check_on="evaluate"),
}
MOMENTS = [
    "probe",
    "half of drift.jsonl",
    "half of features.jsonl",
    "half of forecast.part",
    "written, not synced",
    "replacing a file",
    "training step",
    "saving",
    "saving the state",
    "saved, not checked",
]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that was never killed, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("whole")
            session(RUNS[name], made[name])
        return made[name]

    return folder


def timeless(value: Any) -> Any:
    """The same without what the clock decides, and what the trainers themselves count anew after a resume."""
    if isinstance(value, dict):
        clock = ("seconds", "seconds_by_part", "time", "sts/check_s", "sts/overhead_s", "sts/overhead_share")
        ends = ("_runtime", "_per_second", "train_loss", "num_tokens")
        return {k: timeless(v) for k, v in value.items() if k not in clock and not k.endswith(ends)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def digest_of(folder: Path) -> str:
    """Of the baseline in a run's folder; the file's own bytes differ, safetensors writes metadata in any order."""
    with safe_open(folder / "baseline.safetensors", framework="pt") as file:
        return StepZeroReference.load(folder / "baseline.safetensors", file.metadata()["fingerprint"]).digest


def log_of_ours(out: Path) -> dict[str, Any]:
    """Everything that the run's folder says."""
    folder = out / "sts"
    lines = {f.name: [json.loads(line) for line in f.read_text().splitlines()] for f in folder.glob("*.jsonl")}
    return {
        "forecast": timeless(json.loads((folder / "forecast.json").read_text())),
        "baseline": digest_of(folder),
        **timeless(lines),
    }


def assert_same_run(out: Path, whole: Path) -> None:
    here, there = outcome(out), outcome(whole)
    assert same(here["weights"], there["weights"])
    assert same(timeless(here["log"]), timeless(there["log"]))
    ours, theirs = log_of_ours(out), log_of_ours(whole)
    assert set(ours) == set(theirs) == {"forecast", "baseline", "drift.jsonl", "features.jsonl"}
    for name in theirs:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_is_the_same_run(moment: str, seed: int, tmp_path: Path, whole_run: Callable[[str], Path]) -> None:
    draw = random.Random(f"{moment}/{seed}")
    name = draw.choice(list(RUNS))
    whole = whole_run(name)
    moments = outcome(whole)["moments"]
    last_step = max(i for i, m in enumerate(moments) if m == "training step")
    # Of a run that is killed in its last check, all is saved: resumed then, transformers trains a step further.
    kill_at = draw.choice([i for i, m in enumerate(moments) if m == moment and (moment != "probe" or i < last_step)])
    session(RUNS[name], tmp_path, kill_at=kill_at)
    session(RUNS[name], tmp_path)
    assert_same_run(tmp_path, whole)


def test_killed_again_and_again_it_still_is(tmp_path: Path, whole_run: Callable[[str], Path]) -> None:
    name = "plain, each save"
    whole = whole_run(name)
    for kill_at in (40, 60, 60, 40):
        session(RUNS[name], tmp_path, kill_at=kill_at)
    session(RUNS[name], tmp_path)
    assert_same_run(tmp_path, whole)


def test_the_comparison_can_fail(tmp_path: Path, whole_run: Callable[[str], Path]) -> None:
    """A check that is lost from the log, or told twice, is noticed."""
    name = "plain, each save"
    session(RUNS[name], tmp_path)
    assert_same_run(tmp_path, whole_run(name))
    drift = tmp_path / "sts" / "drift.jsonl"
    lines = drift.read_text().splitlines(keepends=True)
    for broken in (lines[1:], [*lines, lines[-1]]):
        drift.write_text("".join(broken))
        with pytest.raises(AssertionError, match=r"drift\.jsonl"):
            assert_same_run(tmp_path, whole_run(name))


@pytest.mark.parametrize(
    ("lora", "restore"),
    [(False, False), (True, True), *(pytest.param(lora, not lora, marks=pytest.mark.slow) for lora in (False, True))],
)
def test_begun_without_the_callback_it_trains_on_and_says_so_once(lora: bool, restore: bool, tmp_path: Path) -> None:
    run = Run("plain", lora=lora, check_on=1, restore=restore, on_forecast_error="train unwatched")
    session(run, tmp_path / "bare", watched=False)
    n_moments = len(outcome(tmp_path / "bare")["moments"])
    out = tmp_path / "joined"
    session(run, out, watched=False, kill_at=n_moments - 3)
    assert whole_checkpoints(out)
    session(run, out)
    here, there = outcome(out), outcome(tmp_path / "bare")
    assert same(here["weights"], there["weights"])
    (fault,) = [json.loads(line) for line in (out / "sts" / "faults.jsonl").read_text().splitlines()]
    assert fault["what"] == "resume"
    assert "was begun without this callback" in fault["error"]
    assert not (out / "sts" / "baseline.safetensors").exists()  # never made from weights that training has moved
    assert not any("sts/near/drift" in row for row in here["log"])


def test_a_session_without_the_callback_in_the_middle_costs_only_its_own_checks(
    tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    name = "plain, lora, each step"
    run, whole = RUNS[name], whole_run(name)
    moments = outcome(whole)["moments"]
    steps = [i for i, m in enumerate(moments) if m == "training step"]
    session(run, tmp_path, kill_at=steps[5])  # two steps accumulate: in step 3, after the save at 2
    bare_moments = 2 * 2 + 2  # up to the save at 4, and some
    session(run, tmp_path, watched=False, kill_at=bare_moments + 3)
    assert [c.name for c in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    session(run, tmp_path)
    assert checked_steps(tmp_path) == [1, 2, 5, 6]
    ours, theirs = log_of_ours(tmp_path), log_of_ours(whole)
    assert ours["baseline"] == theirs["baseline"]
    levels: list[dict[int, float]] = [{}, {}]
    for rows_of, level in zip((ours["drift.jsonl"], theirs["drift.jsonl"]), levels, strict=True):
        for row in rows_of:
            del row["verdict"]["best_checkpoint"]  # of steps that were not checked nothing is known
            level[row["snapshot"]["step"]] = row["verdict"].pop("level")
    assert levels[0] == pytest.approx(
        {step: part * (3 if step == 5 else 1) for step, part in levels[1].items() if step not in (3, 4)}
    )
    assert ours["drift.jsonl"] == [row for row in theirs["drift.jsonl"] if row["snapshot"]["step"] in (1, 2, 5, 6)]


def test_a_baseline_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """Same model, SAE and probes, but other weights at step 0: only the checkpoint can tell."""
    made_trainer("plain", tmp_path, [made_callback(), StopAt(4)]).train()
    other = made_trainer("plain", tmp_path / "other", [made_callback()], max_steps=1)
    other.model.load_state_dict(tiny_model("llama", seed=5).state_dict())
    other.train()
    (tmp_path / "sts").rename(tmp_path / "sts.mine")
    (tmp_path / "other" / "sts").rename(tmp_path / "sts")
    resumed = made_trainer("plain", tmp_path, [made_callback()])
    with pytest.raises(CannotTell, match="step 0 of another run"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert checked_steps(tmp_path) == [1]


def test_a_run_that_goes_on_in_another_precision_is_not_compared(tmp_path: Path) -> None:
    made_trainer("plain", tmp_path, [made_callback(), StopAt(4)]).train()
    before = checked_steps(tmp_path)
    resumed = made_trainer("plain", tmp_path, [made_callback()], bf16=True)
    with pytest.raises(CannotTell, match="made in float32, and the model now computes in float32, autocast to bfloat16; resume"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert checked_steps(tmp_path) == before


def test_an_alarm_that_lasts_over_a_resume_is_acted_on_once(tmp_path: Path) -> None:
    from test_callback import harmful

    told: list[int] = []
    harm = {**harmful(), "action": lambda verdict: told.append(verdict.step)}
    trainer = made_trainer("plain", tmp_path, [made_callback(**harm), StopAt(4)], learning_rate=0.5)
    trainer.train()
    assert told
    before = list(told)
    resumed = made_trainer("plain", tmp_path, [made_callback(**harm)], learning_rate=0.5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    alarms = [
        json.loads(line)["verdict"]["step"]
        for line in (tmp_path / "sts" / "drift.jsonl").read_text().splitlines()
        if json.loads(line)["verdict"]["decision"] == "no-go"
    ]
    assert 4 in alarms and 5 in alarms  # else there is nothing to see here
    assert told == before


class MemoryRunsShort(TrainerCallback):
    """The first attempt fails in its third step as one that lacks memory does."""

    def __init__(self) -> None:
        self.n_begun = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.n_begun += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.n_begun == 1 and state.global_step == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_auto_find_batch_size_keeps_the_first_baseline(tmp_path: Path) -> None:
    short, callback = MemoryRunsShort(), made_callback(check_on=1)
    options: dict[str, Any] = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "save_strategy": "no"}
    trainer = made_trainer("plain", tmp_path, [callback, short], **options)
    trainer.train()
    assert short.n_begun == 2
    folder = tmp_path / "sts"
    assert checked_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert not (folder.parent / "sts.1").exists()
    untouched = made_trainer("plain", tmp_path / "one", [made_callback(check_on=1)], max_steps=1, save_strategy="no")
    untouched.train()
    first = digest_of(tmp_path / "one" / "sts")
    assert digest_of(folder) == first

    trainer.train()  # a call of its own: the weights of now are its step 0
    assert checked_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert digest_of(folder) != first
    assert digest_of(tmp_path / "sts.1") == first


def test_a_swapped_model_gets_a_forecast_of_its_own(tmp_path: Path) -> None:
    callback = made_callback()
    trainer = made_trainer("plain", tmp_path, [callback], save_strategy="no", max_steps=2)
    trainer.train()
    first = callback.forecast
    trainer.model = trainer.model_wrapped = tiny_model("llama", seed=9)
    trainer.optimizer = None
    trainer.train()
    assert first is not None and callback.forecast is not None
    assert callback.forecast.median_norm != first.median_norm
    assert checked_steps(tmp_path) == [1, 2]
