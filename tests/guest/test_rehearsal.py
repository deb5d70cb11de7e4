"""A rehearsal is the training that follows; it is made where it can be and pays, and what comes of it is told before step 1."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from guest.runs import Shelf, checked_steps, doses, finished, made_trainer
from sts_callback.errors import CannotTell, ConfigError, NoGo
from sts_callback.measure.monitor import Monitor
from sts_callback.training.rehearsal import N_STEPS, planned_rates
from tiny import rows, tiny_arguments, tiny_tokenizer, tokenised


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf.filled(tmp_path_factory.mktemp("shelf"))


def two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """One that no trainer makes: two groups of parameters, each with a rate."""
    (first, *rest) = model.parameters()
    groups = [{"params": [first], "lr": 2e-3}, {"params": rest, "betas": (0.5, 0.9)}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optim": "adamw_torch", "weight_decay": 0.5},
    "fused AdamW, clipped": {"optim": "adamw_torch_fused", "max_grad_norm": 0.01},
    "SGD with momentum": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "Adafactor": {"optim": "adafactor"},
    "RMSprop": {"optim": "rmsprop"},
    "the user's own": {},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rehearsal_does_what_training_then_does(name: str, accumulation: int, shelf: Shelf, tmp_path: Path) -> None:
    """On as many rows as a step takes, without dropout and at a constant rate, there is nothing in which they could differ."""
    model, tokenizer = shelf.model("llama"), tiny_tokenizer()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    ours = shelf.callback(check_on=N_STEPS, rehearse=True)
    args = tiny_arguments(
        tmp_path,
        max_steps=N_STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        gradient_accumulation_steps=accumulation,
        **OPTIMIZERS[name],
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**args),
        train_dataset=tokenised(rows(2 * accumulation), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[ours],
        optimizers=(two_groups(model) if "own" in name else None, None),
    )
    ours._settings = SimpleNamespace(**vars(ours._settings) | {"train_data": rows(40)})  # type: ignore[assignment]
    ours.attach(trainer)
    trainer.train()
    (dose,) = doses(tmp_path)
    *_, line = (tmp_path / "sts" / "drift.jsonl").read_text().splitlines()
    trained = json.loads(line)["snapshot"]["domains"]
    assert checked_steps(tmp_path)[-1] == N_STEPS
    for domain, rehearsed in dose.check.domains.items():
        assert max(map(abs, rehearsed.query_changes)) > 1e-3
        assert rehearsed.query_changes == pytest.approx(trained[domain]["query_changes"], rel=0.02, abs=1e-4)
        assert rehearsed.relative_drift.value == pytest.approx(trained[domain]["relative_drift"]["value"], rel=0.02)


def schedule(kind: str, n_steps: int, n_warmup: int = 0, rate: float = 1e-3) -> Any:
    """A trainer with a schedule and nothing else."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    if kind == "one cycle":
        made: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=n_steps)
    else:
        made = get_scheduler(kind, optimizer, n_warmup, n_steps)
    return SimpleNamespace(optimizer=optimizer, lr_scheduler=made)


@pytest.mark.parametrize(
    ("kind", "n_steps", "n_warmup", "peak", "rate_sum"),
    [
        ("constant", 10, 0, 1.0, 10.0),
        ("constant_with_warmup", 10, 4, 1.0, 7.5),
        ("constant_with_warmup", 10, 20, 0.45, 2.25),  # never warm
        ("linear", 10, 0, 1.0, 5.5),
        ("cosine", 1000, 100, 1.0, 500.0),
        ("one cycle", 10, 0, 1.0, math.nan),
        ("reduce_lr_on_plateau", 10, 0, 1.0, math.nan),
    ],
)
def test_what_a_schedule_comes_to(kind: str, n_steps: int, n_warmup: int, peak: float, rate_sum: float) -> None:
    peaks, total = planned_rates(schedule(kind, n_steps, n_warmup), n_steps)
    assert peaks == pytest.approx([1e-3 * peak])
    assert total == pytest.approx(1e-3 * rate_sum, rel=1e-3, nan_ok=True)


