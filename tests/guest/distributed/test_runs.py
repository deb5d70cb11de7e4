"""Runs of two processes: training cannot tell that the callback is there, both do the same, and neither waits for the other."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guest.distributed.launch import launch, seen
from guest.distributed.worker import N_STEPS, Witness, full_weights, made_model, made_monitor
from guest.runs import same
from sts_callback.measure.monitor import Monitor
from sts_callback.records import POWER
from sts_callback.training.rehearsal import N_STEPS as N_REHEARSED

SHARDED = ("fsdp2", "tp", "zero3")
MODES = [
    "ddp",
    pytest.param("fsdp2", marks=pytest.mark.slow),
    pytest.param("tp", marks=pytest.mark.slow),
    pytest.param(
        "zero3",
        marks=[pytest.mark.slow, pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")],
    ),
]
SECONDS = {"ddp": 120, "fsdp2": 180, "tp": 180, "zero3": 280}
"""After which a set of runs counts as hung. DeepSpeed compiles a part of itself at its first use."""
STOP = {"callback": {"harmful": True, "action": "stop"}, "options": {"learning_rate": 0.5, "max_steps": 2 * N_STEPS}}
CASES: dict[str, dict[str, Any]] = {
    "without": {"callback": None},
    "with": {"callback": {"rehearse": True}, "attached": True},
    "LoRA without": {"callback": None, "lora": True},
    "LoRA with": {"callback": {"rehearse": True}, "attached": True, "lora": True},
}
ALIKE = {
    "callback": {"rehearse": True, "check_on": N_REHEARSED},
    "attached": True,
    "without_dropout": True,
    "n_rows": 8,  # two processes, two batches a step, two rows a batch: each step takes all
    "options": {"max_steps": N_REHEARSED, "lr_scheduler_type": "constant", "learning_rate": 1e-3, "max_grad_norm": 0.1},
}
"""A run whose rehearsal and training can differ in nothing."""
FAULTS: dict[str, dict[str, Any]] = {
    "stop": STOP,
    "check fails on the second": {"callback": {}, "fault": "check@1"},
    "check fails on the first": {"callback": {}, "fault": "check@0"},
    "failure after a check": {"callback": {}, "fault": "after-check@1"},
    "disk full": {"callback": {}, "fault": "disk-full@0"},
    "stop with a full disk": {**STOP, "fault": "disk-full@0"},
    "raised if asked": {"callback": {"on_error": "raise"}, "fault": "check@1"},
    "first part": {"callback": {}, "stop_at": 2, "options": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}},
    "second part": {"callback": {}, "resumes": "first part"},
    "forecast fails on the second": {"callback": {}, "fault": "forecast@1"},
    "forecast fails, unwatched": {"callback": {"on_forecast_error": "train unwatched"}, "fault": "forecast@1"},
    "forecast refused on the second": {"callback": {}, "fault": "refusal@1"},
    "memory short on the second": {"callback": {}, "fault": "memory@1"},
    "cut sequences": {"callback": {}, "parallelism": {"cp_size": 2}},
}
NOT_WITH_TP = {"lora", "stop_at", "resumes"}
"""Adapters on split matrices are not ours to try, and transformers resumes no such run."""
Runs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a mode's runs, made at the first asking."""
    made: dict[tuple[str, str], Path | BaseException] = {}

    def folder(mode: str, which: str = "plain") -> Path:
        if (mode, which) not in made:
            path = tmp_path_factory.mktemp(f"{mode}-{which}")
            chosen = {"plain": CASES, "faults": FAULTS}[which]
            if mode == "tp":
                chosen = {name: case for name, case in chosen.items() if not NOT_WITH_TP & case.keys()}
            try:
                launch(path, {name: {"mode": mode, **case} for name, case in chosen.items()}, seconds=SECONDS[mode])
                made[mode, which] = path
            except AssertionError as error:
                made[mode, which] = error
        found = made[mode, which]
        if isinstance(found, BaseException):
            raise found
        return found

    return folder


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_training_is_bit_identical_with_and_without(mode: str, lora: bool, runs: Runs) -> None:
    name = kind(mode, lora)
    for without, with_it in zip(
        seen(runs(mode, "plain"), f"{name}without"), seen(runs(mode, "plain"), f"{name}with"), strict=True
    ):
        assert without["error"] is None
        assert with_it["error"] is None
        assert with_it["forwards"], "the callback measured nothing"
        assert not without["forwards"]
        assert [row["step"] for row in with_it["log"] if "loss" in row] == [*range(1, N_STEPS + 1)]
        assert identical(without, with_it)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_whole_on_each_process_is_rehearsed(mode: str, lora: bool, runs: Runs) -> None:
    one, other = (rank["rehearsal"] for rank in seen(runs(mode, "plain"), kind(mode, lora) + "with"))
    if mode in SHARDED:
        assert one["doses"] == []
        assert one["skipped"] == "its model is sharded."
    else:
        (dose,) = one["doses"]
        assert any(dose["check"]["domains"]["near"]["query_changes"])
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_rehearsal_of_two_processes_does_what_their_training_then_does(tmp_path: Path) -> None:
    launch(tmp_path, {"alike": {"mode": "ddp", **ALIKE}}, seconds=SECONDS["ddp"])
    one, other = seen(tmp_path, "alike")
    assert one["error"] is other["error"] is None
    (dose,), (*_, trained) = one["rehearsal"]["doses"], snapshots(tmp_path, "alike")
    assert trained["step"] == N_REHEARSED
    for name, domain in trained["domains"].items():
        assert max(map(abs, domain["query_changes"])) > 1e-3
        assert dose["check"]["domains"][name]["query_changes"] == pytest.approx(domain["query_changes"], rel=0.02, abs=1e-4)


