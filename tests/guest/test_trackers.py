"""What a check found reaches the trackers, the trainer's state and the choice of the best checkpoint, under stable names."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from guest.runs import Shelf, checked_steps, made_trainer, same
from sts_callback import Monitor, STSCallback
from sts_callback.errors import ConfigError

KEYS = {
    "sts/n_shared_features",
    "sts/check_s",
    "sts/worst_headroom",
    *(f"sts/{name}/{number}" for name in ("train", "near", "far") for number in ("drift", "nll_change", "accuracy")),
}
LOGGED = KEYS | {"sts/overhead_s", "sts/overhead_share"}  # of the run, not of what an evaluation has found
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf.filled(tmp_path_factory.mktemp("shelf"))


def trained(kind: str, shelf: Shelf, out: Path, ours: STSCallback, *others: TrainerCallback, **options: Any) -> Trainer:
    trainer = made_trainer(kind, shelf, out, [*others, ours], **options)
    ours.attach(trainer)
    trainer.train()
    return trainer


def measured(out: Path) -> Rows:
    """The drift of one domain, and the step, of each check of a run."""
    snapshots = [json.loads(line)["snapshot"] for line in (out / "sts" / "drift.jsonl").read_text().splitlines()]
    return [{"step": s["step"], "near": s["domains"]["near"]["relative_drift"]["value"]} for s in snapshots]


def in_tensorboard(out: Path) -> Rows:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(next(out.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    by_step: dict[int, dict[str, Any]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            by_step.setdefault(event.step, {"train/global_step": event.step})[tag] = event.value
    return list(by_step.values())


def in_wandb(out: Path) -> Rows:
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.finish()
    wandb.teardown()  # waits until its service, a process, has written all
    rows = []
    for record in _wandb_records(next(out.rglob("*.wandb")).read_bytes()):
        read = wandb_internal_pb2.Record()
        read.ParseFromString(record)
        if read.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in read.history.item})
    return rows


def _wandb_records(content: bytes) -> Iterator[bytes]:
    """Records of an offline run's file: LevelDB's log format, 7 bytes at its head, in blocks of 32 KiB."""
    place, record, block, head = 7, b"", 2**15, 7
    while place + head <= len(content):
        if block - place % block < head:
            place += block - place % block
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + head])
        record += content[place + head : place + head + size]
        place += head + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def in_trackio(out: Path) -> Rows:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("guest")
    rows: Rows = SQLiteStorage.get_logs("guest", run)
    return rows


@pytest.mark.parametrize(("tracker", "read"), [("tensorboard", in_tensorboard), ("wandb", in_wandb), ("trackio", in_trackio)])
def test_every_number_of_every_check_is_in_the_tracker(
    tracker: str, read: Callable[[Path], Rows], shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trained("SFT", shelf, tmp_path, shelf.callback(), report_to=tracker, project="guest")
    rows = read(tmp_path)
    ours = [row for row in rows if any(key.startswith("train/sts/") for key in row)]
    assert [row["train/global_step"] for row in ours] == [1, 2, 3]
    for row, check in zip(ours, measured(tmp_path), strict=True):
        assert {key.removeprefix("train/") for key in row if "sts/" in key} == LOGGED
        assert row["train/sts/near/drift"] == pytest.approx(check["near"], rel=1e-6)  # TensorBoard keeps float32
    assert sum("train/loss" in row for row in rows) == 3


def strangers(rows: Any) -> list[str]:
    """Paths to what is neither a Python number, text, truth value nor None, in rows of any depth."""
    if isinstance(rows, dict):
        return [f"{key}.{path}" for key, value in rows.items() for path in strangers(value)]
    if isinstance(rows, (list, tuple)):
        return [f"{i}.{path}" for i, value in enumerate(rows) for path in strangers(value)]
    return [] if rows is None or type(rows) in (float, int, str, bool) else [type(rows).__name__]


def test_strangers_are_seen() -> None:
    rows = [{"loss": 1.0, "sts/near/drift": np.float64(1.0)}, {"sts/check_s": torch.tensor(1.0)}]
    assert strangers(rows) == ["0.sts/near/drift.float64", "1.sts/check_s.Tensor"]


class Listener(TrainerCallback):
    """Keeps what passes by."""

    def __init__(self) -> None:
        self.logs: Rows = []
        self.metrics: Rows = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.metrics.append(metrics)  # the dictionary itself: what others add later is in it, too


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("kind", ["SFT", "Reward"])
@pytest.mark.parametrize("attached", [True, False])
def test_only_python_numbers_enter_logs_metrics_and_state(kind: str, attached: bool, shelf: Shelf, tmp_path: Path) -> None:
    listener, ours = Listener(), shelf.callback(check_on="evaluate")
    trainer = made_trainer(kind, shelf, tmp_path, [listener, ours], **EVERY_STEP)
    if attached:
        ours.attach(trainer)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "sts/near/drift" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    expected = KEYS if kind == "SFT" else {key for key in KEYS if not key.endswith(("nll_change", "accuracy", "headroom"))}
    for row, metrics in zip(rows, listener.metrics, strict=True):
        assert {key for key in row if key.startswith("sts/")} - {"sts/best_checkpoint"} == expected | (LOGGED - KEYS)
        assert {key for key in metrics if "sts/" in key} == {f"eval_{key}" for key in expected}
        assert {f"eval_{key}": row[key] for key in expected}.items() <= metrics.items()
        assert all(type(row[key]) is float for key in expected)
    assert strangers([vars(trainer.state), listener.logs, listener.metrics]) == []
    assert sum("sts/near/drift" in row for row in listener.logs) == (3 if attached else 0)
    text = (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()
    assert "NaN" not in text
    assert rows[-1] in json.loads(text)["log_history"]


BY_DRIFT = {**EVERY_STEP, "metric_for_best_model": "sts/near/drift", "greater_is_better": False, "load_best_model_at_end": True}


def test_the_best_checkpoint_can_be_chosen_by_a_number_of_ours(shelf: Shelf, tmp_path: Path) -> None:
    trainer = trained("SFT", shelf, tmp_path, shelf.callback(check_on="evaluate"), **BY_DRIFT)
    checks = measured(tmp_path)
    assert checks[0]["near"] < min(check["near"] for check in checks[1:])
    assert trainer.state.best_global_step == 1
    assert trainer.state.best_metric == checks[0]["near"]
    best = shelf.model("llama").from_pretrained(tmp_path / "checkpoint-1").state_dict()
    assert same(trainer.model.state_dict(), best)


def test_the_best_checkpoint_by_all_budgets_together_is_named_and_can_be_chosen(shelf: Shelf, tmp_path: Path) -> None:
    chosen = {**EVERY_STEP, "metric_for_best_model": "sts/worst_headroom", "load_best_model_at_end": True, "learning_rate": 0.05}
    trainer = trained("SFT", shelf, tmp_path, shelf.callback(check_on="evaluate", protect={"near": 0.1, "far": 0.2}), **chosen)
    checks = [json.loads(line) for line in (tmp_path / "sts" / "drift.jsonl").read_text().splitlines()]
    changes = [[check["snapshot"]["domains"][name]["nll_change"]["value"] for name in ("near", "far")] for check in checks]
    headroom = [min(0.1 - near, 0.2 - far) for near, far in changes]
    rows = [row for row in trainer.state.log_history if "sts/worst_headroom" in row]
    assert [row["sts/worst_headroom"] for row in rows] == headroom
    assert trainer.state.best_global_step == 1 + headroom.index(max(headroom))
    used = [max(near / 0.1, far / 0.2) for near, far in changes]
    best = [0, 1, 1 + used.index(min(used[:2]))]
    assert [check["verdict"]["best_checkpoint"] for check in checks] == best
    assert [row.get("sts/best_checkpoint", 0) for row in rows] == best
    assert f"Best checkpoint on disk: checkpoint-{1 + used.index(min(used))};" in (tmp_path / "sts" / "report.html").read_text()


def test_early_stopping_can_go_by_a_number_of_ours(shelf: Shelf, tmp_path: Path) -> None:
    """Drift never gets better, so patience ends; the callback stands before the one that reads its number."""
    patience = EarlyStoppingCallback(early_stopping_patience=2)
    settings = {**BY_DRIFT, "max_steps": 6, "metric_for_best_model": "eval_sts/near/drift"}
    trainer = made_trainer("SFT", shelf, tmp_path, [shelf.callback(check_on="evaluate"), patience], **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert checked_steps(tmp_path) == [1, 2, 3]


def test_a_check_that_failed_is_never_the_best(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Monitor.check

    def fails_at_first(self: Monitor, step: int, **kwargs: Any) -> Any:
        if step == 1:
            raise RuntimeError("the first check fails")
        return real(self, step, **kwargs)

    monkeypatch.setattr(Monitor, "check", fails_at_first)
    listener = Listener()
    trainer = trained("SFT", shelf, tmp_path, shelf.callback(check_on="evaluate"), listener, **BY_DRIFT)
    assert math.isnan(listener.metrics[0]["eval_sts/near/drift"])
    assert trainer.state.global_step == 3
    assert trainer.state.best_global_step == 2
    assert "the first check fails" in (tmp_path / "sts" / "faults.jsonl").read_text()


def test_an_evaluation_outside_training_is_the_users_alone(shelf: Shelf, tmp_path: Path) -> None:
    trainer = made_trainer("SFT", shelf, tmp_path, [shelf.callback(check_on="evaluate")], **EVERY_STEP)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert not any("sts/" in key for key in [*before, *after])
    assert checked_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "check_on", "message"),
    [
        ({}, "save", "check_on: got 'save'; metric_for_best_model='sts/near/drift' .* takes check_on='evaluate'"),
        ({"greater_is_better": None}, "evaluate", "greater_is_better: got True .* set greater_is_better=False"),
        (
            {"metric_for_best_model": "sts/law/drift"},
            "evaluate",
            "got 'sts/law/drift'; allowed of STS's are sts/train/nll_change, .*, sts/worst_headroom",
        ),
        (
            {"metric_for_best_model": "sts/worst_headroom"},
            "evaluate",
            "greater_is_better: got False, .* the least sts/worst_headroom; set greater_is_better=True",
        ),
    ],
)
def test_a_choice_that_could_not_work_is_refused_before_the_first_step(
    settings: dict[str, Any], check_on: str, message: str, shelf: Shelf, tmp_path: Path
) -> None:
    trainer = made_trainer("SFT", shelf, tmp_path, [shelf.callback(check_on=check_on)], **{**BY_DRIFT, **settings})
    with pytest.raises(ConfigError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_other_metrics_are_none_of_our_business(shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    settings = {**BY_DRIFT, "metric_for_best_model": "eval_loss"}
    trainer = trained("SFT", shelf, tmp_path, shelf.callback(), EarlyStoppingCallback(3), **settings)
    assert trainer.state.best_global_step is not None
    assert "early stopping" not in caplog.text
