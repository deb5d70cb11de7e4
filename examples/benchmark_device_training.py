"""Training on the device of `benchmark_device.py`: a step of it, and whether the callback leaves it as it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from random_weights import byte_tokenizer, random_llama, random_sae, token_rows, usual_norm
from sts_callback import ProbeConfig, STSCallback
from sts_callback.runs.directory import RunDirectory

STEP_ROWS, STEP_TOKENS = 8, 512
N_STEPS, N_TOKENS = 6, 40  # of the training that is compared, and of its queries and answers
FIT = "sts_callback.measure.diagnostics.require_fit"
"""An SAE of random weights fits no model, and a forecast would refuse it. Here that is left out: only the cost is asked."""


def with_lora(model: PreTrainedModel) -> Any:
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def lora_step(model: PreTrainedModel, device: str) -> Callable[[], None]:
    """Make a step of training with LoRA on all linear layers: forward, backward, AdamW. Activations are kept, not recomputed."""
    config: Any = model.config
    tuned = with_lora(model).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(300, config.vocab_size, (STEP_ROWS, STEP_TOKENS), device=device)

    def step() -> None:
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the first one makes the optimizer's state
    return step


def identity(device: str) -> dict[str, Any]:
    """Train a tiny model twice without the callback and once with it, and compare all weights, bit by bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS need not repeat itself
    torch.use_deterministic_algorithms(True, warn_only=True)
    start = random_llama("tiny", torch.float32)
    callback = STSCallback(
        random_sae("jumprelu", start.config.hidden_size, 512, "blocks.4.hook_resid_post", usual_norm(start, 4)),
        ["domain"],
        domains={"domain": token_rows(40, N_TOKENS, seed=1)},
        check_on=1,
        max_overhead=None,
        probes=ProbeConfig(n_queries=8),
        on_error="raise",
        ledger="",
    )
    with tempfile.TemporaryDirectory() as out, mock.patch(FIT):
        untrained = trained(out, device, 0)
        without, again, watched = (trained(out, device, N_STEPS, *callbacks) for callbacks in ((), (), (callback,)))
        n_checks = len(RunDirectory(Path(out) / "sts").checks_before(N_STEPS))
    return {
        "steps": N_STEPS,
        "checks": n_checks,
        "moved": not same(untrained, without),
        "without_twice": same(without, again),
        "with_and_without": same(without, watched),
    }


def trained(out: str, device: str, n_steps: int, *callbacks: STSCallback) -> list[torch.Tensor]:
    """All weights of a tiny model after so many steps."""
    set_seed(0)
    model = with_lora(random_llama("tiny", torch.float32))
    args = TrainingArguments(
        out,
        max_steps=n_steps,
        learning_rate=1e-2,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(token_rows(64, N_TOKENS, seed=0, spread=0))  # all of one length: no padding
    if n_steps:
        Trainer(model, args, train_dataset=rows, processing_class=byte_tokenizer(), callbacks=[*callbacks]).train()
    return [p.detach().cpu() for p in model.parameters()]


def same(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    """Whether all are equal, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