def kind(mode: str, lora: bool) -> str:
    """How the names of such cases begin."""
    if mode == "tp" and lora:
        pytest.skip("see NOT_WITH_TP")
    return "LoRA " * lora


def identical(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Log rows (losses and gradient norms among them) and the weights after every step, bit for bit."""
    return same(one["log"], other["log"]) and same(one["weights"], other["weights"])


def test_the_identity_test_can_fail(runs: Runs) -> None:
    one, other = (seen(runs("ddp", "plain"), "with")[0] for _ in range(2))
    assert identical(one, other)
    next(iter(other["weights"][N_STEPS].values())).view(-1)[0] += 1e-6
    assert not identical(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_the_run_is_what_it_says(mode: str, runs: Runs) -> None:
    wanted = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "tp": "MULTI_GPU", "zero3": "DEEPSPEED"}
    for rank in seen(runs(mode, "plain"), "with"):
        assert rank["distributed"].endswith(wanted[mode])
        assert rank["n_ranks"] == 2


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_decide_alike_and_run_as_many_forwards(mode: str, lora: bool, runs: Runs) -> None:
    one, other = seen(runs(mode, "plain"), kind(mode, lora) + "with")
    assert one["decisions"] == other["decisions"]
    assert [decision[1] for decision in one["decisions"]] == [*range(1, N_STEPS + 1)]
    assert len(one["forwards"]) == len(other["forwards"])
    ended = [forward["ended"] for rank in (one, other) for forward in rank["forwards"]]
    assert all(ended) == (mode in SHARDED), "sharded models run to the end, others need not"


@pytest.mark.parametrize("mode", MODES)
def test_only_the_first_rank_writes(mode: str, runs: Runs) -> None:
    one, other = seen(runs(mode, "plain"), "with")
    read = ("baseline.safetensors", "drift.jsonl", "features.jsonl", "forecast.json")
    assert one["ours"] == [
        f"sts/{name}" for name in sorted([*read, "ended.json", "rehearsal.json", "report.html", "report.json", "settings.json"])
    ]
    assert other["ours"] == []


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_one_process(mode: str, lora: bool, runs: Runs) -> None:
    """Under DDP to the last bit."""
    folder, case = runs(mode, "plain"), kind(mode, lora) + "with"
    model = made_model(lora)
    monitor = made_monitor(model)
    tolerance = 1e-5 if mode in SHARDED else 0.0
    left_out = SECONDS_FIELDS | (GRADIENT_FIELDS if mode in SHARDED else set()) | ({"model_name"} if mode == "tp" else set())
    forecast = json.loads((folder / case / "rank-0" / "sts" / "forecast.json").read_text())["forecast"]
    assert forecast["checks"].pop()["name"] == POWER  # which takes the budgets of the run
    assert differences(monitor.forecast().to_dict(), forecast, left_out, tolerance) == []
    # The NLL of a whole answer is some hundred nats: split matrices move its last bits by more than 1e-5.
    left_out = SECONDS_FIELDS | ({"query_changes"} if mode == "tp" else set())
    found = snapshots(folder, case)
    assert [snapshot["step"] for snapshot in found] == [*range(1, N_STEPS + 1)]
    assert_measured_by(monitor, model, seen(folder, case)[0]["weights"], found, left_out, tolerance)


def assert_measured_by(
    monitor: Monitor, model: Any, weights: dict[int, Any], found: list[dict[str, Any]], left_out: set[str], tolerance: float
) -> None:
    """One process finds the same with the weights of the same steps."""
    for snapshot in found:
        step = snapshot["step"]
        model.load_state_dict(weights[step], strict=False)
        assert all(torch.equal(p, weights[step][name]) for name, p in full_weights(model).items())
        assert differences(monitor.check(step).to_dict(), snapshot, left_out, tolerance) == []


SECONDS_FIELDS = {"seconds", "seconds_by_part"}
GRADIENT_FIELDS = {"gradient_change"}  # not taken on sharded models


def differences(one: Any, other: Any, left_out: set[str], tolerance: float, where: str = "") -> list[str]:
    """Where two records as read from JSON differ by more than the tolerance, relative or absolute."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [d for k in one if k not in left_out for d in differences(one[k], other[k], left_out, tolerance, f"{where}.{k}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, left_out, tolerance, f"{where}[{i}]")]
    if isinstance(one, float) and isinstance(other, float):
        same = math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
        return [] if same else [f"{where}: {one} and {other}"]
    return [] if one == other else [f"{where}: {one} and {other}"]


