"""What goes wrong around a run, and what becomes of it: a table of faults, each of them injected.

The result of training is always that of the same run without the callback, and what a user is told is asserted: the verdict of
each check, and a last line that says if the run was not wholly watched. `FAULTS.md` beside this file is the table as the tests
saw it; `STS_WRITE_FAULTS=1 pytest tests/guest/test_faults.py` writes it anew.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from guest.runs import same
from sts_callback import STSCallback
from sts_callback.config import PolicyConfig
from sts_callback.errors import CannotTell, ConfigError, DataError, ModelError, SaeError, StsError
from sts_callback.policy import judge_drift
from sts_callback.records import DriftSnapshot, Verdict
from test_callback import PROBES, TINY_DOMAINS, made_callback
from tiny import rotated_sae, rows, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

TABLE = Path(__file__).parent / "FAULTS.md"
N_STEPS = 3


class Scene:
    """One run, and what is wrong with it."""

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.monkeypatch = out, monkeypatch
        self.watched = False
        self.step = 0
        self.model: nn.Module = tiny_model("llama")
        self.tokenizer = tiny_tokenizer()
        self.args: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        self.train_dataset: Any = None
        self.callbacks: list[TrainerCallback] = []
        self.steps_of_interest: dict[int, Callable[[], object]] = {}
        self.is_attached = False
        self.train: Callable[[Trainer], object] = lambda trainer: trainer.train()
        self.last: Trainer  # the newest one made

    def on_probe(
        self, spoil: Callable[[torch.Tensor], torch.Tensor], *, steps: set[int], module: nn.Module | None = None
    ) -> None:
        """Do something to the activations of our own forwards at some steps; those of training are not touched."""

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return spoil(output) if not module.training and self.step in steps else None

        (self.model.model.layers[0] if module is None else module).register_forward_hook(hook)

    def at(self, step: int, do: Callable[[], object]) -> None:
        """Do something at the end of a step, before the callback's turn."""
        self.steps_of_interest[step] = do

    def tokenised(self, n: int = 40) -> Dataset:
        return tokenised(rows(n), tiny_tokenizer())

    def trainer(self) -> Trainer:
        scene = self

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                scene.step = state.global_step
                if state.global_step in scene.steps_of_interest:
                    scene.steps_of_interest[state.global_step]()

        args = tiny_arguments(self.out, **{"max_steps": N_STEPS, **self.args})
        ours = [made_callback(**{"check_on": 1, **self.options})] if self.watched else []
        trainer = Trainer(
            model=self.model,
            args=TrainingArguments(**args),
            train_dataset=self.tokenised() if self.train_dataset is None else self.train_dataset,
            processing_class=self.tokenizer,
            data_collator=padded,
            callbacks=[Steps(), *ours, *(self.callbacks if self.watched else [])],
        )
        for callback in ours if self.is_attached else []:
            callback.attach(trainer)
        self.last = trainer
        return trainer


def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch, padded with zeros: also for a tokenizer that knows no padding."""
    width = max(len(f["input_ids"]) for f in features)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[*f[name], *[value] * (width - len(f[name]))] for f in features])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", -100), "attention_mask": (ids != 0).long()}


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    inject: Callable[[Scene], object]
    becomes: str
    """What happens, in words, for the table."""
    checks: tuple[int, ...] = (1, 2, 3)
    """Steps whose checks are in the run log at the end."""
    told: tuple[int, ...] | None = None
    """Steps whose checks are in the trainer's log at the end, if other ones."""
    recorded: tuple[tuple[int, str, str], ...] = ()
    """Faults in the run log: step, what failed, part of the error."""
    raises: type[BaseException] | None = None
    """What `on_error="raise"` raises, where something failed."""
    refused: tuple[type[BaseException], str] | None = None
    """With what the run is refused before its first step, that of a resumed one before the next."""
    verdicts: tuple[str, ...] | None = None
    """The verdicts of `checks`, if other ones than without a fault."""
    last_line: str = ""
    """What the last line says of a run that was not wholly watched."""
    in_training: bool = False
    """Whether training itself is another one, and its run without the callback too."""


# What is wrong with the model's forward in our passes.


def nan(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("nan"))


def infinite(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("inf"))


