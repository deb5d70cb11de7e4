"""Rates and mixtures rehearsed side by side: what is tried, what is put back, what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from samples import IDENTITY, answers, domain_drift, snapshot
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.errors import CannotTell, ConfigError, DataError
from sts_callback.measure.monitor import Monitor
from sts_callback.policy import judge_rehearsal
from sts_callback.records.rehearsal import Dose, Rehearsal, Trial, Trials
from sts_callback.report.terminal.rehearsal import trials_table
from sts_callback.report.trials import answers as said
from sts_callback.report.trials import trial_line
from sts_callback.training.sft import SFTSetup, read_setup
from sts_callback.training.trials import Mixture, Rows, try_out
from tiny import rows, saved_sae, tiny_model, tiny_tokenizer

TRAIN, CASES = rows(40, "sums"), rows(12, "tales", seed=70)
ALL = Rows(TRAIN, {"cases": CASES}, seed=0)


def setup(**options: Any) -> SFTSetup:
    return read_setup(None, lora_r=4, full=False, options={"per_device_train_batch_size": 2, "max_steps": 40, **options})


def test_a_mixture_has_its_shares_and_the_training_rows_of_the_others() -> None:
    plain, mixed = ALL.of(Mixture({}), 20), ALL.of(Mixture({"cases": 0.25}), 20)
    assert len(plain) == len(mixed) == 20
    assert sum(row in CASES for row in mixed) == 5
    assert [row for row in mixed if row in TRAIN] != TRAIN[:15]  # drawn, not the first ones
    assert {row["prompt"] for row in mixed if row in TRAIN} <= {row["prompt"] for row in plain}


def test_rows_of_a_small_source_come_again() -> None:
    drawn = ALL.of(Mixture({"cases": 0.5}), 48)
    assert sorted(row["prompt"] for row in drawn if row in CASES) == sorted(2 * [row["prompt"] for row in CASES])


def measuring(folder: Path, tokenizer: Any, n_queries: int = 28) -> Callable[[nn.Module], Monitor]:
    """What makes the monitor of a tuned model, which protects `far`."""
    config = ProbeConfig(n_queries=n_queries, n_features=8)
    domains = {"far": rows(40, "poems", seed=90)}
    return partial(
        Monitor, tokenizer=tokenizer, sae=saved_sae(folder), train_data=TRAIN, domains=domains, config=config, progress=False
    )


def stopping_at(beginning: str, told: list[str]) -> Callable[[str], None]:
    """Keeps the lines that it is told, and stops the command at one that begins so."""

    def keep(line: str) -> None:
        told.append(line)
        if line.startswith(beginning):
            raise KeyboardInterrupt

    return keep


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, dict[str, torch.Tensor], list[str], Trials]:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    monitor = measuring(tmp_path_factory.mktemp("sae"), tokenizer)
    mixtures = [Mixture({}), Mixture({"cases": 0.5})]
    policy = PolicyConfig({"far": 0.1})
    told = list[str]()
    _, found = try_out(model, tokenizer, setup(), ALL, mixtures, [1e-5, 3e-1], monitor, policy, told=told.append)
    return model, before, told, found


def test_a_run_that_cannot_be_put_back_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sts_callback.training.rehearsal.is_sharded", lambda model: True)
    tokenizer = tiny_tokenizer()
    monitor = measuring(tmp_path, tokenizer)
    with pytest.raises(CannotTell, match="rehearse: such a run cannot be rehearsed: its model is sharded"):
        try_out(tiny_model(), tokenizer, setup(), ALL, [Mixture({})], [1e-5], monitor, PolicyConfig({"far": 0.1}), told=print)


def test_every_rate_and_mixture_is_tried_and_moves_the_model_by_its_own(tried: Any) -> None:
    *_, found = tried
    assert [(trial.learning_rate, dict(trial.replay)) for trial in found.trials] == [
        (1e-5, {}),
        (3e-1, {}),
        (1e-5, {"cases": 0.5}),
        (3e-1, {"cases": 0.5}),
    ]
    changes = [trial.check.domains["far"].nll_change.value for trial in found.trials]
    assert abs(changes[0]) < 0.01 < abs(changes[1])
    assert len(set(changes)) == 4


def test_the_model_is_left_as_it_was_with_an_adapter_that_does_nothing(tried: Any) -> None:
    model, before, _, found = tried
    after = {name.replace(".base_layer", ""): weight for name, weight in model.state_dict().items() if "lora" not in name}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all((weight == 0).all() for name, weight in model.state_dict().items() if "lora_B" in name)
    assert found.trials[0].rehearsal.steps_planned == 40


def test_what_is_ahead_is_told_and_each_trial_as_it_is_done(tried: Any) -> None:
    _, _, (ahead, *lines), found = tried
    assert ahead.startswith("STS rehearse: a forecast first, then 4 trials (2 rates, 2 mixtures) of 5 training steps and ")
    assert ahead.endswith(" one pass over 56 queries each.")  # 28 of the domain, 28 of the training data
    assert lines == [trial_line(one, number, 4, {"far": 0.1}) for number, one in enumerate(found.trials, 1)]


def test_a_run_that_is_stopped_has_told_what_was_done(tmp_path: Path) -> None:
    told = list[str]()
    tokenizer = tiny_tokenizer()
    monitor = measuring(tmp_path, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        rates, policy = [1e-5, 3e-1], PolicyConfig({"far": 0.1})
        try_out(
            tiny_model(), tokenizer, setup(), ALL, [Mixture({})], rates, monitor, policy, told=stopping_at("Trial 1 of 2", told)
        )
    assert len(told) == 2  # what is ahead, and the first of two trials


def test_too_few_queries_to_see_much_are_told_before_the_first_trial(tmp_path: Path) -> None:
    told = list[str]()
    tokenizer = tiny_tokenizer()
    monitor = measuring(tmp_path, tokenizer, n_queries=20)
    with pytest.raises(KeyboardInterrupt):
        policy = PolicyConfig({"far": 0.1})
        try_out(
            tiny_model(), tokenizer, setup(), ALL, [Mixture({})], [1e-5], monitor, policy, told=stopping_at("n_queries", told)
        )
    assert told[0].startswith("STS rehearse: a forecast first, then 1 trial")
    assert told[1:] == ["n_queries: far has 20; with fewer than 28 an alarm comes late or never."]


def test_trials_can_be_written_and_read(tried: Any) -> None:
    *_, found = tried
    assert Trials.from_json(found.to_json()).to_json() == found.to_json()


def trial(rate: float, change: float, **replay: float) -> Trial:
    check = snapshot(5, domain_drift("law", **answers(change, 0.01)))
    one = Rehearsal((Dose(1.0, rate, 5, check),), 100, 100 * rate, 1.0)
    return Trial(rate, replay, one, judge_rehearsal(one, PolicyConfig({"law": 0.1})))


def trials(*some: Trial) -> Trials:
    return Trials(IDENTITY, "LoRA of rank 16", some, {"law": 0.1}, 2.0)


def test_the_largest_rate_is_the_last_before_one_that_breaks_a_budget() -> None:
    found = trials(trial(1e-4, 0.0), trial(3e-4, 0.2), trial(1e-3, 0.0))
    assert found.largest_rate({}) == 1e-4
    assert found.finding == "within"
    assert "1e-04" in said(found)[0] or "0.0001" in said(found)[0]


def test_the_least_replay_that_keeps_every_budget_is_named() -> None:
    found = trials(trial(1e-3, 0.3), trial(1e-3, 0.2, cases=0.1), trial(1e-3, 0.0, cases=0.2), trial(1e-3, 0.0, cases=0.5))
    assert found.least_replay(1e-3) == {"cases": 0.2}
    assert any("20% cases" in sentence for sentence in said(found))


def test_no_rate_is_named_where_none_keeps_a_budget() -> None:
    found = trials(trial(1e-4, 0.2), trial(1e-3, 0.5))
    assert found.largest_rate({}) is None
    assert found.finding == "beyond"
    assert "under 0.0001" in said(found)[0]


def test_the_table_fits_a_terminal_and_names_the_worst_domain() -> None:
    found = trials(trial(1e-4, 0.0), trial(1e-3, 0.5, **{"a-source-with-a-long-name": 0.25}))
    shown = trials_table(found)
    assert max(map(len, shown.splitlines())) <= 80
    assert "law" in shown


def test_a_trial_in_a_line_names_how_it_was_made_and_the_worst_domain_against_its_budget() -> None:
    line = trial_line(trial(1e-3, 0.5, cases=0.25), 2, 4, {"law": 0.1})
    assert re.fullmatch(
        r"Trial 2 of 4, rate 0\.001, replay 25% cases: no-go; "
        r"worst domain law \+0\.50 \[\+0\.\d\d, \+0\.\d\d\], over, budget 0\.10; 1\.0 s",
        line,
    )
    assert "rate 0.0001, no replay: go; " in trial_line(trial(1e-4, 0.0), 1, 4, {"law": 0.1})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("learning_rte: 1.0e-4", "learning_rate"),
        ("- 1", "holds no arguments"),
        ("optim: nonsense", "optim"),
        ("lr_scheduler_type: nonsense", "lr_scheduler_type"),
    ],
)
def test_arguments_that_trl_refuses_are_named(content: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=named) as raised:
        made = read_setup(file, lora_r=None, full=False, options={})
        run(made, tmp_path)
    assert str(raised.value).startswith("--trainer-args")


def run(made: SFTSetup, folder: Path, train: Any = TRAIN) -> Trials:
    def refuse(model: nn.Module) -> Monitor:
        raise AssertionError("it should be refused before")

    return try_out(
        tiny_model(),
        tiny_tokenizer(),
        made,
        Rows(train, {}, 0),
        [Mixture({})],
        [1e-3],
        refuse,
        PolicyConfig({"far": 0.1}),
        told=print,
    )[1]


def test_arguments_of_trls_script_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    lines = ["model_name_or_path: tiny", "dataset_name: rows", "learning_rate: 2.0e-4", "use_peft: true", "lora_r: 8"]
    file.write_text("\n".join([*lines, "gradient_accumulation_steps: 2"]))
    made = read_setup(file, lora_r=None, full=False, options={"max_steps": None, "per_device_train_batch_size": 3})
    assert made.learning_rate == 2e-4
    assert made.adapter is not None
    assert made.adapter.r == 8
    assert made.arguments == {"learning_rate": 2e-4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    assert read_setup(file, lora_r=None, full=True, options={}).adapter is None
    assert json.loads(json.dumps(made.name)) == "LoRA of rank 8"


def test_rows_that_trl_cannot_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_data"):
        run(setup(), tmp_path, [{"question": "a", "reply": "b"}] * 10)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_shares_that_make_no_mixture_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="--replay cases"):
        Mixture({"cases": share})