def test_the_comparison_of_scores_can_fail() -> None:
    assert differences({"a": [1.0, 2]}, {"a": [1.000001, 2]}, set(), 1e-5) == []
    assert differences({"a": [1.0, 2]}, {"a": [1.000001, 2]}, set(), 0.0) == [".a[0]: 1.0 and 1.000001"]
    assert differences({"a": [1.0, 2]}, {"a": [1.001, 2]}, set(), 1e-5) == [".a[0]: 1.0 and 1.001"]
    assert differences({"a": [1.0, 2]}, {"a": [1.0, 3]}, set(), 1e-5) == [".a[1]: 2 and 3"]


@pytest.mark.parametrize("mode", MODES)
def test_processes_share_the_probes(mode: str, runs: Runs) -> None:
    """Under tensor parallelism there is nothing to share: all compute parts of every batch.

    Each runs the self-test whole, less its backward where the model is sharded.
    """
    model = made_model(lora=False)
    alone = forwards_of(model)
    monitor = made_monitor(model)
    monitor.forecast()
    for step in range(1, N_STEPS + 1 + (mode not in SHARDED)):  # the last one is the rehearsal's
        monitor.check(step)
    for rank in seen(runs(mode, "plain"), "with"):
        share = n_tokens(rank["forwards"]) / n_tokens(alone)
        low, high = {"ddp": (0.4, 0.7), "tp": (0.95, 1.0)}.get(mode, (0.5, 0.8))  # sharded models: each runs all contexts
        assert low <= share <= high


def forwards_of(model: Any) -> list[dict[str, Any]]:
    """Filled with what runs through the model from now on."""
    witness = Witness(None)
    witness.watch(model)
    return witness.forwards


def n_tokens(forwards: list[dict[str, Any]]) -> int:
    return sum(math.prod(forward["shape"]) for forward in forwards)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["check fails on the second", "check fails on the first", "failure after a check"])
def test_a_check_that_fails_on_one_rank_is_skipped_by_all(mode: str, case: str, runs: Runs) -> None:
    folder = runs(mode, "faults")
    ranks = seen(folder, case)
    for rank in ranks:
        assert rank["error"] is None
        assert rank["steps"] == N_STEPS
        assert [decision[1] for decision in rank["decisions"]] == [1, 1, 3, 4]  # the verdict's step at each of the run's
    assert ranks[0]["decisions"] == ranks[1]["decisions"]
    assert checked(folder, case) == [1, 3, 4]
    assert "injected" in fault_text(folder, case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_costs_a_row_and_no_decision(mode: str, runs: Runs) -> None:
    folder = runs(mode, "faults")
    ranks = seen(folder, "disk full")
    for rank in ranks:
        assert rank["error"] is None
        assert [decision[1] for decision in rank["decisions"]] == [1, 2, 3, 4]
    assert ranks[0]["decisions"] == ranks[1]["decisions"]
    assert checked(folder, "disk full") == [1]
    assert "no space left" in fault_text(folder, "disk full")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["stop", "stop with a full disk"])
