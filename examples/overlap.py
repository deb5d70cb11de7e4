"""Does the forecast name the features that training really moves? And does it tell content apart?

    python examples/overlap.py --data-dir DIR

Two checks on Gemma 3 270M, settings fixed beforehand: the forecast's 100 features for GSM8K against the 100 that a short LoRA
run on it moves most, and the forecasts for code and for law against each other. `DIR` holds `gsm8k.jsonl.gz` (`prompt`,
`completion`) and `mmlu_pro.jsonl.gz` (`category`, `question`, `options`, `answer_index`); code is Python's standard library,
a function's head and docstring as prompt and its body as answer. Results go to `overlap.json` beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from peft import LoraConfig
from transformers import set_seed
from transformers.utils import logging

from demo import SAE_FOLDER
from gemma import cached_gemma, loaded_gemma
from rows import code_rows, law_rows, lines
from sts_callback import Monitor, ProbeConfig, STSCallback
from tuning import BATCH, tuned

PROBES = ProbeConfig(n_queries=24, max_tokens=128)
STEPS, LEARNING_RATE = 24, 1e-3


def realised_overlap(name: str, rows: list[dict[str, str]], protect: str) -> dict[str, object]:
    """Train on rows for a few steps and count the forecast features among those that moved most."""
    set_seed(0)
    callback = STSCallback(sae=SAE_FOLDER, protect=[protect], train_data=rows, check_on=STEPS, probes=PROBES, max_overhead=None)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    newest = tuned(name, rows, callback, lora, steps=STEPS, learning_rate=LEARNING_RATE)[-1]
    return {"n_shared": newest.n_shared, "relative_drift": dataclasses.asdict(newest.train.relative_drift)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    data_dir = parser.parse_args(argv).data_dir
    logging.set_verbosity_error()

    model, tokenizer = loaded_gemma()
    law, code = law_rows(data_dir), code_rows()
    made = {
        source: Monitor(model, tokenizer, sae=SAE_FOLDER, train_data=rows, domains={"other": other}, config=PROBES).forecast()
        for source, rows, other in (("code", code, law), ("law", law, code))
    }
    masked = {s: f.train.n_masked / (f.train.n_masked + f.train.n_tokens) for s, f in made.items()}
    results = {
        "n_features": PROBES.n_features,
        "forecast_code_and_law_shared": len(set(made["code"].features) & set(made["law"].features)),
        "share_of_tokens_masked": masked,
        "tokens": {s: f.train.n_tokens for s, f in made.items()},
        "unexplained": {s: f.fvu for s, f in made.items()},
    }
    gsm8k = [{"prompt": str(r["prompt"]), "completion": "\n" + str(r["completion"])} for r in lines(data_dir / "gsm8k.jsonl.gz")]
    results["gsm8k_forecast_and_realised"] = realised_overlap(cached_gemma(), gsm8k, "law")
    results["settings"] = {"steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "n_queries": PROBES.n_queries}
    (Path(__file__).parent / "overlap.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
