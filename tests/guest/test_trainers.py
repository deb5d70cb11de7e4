"""Training cannot tell that the callback is there, whatever the trainer and its settings: bit for bit, in every cell."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback

from guest.runs import SAMPLING, TRAINERS, Outcome, Shelf, checked_steps, doses, finished, made_trainer, taste
from sts_callback import STSCallback
from tiny import rows

TABLE = Path(__file__).with_name("MATRIX.md")
N_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """One way to train: arguments of `made_trainer`, and how to see afterwards that they really were in force."""

    options: dict[str, Any]
    in_force: Callable[[Trainer], bool]
    trainers: tuple[str, ...] = ("Trainer", "SFT")
    kinds: tuple[bool, ...] = (False, True)
    """Of which with LoRA."""
    check_on: str | int = 1
    checks: tuple[int, ...] = tuple(range(1, N_STEPS + 1))
    attached: bool = True
    tapped: bool = False
    """Whether the forecast is made from rollouts."""
    seconds: int = 120
    helpers: tuple[type[TrainerCallback], ...] = ()
    """The user's own callbacks, in both runs."""
    ignored: tuple[str, ...] = ()
    """Warnings of libraries that come of it, with or without us."""


class OutOfMemoryOnce(TrainerCallback):
    """Fails as a GPU would, in the second step at the first batch size."""

    def __init__(self) -> None:
        self.failed = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB.")


def _compiled(trainer: Trainer) -> bool:
    return counters["stats"]["unique_graphs"] > 0


def _kept_the_best(trainer: Trainer) -> bool:
    return trainer.state.best_global_step is not None and len(_evaluations(trainer)) == N_STEPS


def _evaluations(trainer: Trainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "eval_runtime" in row]


COMPILING = (
    # torch 2.13, compiling what trl 1.16 computes losses with
    "ignore:.*should not be instantiated. Methods on autograd functions are all static:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning",
    # inductor of torch 2.13
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1}
SETTINGS = {
    "defaults": Setting({}, lambda t: True, trainers=TRAINERS),
    "defaults, callback not attached": Setting({}, lambda t: True, trainers=("Trainer", "SFT", "Reward"), attached=False),
    "rewards tapped, forecast from own rollouts": Setting(
        {"per_device_train_batch_size": 20}, lambda t: True, trainers=("GRPO", "RLOO"), tapped=True
    ),
    "gradient accumulation": Setting({"gradient_accumulation_steps": 3}, lambda t: t.state.epoch == 3 * N_STEPS / 20),
    "activation checkpointing": Setting({"gradient_checkpointing": True}, lambda t: t.model.is_gradient_checkpointing),
    "bf16 autocast": Setting({"bf16": True}, lambda t: t.accelerator.mixed_precision == "bf16"),
    "input tokens counted": Setting(
        {"include_num_input_tokens_seen": "non_padding"}, lambda t: t.state.num_input_tokens_seen > 0
    ),
    "Adafactor": Setting({"optim": "adafactor"}, lambda t: type(t.optimizer.optimizer).__name__ == "Adafactor"),
    "SGD with momentum": Setting(
        {"optim": "sgd", "optim_args": "momentum=0.9"}, lambda t: t.optimizer.param_groups[0]["momentum"] == 0.9
    ),
    "NEFTune": Setting({"neftune_noise_alpha": 5.0}, lambda t: t.neftune_noise_alpha == 5.0),
    "dropout in every layer (GPT-2)": Setting(
        {"architecture": "gpt2"}, lambda t: any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in t.model.modules())
    ),
    "packing, cut": Setting(
        {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
        lambda t: {len(ids) for ids in t.train_dataset["input_ids"][:5]} == {64},
        trainers=("SFT",),
    ),
    "packing, best fit": Setting(
        {"packing": True, "max_length": 128}, lambda t: len(t.train_dataset["seq_lengths"][0]) > 1, trainers=("SFT",)
    ),
    "evaluation before the first step": Setting(
        {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2},
        lambda t: _evaluations(t)[0]["step"] == 0,
        check_on="evaluate",  # at step 0 nothing has moved
    ),
    "best checkpoint at the end, checks at saves": Setting(
        {**EVALUATED, **SAVED, "load_best_model_at_end": True}, _kept_the_best, check_on="save"
    ),
    "best checkpoint at the end, checks at evaluations": Setting(
        {**EVALUATED, **SAVED, "load_best_model_at_end": True}, _kept_the_best, check_on="evaluate"
    ),
    "batch size found by running out of memory": Setting(
        {"auto_find_batch_size": True, "per_device_train_batch_size": 4},
        lambda t: t._train_batch_size < 4,
        checks=(1, 2, 3),
        helpers=(OutOfMemoryOnce,),
    ),
    "torch_compile=True (backend eager)": Setting(
        {"torch_compile": True, "torch_compile_backend": "eager"}, _compiled, seconds=240, ignored=COMPILING
    ),
    "model.compile() (backend eager)": Setting({"own_compile": "eager"}, _compiled, seconds=240, ignored=COMPILING),
    "torch_compile=True (backend inductor)": Setting(
        {"torch_compile": True, "torch_compile_backend": "inductor"},
        _compiled,
        trainers=("Trainer",),
        kinds=(False,),
        seconds=600,
        ignored=COMPILING,
    ),
    "accumulation, activation checkpointing, bf16, evaluations and saves at once": Setting(
        {
            **EVALUATED,
            **SAVED,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "bf16": True,
            "eval_on_start": True,
            "per_device_eval_batch_size": 2,
        },
        lambda t: t.model.is_gradient_checkpointing and t.accelerator.mixed_precision == "bf16",
        trainers=TRAINERS,
        check_on="save",
    ),
}
CELLS = [(name, kind, lora) for name, setting in SETTINGS.items() for kind in setting.trainers for lora in setting.kinds]