def test_an_alarm_stops_all_ranks_together(mode: str, case: str, runs: Runs) -> None:
    one, other = seen(runs(mode, "faults"), case)
    assert one["error"] is other["error"] is None
    # The step depends on how the split weights round: at this learning rate that is soon seen in the loss.
    assert one["steps"] == other["steps"] < 2 * N_STEPS
    assert one["decisions"] == other["decisions"]
    assert [decision[2] for decision in one["decisions"]][-2:] == ["watch", "no-go"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("case", "kind_of_error", "n_steps"),
    [("raised if asked", "RuntimeError", 2), ("forecast refused on the second", "CannotTell", 0)],
)
def test_what_is_raised_is_raised_by_all(mode: str, case: str, kind_of_error: str, n_steps: int, runs: Runs) -> None:
    one, other = seen(runs(mode, "faults"), case)
    assert other["error"].startswith(f"{kind_of_error}: injected into")
    assert one["error"].startswith(f"RankFailed: process 1 failed with {kind_of_error}: injected into")
    assert one["steps"] == other["steps"] == n_steps


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_forecast_that_fails_on_one_rank_ends_the_run_on_all_before_the_first_step(mode: str, runs: Runs) -> None:
    one, other = seen(runs(mode, "faults"), "forecast fails on the second")
    assert other["error"].startswith("CannotTell: forecast: it failed before the first step with RuntimeError('injected")
    assert "process 1 failed with RuntimeError: injected into the forecast" in one["error"]
    assert one["steps"] == other["steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_forecast_that_fails_on_one_rank_leaves_the_run_unwatched_on_all_if_asked(mode: str, runs: Runs) -> None:
    folder, case = runs(mode, "faults"), "forecast fails, unwatched"
    for rank in seen(folder, case):
        assert rank["error"] is None
        assert rank["decisions"] == [(step, False, step == N_STEPS) for step in range(1, N_STEPS + 1)]
    assert "process 1 failed with RuntimeError: injected into the forecast" in fault_text(folder, case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_where_memory_is_short_on_one_rank_all_take_smaller_batches(mode: str, runs: Runs) -> None:
    folder, case = runs(mode, "faults"), "memory short on the second"
    one, other = seen(folder, case)
    assert one["error"] is other["error"] is None
    assert one["decisions"] == other["decisions"]
    assert checked(folder, case) == [1, 2, 3, 4]
    (fault,) = map(json.loads, fault_text(folder, case).splitlines())  # later checks begin with the size that sufficed
    assert (fault["step"], fault["what"]) == (2, "drift check, 256 tokens a batch")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_what_cannot_be_measured_is_refused_before_the_first_step(mode: str, runs: Runs) -> None:
    for rank in seen(runs(mode, "faults"), "cut sequences"):
        assert rank["error"].startswith("ConfigError: parallelism_config: got cp_size=2, sp_size=1; allowed is 1 for both")
        assert rank["steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_goes_on_with_the_first_baseline(mode: str, runs: Runs) -> None:
    """Also on a rank that has none of our files."""
    if mode == "tp":
        pytest.skip("see NOT_WITH_TP")
    folder = runs(mode, "faults")
    one, other = seen(folder, "second part")
    assert one["error"] is other["error"] is None
    assert one["decisions"] == other["decisions"]
    assert [decision[1] for decision in one["decisions"]] == [3, 4]
    assert checked(folder, "first part") == [1, 2, 3, 4]
    assert not any(name.startswith("sts/") for name in other["ours"])
    whole = runs(mode, "plain")
    assert differences(snapshots(whole, "with"), snapshots(folder, "first part"), SECONDS_FIELDS, 0.0) == []


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_is_resumed_with_another_number_of_processes(before: int, after: int, tmp_path: Path) -> None:
    first: dict[str, Any] = {"mode": "ddp", **FAULTS["first part"]}
    launch(tmp_path, {"first part": first}, seconds=SECONDS["ddp"], n_ranks=before)
    second = {"mode": "ddp", **FAULTS["second part"]}
    launch(tmp_path, {"second part": second}, seconds=SECONDS["ddp"], n_ranks=after)
    ranks = seen(tmp_path, "second part", after)
    assert [rank["error"] for rank in ranks] == [None] * after
    assert checked(tmp_path, "first part") == [1, 2, 3, 4]
    assert not (tmp_path / "first part" / "rank-0" / "sts" / "faults.jsonl").exists()
    weights = seen(tmp_path, "first part", before)[0]["weights"] | ranks[0]["weights"]
    assert sorted(weights) == [1, 2, 3, 4]
    model = made_model(lora=False)
    monitor = made_monitor(model)
    monitor.forecast()
    assert_measured_by(monitor, model, weights, snapshots(tmp_path, "first part"), SECONDS_FIELDS, 0.0)


def snapshots(folder: Path, case: str) -> list[dict[str, Any]]:
    lines = (folder / case / "rank-0" / "sts" / "drift.jsonl").read_text().splitlines()
    return [json.loads(line)["snapshot"] for line in lines]


def checked(folder: Path, case: str) -> list[int]:
    return [snapshot["step"] for snapshot in snapshots(folder, case)]


def fault_text(folder: Path, case: str) -> str:
    return (folder / case / "rank-0" / "sts" / "faults.jsonl").read_text()
