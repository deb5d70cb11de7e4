"""When the callback measures, what it does on an alarm, and what it leaves behind."""

from __future__ import annotations

import json
import math
import shlex
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from guest.runs import PROBES, TINY_DOMAINS, GradNorms, checked_steps
from sts_callback import PolicyConfig, ProbeConfig, STSCallback
from sts_callback.errors import CannotTell, ConfigError, DataError, NoGo, SaeError
from sts_callback.records import DriftSnapshot, Verdict
from sts_callback.records.run import Given
from sts_callback.report.terminal.watch import watch_view
from sts_callback.runs.directory import RunDirectory
from sts_callback.runs.ledger import append, read
from tiny import rotated_sae, rows, saved_sae, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

pytestmark = pytest.mark.versions


def made_callback(**options: Any) -> STSCallback:
    defaults: dict[str, Any] = {
        "sae": rotated_sae(),
        "protect": ["near"],
        "domains": TINY_DOMAINS,
        "probes": PROBES,
        "max_overhead": None,  # training takes hardly any time here
    }
    return STSCallback(**{**defaults, **options})


def made_trainer(kind: str, out: Path, callbacks: list[Any], *, lora: bool = False, **options: Any) -> Trainer:
    """A tiny trainer with dropout, accumulation, evaluation and saves."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.save_pretrained(out / "base")
    defaults = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    evaluation = {"eval_strategy": "steps", "eval_steps": 3}
    shared = tiny_arguments(out, **{**defaults, **evaluation, **options})
    adapters = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    if kind == "sft":
        return SFTTrainer(
            model=model,
            args=SFTConfig(**shared),
            train_dataset=Dataset.from_list(rows(40)),
            eval_dataset=Dataset.from_list(rows(4, seed=70)),
            processing_class=tokenizer,
            peft_config=adapters if lora else None,
            callbacks=callbacks,
        )

    if lora:
        torch.manual_seed(1)
        model = get_peft_model(model, adapters)
    return Trainer(
        model=model,
        args=TrainingArguments(**shared),
        train_dataset=tokenised(rows(40), tokenizer),
        eval_dataset=tokenised(rows(4, seed=70), tokenizer),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=callbacks,
    )


def last_snapshot(out: Path) -> dict[str, Any]:
    snapshot: dict[str, Any] = json.loads((out / "sts" / "drift.jsonl").read_text().splitlines()[-1])["snapshot"]
    return snapshot


@pytest.mark.parametrize(
    ("check_on", "expected"),
    [("save", [1, 2, 4, 5, 6]), ("evaluate", [1, 2, 3, 5, 6]), (4, [1, 2, 4, 5, 6]), (1, [1, 2, 3, 4, 5, 6])],
)
def test_checks_come_when_asked_and_between_and_once_at_the_end(check_on: Any, expected: list[int], tmp_path: Path) -> None:
    made_trainer("sft", tmp_path, [made_callback(check_on=check_on)]).train()
    assert checked_steps(tmp_path) == expected


def test_without_attach_everything_is_in_the_log_and_the_train_data_is_found(tmp_path: Path) -> None:
    callback = made_callback()
    trainer = made_trainer("sft", tmp_path, [callback])
    trainer.train()
    rows_of_ours = [row for row in trainer.state.log_history if "sts/near/drift" in row]
    assert [row["step"] for row in rows_of_ours] == [1, 2, 4, 5, 6]
    assert all(type(value) in (float, int) for row in rows_of_ours for value in row.values())
    assert rows_of_ours[-1]["sts/near/drift"] > 0
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert any("sts/near/drift" in row for row in saved["log_history"])
    assert callback.forecast is not None
    assert callback.forecast.train.n_queries == PROBES.n_queries


def test_attached_it_logs_through_the_trainer_and_keeps_the_loss_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    callback = made_callback(check_on=1)
    trainer = made_trainer("sft", tmp_path, [Tracker(), callback])
    callback.attach(trainer)
    listening = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert sum("sts/near/drift" in row for row in seen) == 6
    assert sum("loss" in row for row in seen) == 6
    assert trainer.callback_handler.callbacks == listening
    shown = capsys.readouterr().out
    assert "'loss'" in shown
    assert "STS step 1" in shown
    assert "sts/near/drift" not in shown  # the check's own lines say it better


def test_the_run_folder_holds_forecast_baseline_and_checks(tmp_path: Path) -> None:
    made_trainer("plain", tmp_path, [made_callback()]).train()
    folder = tmp_path / "sts"
    assert {file.name for file in folder.iterdir()} == {
        "settings.json",
        "forecast.json",
        "rehearsal.json",
        "baseline.safetensors",
        "features.jsonl",
        "drift.jsonl",
        "ended.json",
        "report.html",
        "report.json",
    }
    content = json.loads((folder / "forecast.json").read_text())
    assert set(content["forecast"]["domains"]) == {"near", "far"}
    assert content["verdict"]["decision"] in ("go", "no-go", "not covered", "cannot tell")
    drifted = {feature for feature, _ in last_snapshot(tmp_path)["train"]["top_features"]}
    told = [json.loads(line)["feature"] for line in (folder / "features.jsonl").read_text().splitlines()]
    assert len(told) == len(set(told))
    assert set(told) >= {*content["forecast"]["features"], *drifted}


def test_budgets_with_units_are_kept_judged_and_told(tmp_path: Path) -> None:
    budgets: dict[str, float | str] = {"near": "2 points", "far": "0.05bits per byte"}
    callback = made_callback(protect=budgets)
    trainer = made_trainer("sft", tmp_path, [callback])
    trainer.train()
    kept = json.loads((tmp_path / "sts" / "settings.json").read_text())["policy"]["budgets"]
    assert kept == {"near": "2 points", "far": "0.05 bits/byte"}
    assert callback.verdict is not None
    assert "points of token accuracy after 6 steps" in callback.verdict.reasons["near"]
    assert "bits a byte after 6 steps" in callback.verdict.reasons["far"]
    near = last_snapshot(tmp_path)["domains"]["near"]
    assert near["accuracy"]["n_gained"] - near["accuracy"]["n_lost"] == sum(near["accuracy"]["query_changes"]) > 0
    (row,) = (row for row in trainer.state.log_history if "sts/near/accuracy" in row and row["step"] == 6)
    assert row["sts/near/accuracy"] == near["accuracy"]["now"]
    report = (tmp_path / "sts" / "report.html").read_text()
    assert "2 points" in report and "0.05 bits/byte" in report


def test_resuming_keeps_the_first_baseline(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made_trainer("sft", whole, [made_callback()]).train()
    made_trainer("sft", parts, [made_callback(), StopAt(4)]).train()
    before = (parts / "sts" / "baseline.safetensors").read_bytes()
    made_trainer("sft", parts, [made_callback()]).train(resume_from_checkpoint=str(parts / "checkpoint-4"))
    assert (parts / "sts" / "baseline.safetensors").read_bytes() == before
    assert drift_series(parts) == drift_series(whole)
    assert drift_series(whole)[6] > 0


def test_a_run_that_ends_twice_is_in_the_ledger_once_with_its_last_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STS_LEDGER", str(tmp_path / "ledger.jsonl"))
    out = tmp_path / "run"
    made_trainer("sft", out, [made_callback(), StopAt(4)]).train()
    callback = made_callback()
    made_trainer("sft", out, [callback]).train(resume_from_checkpoint=str(out / "checkpoint-4"))
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["steps"] for line in lines] == [4, 6]
    (entry,) = read().entries
    assert callback.forecast is not None
    assert entry.identity == callback.forecast.identity
    last = last_snapshot(out)["domains"]
    for name, domain in entry.domains.items():
        before = callback.forecast.domains[name]
        assert domain.transfer == pytest.approx(before.transfer.value, nan_ok=True)
        assert domain.relative_drift.value == last[name]["relative_drift"]["value"]
        assert domain.nll_change.value == last[name]["nll_change"]["value"]
    assert not any(text in "".join(lines) for text in (str(tmp_path), "what is"))


def test_past_runs_say_what_to_expect_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STS_LEDGER", str(tmp_path / "ledger.jsonl"))
    made_trainer("sft", tmp_path, [made_callback()], max_steps=2).train()
    assert "xpected" not in capsys.readouterr().out
    (entry,) = read().entries
    for i in range(4):
        append(replace(entry, identity=replace(entry.identity, probes=f"{i}"), forecast=f"{i}"))
    made_trainer("sft", tmp_path, [made_callback()], max_steps=2).train()
    shown = capsys.readouterr().out
    assert "expected at the end" in shown and "by past runs of like length and rate" in " ".join(shown.split())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


def drift_series(out: Path) -> dict[int, float]:
    snapshots = [json.loads(line)["snapshot"] for line in (out / "sts" / "drift.jsonl").read_text().splitlines()]
    return {s["step"]: s["domains"]["near"]["relative_drift"]["value"] for s in snapshots}


def test_resuming_without_a_baseline_is_refused_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_trainer("sft", tmp_path, [StopAt(4)]).train()
    trainer = made_trainer("sft", tmp_path, [made_callback()])
    with pytest.raises(CannotTell, match="Start the run anew"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 4
    trainer = made_trainer("sft", tmp_path, [made_callback(on_forecast_error="train unwatched")])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 6
    assert "NOT WATCHED" in capsys.readouterr().out.splitlines()[-1]


def harmful() -> dict[str, Any]:
    """Settings under which the tiny run alarms at its second check: the budget is next to nothing."""
    return {"protect": {"far": 1e-6}, "check_on": 1, "policy": PolicyConfig(min_drift=1e-6, patience=2)}


def alarmed_steps(out: Path) -> list[int]:
    lines = [json.loads(line)["verdict"] for line in (out / "sts" / "drift.jsonl").read_text().splitlines()]
    return [v["step"] for v in lines if v["decision"] == "no-go"]


def test_an_alarm_stops_training_with_a_checkpoint_if_asked(tmp_path: Path) -> None:
    trainer = made_trainer("sft", tmp_path, [made_callback(**harmful(), action="stop")], save_strategy="no", learning_rate=0.5)
    trainer.train()
    first = alarmed_steps(tmp_path)[0]
    assert trainer.state.global_step == first < 6
    assert (tmp_path / f"checkpoint-{first}").is_dir()


def test_an_alarm_saves_a_checkpoint_and_trains_on_if_asked(tmp_path: Path) -> None:
    trainer = made_trainer(
        "sft", tmp_path, [made_callback(**harmful(), action="checkpoint")], save_strategy="no", learning_rate=0.5
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert (tmp_path / f"checkpoint-{alarmed_steps(tmp_path)[0]}").is_dir()


class Constant(TrainerCallback):
    """Gives evaluations a metric of which the first value is the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_constant"] = 1.0