def _marked(cell: tuple[str, str, bool]) -> Any:
    name, kind, lora = cell
    quick = name == "defaults" and (not lora or kind in ("Trainer", "SFT", "GRPO"))
    marks = [pytest.mark.filterwarnings(warning) for warning in SETTINGS[name].ignored]
    marks += [] if quick else [pytest.mark.slow, pytest.mark.timeout(SETTINGS[name].seconds)]
    return pytest.param(*cell, id=f"{name}-{kind}-{'lora' if lora else 'full'}", marks=marks)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf.filled(tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str, bool], str]]:
    """What each cell showed; written down once the last of them is known."""
    found: dict[tuple[str, str, bool], str] = {}
    yield found
    if set(found) == set(CELLS):
        TABLE.write_text(as_markdown(found), encoding="utf-8")


def as_markdown(found: dict[tuple[str, str, bool], str]) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft", "accelerate"))
    lines = [
        "# What was tried",
        "",
        "Each cell is one run with the callback and one without: gradient norms, the trainer's own log rows (losses among them),",
        "final weights, the random state of Python, NumPy and torch, the model's settings and the tokenizer are compared bit for",
        "bit, and what the trainer counts. Attached, with any trainer but GRPO and RLOO, the run with the callback is rehearsed.",
        "Written by `tests/guest/test_trainers.py` when all of it has run. Tiny models on a CPU,",
        f"{libraries}.",
        "",
        "| trainer | setting | full parameters | LoRA |",
        "|---|---|---|---|",
    ]
    for name, setting in SETTINGS.items():
        for kind in setting.trainers:
            lines.append(f"| {kind} | {name} | {found[name, kind, False]} | {found.get((name, kind, True), 'not tried')} |")
    return "\n".join(lines) + "\n"


def run(
    name: str, kind: str, lora: bool, shelf: Shelf, out: Path, ours: TrainerCallback | None, **more: Any
) -> tuple[Trainer, Outcome]:
    setting = SETTINGS[name]
    torch._dynamo.reset()
    counters.clear()
    callbacks = [*(helper() for helper in setting.helpers), *([ours] if ours is not None else [])]
    rewards = ours.tap(taste) if isinstance(ours, STSCallback) and setting.tapped else taste
    trainer = made_trainer(kind, shelf, out, callbacks, lora=lora, rewards=rewards, **setting.options)
    if isinstance(ours, STSCallback) and setting.attached:
        ours.attach(trainer)
    outcome = finished(trainer)
    assert setting.in_force(trainer)
    return trainer, outcome


@pytest.mark.parametrize(("name", "kind", "lora"), [_marked(cell) for cell in CELLS])
def test_a_run_is_the_same_with_and_without(
    name: str, kind: str, lora: bool, shelf: Shelf, table: dict[tuple[str, str, bool], str], tmp_path: Path
) -> None:
    setting = SETTINGS[name]
    answers = {"train_data": rows(40)} if kind in SAMPLING and not setting.tapped else {}  # their own rows are prompts alone
    rehearsed = setting.attached and kind not in ("GRPO", "RLOO")
    ours = shelf.callback(check_on=setting.check_on, rehearse=rehearsed or "auto", **answers)
    _, without = run(name, kind, lora, shelf, tmp_path / "without", None)
    n_graphs = counters["stats"]["unique_graphs"]
    _, with_ours = run(name, kind, lora, shelf, tmp_path / "with", ours)
    differences = without.differences(with_ours)
    table[name, kind, lora] = f"**differs**: {', '.join(differences)}" if differences else "identical"
    assert differences == []
    assert counters["stats"]["unique_graphs"] == n_graphs
    assert len(without.gradient_norms) >= N_STEPS
    assert ours.forecast is not None
    assert ours.forecast.train_source == ("own rollouts" if setting.tapped else "reference answers")
    assert checked_steps(tmp_path / "with") == list(setting.checks)
    assert not (tmp_path / "with" / "sts" / "faults.jsonl").exists()
    assert ours.rehearsal is not None
    if rehearsed:
        assert [dose.multiple for dose in doses(tmp_path / "with")] == [1]
        changes = [dose.check.domains["near"].query_changes for dose in doses(tmp_path / "with")]
        assert kind == "Reward" or all(map(any, changes))  # a model without a head has no NLL
        assert all(dose.check.domains["near"].relative_drift.value > 0 for dose in doses(tmp_path / "with"))
    else:
        assert ours.rehearsal.skipped


