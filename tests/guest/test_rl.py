"""GRPO and RLOO: the forecast from the policy's own rollouts, and its drift split into text and representation."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl

from guest.runs import PROBES, TINY_DOMAINS, Shelf, checked_steps, finished, made_trainer, same, taste
from killable import together
from pages import blocks, page
from ranked import learn_by_rewards
from sts_callback import Monitor, STSCallback
from sts_callback.errors import ConfigError, DataError, SaeError
from tiny import rotated_sae, rows, tiny_tokenizer

TEN_PROMPTS = {"per_device_train_batch_size": 20}  # of two completions each
FEW = [{"prompt": row["prompt"]} for row in rows(1)] * 30
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf.filled(tmp_path_factory.mktemp("shelf"))


def brief(completions: list[str], **others: Any) -> list[float]:
    return [-float(len(text.split())) for text in completions]


def rewarded(kind: str, shelf: Shelf, out: Path, ours: STSCallback, *others: TrainerCallback, **options: Any) -> Trainer:
    """A trainer with tapped rewards, on prompts alone."""
    options = {**TEN_PROMPTS, "rewards": ours.tap([taste, brief]), **options}
    return made_trainer(kind, shelf, out, [ours, *others], **options)


def lines(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text().splitlines()]


def snapshots(out: Path) -> Rows:
    return [line["snapshot"] for line in lines(out / "sts" / "drift.jsonl")]


class Hearing:
    """A reward function of the user's that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[int, list[str], list[str], list[float]]] = []

    def __call__(self, prompts: list[str], completions: list[str], trainer_state: Any, **others: Any) -> list[float]:
        rewards = taste(completions)
        self.given.append((trainer_state.global_step, list(prompts), list(completions), rewards))
        return rewards


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_the_forecast_is_made_from_the_best_rollouts_of_the_first_step(
    kind: str, shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, hearing = shelf.callback(), Hearing()
    rewarded(kind, shelf, tmp_path, ours, rewards=ours.tap(hearing)).train()
    best: dict[str, tuple[float, str]] = {}
    for step, *given in hearing.given:
        for prompt, completion, reward in zip(*given, strict=True) if step == 0 else ():
            if prompt not in best or reward > best[prompt][0]:
                best[prompt] = reward, completion
    assert len(best) == 10
    written = lines(tmp_path / "sts" / "rollouts.jsonl")
    assert {row["prompt"]: (row["reward"], row["completion"]) for row in written} == best
    assert ours.forecast is not None
    assert ours.forecast.train_source == "own rollouts"
    assert "own best-rewarded rollouts of the first step" in capsys.readouterr().out
    assert json.loads((tmp_path / "sts" / "forecast.json").read_text())["forecast"]["train_source"] == "own rollouts"
    assert checked_steps(tmp_path) == [1, 2, 3]
    assert not (tmp_path / "sts" / "faults.jsonl").exists()


@pytest.mark.parametrize(
    ("kind", "lora", "options"),
    [
        ("GRPO", False, {}),
        ("RLOO", False, {}),
        pytest.param(
            "GRPO",
            True,
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 5, "gradient_checkpointing": True, "bf16": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("RLOO", False, {"steps_per_generation": 2, "per_device_train_batch_size": 10}, marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_with_and_without(
    kind: str, lora: bool, options: dict[str, Any], shelf: Shelf, tmp_path: Path
) -> None:
    settings = {**TEN_PROMPTS, "lora": lora, "max_steps": 2, **options}
    without = finished(made_trainer(kind, shelf, tmp_path / "without", [], rewards=[taste, brief], **settings))
    ours = shelf.callback()
    with_ours = finished(rewarded(kind, shelf, tmp_path / "with", ours, **settings))
    assert without.differences(with_ours) == []
    assert any("rewards/brief/mean" in row for row in without.log_rows)
    assert ours.forecast is not None
    assert ours.forecast.train_source == "own rollouts"
    assert checked_steps(tmp_path / "with") == [1, 2]


class Gradients(TrainerCallback):
    """Those of every step, just before the optimizer takes them."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    def is_like(self, other: Gradients) -> bool:
        return same(self.seen, other.seen)


class Careless(TrainerCallback):
    """Makes gradients of its own beside training's."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model(input_ids=torch.ones(1, 4).long()).logits.sum().backward()


@pytest.mark.parametrize("careful", [True, False])
def test_the_forecast_leaves_the_gradients_of_the_step_as_they_are(careful: bool, shelf: Shelf, tmp_path: Path) -> None:
    before, after, ours = Gradients(), Gradients(), shelf.callback()
    callbacks = [before, ours if careful else Careless(), after]
    made_trainer("GRPO", shelf, tmp_path, callbacks, rewards=ours.tap(taste), **TEN_PROMPTS, max_steps=1).train()
    assert len(before.seen[0]) > 20
    assert before.is_like(after) == careful
    assert (ours.forecast is not None) == careful


def test_forecast_and_baseline_are_those_of_the_weights_of_step_zero(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback()
    trainer = rewarded("GRPO", shelf, tmp_path, ours, max_steps=1)
    trainer.train()
    rollouts = lines(tmp_path / "sts" / "rollouts.jsonl")
    kept: Any = trainer.state.stateful_callbacks
    digests = []
    for model in (shelf.model("llama"), trainer.model):
        options: Any = {"sae": shelf.folder / "sae", "train_data": rollouts, "domains": TINY_DOMAINS, "config": PROBES}
        monitor = Monitor(model, tiny_tokenizer(), **options, progress=False)
        again = monitor.forecast()
        assert monitor.step_zero is not None
        digests.append(monitor.step_zero.digest)
        if model is not trainer.model:
            assert ours.forecast is not None
            assert again.features == ours.forecast.features
            assert again.to_dict()["domains"] == ours.forecast.to_dict()["domains"]
    assert digests[0] == kept["sts_callback"]["baseline"] != digests[1]


def test_an_evaluations_rollouts_are_not_taken(shelf: Shelf, tmp_path: Path) -> None:
    ours, hearing = shelf.callback(), Hearing()
    evaluated = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    rewarded("GRPO", shelf, tmp_path, ours, rewards=ours.tap(hearing), max_steps=1, **evaluated).train()
    of_evaluation = {row["prompt"] for row in rows(4, seed=70)}
    assert set(hearing.given[0][1]) <= of_evaluation
    written = {row["prompt"] for row in lines(tmp_path / "sts" / "rollouts.jsonl")}
    assert len(written) == 10
    assert not written & of_evaluation


@pytest.mark.parametrize("column", ["solution", "answer", "completion"])
def test_reference_answers_of_the_data_come_before_rollouts(column: str, shelf: Shelf, tmp_path: Path) -> None:
    examples = [{"prompt": row["prompt"], column: row["completion"]} for row in rows(40)]
    ours, known = shelf.callback(), shelf.callback(train_data=rows(40))
    rewarded("GRPO", shelf, tmp_path / "a", ours, examples=examples, max_steps=2).train()
    rewarded("GRPO", shelf, tmp_path / "b", known, max_steps=1).train()
    assert ours.forecast is not None and known.forecast is not None
    assert ours.forecast.train_source == known.forecast.train_source == "reference answers"
    assert ours.forecast.identity.probes == known.forecast.identity.probes
    assert snapshots(tmp_path / "a")[-1]["text_drift"]["value"] is not None
    assert len(lines(tmp_path / "a" / "sts" / "rollouts.jsonl")) == 10


def test_prompts_alone_without_a_tap_are_refused_with_the_way_round(shelf: Shelf, tmp_path: Path) -> None:
    trainer = made_trainer("GRPO", shelf, tmp_path, [shelf.callback()], **TEN_PROMPTS)
    with pytest.raises(DataError, match=r"prompts but no answers .* reward_funcs=callback.tap\(reward_funcs\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_too_small_a_first_step_is_refused_before_anything_is_written(shelf: Shelf, tmp_path: Path) -> None:
    ours, hearing = shelf.callback(), Hearing()
    trainer = rewarded("GRPO", shelf, tmp_path, ours, rewards=ours.tap(hearing), per_device_train_batch_size=2)
    with pytest.raises(ConfigError, match="1 prompts, but a forecast from the model's own rollouts takes 6"):
        trainer.train()
    assert hearing.given == []


def test_a_sharded_model_is_refused_before_anything_is_written(shelf: Shelf, tmp_path: Path) -> None:
    ours, hearing = shelf.callback(), Hearing()
    trainer = rewarded("GRPO", shelf, tmp_path, ours, rewards=ours.tap(hearing))
    next(trainer.model.parameters()).ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ConfigError, match="the model is sharded"):
        trainer.train()
    assert hearing.given == []


@pytest.mark.parametrize(
    ("options", "error"),
    [({"sae": "nowhere/layer_1"}, SaeError), ({"domains": {"near": "nowhere.jsonl"}}, DataError)],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    options: dict[str, Any], error: type[Exception], shelf: Shelf, tmp_path: Path
) -> None:
    ours, hearing = shelf.callback(**options), Hearing()
    trainer = rewarded("GRPO", shelf, tmp_path, ours, rewards=ours.tap(hearing))
    with pytest.raises(error, match="nowhere"):
        trainer.train()
    assert hearing.given == []


def test_an_sae_that_does_not_fit_stops_the_run_before_the_weights_move(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback(sae=rotated_sae(d_in=16))
    trainer = rewarded("GRPO", shelf, tmp_path, ours)
    with pytest.raises(SaeError, match=r"width 16.*width 32"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_with_too_few_usable_rollouts_it_trains_unwatched_if_asked(
    shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = finished(made_trainer("GRPO", shelf, tmp_path / "plain", [], rewards=[taste, brief], examples=FEW, **TEN_PROMPTS))
    ours = shelf.callback(on_forecast_error="train unwatched")
    unwatched = finished(rewarded("GRPO", shelf, tmp_path / "ours", ours, examples=FEW))
    assert plain.differences(unwatched) == []
    (fault,) = lines(tmp_path / "ours" / "sts" / "faults.jsonl")
    assert (fault["step"], fault["what"]) == (0, "forecast")
    assert "the first step left 1 prompts" in fault["error"]
    assert {file.name for file in (tmp_path / "ours" / "sts").iterdir()} == {"faults.jsonl", "ended.json"}
    assert "NOT WATCHED" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_too_few_usable_rollouts_are_refused_before_the_weights_move(on_error: str, shelf: Shelf, tmp_path: Path) -> None:
    trainer = rewarded("GRPO", shelf, tmp_path, shelf.callback(on_error=on_error), examples=FEW)
    with pytest.raises(DataError, match="the first step left 1 prompts"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_functions_that_were_tapped_but_not_handed_over_are_refused(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback()
    ours.tap(taste)
    with pytest.raises(DataError, match=r"hand the trainer what callback\.tap\(\) returned"):
        made_trainer("GRPO", shelf, tmp_path, [ours], **TEN_PROMPTS, max_steps=1).train()


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_resumed_run_goes_on_with_the_rollouts_of_step_zero(kind: str, shelf: Shelf, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rewarded(kind, shelf, whole, shelf.callback(), **saved).train()
    rewarded(kind, shelf, parts, shelf.callback(), StopAfterTwo(), **saved).train()
    first = (parts / "sts" / "rollouts.jsonl").read_bytes()
    again = shelf.callback()
    rewarded(kind, shelf, parts, again, **saved).train(resume_from_checkpoint=str(parts / "checkpoint-2"))
    assert (parts / "sts" / "rollouts.jsonl").read_bytes() == first
    assert not (parts / "sts" / "faults.jsonl").exists()
    assert again.forecast is not None
    assert again.forecast.train_source == "own rollouts"
    series = [[{**s, "seconds": 0} for s in snapshots(out)] for out in (whole, parts)]
    assert series[0] == series[1]
    assert [s["step"] for s in series[0]] == [1, 2, 3]
    assert series[0][2]["text_drift"]["value"] is not None


def test_a_second_training_takes_rollouts_of_its_own(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback()
    trainer = rewarded("GRPO", shelf, tmp_path, ours, max_steps=1)
    trainer.train()
    trainer.train()
    texts = [{row["sample"] for row in lines(tmp_path / folder / "rollouts.jsonl")} for folder in ("sts.1", "sts")]
    assert texts[0] != texts[1]
    assert checked_steps(tmp_path) == [1]


def test_real_drift_supersedes_the_forecast(shelf: Shelf, tmp_path: Path) -> None:
    for name, rate in (("fast", 5e-2), ("still", 0.0)):
        rewarded("GRPO", shelf, tmp_path / name, shelf.callback(), learning_rate=rate, max_steps=1).train()
        verdicts = [line["verdict"]["supersedes_forecast"] for line in lines(tmp_path / name / "sts" / "drift.jsonl")]
        moved = [s["train"]["relative_drift"]["value"] >= 0.05 for s in snapshots(tmp_path / name)]
        assert verdicts == moved
        assert any(moved) == (name == "fast")
        told = "itself has moved for sure" in (tmp_path / name / "sts" / "report.html").read_text()
        assert told == (name == "fast")


@pytest.fixture
def model(shelf: Shelf) -> PreTrainedModel:
    return shelf.model("llama")


@pytest.fixture
def monitor(model: PreTrainedModel, shelf: Shelf) -> Monitor:
    made = Monitor(
        model,
        tiny_tokenizer(),
        sae=shelf.folder / "sae",
        train_data=rows(40),
        domains=TINY_DOMAINS,
        config=PROBES,
        progress=False,
    )
    made.forecast()
    return made


def test_other_text_by_the_same_weights_is_text_drift_alone(monitor: Monitor) -> None:
    check = monitor.check(1, rollouts=(rows(8), rows(8, "poems by heart", seed=90)))
    assert check.train.relative_drift.value == 0
    assert check.output_drift.low > 0


def test_text_of_one_kind_by_other_weights_is_drift_of_the_representation_alone(monitor: Monitor, model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    check = monitor.check(1, rollouts=(rows(8, seed=0), rows(8, seed=8)))
    assert check.train.relative_drift.low > 0.01
    assert check.output_drift.low < 0 < check.output_drift.high


def test_out_of_smaller_batches_comes_the_same_text_drift(monitor: Monitor) -> None:
    texts = rows(8), rows(8, "poems", seed=90)
    whole, cut = (monitor.check(1, rollouts=texts, batch_tokens=size).output_drift for size in (1024, 64))
    assert cut.value == pytest.approx(whole.value, rel=1e-4)


@pytest.mark.parametrize(("then", "now"), [([], []), (rows(8), []), (rows(1), rows(8, seed=9)), (rows(8), rows(8))])
def test_without_texts_to_compare_there_is_no_text_drift(then: Rows, now: Rows, monitor: Monitor) -> None:
    assert math.isnan(monitor.check(1, rollouts=(then, now)).output_drift.value)


def test_text_drift_stands_in_log_and_on_screen(shelf: Shelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = shelf.callback()
    trainer = rewarded("RLOO", shelf, tmp_path, ours)
    ours.attach(trainer)
    trainer.train()
    logged = {row["step"]: row["sts/train/text_drift"] for row in trainer.state.log_history if "sts/train/text_drift" in row}
    written = {s["step"]: s["text_drift"]["value"] for s in snapshots(tmp_path)}
    assert written.pop(1) is None  # nothing was written since
    assert logged == written
    assert list(logged) == [2, 3]
    assert capsys.readouterr().out.count("What the policy writes has moved by") == 2


def test_the_example_of_the_page_runs(shelf: Shelf, tmp_path: Path) -> None:
    (example,) = blocks(page("docs/rl.md"), "python")
    options = {"max_steps": 1, "num_generations": 2, "max_completion_length": 8, "use_cpu": True, "bf16": False, **TEN_PROMPTS}
    names = {
        "STSCallback": functools.partial(STSCallback, domains={"law": TINY_DOMAINS["near"]}, probes=PROBES),
        "GRPOTrainer": functools.partial(trl.GRPOTrainer, processing_class=tiny_tokenizer()),
        "sae": shelf.folder / "sae",
        "model": shelf.model("llama"),
        "args": trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", dataloader_pin_memory=False, **options),
        "prompts": Dataset.from_list([{"prompt": row["prompt"]} for row in rows(40)]),
        "correct": taste,
        "brief": brief,
    }
    exec(example, names)
    assert json.loads((tmp_path / "sts" / "forecast.json").read_text())["forecast"]["train_source"] == "own rollouts"


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_processes_forecast_from_the_rollouts_of_both(tmp_path: Path) -> None:
    together(learn_by_rewards, tmp_path, limit_s=150)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0]["forecast"] == found[1]["forecast"]
    assert found[0]["heard"] != found[1]["heard"]
    written = [row["prompt"] for row in lines(tmp_path / "sts" / "rollouts.jsonl")]
    assert sorted(written) == sorted({*found[0]["heard"], *found[1]["heard"]})
    assert checked_steps(tmp_path) == [1, 2]
    assert not (tmp_path / "sts" / "faults.jsonl").exists()