BEST = {"save_strategy": "best", "metric_for_best_model": "constant", "eval_steps": 2}


@pytest.mark.parametrize(
    ("alarm_at", "action", "check_on", "options", "saved"),
    [
        (4, "checkpoint", "evaluate", BEST, [2, 5]),  # the trainer drops the wish at step 4
        (4, "checkpoint", 1, BEST, [2, 5]),
        (3, "checkpoint", 1, BEST, [2, 3]),
        (2, "checkpoint", "evaluate", BEST, [2]),
        (2, "checkpoint", "evaluate", {**BEST, "eval_steps": 1}, [1, 6]),
        (6, "checkpoint", "evaluate", BEST, [2, 6]),
        (4, "stop", "evaluate", BEST, [2, 4]),
        (4, "stop", 1, BEST, [2, 4]),
        (4, "warn", "evaluate", BEST, [2]),
        (3, "checkpoint", "evaluate", {"save_strategy": "no"}, [3]),
        (2, "checkpoint", "save", {}, [2, 4, 6]),
        (3, "checkpoint", 1, {}, [2, 3, 4, 6]),
    ],
)
def test_an_alarms_checkpoint_is_made_once_whatever_else_is_saved(
    alarm_at: int,
    action: Any,
    check_on: Any,
    options: dict[str, Any],
    saved: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judged(history: list[DriftSnapshot], policy: PolicyConfig, levels: list[float]) -> Verdict:
        step = history[-1].step
        return Verdict("no-go", ("near",), {"near": "suffers."}, step) if step == alarm_at else Verdict("go", (), {}, step)

    monkeypatch.setattr("sts_callback.training.looks.judge_drift", judged)
    callbacks = [Constant(), made_callback(action=action, check_on=check_on)]
    made_trainer("plain", tmp_path, callbacks, gradient_accumulation_steps=1, **options).train()
    assert sorted(int(folder.name.removeprefix("checkpoint-")) for folder in tmp_path.glob("checkpoint-*")) == saved


@pytest.mark.parametrize("action", ["checkpoint", "stop"])
def test_an_alarms_checkpoint_that_the_trainer_may_drop_for_good_is_refused(action: Any, tmp_path: Path) -> None:
    callback = made_callback(action=action, check_on="evaluate")
    trainer = made_trainer("sft", tmp_path, [Constant(), callback], **BEST, eval_strategy="epoch")
    with pytest.raises(ConfigError, match=f"save_strategy: got 'best'.*action='{action}'.*set save_strategy='epoch'"):
        trainer.train()
    assert not (tmp_path / "sts").exists()


def test_an_alarm_calls_the_users_function_once_while_it_lasts(tmp_path: Path) -> None:
    told: list[Verdict] = []
    made_trainer("sft", tmp_path, [made_callback(**harmful(), action=told.append)], learning_rate=0.5).train()
    steps = alarmed_steps(tmp_path)
    assert len(steps) > 1
    assert told[0].step == steps[0]
    assert told[0].threatened == ("far",)
    assert len(told) == sum(1 for step in steps if step - 1 not in steps)


def test_an_alarm_is_printed_once_with_what_to_do_and_logged_for_those_who_keep_logs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="sts_callback")
    made_trainer("sft", tmp_path, [made_callback(**harmful())], learning_rate=0.5).train()
    first, *_ = steps = alarmed_steps(tmp_path)
    begun = sum(1 for step in steps if step - 1 not in steps)
    shown = capsys.readouterr()
    assert f"STS step {first}: ALARM, far is over its budget\n" in shown.out
    assert shown.out.count("What to do:") == begun
    assert f"ALARM, far is over its budget since step {first}\n" in shown.out
    assert "alarm" not in shown.err
    assert [r.levelname for r in caplog.records if "STS alarm at step" in r.message] == ["INFO"] * begun