class DrawsANumber(TrainerCallback):
    """Careless with the random state."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.rand(1)


class DrawsAtTheEnd(TrainerCallback):
    """The same, too late for this run but not for the user's next."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        torch.rand(1)


class LeavesEvaluationMode(TrainerCallback):
    """TRL would no longer log its own metrics, and dropout is off where nothing switches it on again."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.eval()


class ClipsTheTexts(TrainerCallback):
    """Leaves its truncation with the user's tokenizer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, processing_class: Any = None, **kwargs: Any) -> None:
        processing_class(["a text"], truncation=True, max_length=4)


class NudgesAWeight(TrainerCallback):
    """By the last bit of one number, after the last step."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weight = next(model.parameters()).data
        weight.view(torch.int32).flatten()[0] ^= 1


@pytest.mark.parametrize(
    ("careless", "expected"),
    [
        (DrawsANumber, {"gradient_norms", "log_rows", "weights", "random_state", "counters"}),
        (DrawsAtTheEnd, {"random_state"}),
        (LeavesEvaluationMode, {"log_rows", "model_settings"}),
        (ClipsTheTexts, {"tokenizer"}),
        (NudgesAWeight, {"weights"}),
    ],
)
def test_the_comparison_can_fail(careless: type[TrainerCallback], expected: set[str], shelf: Shelf, tmp_path: Path) -> None:
    outcomes = [run("defaults", "SFT", False, shelf, tmp_path / str(i), c)[1] for i, c in enumerate((None, careless()))]
    assert set(outcomes[0].differences(outcomes[1])) == expected


@pytest.mark.parametrize("kind", ["GRPO", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SAMPLING[1:])])
def test_the_comparison_sees_other_rollouts(kind: str, shelf: Shelf, tmp_path: Path) -> None:
    outcomes = [run("defaults", kind, False, shelf, tmp_path / str(i), c)[1] for i, c in enumerate((None, DrawsANumber()))]
    assert "log_rows" in outcomes[0].differences(outcomes[1])


def test_the_table_shows_a_cell_that_differs() -> None:
    found = dict.fromkeys(CELLS, "identical") | {CELLS[0]: "**differs**: weights"}
    assert re.search(r"Trainer .*defaults .*\*\*differs\*\*: weights .*identical", as_markdown(found))


def test_smaller_batches_after_an_out_of_memory_keep_step_zero(shelf: Shelf, tmp_path: Path) -> None:
    """The trainer starts again at step 0, but with weights that have moved: they are no baseline."""
    ours = shelf.callback()
    baselines = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            baselines.append((tmp_path / "sts" / "baseline.safetensors").read_bytes())

    name = "batch size found by running out of memory"
    trainer = made_trainer("SFT", shelf, tmp_path, [OutOfMemoryOnce(), ours, Watch()], **SETTINGS[name].options)
    trainer.train()
    assert len(baselines) == 2
    assert baselines[0] == baselines[1]
    assert not (tmp_path / "sts.1").exists()
    assert checked_steps(tmp_path) == [1, 2, 3]  # the first attempt's check is the new one's


def test_a_second_training_makes_its_own_step_zero(shelf: Shelf, tmp_path: Path) -> None:
    """Also where batch sizes are found: only a run that has not ended is taken up."""
    ours = shelf.callback()
    trainer = made_trainer("SFT", shelf, tmp_path, [ours], auto_find_batch_size=True)
    trainer.train()
    trainer.train()
    assert (tmp_path / "sts.1" / "drift.jsonl").is_file()
    assert checked_steps(tmp_path) == [1, 2, 3]


def test_a_model_without_a_head_is_watched_without_nll(shelf: Shelf, tmp_path: Path) -> None:
    ours = shelf.callback()
    trainer = made_trainer("Reward", shelf, tmp_path, [ours])
    ours.attach(trainer)
    trainer.train()
    (row, *_) = [row for row in trainer.state.log_history if "sts/near/drift" in row]
    assert row["sts/near/drift"] > 0
    assert "sts/near/nll_change" not in row
