"""A short fine-tune on the CPU with a callback attached: what the measurements beside this file train."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sts_callback import STSCallback
from sts_callback.records import DriftSnapshot
from sts_callback.runs.directory import RunDirectory

BATCH = 2  # rows
ON_CPU: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
}
"""Arguments of a TRL trainer for a short run on the CPU that keeps nothing."""
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def to_tune(name: str, callback: STSCallback, lora: LoraConfig = LORA) -> dict[str, Any]:
    """What any trainer of TRL is given to tune a model from a folder with the callback."""
    return {
        "model": AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        "processing_class": AutoTokenizer.from_pretrained(name),
        "peft_config": lora,
        "callbacks": [callback],
    }


def tuned(
    name: str, rows: list[dict[str, str]], callback: STSCallback, lora: LoraConfig, *, steps: int, learning_rate: float
) -> list[DriftSnapshot]:
    """Train, and return the callback's drift checks."""
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            **to_tune(name, callback, lora),
            args=SFTConfig(
                output_dir=out,
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=learning_rate,
                max_length=256,
                **ON_CPU,
            ),
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
        return RunDirectory(Path(out) / "sts").checks_before(steps)
