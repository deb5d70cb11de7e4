"""What a run was given, in the words of the commands that look for the cause of its alarm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_callback.data.starter import starter_domains
from sts_callback.model.hooks import loaded_from
from sts_callback.records.run import Given
from sts_callback.training.arguments import Settings

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerState, TrainingArguments


def given_to(settings: Settings, model: nn.Module, args: TrainingArguments, state: TrainerState, optimizer: Any) -> Given:
    """What of a run a command can be told.

    Args:
        settings: the user's.
        model: that is trained.
        args: the trainer's.
        state: the trainer's.
        optimizer: the trainer's; a scheduler has noted the peak of its rate in it.

    """
    groups = getattr(optimizer, "param_groups", None)
    shipped = starter_domains()
    return Given(
        model=loaded_from(model),
        sae=_in_words(settings.saes[0]),
        train=_in_words(settings.train_data),
        domains={name: _in_words(source) for name, source in settings.domains.items() if shipped.get(name) != source},
        learning_rate=float(groups[0].get("initial_lr") or 0.0) if groups else 0.0,
        steps=state.max_steps,
        batch_size=(state.train_batch_size or 0) * args.gradient_accumulation_steps,
        lora_r=_lora_rank(model),
        probes=settings.probes.unusual_numbers,
    )


def _in_words(source: object) -> str:
    return str(source) if isinstance(source, (str, Path)) else ""


def _lora_rank(model: nn.Module) -> int | None:
    """Of the model's one adapter; 0 where all parameters are trained; None where neither is so."""
    adapters = next((found for m in model.modules() if (found := getattr(m, "peft_config", None))), None)
    if not adapters:
        return 0 if all(p.requires_grad for p in model.parameters()) else None
    ranks = [getattr(adapter, "r", None) for adapter in adapters.values()]
    return ranks[0] if len(ranks) == 1 and isinstance(ranks[0], int) and ranks[0] > 0 else None
