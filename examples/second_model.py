"""A second real model: forecast, rehearsal and drift checks of Qwen2.5-Coder-0.5B-Instruct, with an SAE and without one.

    python examples/second_model.py --sae qwen-sae
    python examples/second_model.py --sae none

Chats of arithmetic word problems through the model's own chat template, LoRA, 20 steps at a harsh rate. The SAE is one that
`sts-callback sae train` made of the same model after layer 16; without one the raw activations after that layer are read.
What was forecast, rehearsed and measured goes to `second_model.json` beside this file, each run under its own key.
Settings were fixed before the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from qwen import cached_qwen
from sts_callback import ProbeConfig, STSCallback
from sts_callback.records import DriftSnapshot
from sts_callback.runs.directory import RunDirectory
from tuning import ON_CPU, to_tune
from word_problems import word_problems

RESULTS = Path(__file__).with_suffix(".json")
LAYER, STEPS, ROWS, LEARNING_RATE, CHECK_ON = 16, 20, 4, 1e-3, 10
PROTECTED = ("code", "tool_calls", "everyday", "law")
PROBES = ProbeConfig(n_queries=28, max_tokens=48)  # as in the README's first run


def chats(n: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in word_problems(n)
    ]


def run(sae: str, out: Path) -> dict[str, Any]:
    """Train with the callback; what the run's folder says of it."""
    set_seed(0)
    callback = STSCallback(
        sae=sae,
        layer=LAYER if sae == "none" else None,
        protect=list(PROTECTED),
        rehearse=True,
        check_on=CHECK_ON,
        max_overhead=None,
        probes=PROBES,
    )
    trainer = SFTTrainer(
        **to_tune(cached_qwen(), callback),
        args=SFTConfig(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            learning_rate=LEARNING_RATE,
            max_length=256,
            logging_steps=5,
            **ON_CPU,
        ),
        train_dataset=Dataset.from_list(chats(400)),
    )
    callback.attach(trainer)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    record = RunDirectory(out / "sts")
    forecast, rehearsal = callback.forecast, record.read_rehearsal()
    assert forecast is not None and rehearsal is not None
    return {
        "seconds": seconds,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "forecast": {
            "seconds": forecast.seconds,
            "fvu": forecast.fvu if forecast.identity.has_sae else None,
            "sts_net": {name: domain.sts_net.to_dict() for name, domain in forecast.domains.items()},
        },
        "rehearsal": {
            "seconds": rehearsal.seconds,
            "doses": [
                {"n_steps": dose.n_steps, "learning_rate": dose.learning_rate} | told(dose.check) for dose in rehearsal.doses
            ],
        },
        "checks": {check.step: told(check) | {"verdict": verdict.to_dict()} for check, verdict in record.judged_checks(STEPS)},
    }


def told(check: DriftSnapshot) -> dict[str, Any]:
    return {
        "seconds": check.seconds,
        "n_shared": check.n_shared,
        "domains": {
            name: {"nll_change": domain.nll_change.to_dict(), "relative_drift": domain.relative_drift.to_dict()}
            for name, domain in check.domains.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", required=True, help="an SAE's folder, or none")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the runs' folders go (default: runs)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    key = "none" if args.sae == "none" else "sae"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[key] = run(args.sae, args.out / f"second-model-{key}")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