def raising_in_batches(error: BaseException) -> Callable[[torch.Tensor], torch.Tensor]:
    """The self-test of a new monitor runs no more than two rows at once."""

    def spoil(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise error
        return x

    return spoil


def raising(error: BaseException, n_times: int = 10**9) -> Callable[[torch.Tensor], torch.Tensor]:
    left = [n_times]

    def spoil(x: torch.Tensor) -> torch.Tensor:
        if left[0] == 0:
            return x
        left[0] -= 1
        raise error

    return spoil


def out_of_memory() -> RuntimeError:
    return RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


# What is wrong with the disk.


def disk_full(scene: Scene, from_step: int, to_step: int, part: str = "") -> None:
    """Nothing whose name has that part can be written into the run's folder."""
    original = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if from_step <= scene.step <= to_step and path.parent.name == "sts" and part in path.name and mode in ("a", "w"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, mode, *args, **kwargs)

    scene.monkeypatch.setattr(Path, "open", full)


def read_only(scene: Scene) -> None:
    original = Path.mkdir

    def refused(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == "sts":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        original(path, *args, **kwargs)

    scene.monkeypatch.setattr(Path, "mkdir", refused)


def file_in_place_of_folder(scene: Scene) -> None:
    (scene.out / "sts").write_text("mine")


def resumed(damage: Callable[[Path], object] = lambda folder: None, **changed: Any) -> Callable[[Scene], None]:
    """Stop after step 2, do damage to the run's folder, resume from the save at step 2."""

    def inject(scene: Scene) -> None:
        scene.args |= {"save_strategy": "steps", "save_steps": 2}

        def train(trainer: Trainer) -> None:
            if scene.watched:
                trainer.train()
                damage(scene.out / "sts")
                scene.options |= changed
                scene.step = 0
                trainer = scene.trainer()
                trainer.train(resume_from_checkpoint=str(scene.out / "checkpoint-2"))
            else:
                trainer.train()

        scene.train = train

    return inject


def cut(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    file = folder / "baseline.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def tear(garbage: bytes) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        lines = (folder / "drift.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "drift.jsonl").write_bytes(lines[0] + garbage + b"".join(lines[1:]))

    return damage


# What is wrong with tokenizer, texts and names.


def without(*tokens: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        for token in tokens:
            setattr(scene.tokenizer, token, None)

    return inject


def domains(**changed: Any) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.options["domains"] = {**TINY_DOMAINS, **changed}

    return inject


def named(name: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.options |= {"domains": {name: TINY_DOMAINS["near"]}, "protect": [name]}

    return inject


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
    for i in range(30)
]
SCRIPTS = [{"prompt": f"{i} を足すと何になりますか。", "completion": f" إنها {i + 1}"} for i in range(30)]
EMPTY = [{"prompt": "", "completion": ""}]


class Unreadable:
    """A data set that fails when it is read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("the bucket is gone")


def undecodable(scene: Scene) -> None:
    file = scene.out / "near.jsonl"
    file.write_bytes(b'{"prompt": "\xff\xfe", "completion": "x"}\n' * 30)
    scene.options["domains"] = {"near": str(file)}


# What is wrong with how the callback is used.


def alarming(scene: Scene, action: Callable[[Verdict], object]) -> None:
    """Every check alarms."""
    scene.options["action"] = action
    alarm = Verdict("no-go", ("near",), {"near": "suffers."}, 1)
    scene.monkeypatch.setattr("sts_callback.training.looks.judge_drift", lambda history, policy, levels: alarm)


def broken_action(scene: Scene) -> None:
    def action(verdict: Verdict) -> None:
        raise LookupError("pager is down")

    alarming(scene, action)


def two_callbacks(scene: Scene) -> None:
    scene.callbacks.append(made_callback())


def same_callback_twice(scene: Scene) -> None:
    def train(trainer: Trainer) -> None:
        trainer.callback_handler.callbacks += [c for c in trainer.callback_handler.callbacks if isinstance(c, STSCallback)]
        trainer.train()

    scene.train = train


def twice(between: Callable[[Trainer], object] = lambda trainer: None) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        def train(trainer: Trainer) -> None:
            trainer.train()
            between(trainer)
            trainer.optimizer = trainer.lr_scheduler = None
            scene.step = 0
            trainer.train()

        scene.train = train

    return inject


def use_model(trainer: Trainer, model: nn.Module) -> None:
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model


def lora(scene: Scene) -> None:
    torch.manual_seed(1)
    scene.model = get_peft_model(scene.model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def merged_in_between(scene: Scene) -> None:
    lora(scene)
    twice(lambda trainer: use_model(trainer, trainer.model.merge_and_unload().requires_grad_()))(scene)


def swapped_in_mid_run(scene: Scene) -> None:
    other = tiny_model("llama", seed=4)
    scene.at(2, lambda: scene.monkeypatch.setattr(scene.last.callback_handler, "model", other))


# What is wrong with model and SAE.


def meta_sae(scene: Scene) -> None:
    scene.options["sae"] = rotated_sae().to("meta")


def nan_sae(scene: Scene) -> None:
    sae = rotated_sae()
    sae.W_enc.data[0, 0] = float("nan")
    scene.options["sae"] = sae


def hub_out_of_reach(scene: Scene) -> None:
    scene.monkeypatch.setenv("HF_HOME", str(scene.out / "cache"))
    scene.options["sae"] = "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small"


def split_over_devices(scene: Scene) -> None:
    places: dict[str, Any] = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" for i in range(4)}
    scene.model = dispatch_model(scene.model, places, main_device="cpu", force_hooks=True)


def typed(dtype: torch.dtype) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.model = scene.model.to(dtype)
        scene.args |= {"optim": "sgd", "learning_rate": 1e-2}  # squares of gradients, which Adam keeps, are 0 in float16

    return inject


def frozen_but_the_head(scene: Scene) -> None:
    scene.model.requires_grad_(False)
    scene.model.lm_head.requires_grad_(True)


def tied(scene: Scene) -> None:
    scene.model.lm_head.weight = scene.model.model.embed_tokens.weight


def default_dtype(scene: Scene) -> None:
    def train(trainer: Trainer) -> None:
        torch.set_default_dtype(torch.bfloat16)
        try:
            trainer.train()
        finally:
            torch.set_default_dtype(torch.float32)

    scene.train = train


def deterministic(scene: Scene) -> None:
    def train(trainer: Trainer) -> None:
        torch.use_deterministic_algorithms(True)
        try:
            trainer.train()
        finally:
            torch.use_deterministic_algorithms(False)

    scene.train = train


# What is wrong with the world around.


def clock_backwards(scene: Scene) -> None:
    now = iter(range(10**9, 0, -1))
    scene.monkeypatch.setattr(time, "time", lambda: float(next(now)))


def closed(stream: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        dead = io.StringIO()
        dead.close()
        scene.monkeypatch.setattr(sys, stream, dead)

    return inject


def quietly(trainer: Trainer) -> None:
    trainer.remove_callback(PrinterCallback)  # it would fail by itself
    trainer.train()


def closed_log(scene: Scene) -> None:
    dead = io.StringIO()
    dead.close()
    handler = logging.StreamHandler(dead)
    ours = logging.getLogger("sts_callback")
    scene.monkeypatch.setattr(ours, "handlers", [handler])
    scene.monkeypatch.setattr(ours, "propagate", False)
    scene.monkeypatch.setattr(logging, "raiseExceptions", False)
    scene.on_probe(raising(ValueError("broken")), steps={2})


def broken_tracker(scene: Scene) -> None:
    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "sts/near/drift" in logs and state.global_step == 2:
                raise ConnectionError("no answer from the tracker")

    scene.callbacks.append(Tracker())
    scene.is_attached = True


def elsewhere(scene: Scene, name: str) -> None:
    folder = scene.out / name
    folder.mkdir()
    scene.out = folder


def symlinked(scene: Scene) -> None:
    (scene.out / "real").mkdir()
    (scene.out / "link").symlink_to(scene.out / "real")
    scene.out = scene.out / "link"


def checkpoint_deleted(scene: Scene) -> None:
    scene.args |= {"save_strategy": "steps", "save_steps": 1}
    scene.at(2, lambda: shutil.rmtree(scene.out / "checkpoint-1"))


UNWATCHED, NOT_WHOLLY = "NOT WATCHED", "NOT WHOLLY WATCHED"
USUAL = ("go", "go", "go")
"""Verdicts of the checks of a run without a fault."""
BY_NUMBERS = ("as the numbers have it",)
"""Verdicts of a run that is another one, and whose numbers lie near the budget."""
FAULTS = [
    # The model's forward in our passes
    Fault(
        "NaN activations in one check",
        lambda s: s.on_probe(nan, steps={2}),
        "the check cannot tell and says that the model has diverged; the others can",
        recorded=((2, "model", "NaN or infinite numbers on train, near"),),
        verdicts=(USUAL[0], "cannot tell", USUAL[2]),
    ),
    Fault(
        "infinite activations in one check",
        lambda s: s.on_probe(infinite, steps={2}),
        "likewise",
        recorded=((2, "model", "NaN or infinite numbers on train, near"),),
        verdicts=(USUAL[0], "cannot tell", USUAL[2]),
    ),
    Fault(
        "NaN in the head in one check",
        lambda s: s.on_probe(nan, steps={2}, module=s.model.lm_head),
        "likewise",
        recorded=((2, "model", "NaN or infinite numbers on train, near"),),
        verdicts=(USUAL[0], "cannot tell", USUAL[2]),
    ),
    Fault(
        "NaN activations in the forecast",
        lambda s: s.on_probe(nan, steps={0}),
        "refused",
        refused=(ModelError, "NaN or infinite before training"),
    ),
    Fault(
        "NaN activations in the forecast, to be trained unwatched",
        lambda s: (s.on_probe(nan, steps={0}), s.options.update(on_forecast_error="train unwatched")),
        "the run is not watched",
        checks=(),
        recorded=((0, "forecast", "NaN or infinite"),),
        raises=ModelError,
        last_line=UNWATCHED,
    ),
    Fault(
        "an error in one check",
        lambda s: s.on_probe(raising(ZeroDivisionError("in layer 0")), steps={2}),
        "the check is left out",
        checks=(1, 3),
        recorded=((2, "drift check", "in layer 0"),),
        last_line=NOT_WHOLLY,
        raises=ZeroDivisionError,
    ),
    Fault(
        "an error in every forward of ours",
        lambda s: s.on_probe(raising(ZeroDivisionError("in layer 0")), steps={0}),
        "refused",
        refused=(ModelError, "in layer 0"),
    ),
    Fault(
        "an error in batches of the forecast",
        lambda s: s.on_probe(raising_in_batches(ZeroDivisionError("in layer 0")), steps={0}),
        "refused",
        refused=(CannotTell, "failed before the first step with ZeroDivisionError.*train unwatched"),
        raises=ZeroDivisionError,
    ),
    Fault(
        "an error in batches of the forecast, to be trained unwatched",
        lambda s: (
            s.on_probe(raising_in_batches(ZeroDivisionError("in layer 0")), steps={0}),
            s.options.update(on_forecast_error="train unwatched"),
        ),
        "the run is not watched",
        checks=(),
        recorded=((0, "forecast", "in layer 0"),),
        raises=ZeroDivisionError,
        last_line=UNWATCHED,
    ),
    Fault(
        "out of memory once in a check",
        lambda s: s.on_probe(raising(out_of_memory(), 1), steps={2}),
        "the check is made again in batches half as large, as are all later ones",
        recorded=((2, "drift check, 1024 tokens a batch", "out of memory"),),
    ),
    Fault(
        "out of memory in a check, however small its batches",
        lambda s: s.on_probe(raising(out_of_memory()), steps={2}),
        "batches halve three times, then the check is left out",
        checks=(1, 3),
        recorded=tuple((2, f"drift check, {n} tokens a batch", "out of memory") for n in (1024, 512, 256, 128)),
        last_line=NOT_WHOLLY,
        raises=RuntimeError,
    ),
    Fault(
        "out of memory in a check, under auto_find_batch_size",
        lambda s: (s.args.update(auto_find_batch_size=True), s.on_probe(raising(out_of_memory()), steps={2})),
        "as before; training is not begun again",
        checks=(1, 3),
        recorded=tuple((2, f"drift check, {n} tokens a batch", "out of memory") for n in (1024, 512, 256, 128)),
        last_line=NOT_WHOLLY,
    ),
    Fault(
        "MemoryError once in a check",
        lambda s: s.on_probe(raising(MemoryError(), 1), steps={2}),
        "as out of memory",
        recorded=((2, "drift check, 1024 tokens a batch", "MemoryError"),),
    ),
    Fault(
        "out of memory once in the forecast",
        lambda s: s.on_probe(raising(out_of_memory(), 1), steps={0}),
        "the forecast is made again in batches half as large, as are all checks",
        recorded=((0, "forecast, 1024 tokens a batch", "out of memory"),),
    ),
    Fault(
        "out of memory in the forecast, however small its batches",
        lambda s: s.on_probe(raising(out_of_memory()), steps={0}),
        "batches halve three times, then refused",
        refused=(CannotTell, "memory does not suffice"),
        raises=RuntimeError,
    ),
    Fault(
        "out of memory in the forecast, under auto_find_batch_size",
        lambda s: (s.args.update(auto_find_batch_size=True), s.on_probe(raising(out_of_memory()), steps={0})),
        "as before; training is not begun again",
        refused=(CannotTell, "memory does not suffice"),
    ),
    # The disk
    Fault(
        "disk full when a check is written",
        lambda s: disk_full(s, 2, 2, "drift"),
        "the check is in the trainer's log only",
        told=(1, 2, 3),
        checks=(1, 3),
        recorded=((2, "run log", "No space left"),),
        raises=OSError,
    ),
    Fault(
        "disk full when the forecast is written, free again later",
        lambda s: disk_full(s, 0, 1),
        "forecast and baseline are written with the first check that can be",
        told=(1, 2, 3),
        checks=(2, 3),
        recorded=tuple((step, "run log", "No space left") for step in (0, 0, 1)),
        raises=OSError,
    ),
    Fault(
        "disk full to the end",
        lambda s: disk_full(s, 0, 9),
        "what is measured is in the trainer's log only; the log says why",
        told=(1, 2, 3),
        checks=(),
        raises=OSError,
    ),
    Fault("output folder read-only", read_only, "refused", refused=(ConfigError, "output_dir: .* cannot be")),
    Fault(
        "a file where the folder sts should be",
        file_in_place_of_folder,
        "refused",
        refused=(ConfigError, "output_dir: .*sts is a file"),
    ),
    Fault(
        "a ledger that cannot be written",
        lambda s: s.monkeypatch.setenv("STS_LEDGER", str(s.out)),
        "the run is not in it",
        recorded=((0, "ledger", "Is a directory"), (N_STEPS, "ledger", "Is a directory")),
        raises=OSError,
    ),
    Fault(
        "folder sts deleted in mid-run",
        lambda s: s.at(2, lambda: shutil.rmtree(s.out / "sts", ignore_errors=True)),
        "it is made again, with forecast and baseline; checks before are lost",
        told=(1, 2, 3),
        checks=(2, 3),
    ),
    Fault("checkpoint deleted in mid-run", checkpoint_deleted, "nothing: none of ours is in it"),
    Fault(
        "output folder with spaces and other scripts",
        lambda s: elsewhere(s, "mes résultats/年 №1".replace("/", " ")),
        "nothing",
    ),
    Fault("output folder is a symbolic link", symlinked, "nothing"),
    # Resume
    Fault("resume, all in order", resumed(), "nothing: the same checks again"),
    Fault(
        "resume, baseline truncated",
        resumed(cut("baseline.safetensors")),
        "refused",
        refused=(CannotTell, "baseline"),
    ),
    Fault(
        "resume, baseline no such file format",
        resumed(lambda folder: (folder / "baseline.safetensors").write_bytes(b"GIF89a")),
        "refused",
        refused=(CannotTell, "baseline"),
    ),
    Fault(
        "resume, a bit of the baseline flipped",
        resumed(flip_a_bit),
        "refused",
        refused=(CannotTell, "baseline"),
    ),
    Fault(
        "resume, baseline deleted",
        resumed(lambda folder: (folder / "baseline.safetensors").unlink()),
        "refused",
        refused=(CannotTell, "baseline"),
    ),
    Fault(
        "resume with another SAE",
        resumed(sae=rotated_sae(seed=8)),
        "refused",
        refused=(CannotTell, "baseline"),
    ),
    Fault(
        "resume, forecast truncated",
        resumed(cut("forecast.json")),
        "refused",
        refused=(CannotTell, "forecast"),
    ),
    Fault(
        "resume, folder sts deleted",
        resumed(shutil.rmtree),
        "refused",
        refused=(CannotTell, "forecast"),
    ),
    Fault(
        "resume, folder sts deleted, to be trained unwatched",
        resumed(shutil.rmtree, on_forecast_error="train unwatched"),
        "the rest of the run is not watched",
        told=(1, 2),
        checks=(),
        recorded=((2, "resume", "forecast"),),
        last_line=UNWATCHED,
    ),
    Fault(
        "resume, a line of drift.jsonl torn",
        resumed(tear(b'{"snapshot": {"st\n')),
        "the line is left out, and counted",
        recorded=((2, "run log", "1 damaged line"),),
    ),
    Fault(
        "resume, drift.jsonl is not UTF-8",
        resumed(tear(b'\xff\xfe\x00\n{"snapshot": "\xe9"}\n')),
        "the lines are left out, and counted",
        recorded=((2, "run log", "2 damaged line"),),
    ),
    # Tokenizer, texts, names
    Fault("tokenizer without BOS", without("bos_token"), "nothing stands before texts"),
    Fault("tokenizer without padding token", without("pad_token"), "nothing: we pad ourselves"),
    Fault("tokenizer without any special token", without("bos_token", "pad_token", "eos_token"), "nothing"),
    Fault(
        "conversations and a tokenizer without chat template",
        domains(near=CONVERSATIONS),
        "refused",
        refused=(DataError, "no chat template; set tokenizer.chat_template"),
    ),
    Fault("domain in other scripts", domains(near=SCRIPTS), "nothing", verdicts=BY_NUMBERS),
    Fault("empty strings in a domain", domains(near=[*rows(25), *EMPTY * 5]), "their rows are left out"),
    Fault("nothing but empty strings", domains(near=EMPTY * 30), "refused", refused=(DataError, "0 usable rows")),
    Fault(
        "a text of 100,000 characters",
        lambda s: (
            domains(near=[*rows(25), {"prompt": "a b " * 25_000, "completion": " c"}])(s),
            s.options.update(probes=replace(PROBES, max_tokens=64)),
        ),
        "cut, and the cut counted",
    ),
    Fault("a domain file that is not UTF-8", undecodable, "refused", refused=(DataError, "UTF-8")),
    Fault(
        "rows of numbers in place of texts",
        domains(near=[{"prompt": i, "completion": i} for i in range(30)]),
        "refused",
        refused=(DataError, "allowed are texts"),
    ),
    Fault(
        "a training set that cannot be read by us",
        lambda s: s.options.update(train_data=Unreadable()),
        "refused",
        refused=(StsError, "the bucket is gone"),
        raises=Exception,
    ),
    Fault("a domain's name with slashes and dots", named("../../etc/law"), "nothing"),
    Fault("a domain's name of 500 characters", named("law" * 166 + "xy"), "nothing"),
    Fault("a domain's name with a line break", named("law\nhealth"), "nothing"),
    Fault(
        "training data of one row",
        lambda s: setattr(s, "train_dataset", s.tokenised(1)),
        "refused",
        in_training=True,
        refused=(DataError, "1 usable rows"),
    ),
    Fault(
        "training data that is a stream",
        lambda s: setattr(s, "train_dataset", IterableDataset.from_generator(lambda: iter(s.tokenised()))),
        "refused, with what to give in its place",
        in_training=True,
        refused=(DataError, r"stream; give a sample of it as STSCallback\(train_data=...\)"),
    ),
    Fault(
        "training data that is a stream, with a sample given",
        lambda s: (
            setattr(s, "train_dataset", IterableDataset.from_generator(lambda: iter(s.tokenised()))),
            s.options.update(train_data=rows(40)),
        ),
        "nothing",
        in_training=True,
    ),
    # How the callback is used
    Fault(
        "the user's action fails",
        broken_action,
        "the check is made and written all the same",
        recorded=((1, "action", "pager is down"),),
        verdicts=("no-go", "no-go", "no-go"),
        raises=LookupError,
    ),
    Fault("two callbacks in one trainer", two_callbacks, "refused", refused=(ConfigError, "two STSCallbacks")),
    Fault("one callback twice in one trainer", same_callback_twice, "refused", refused=(ConfigError, "two STSCallbacks")),
    Fault(
        "train() twice",
        twice(),
        "each has a forecast; the first one's folder is moved to sts.1",
        in_training=True,
        verdicts=BY_NUMBERS,
    ),
    Fault(
        "train() twice, model swapped between",
        twice(lambda trainer: use_model(trainer, tiny_model("llama", seed=2))),
        "each has a forecast",
        in_training=True,
        verdicts=BY_NUMBERS,
    ),
    Fault(
        "train() twice, vocabulary resized between",
        twice(lambda trainer: trainer.model.resize_token_embeddings(310, mean_resizing=False)),
        "each has a forecast",
        in_training=True,
        verdicts=BY_NUMBERS,
    ),
    Fault("train() twice, LoRA merged between", merged_in_between, "each has a forecast", in_training=True, verdicts=BY_NUMBERS),
    Fault(
        "model swapped in mid-run",
        swapped_in_mid_run,
        "checks of another model are left out",
        checks=(1,),
        recorded=((2, "drift check", "another one"), (3, "drift check", "another one")),
        last_line=NOT_WHOLLY,
        raises=StsError,
    ),
    Fault(
        "no epoch to train",
        lambda s: s.args.update(max_steps=-1, num_train_epochs=0),
        "a forecast, no check",
        checks=(),
        in_training=True,
    ),
    # Model and SAE
    Fault("SAE on the meta device", meta_sae, "refused", refused=(SaeError, "meta")),
    Fault("NaN in the SAE", nan_sae, "refused", refused=(SaeError, "not all finite numbers")),
    Fault(
        "SAE of the hub, out of reach, no cache",
        hub_out_of_reach,
        "refused",
        refused=(SaeError, "could not be loaded from the hub"),
    ),
    Fault("model split over devices", split_over_devices, "nothing"),
    Fault("model in bfloat16", typed(torch.bfloat16), "nothing", in_training=True, verdicts=BY_NUMBERS),
    Fault("model in float16", typed(torch.float16), "nothing", in_training=True, verdicts=BY_NUMBERS),
    Fault(
        "all frozen but the head",
        frozen_but_the_head,
        "no drift below it, so only harm can be told",
        in_training=True,
        verdicts=("cannot tell", "cannot tell", "cannot tell"),
    ),
    Fault("tied weights", tied, "nothing", in_training=True),
    Fault("LoRA", lora, "nothing", in_training=True),
    Fault("bfloat16 as the default type", default_dtype, "nothing", in_training=True, verdicts=BY_NUMBERS),
    Fault("deterministic algorithms asked for", deterministic, "nothing"),
    # The world around
    Fault("clock going backwards", clock_backwards, "nothing: no date is used"),
    Fault(
        "standard output closed",
        lambda s: (closed("stdout")(s), setattr(s, "train", quietly)),
        "tables are not shown, all else goes on",
        recorded=tuple((i, "screen", "closed file") for i in (0, 1, 2, 3, 3)),
        raises=ValueError,
    ),
    Fault("standard error closed", lambda s: (closed("stderr")(s), s.args.update(disable_tqdm=False)), "no progress is shown"),
    Fault(
        "logging to a closed stream",
        closed_log,
        "the fault is in the run log all the same",
        checks=(1, 3),
        recorded=((2, "drift check", "broken"),),
        last_line=NOT_WHOLLY,
        raises=ValueError,
    ),
    Fault("data loader with a worker process", lambda s: s.args.update(dataloader_num_workers=1), "nothing"),
    Fault(
        "a tracker that fails on our row",
        broken_tracker,
        "the check is in the run log, its row in no tracker",
        recorded=((2, "trainer's log", "no answer from the tracker"),),
        raises=ConnectionError,
    ),
]


@dataclass
class Seen:
    """What a run left behind."""

    error: BaseException | None
    log: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    told: tuple[int, ...] = ()
    folder: Path = Path()
    step: int = 0
    """Optimizer steps done by the newest trainer."""
    last_line: str = ""
    """Of what was printed."""
    mode: set[bool] = field(default_factory=set)
    """Whether its modules are in training mode."""


def run(fault: Fault, out: Path, *, watched: bool, on_error: str = "warn") -> Seen:
    out.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        scene = Scene(out, monkeypatch)
        scene.watched = watched
        scene.options["on_error"] = on_error
        fault.inject(scene)
        trainer = scene.trainer()
        error: BaseException | None = None
        lines_of: list[str] = []
        monkeypatch.setattr(tqdm, "write", staticmethod(printing(lines_of)))
        try:
            scene.train(trainer)
        except BaseException as raised:
            error = raised
    trainer = scene.last
    timing = ("_runtime", "_per_second", "train_loss", "total_flos")
    log = [
        {k: v for k, v in row.items() if not k.endswith(timing)}
        for row in trainer.state.log_history
        if not any(key.startswith("sts/") for key in row)
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    told = tuple(row["step"] for row in trainer.state.log_history if "sts/n_shared_features" in row)
    return Seen(
        error,
        log,
        weights,
        told,
        scene.out / "sts",
        trainer.state.global_step,
        "".join(lines_of[-1:]).splitlines()[-1] if lines_of else "",
        {module.training for module in trainer.model.modules()},
    )


def printing(kept: list[str]) -> Callable[..., None]:
    """Print as `tqdm.write` does, and keep what was printed."""
    original = tqdm.write

    def write(text: str, *args: Any, **kwargs: Any) -> None:
        kept.append(text)
        original(text, *args, **kwargs)

    return write


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """The run without the callback and without a fault."""
    return run(Fault("", lambda scene: None, ""), tmp_path_factory.mktemp("untroubled") / "without", watched=False)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(fault: Fault, untroubled: Seen, tmp_path: Path) -> None:
    zero_shot = run(fault, tmp_path / "without", watched=False) if fault.in_training else untroubled
    seen = run(fault, tmp_path / "with", watched=True)
    assert zero_shot.error is None
    assert all(math.isfinite(row["loss"]) for row in zero_shot.log if "loss" in row)  # else there would be little to compare
    if fault.refused:
        kind, message = fault.refused
        with pytest.raises(kind, match=message):
            raise seen.error or AssertionError("it was not refused")
        assert seen.step == (2 if fault.name.startswith("resume") else 0)  # no step was made
        return
    if seen.error is not None:
        raise seen.error
    assert same(seen.log, zero_shot.log)
    assert same(seen.weights, zero_shot.weights)
    checks = lines(seen.folder / "drift.jsonl")
    assert tuple(row["snapshot"]["step"] for row in checks) == fault.checks
    usual = tuple(USUAL[step - 1] for step in fault.checks)
    decided = tuple(row["verdict"]["decision"] for row in checks)
    if fault.verdicts == BY_NUMBERS:
        policy = json.loads((seen.folder / "settings.json").read_text())["policy"]
        snapshots = [DriftSnapshot.from_dict(row["snapshot"]) for row in checks]
        level = policy["alpha"] / N_STEPS
        assert decided == tuple(judge_drift([s], PolicyConfig(**policy), [level]).decision for s in snapshots)
    else:
        assert decided == (usual if fault.verdicts is None else fault.verdicts)
    assert fault.last_line in seen.last_line
    assert fault.last_line or "NOT" not in seen.last_line
    assert seen.told == (fault.checks if fault.told is None else fault.told)
    recorded = lines(seen.folder / "faults.jsonl")
    assert [(row["step"], row["what"]) for row in recorded] == [(step, what) for step, what, _ in fault.recorded], recorded
    for row, (_, _, message) in zip(recorded, fault.recorded, strict=True):
        assert message in row["error"]
        assert row["trace"] or row["what"] in ("run log", "model")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f in FAULTS if f.raises], ids=lambda fault: fault.name)
def test_the_original_error_is_raised_if_asked(fault: Fault, tmp_path: Path) -> None:
    assert fault.raises is not None
    seen = run(fault, tmp_path / "with", watched=True, on_error="raise")
    assert isinstance(seen.error, fault.raises), seen.error


def test_a_careless_guest_is_noticed(untroubled: Seen, tmp_path: Path) -> None:
    """The comparison fails for a callback that only draws a random number."""

    class Careless(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(1)

    def with_dropout(scene: Scene) -> None:
        scene.callbacks.append(Careless())

    seen = run(Fault("a careless guest", with_dropout, "noticed"), tmp_path / "with", watched=True)
    assert seen.error is None
    assert not same(seen.log, untroubled.log)


def test_an_interrupt_in_a_check_passes_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    seen = run(Fault("", lambda s: s.on_probe(raising(KeyboardInterrupt()), steps={2}), ""), tmp_path / "with", watched=True)
    assert isinstance(seen.error, KeyboardInterrupt)
    assert seen.mode == {True}
    assert torch.is_grad_enabled()
    assert not (seen.folder / "faults.jsonl").exists()


def test_an_empty_training_set_fails_as_it_does_without_us(tmp_path: Path) -> None:
    def empty(scene: Scene) -> None:
        scene.train_dataset = scene.tokenised(2).select([])

    zero_shot, seen = (run(Fault("", empty, ""), tmp_path / str(watched), watched=watched) for watched in (False, True))
    assert zero_shot.error is not None
    assert repr(seen.error) == repr(zero_shot.error)


def table() -> str:
    """The faults and what becomes of them."""
    head = (
        "# Faults, and what becomes of them\n\n"
        "Each row is a test of `test_faults.py`, which also writes this table (`STS_WRITE_FAULTS=1`). In every row that is not\n"
        "refused before its first step, training is the same as without the callback, bit for bit.\n\n"
        '| fault | what happens | verdicts | last line | in `faults.jsonl` | `on_error="raise"` |\n|---|---|---|---|---|---|\n'
    )
    body = ""
    for fault in FAULTS:
        recorded = "; ".join(dict.fromkeys(f"step {step}: {what}" for step, what, _ in fault.recorded))
        becomes = f"{fault.becomes}: {fault.refused[0].__name__}" if fault.refused else fault.becomes
        usual = tuple(USUAL[step - 1] for step in fault.checks)
        verdicts = usual if fault.verdicts is None else fault.verdicts
        by_step = ", ".join(f"{step}: {verdict}" for step, verdict in zip(fault.checks, verdicts, strict=False))
        checks = "" if fault.refused else verdicts[0] if verdicts == BY_NUMBERS else by_step
        raised = f"raises {fault.raises.__name__}" if fault.raises else ""
        body += f"| {fault.name} | {becomes} | {checks} | {fault.last_line} | {recorded} | {raised} |\n"
    return head + body


def test_the_written_table_is_that_of_the_tests() -> None:
    if os.environ.get("STS_WRITE_FAULTS"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table()
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