def advised(text: str) -> list[list[str]]:
    """The words of the commands that a text shows, as a shell reads them."""
    return [shlex.split(line) for line in text.replace("\\\n", "").splitlines() if line.lstrip().startswith("sts-callback ")]


def test_an_alarm_names_model_sae_and_files_as_the_run_was_given_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train, own = Path("my rows.jsonl"), Path("far.jsonl")
    for file, texts in ((train, rows(40)), (own, TINY_DOMAINS["far"])):
        file.write_text("".join(f"{json.dumps(row)}\n" for row in texts))
    sae = saved_sae(Path("sae"))
    harm = harmful() | {"sae": str(sae), "train_data": str(train), "domains": TINY_DOMAINS | {"far": own}}
    trainer = made_trainer("sft", tmp_path / "out", [made_callback(**harm)], learning_rate=0.5)
    base = str(tmp_path / "out" / "base")
    trainer.model.name_or_path = base  # as from_pretrained sets it
    trainer.train()
    blame, rehearse = advised(capsys.readouterr().out)[:2]
    probes = ["--n-queries", str(PROBES.n_queries), "--n-features", str(PROBES.n_features)]
    rows_of = ["--domain", "far=far.jsonl", "--protect", "far=1e-06"]
    common = ["--model", base, "--sae", "sae", "--train", "my rows.jsonl", *probes, *rows_of]
    assert blame == ["sts-callback", "blame", *common, "--run-dir", str(tmp_path / "out")]
    own_steps = ["--full", "--batch-size", "4", "--steps-planned", "6", "--learning-rate", "0.05", "0.2"]
    assert rehearse == ["sts-callback", "rehearse", *common, *own_steps]
    logged = RunDirectory(tmp_path / "out" / "sts").read_all()
    assert logged.given == Given(
        base, "sae", "my rows.jsonl", {"near": "", "far": "far.jsonl"}, 0.5, 6, 4, 0, logged.given.probes
    )
    assert logged.given.probes == {"n_queries": PROBES.n_queries, "n_features": PROBES.n_features}
    assert [blame, rehearse] == advised(watch_view(logged, tmp_path / "out", colour=False))


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT of the lowest versions looks for one by no name
def test_what_has_no_name_is_not_made_up(tmp_path: Path) -> None:
    made_trainer("sft", tmp_path, [made_callback()], max_steps=1, lora=True).train()
    given = RunDirectory(tmp_path / "sts").read_all().given
    assert (given.model, given.sae, given.train, given.lora_r) == ("", "", "", 4)


