"""Tiny runs of every trainer, and what is left of a run that another run can be compared with, bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sts_callback import ProbeConfig, STSCallback
from sts_callback.records.rehearsal import Dose, Rehearsal
from tiny import rows, saved_sae, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

TRAINERS = ("Trainer", "SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation")
SAMPLING = ("GRPO", "RLOO", "Distillation")
"""Those that train on what the model itself writes."""
PROBES = ProbeConfig(n_queries=8, n_features=8)  # an alarm takes 7
TINY_DOMAINS = {"near": rows(20, "sums", seed=50), "far": rows(20, "poems", seed=90)}
_TIMINGS = ("_runtime", "_per_second", "step_time")


@dataclass(frozen=True)
class Shelf:
    """A folder with what runs load: models, which reference models are read from again, and an SAE."""

    folder: Path

    @staticmethod
    def filled(folder: Path) -> Shelf:
        """Write a model of each kind, and the SAE."""
        for architecture in ("llama", "gpt2"):
            tiny_model(architecture).save_pretrained(folder / architecture)
        torch.manual_seed(0)
        body = AutoModelForCausalLM.from_pretrained(folder / "llama")
        judge = LlamaForSequenceClassification(body.config.__class__(**{**body.config.to_dict(), "num_labels": 1}))
        judge.model.load_state_dict(body.model.state_dict())
        judge.save_pretrained(folder / "judge")
        tiny_model(seed=1).save_pretrained(folder / "teacher")
        saved_sae(folder / "sae")
        return Shelf(folder)

    def model(self, name: str) -> PreTrainedModel:
        """A fresh copy."""
        kind = AutoModelForSequenceClassification if name == "judge" else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_pretrained(self.folder / name)
        return model

    def callback(self, **options: Any) -> STSCallback:
        """A callback that looks after each step."""
        defaults: dict[str, Any] = {
            "protect": ["near"],
            "domains": TINY_DOMAINS,
            "probes": PROBES,
            "check_on": 1,
            "max_overhead": None,
        }
        return STSCallback(**{"sae": self.folder / "sae", **defaults, **options})


class GradNorms(TrainerCallback):
    """Gradient norms of every step, exactly."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.norms.append(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))


def made_trainer(
    kind: str,
    shelf: Shelf,
    out: Path,
    callbacks: Sequence[TrainerCallback],
    *,
    lora: bool = False,
    architecture: str = "llama",
    own_compile: str | None = None,
    rewards: Any = None,
    examples: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Trainer:
    """A trainer of three steps.

    Args:
        kind: one of `TRAINERS`.
        shelf: where its models are.
        out: its output folder.
        callbacks: the user's.
        lora: train adapters only.
        architecture: which tiny model.
        own_compile: the backend if the user compiles the model in place, by `model.compile()`.
        rewards: of GRPO and RLOO, in place of `taste`.
        examples: training data in place of the usual.
        options: training arguments that differ.

    """
    settings = tiny_arguments(out, max_steps=3, gradient_checkpointing=False)
    if kind in SAMPLING:
        settings["max_completion_length"] = 8
    if kind in ("GRPO", "RLOO"):
        settings["num_generations"] = 2
    settings |= options
    model, tokenizer = shelf.model("judge" if kind == "Reward" else architecture), tiny_tokenizer()
    adapters = LoraConfig(
        r=4,
        lora_dropout=0.3,
        target_modules="all-linear",
        task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM",
        modules_to_save=["score"] if kind == "Reward" else None,
        fan_in_fan_out=architecture == "gpt2",  # its layers are Conv1D
    )
    shared: dict[str, Any] = {"processing_class": tokenizer, "callbacks": list(callbacks)}
    torch.manual_seed(1)  # adapters are drawn before a trainer seeds, here and in TRL before 1.0
    if kind == "Trainer":
        if lora:
            model = get_peft_model(model, adapters)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings),
            train_dataset=tokenised(rows(40), tokenizer),
            eval_dataset=tokenised(rows(4, seed=70), tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            **shared,
        )
    else:
        if kind in ("GRPO", "RLOO"):
            shared["reward_funcs"] = rewards or taste
        if kind == "Distillation":
            shared["teacher_model"] = shelf.model("teacher")
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(**settings),
            train_dataset=Dataset.from_list(examples or _examples(kind, rows(40))),
            eval_dataset=Dataset.from_list(_examples(kind, rows(4, seed=70))),
            peft_config=adapters if lora else None,
            **shared,
        )
    if own_compile is not None:
        trainer.model.compile(backend=own_compile)
    return trainer


def _examples(kind: str, examples: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The same examples in the form that a trainer takes."""
    if kind in ("DPO", "Reward"):
        return [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"][::-1]} for r in examples]
    if kind == "KTO":
        return [{**row, "label": i % 2 == 0} for i, row in enumerate(examples)]
    if kind in SAMPLING:
        return [{"prompt": row["prompt"]} for row in examples]
    return list(examples)


def taste(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that tells any two texts apart, so that the log rows tell any two rollouts apart."""
    return [sum(ord(letter) * (place + 1) for place, letter in enumerate(text)) / 1000 for text in completions]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    gradient_norms: list[float]
    log_rows: list[dict[str, Any]]
    """The trainer's own, without timings."""
    weights: dict[str, torch.Tensor]
    random_state: tuple[Any, ...]
    """Of Python, NumPy and torch."""
    model_settings: tuple[Any, ...]
    """Its configuration, hooks, and which modules train and which parameters have gradients."""
    tokenizer: str
    counters: dict[str, Any]
    """Numbers that the trainer keeps, and its state's, without timings."""

    def differences(self, other: Outcome) -> list[str]:
        """Names of the fields in which two runs differ by as little as a bit."""
        return [f.name for f in fields(self) if not same(getattr(self, f.name), getattr(other, f.name))]


def finished(trainer: Trainer) -> Outcome:
    """Train, and take what is left."""
    norms = GradNorms()
    trainer.add_callback(norms)
    trainer.train()
    model: Any = trainer.model
    return Outcome(
        gradient_norms=norms.norms,
        log_rows=[
            {k: v for k, v in row.items() if not k.endswith(_TIMINGS)}
            for row in trainer.state.log_history
            if not any(key.startswith("sts/") for key in row)
        ],
        weights=model.state_dict(),
        random_state=(random.getstate(), np.random.get_state(), torch.get_rng_state()),
        model_settings=(
            model.config.to_dict(),
            [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
            [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        ),
        tokenizer=trainer.processing_class.backend_tokenizer.to_str() + repr(trainer.processing_class),  # type: ignore
        counters={
            name: value
            for one in (trainer, trainer.state)
            for name, value in vars(one).items()
            if isinstance(value, (int, float)) and not name.endswith(_TIMINGS)
        },
    )


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the bit, where NaN, which a run may diverge to, equals NaN."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, float) and one != one:
        return isinstance(other, float) and other != other
    return type(one) is type(other) and bool(one == other)


def doses(out: Path) -> list[Dose]:
    """Of the rehearsal of a run."""
    return list(Rehearsal.from_dict(json.loads((out / "sts" / "rehearsal.json").read_text())["rehearsal"]).doses)


def checked_steps(out: Path) -> list[int]:
    """Steps of the drift checks of a run."""
    return [json.loads(line)["snapshot"]["step"] for line in (out / "sts" / "drift.jsonl").read_text().splitlines()]