def test_the_rates_are_those_of_the_steps() -> None:
    made = schedule("cosine", 30, 5)
    seen = []
    for _ in range(30):
        seen.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.lr_scheduler.step()
    assert planned_rates(schedule("cosine", 30, 5), 30) == ([pytest.approx(max(seen))], pytest.approx(sum(seen)))


def test_long_runs_are_rehearsed_at_a_multiple_too(shelf: Shelf, tmp_path: Path) -> None:
    first, second = rehearsed(shelf, tmp_path, max_steps=60, lr_scheduler_type="linear", learning_rate=1e-3)
    assert (first.multiple, first.learning_rate, first.check.step) == (1.0, 1e-3, N_STEPS)
    assert second.multiple == pytest.approx(30.5 / N_STEPS)
    assert second.learning_rate == pytest.approx(1e-3 * 30.5 / N_STEPS)
    assert second.check.step == 2 * N_STEPS
    assert second.check.train.relative_drift.value > first.check.train.relative_drift.value


def test_two_doses_leave_no_trace_either(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback(check_on=6, rehearse=True)
    options = {"max_steps": 12, "lr_scheduler_type": "constant", "lora": True, "learning_rate": 5e-3}
    without = finished(made_trainer("SFT", shelf, tmp_path / "without", [], **options))
    trainer = made_trainer("SFT", shelf, tmp_path / "with", [ours], **options)
    ours.attach(trainer)
    assert without.differences(finished(trainer)) == []
    assert [dose.multiple for dose in doses(tmp_path / "with")] == [1.0, pytest.approx(12 / N_STEPS)]


def test_a_gradient_scaler_is_put_back(shelf: Shelf, tmp_path: Path) -> None:
    """As float16 takes on a GPU; its scale grows with the steps, and with those of a rehearsal."""
    outcomes, scales = [], []
    for name in ("without", "with"):
        ours = shelf.callback(rehearse=True)
        trainer = made_trainer("SFT", shelf, tmp_path / name, [ours] if name == "with" else [])
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        trainer.accelerator.scaler = scaler
        ours.attach(trainer)
        outcomes.append(finished(trainer))
        scales.append(scaler.state_dict())
    assert ours.rehearsal is not None and ours.rehearsal.doses
    assert outcomes[0].differences(outcomes[1]) == []
    assert scales[0] == scales[1]
    assert scales[0]["scale"] == 16.0


class Stop(TrainerCallback):
    """Ends training after a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def rehearsed(shelf: Shelf, out: Path, callback: dict[str, Any] | None = None, kind: str = "SFT", **options: Any) -> Any:
    """Doses of a run that is stopped after its first step."""
    ours = shelf.callback(**{"rehearse": True, "check_on": "save"} | (callback or {}))
    trainer = made_trainer(kind, shelf, out, [ours, Stop()], **options)
    ours.attach(trainer)
    trainer.train()
    assert ours.rehearsal is not None
    return ours.rehearsal.doses or ours.rehearsal.skipped


@pytest.mark.parametrize(
    ("max_steps", "max_overhead", "n_doses"),
    [
        (10, None, 1),
        (9, None, 0),  # shorter than it pays
        (49, 0.01, 0),  # five of 49 steps are more than one in ten
        (10**6, 0.5, 2),
    ],
)
def test_by_itself_where_the_training_pays(
    max_steps: int, max_overhead: float | None, n_doses: int, shelf: Shelf, tmp_path: Path
) -> None:
    found = rehearsed(shelf, tmp_path, {"rehearse": "auto", "max_overhead": max_overhead}, max_steps=max_steps)
    if n_doses:
        assert len(found) == n_doses
    else:
        reason = (
            "more than 10% of the time of 49 steps"
            if max_steps >= 10
            else "it has 9 steps; unasked, runs of 10 or more are rehearsed"
        )
        assert reason in found
        assert "rehearse=True" in found


def test_what_is_found_is_the_verdict_before_the_first_step(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The forecast keeps its own, which is told beside it."""
    ours = shelf.callback(rehearse=True, protect={"far": 1e-3})
    trainer = made_trainer("SFT", shelf, tmp_path, [ours], max_steps=3, learning_rate=0.5)
    ours.attach(trainer)
    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(ours.verdict)

    trainer.add_callback(Look())
    trainer.train()
    (verdict,) = seen
    assert (verdict.decision, verdict.threatened, verdict.step) == ("no-go", ("far",), 0)
    assert verdict.states == {"far": "over"}
    written = json.loads((tmp_path / "sts" / "rehearsal.json").read_text())
    assert written["verdict"]["decision"] == "no-go"
    assert json.loads((tmp_path / "sts" / "forecast.json").read_text())["verdict"]["decision"] != "no-go"
    shown = capsys.readouterr().out
    assert "STS rehearsal: NO-GO, training is expected to make far worse\n" in shown
    assert shown.index("STS: forecast made in ") < shown.index("STS rehearsal: ")
    assert "STS forecast" not in shown  # the rehearsal has the last word, and says what it said
    assert "after 5 steps" in shown and "The forecast, by examples in context, said: " in " ".join(shown.split())
    page = (tmp_path / "sts" / "report.html").read_text()
    assert "Rehearsal: a few steps, measured and put back" in page
    assert "Before training, the rehearsal said: no-go." in page
    assert "The rehearsal took" in page


def test_a_no_go_is_refused_before_the_first_step_if_asked(shelf: Shelf, tmp_path: Path) -> None:
    before = shelf.model("llama").state_dict()
    ours = shelf.callback(rehearse=True, protect={"far": 1e-3}, on_forecast="refuse")
    trainer = made_trainer("SFT", shelf, tmp_path, [ours], learning_rate=0.5)
    ours.attach(trainer)
    with pytest.raises(NoGo, match="far"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_checks_are_those_of_a_run_without_rehearsal(shelf: Shelf, tmp_path: Path) -> None:
    found = []
    for rehearse in (False, True):
        ours = shelf.callback(rehearse=rehearse)
        trainer = made_trainer("SFT", shelf, tmp_path / str(rehearse), [ours], lora=True)
        ours.attach(trainer)
        trainer.train()
        lines = (tmp_path / str(rehearse) / "sts" / "drift.jsonl").read_text().splitlines()
        snapshots = [json.loads(line)["snapshot"] for line in lines]
        found.append([{key: value for key, value in one.items() if key != "seconds"} for one in snapshots])
    assert found[0] == found[1]
    assert not (tmp_path / "False" / "sts" / "rehearsal.json").exists()


def test_it_needs_the_trainer(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"callback.attach\(trainer\)"):
        made_trainer("SFT", shelf, tmp_path / "asked", [shelf.callback(rehearse=True)]).train()
    ours = shelf.callback()
    made_trainer("SFT", shelf, tmp_path / "unasked", [ours]).train()
    assert ours.rehearsal is not None
    assert "callback.attach(trainer)" in ours.rehearsal.skipped
    assert "this run is not rehearsed: callback.attach(trainer)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_other_words_are_refused(value: Any, shelf: Shelf) -> None:
    with pytest.raises(ConfigError, match=r"rehearse: got .* allowed is 'auto', True or False"):
        shelf.callback(rehearse=value)


def test_a_stream_is_not_rehearsed(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback(rehearse=True, train_data=rows(40))
    trainer = made_trainer("SFT", shelf, tmp_path, [ours])
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    ours.attach(trainer)
    trainer.train()
    assert ours.rehearsal is not None
    assert "stream" in ours.rehearsal.skipped


def test_an_optimizer_that_cannot_be_made_anew_is_told(shelf: Shelf, tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def __init__(self, params: Any, rate: float) -> None:
            super().__init__(params, lr=rate)

    ours = shelf.callback(rehearse=True)
    trainer = made_trainer("SFT", shelf, tmp_path, [ours])
    trainer.optimizer = Odd(trainer.model.parameters(), 1e-3)
    ours.attach(trainer)
    trainer.train()
    assert ours.rehearsal is not None
    assert "its Odd cannot be made anew" in ours.rehearsal.skipped
    assert checked_steps(tmp_path) == [1, 2, 3]


def broken(self: Monitor, step: int, **kwargs: Any) -> Any:
    if kwargs.get("title"):
        raise RuntimeError("injected into the rehearsal")
    return CHECK(self, step, **kwargs)


CHECK = Monitor.check


def test_a_failure_ends_as_others_before_the_first_step(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Monitor, "check", broken)
    ours = shelf.callback(rehearse=True)
    trainer = made_trainer("SFT", shelf, tmp_path / "raise", [ours])
    ours.attach(trainer)
    with pytest.raises(CannotTell, match=r"rehearsal: it failed before the first step .*rehearse=False"):
        trainer.train()
    shown = capsys.readouterr().out
    assert re.search(r"^STS: forecast made in \d+ s; rehearsing 5 steps \.\.\.$", shown, re.MULTILINE)
    assert shown.count("STS forecast: ") == 1  # what it had cost is not lost
    assert "STS rehearsal: " not in shown

    ours = shelf.callback(rehearse=True, on_forecast_error="train unwatched")
    trainer = made_trainer("SFT", shelf, tmp_path / "go on", [ours])
    ours.attach(trainer)
    trainer.train()
    assert ours.rehearsal is not None
    assert ours.rehearsal.skipped == "it failed; faults.jsonl has the reason."
    assert "injected into the rehearsal" in (tmp_path / "go on" / "sts" / "faults.jsonl").read_text()
    assert capsys.readouterr().out.count("STS forecast: ") == 1
    assert checked_steps(tmp_path / "go on") == [1, 2, 3]


def test_where_the_batch_is_too_large_training_finds_another(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback(rehearse=True)
    trainer = made_trainer("SFT", shelf, tmp_path, [ours], auto_find_batch_size=True, per_device_train_batch_size=4)
    step = trainer.training_step

    def short_of_memory(model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        if len(inputs["input_ids"]) == 4:
            raise RuntimeError("CUDA out of memory. Injected")
        return step(model, inputs, *args)

    trainer.training_step = short_of_memory
    ours.attach(trainer)
    trainer.train()
    assert trainer._train_batch_size < 4
    assert ours.rehearsal is not None
    assert "it failed" in ours.rehearsal.skipped
    assert checked_steps(tmp_path) == [1, 2, 3]


def test_a_resumed_run_keeps_the_verdict_of_its_rehearsal(shelf: Shelf, tmp_path: Path) -> None:
    options = {"learning_rate": 0.5, "save_strategy": "steps", "save_steps": 1}
    first = shelf.callback(rehearse=True, protect={"far": 1e-3}, check_on=3)
    trainer = made_trainer("SFT", shelf, tmp_path, [first, Stop()], **options)
    first.attach(trainer)
    trainer.train()
    (tmp_path / "sts" / "drift.jsonl").unlink()  # as if it had been killed
    second = shelf.callback(rehearse=True, protect={"far": 1e-3}, check_on=3)
    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(second.verdict)

    trainer = made_trainer("SFT", shelf, tmp_path, [second, Look()], **options)
    second.attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert [(verdict.decision, verdict.step) for verdict in seen] == [("no-go", 0)]
    assert second.rehearsal is not None and first.rehearsal is not None
    assert second.rehearsal.to_json() == first.rehearsal.to_json()