def test_a_failing_action_is_recorded_and_training_goes_on(tmp_path: Path) -> None:
    def broken(verdict: Verdict) -> None:
        raise RuntimeError("pager is down")

    trainer = made_trainer("sft", tmp_path, [made_callback(**harmful(), action=broken)], learning_rate=0.5)
    trainer.train()
    assert trainer.state.global_step == 6
    assert "pager is down" in (tmp_path / "sts" / "faults.jsonl").read_text()


def test_a_failure_is_raised_if_asked(tmp_path: Path) -> None:
    def broken(verdict: Verdict) -> None:
        raise RuntimeError("pager is down")

    trainer = made_trainer("sft", tmp_path, [made_callback(**harmful(), action=broken, on_error="raise")], learning_rate=0.5)
    with pytest.raises(RuntimeError, match="pager is down"):
        trainer.train()


def test_a_no_go_forecast_refuses_before_the_first_step_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = Verdict("no-go", ("near",), {"near": "will suffer."}, 0)
    for room in ("session", "recorder"):
        monkeypatch.setattr(f"sts_callback.training.{room}.judge_forecast", lambda forecast, policy: verdict)
    norms = GradNorms()
    trainer = made_trainer("sft", tmp_path, [made_callback(on_forecast="refuse"), norms])
    with pytest.raises(NoGo, match="near: will suffer"):
        trainer.train()
    assert norms.norms == []
    assert (tmp_path / "sts" / "forecast.json").is_file()
    assert "Training begins" not in capsys.readouterr().out
    made_trainer("sft", tmp_path, [made_callback()]).train()  # by default it only says so
    assert "Training begins all the same; STSCallback(on_forecast='refuse') would not let it." in capsys.readouterr().out


