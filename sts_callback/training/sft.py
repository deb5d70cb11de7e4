"""TRL's SFTTrainer from a YAML file and a few options: how the user would train, as far as a rehearsal needs it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sts_callback.data.pairs import Row
from sts_callback.errors import ConfigError, DataError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

LORA_R = 16
"""Rank of the adapter where nothing is said; TRL's default too. Its alpha is twice the rank, and it sits on all linear layers."""
_NEVER = {
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "disable_tqdm": True,
}
"""What a trainer that stops before its first step must not do, whatever the file says."""


@dataclass(frozen=True)
class SFTSetup:
    """How training is set up."""

    arguments: Mapping[str, Any]
    """Of `SFTConfig`."""
    adapter: PeftConfig | None
    """None trains all parameters."""

    @property
    def name(self) -> str:
        """What is trained, in words."""
        rank = getattr(self.adapter, "r", None)
        return "all parameters" if self.adapter is None else f"LoRA of rank {rank}" if rank else str(self.adapter.peft_type)

    @property
    def learning_rate(self) -> float | None:
        """At the schedule's peak, if it is said."""
        rate = self.arguments.get("learning_rate")
        return None if rate is None else float(rate)


def read_setup(file: Path | None, *, lora_r: int | None, full: bool, options: Mapping[str, Any]) -> SFTSetup:
    """What a YAML file, as `trl sft --config` takes it, and options on top of it come to.

    Args:
        file: keys of `SFTConfig` and of TRL's `ModelConfig` (`use_peft`, `lora_r`, ...). Others that TRL's script takes, such as
            `dataset_name`, are passed over.
        lora_r: rank of an adapter, whatever the file says.
        full: train all parameters, whatever the file says.
        options: of `SFTConfig`; None leaves what the file says.

    Raises:
        ConfigError: if the file cannot be read or has a key that TRL's script does not know.

    """
    from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config

    content = _content(file)
    known = {kind: {f.name for f in fields(kind)} for kind in (SFTConfig, ModelConfig, ScriptArguments)}
    for key in content:
        if not any(key in names for names in known.values()):
            near = difflib.get_close_matches(str(key), sorted(set().union(*known.values())), n=1)
            hint = f"did you mean {near[0]}?" if near else "give arguments of SFTConfig and ModelConfig."
            raise ConfigError(f"--trainer-args: {file} has {key!r}, which `trl sft` does not know; {hint}")
    arguments = {key: value for key, value in content.items() if key in known[SFTConfig]}
    arguments |= {key: value for key, value in options.items() if value is not None}
    adapter = {key: value for key, value in content.items() if key in known[ModelConfig]}
    if lora_r is not None or (not full and "use_peft" not in adapter):
        rank = LORA_R if lora_r is None else lora_r
        adapter |= {"use_peft": True, "lora_r": rank, "lora_alpha": 2 * rank}
    if full:
        adapter["use_peft"] = False
    if adapter.get("use_peft"):
        adapter.setdefault("lora_target_modules", "all-linear")
    try:
        return SFTSetup(arguments, get_peft_config(ModelConfig(**adapter)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--trainer-args: TRL cannot make an adapter of them ({error}); correct {sorted(adapter)}.") from error


def sft_config(setup: SFTSetup, folder: str, *, on_cpu: bool, seed: int) -> TrainingArguments:
    """Arguments of a trainer that stops before its first step.

    Args:
        setup: how training is set up.
        folder: for what the trainer writes.
        on_cpu: whether the model is there.
        seed: where the setup has none.

    Raises:
        ConfigError: if TRL refuses an argument.

    """
    from trl import SFTConfig

    defaults = {"seed": seed, "use_cpu": on_cpu, **({"bf16": False} if on_cpu else {})}
    try:
        return SFTConfig(**defaults | dict(setup.arguments) | _NEVER | {"output_dir": folder})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"--trainer-args: SFTConfig refuses them ({error}); correct {sorted(setup.arguments)}.") from error


def sft_trainer(
    args: TrainingArguments, adapter: PeftConfig | None, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> Trainer:
    """A trainer on some rows; what it has put around the model is its `model`.

    Args:
        args: of the trainer.
        adapter: to be put around the model, if any.
        model: to be tuned.
        tokenizer: its tokenizer.
        rows: in one of TRL's formats.

    Raises:
        DataError: if TRL refuses the rows or the adapter.

    """
    from datasets import Dataset
    from trl import SFTTrainer

    try:
        data = Dataset.from_list([dict(row) for row in rows])
        return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)  # type: ignore[arg-type]
    except Exception as error:  # of TRL, datasets and the chat template, for rows of every kind
        raise DataError(
            f"train_data: TRL's SFTTrainer cannot be set up on these rows ({error!r}); give rows of one of its formats, such as "
            "prompt and completion, or messages, and an adapter that fits the model."
        ) from error


def _content(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--trainer-args: {file} cannot be read ({error}); give a YAML file of SFTConfig's arguments."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"--trainer-args: {file} holds no arguments; give lines such as 'learning_rate: 2.0e-4'.")
    return content
