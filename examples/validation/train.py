"""LoRA fine-tunes, loss at answer tokens only."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sts_callback.data.batches import answer_positions
from sts_callback.data.probes import Query


def tune(
    model: nn.Module,
    rows: Sequence[Query],
    bos: Sequence[int],
    settings: dict[str, Any],
    *,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int], None],
) -> list[float]:
    """Train adapters inside the model and take them out again, at a rate that rises and stays.

    Args:
        model: left as it was.
        rows: tokens of prompts and completions.
        bos: what stands before each.
        settings: `training` of settings.yaml.
        learning_rate: reached after the warm-up.
        seed: of the adapters' weights and of the order of rows.
        on_step: called after each step, with its number from 1; the adapters are in the model then.

    Returns:
        The loss of each step, in nats a token.

    """
    size = settings["rows"]
    order = shuffled(len(rows), settings["steps"] * size, random.Random(seed))
    batches = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    rates = [learning_rate * min(1.0, (step + 1) / settings["warmup"]) for step in range(settings["steps"])]
    return take_steps(model, batches, rates, bos, settings["lora"], seed=seed, on_step=on_step)


def take_steps(
    model: nn.Module,
    batches: Sequence[Sequence[Query]],
    rates: Sequence[float],
    bos: Sequence[int],
    lora: Mapping[str, Any],
    *,
    seed: int,
    on_step: Callable[[int], None],
) -> list[float]:
    """Train adapters inside the model and take them out again, one step for each batch.

    Args:
        model: left as it was.
        batches: tokens of prompts and completions, step by step.
        rates: the learning rate of each step.
        bos: what stands before each row.
        lora: of the adapters.
        seed: of their weights.
        on_step: called after each step, with its number from 1; the adapters are in the model then.

    Returns:
        The loss of each step, in nats a token.

    """
    torch.manual_seed(seed)
    tuned = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    curve = []
    try:
        for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            loss = _loss(model, batch, bos)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
            model.eval()
            on_step(step + 1)
    finally:
        tuned.unload()
        model.requires_grad_(True).eval()
    return curve


def shuffled(n_rows: int, n_wanted: int, draw: random.Random) -> list[int]:
    """Places of rows, each once before any comes again."""
    order: list[int] = []
    while len(order) < n_wanted:
        order += draw.sample(range(n_rows), n_rows)
    return order[:n_wanted]


def _loss(model: nn.Module, batch: Sequence[Query], bos: Sequence[int]) -> torch.Tensor:
    """Mean NLL of the answer tokens; the head sees no other positions."""
    length = max(len(q.tokens) for q in batch)
    ids = torch.tensor([[*bos, *q.tokens, *[0] * (length - len(q.tokens))] for q in batch])
    real = torch.tensor([[1] * (len(bos) + len(q.tokens)) + [0] * (length - len(q.tokens)) for q in batch])
    hidden = model.model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, len(bos) :][answer_positions(batch)])
    return nn.functional.cross_entropy(logits, torch.tensor([token for q in batch for token in q.answer]))