def test_a_second_fresh_run_moves_the_first_ones_files_aside(tmp_path: Path) -> None:
    for _ in range(2):
        made_trainer("sft", tmp_path, [made_callback()]).train()
    assert checked_steps(tmp_path) == [1, 2, 4, 5, 6]
    assert (tmp_path / "sts.1" / "drift.jsonl").is_file()


def test_push_to_hub_uploads_the_run_folder_and_that_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uploads: list[set[str]] = []

    class Hub:
        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: str, ignore_patterns: list[str], **kwargs: Any) -> Future[None]:
            assert "features.jsonl and rollouts.jsonl quote your texts" in caplog.text
            files = [file.relative_to(folder_path).as_posix() for file in Path(folder_path).rglob("*") if file.is_file()]
            uploads.append(set(filter_repo_objects(files, ignore_patterns=ignore_patterns)))
            uploaded: Future[None] = Future()
            uploaded.set_result(None)
            return uploaded

    (tmp_path / "sts").mkdir()
    (tmp_path / "sts" / "features.jsonl").touch()  # an earlier run's, which is moved aside
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    made_trainer("plain", tmp_path, [made_callback()], push_to_hub=True, hub_model_id="me/model").train()
    of_ours = {"sts/features.jsonl", "sts.1/features.jsonl"}
    assert uploads[0] >= {"model.safetensors", *of_ours}
    kept = set(filter_repo_objects(uploads[0], ignore_patterns=["sts*/*", "checkpoint-*"]))  # as the warning has it
    assert "model.safetensors" in kept
    assert not any(name.startswith("sts") for name in kept)


