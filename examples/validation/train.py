"""One short LoRA fine-tune, loss at answer tokens only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sts_callback.data.probes import Query, answer_positions


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
    """Train adapters inside the model and take them out again.

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
    torch.manual_seed(seed)
    order = _order(len(rows), settings["steps"] * settings["rows"], random.Random(seed))
    tuned = get_peft_model(model, LoraConfig(**settings["lora"], task_type="CAUSAL_LM"))
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / settings["warmup"]))
    curve = []
    try:
        for step in range(settings["steps"]):
            batch = [rows[i] for i in order[step * settings["rows"] : (step + 1) * settings["rows"]]]
            model.train()
            loss = _loss(model, batch, bos)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            curve.append(float(loss.detach()))
            model.eval()
            on_step(step + 1)
    finally:
        tuned.unload()
        model.requires_grad_(True).eval()
    return curve


def _order(n_rows: int, n_wanted: int, draw: random.Random) -> list[int]:
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