def test_without_push_to_hub_nothing_is_said_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_trainer("plain", tmp_path, [made_callback()], max_steps=1).train()
    assert "push_to_hub" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check_on": 0}, "check_on: got 0"),
        ({"check_on": "often"}, "check_on: got 'often'"),
        ({"action": "panic"}, "action: got 'panic'"),
        ({"on_forecast": "stop"}, "on_forecast: got 'stop'"),
        ({"on_error": "ignore"}, "on_error: got 'ignore'"),
        ({"protect": ["nera"]}, "'nera' is no domain; did you mean 'near'"),
        ({"protect": {"near": -1.0}}, "protect"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made_callback(**options)


def ill_fitting_sae() -> Any:
    sae = rotated_sae()
    sae.W_dec.data.neg_()
    return sae


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sae": "no-such-release/layer_1"}, SaeError, "not in SAELens' registry"),
        ({"sae": rotated_sae(d_in=16)}, SaeError, "width 16.*width 32"),
        ({"sae": rotated_sae("blocks.9.hook_resid_post")}, Exception, "layer 9.*4 layers"),
        ({"domains": {"near": "nowhere.jsonl"}}, DataError, r"domains\['near'\]: there is no file nowhere.jsonl"),
        ({"domains": {"near": rows(5)}}, DataError, "5 usable rows"),
        ({"domains": {"near": [{"question": "?"}] * 20}}, DataError, "columns .*question.* fit no format"),
        ({"train_data": [{"prompt": "?"}] * 20}, DataError, "prompts but no answers"),
        ({"probes": ProbeConfig(n_queries=8, n_features=60)}, SaeError, "60 of 64"),
        ({"sae": ill_fitting_sae()}, CannotTell, "explained variance: .* take an SAE that was trained on this model"),
        (
            {"probes": ProbeConfig(n_queries=8, n_features=8), "policy": PolicyConfig(alpha=1e-4)},
            CannotTell,
            "n_queries: near has 8; an alarm for one of 1 protected domains at one of 5 checks at alpha 0.0001 takes 9. Give ",
        ),
        (
            {"protect": ["near", "far"], "probes": ProbeConfig(n_queries=9, n_features=8), "policy": PolicyConfig(alpha=1e-4)},
            CannotTell,
            "n_queries: near has 9, far has 9; an alarm for one of 2 protected domains at one of 5 checks at .* takes 10",
        ),
        (
            {"domains": {"near": rows(11), "far": rows(30)}, "policy": PolicyConfig(alpha=1e-3)},
            CannotTell,
            "n_queries: near has 6; an alarm for one of 1 protected domains",
        ),
        ({"domains": {"near": [{"prompt": "a" * 400, "completion": " b" * 300}] * 20}}, DataError, "512 positions"),
    ],
)
def test_wrong_input_stops_the_run_before_its_first_step(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    norms = GradNorms()
    trainer = made_trainer("sft", tmp_path, [made_callback(**options), norms])
    with pytest.raises(error, match=message):
        trainer.train()
    assert norms.norms == []


@pytest.mark.parametrize(
    "options",
    [
        {"probes": ProbeConfig(n_queries=4, n_features=8)},
        {"probes": ProbeConfig(n_queries=8, n_features=8), "policy": PolicyConfig(alpha=1e-4)},  # at the one check of one step
        {"probes": ProbeConfig(n_queries=4, n_features=8), "protect": []},
        {"domains": {"near": rows(20), "far": rows(9)}},  # only protected domains raise alarms
    ],
)
def test_as_many_queries_as_an_alarm_takes_are_enough(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = made_trainer("sft", tmp_path, [made_callback(**options)], max_steps=1, eval_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 1
    assert checked_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"domains": {"near": rows(30), "far": rows(9)}, "probes": ProbeConfig(n_queries=28, n_features=8)},
            ["near has 25;", "give it 33"],
        ),
        ({"domains": {"near": rows(40), "far": rows(9)}, "probes": ProbeConfig(n_queries=27, n_features=8)}, ["near has 27;"]),
        ({"domains": {"near": rows(33), "far": rows(9)}, "probes": ProbeConfig(n_queries=28, n_features=8)}, []),
    ],
    ids=["too few rows", "few queries asked for", "enough"],
)
def test_few_queries_are_told_and_how_many_rows_they_take(
    options: dict[str, Any], told: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = made_trainer("sft", tmp_path, [made_callback(**options)], max_steps=1, eval_strategy="no")
    trainer.train()
    found = [m for m in caplog.messages if m.startswith("n_queries") or "kept as examples" in m]
    assert len(found) == len(told)
    assert all(part in message for part, message in zip(told, found, strict=True))


def test_a_trainer_without_data_or_tokenizer_is_told_what_to_give(tmp_path: Path) -> None:
    args, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerState()
    event: dict[str, Any] = {"model": tiny_model(), "train_dataloader": None, "processing_class": tiny_tokenizer()}
    with pytest.raises(DataError, match=r"STSCallback\(train_data=...\)"):
        made_callback().on_train_begin(args, state, TrainerControl(), **event)
    with pytest.raises(ConfigError, match="processing_class"):
        made_callback().on_train_begin(args, state, TrainerControl(), **{**event, "processing_class": None})
    stream = SimpleNamespace(dataset=(row for row in rows()))
    with pytest.raises(DataError, match="stream"):
        made_callback().on_train_begin(args, state, TrainerControl(), **{**event, "train_dataloader": stream})


def test_scores_say_that_the_like_domain_moves_more(tmp_path: Path) -> None:
    callback = made_callback()
    made_trainer("sft", tmp_path, [callback]).train()
    assert callback.forecast is not None
    near, far = (callback.forecast.domains[name] for name in ("near", "far"))
    assert all(math.isfinite(d.sts_cross.value) and 0 < d.sts_cross.value < 1 for d in (near, far))


def test_several_saes_each_make_a_forecast_and_the_first_one_watches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saes = [rotated_sae(), rotated_sae("blocks.1.hook_resid_post", seed=1)]
    callback = made_callback(sae=saes, protect={"near": 0.1})
    made_trainer("sft", tmp_path, [callback]).train()
    written = json.loads((tmp_path / "sts" / "forecast.json").read_text())
    hooks = [made["identity"]["hook_name"] for made in (written["forecast"], *written["other_saes"])]
    assert hooks == ["blocks.2.hook_resid_post", "blocks.1.hook_resid_post"]
    assert callback.forecast is not None
    assert callback.forecast.identity.hook_name == hooks[0]
    shown = capsys.readouterr().out
    assert shown.index("STS forecast") < shown.index("transfer by SAE") < shown.index("agreement in order")
    assert checked_steps(tmp_path)[0] == 1


def test_no_sae_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="sae: got none"):
        made_callback(sae=[])


def test_features_are_told_in_words_once_each(tmp_path: Path) -> None:
    made_trainer("sft", tmp_path, [made_callback()]).train()
    told = [json.loads(line) for line in (tmp_path / "sts" / "features.jsonl").read_text().splitlines()]
    names = [feature["feature"] for feature in told]
    forecast = json.loads((tmp_path / "sts" / "forecast.json").read_text())["forecast"]
    assert names[: len(forecast["features"])] == forecast["features"]
    assert len(set(names)) == len(names)
    assert set(told[0]["snippets"]) == {"train", "near", "far"}
    assert told[0]["snippets"]["train"][0]["token"]
