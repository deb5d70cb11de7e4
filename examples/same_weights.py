"""Does the alarm go off where the weights are what they were?

    python examples/same_weights.py

Three cases on Gemma 3 270M, settings fixed beforehand, the policy at its defaults:

- a fine-tune with learning rate 0, checked at every step;
- the same weights in other batch layouts;
- the same weights rounded to bfloat16, as a checkpoint saved in it would be.

What happens where weights really move, `false_alarms.py` asks. Results go to `same_weights.json` beside this file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from demo import PROTECTED, SAE_FOLDER
from gemma import cached_gemma
from sts_callback import Monitor, PolicyConfig, ProbeConfig, STSCallback, judge_drift
from sts_callback.config import DEFAULT_BUDGET
from sts_callback.data.starter import starter_domains
from sts_callback.records import DriftSnapshot
from tuning import tuned
from word_problems import word_problems

PROBES = ProbeConfig(n_queries=12, max_tokens=40, n_domain_demonstrations=3)
POLICY = PolicyConfig(budgets=dict.fromkeys(PROTECTED, DEFAULT_BUDGET))
N_STEPS, LAYOUTS = 4, (64, 128, 256, 512)


def tally(checks: Sequence[DriftSnapshot]) -> dict[str, float]:
    return {
        "checks": len(checks),
        "domain_checks": len(checks) * len(PROTECTED),
        "alarms": sum(len(judge_drift([s], POLICY).alarmed) for s in checks),
        "largest_drift": max(d.relative_drift.value for s in checks for d in s.domains.values()),
        "largest_nll_change": max(abs(d.nll_change.value) for s in checks for d in s.domains.values()),
    }


def learning_rate_0(name: str) -> list[DriftSnapshot]:
    callback = STSCallback(sae=SAE_FOLDER, protect=PROTECTED, check_on=1, max_overhead=None, probes=PROBES, on_error="raise")
    lora = LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return tuned(name, word_problems(400), callback, lora, steps=N_STEPS, learning_rate=0.0)


def main() -> None:
    logging.set_verbosity_error()
    set_seed(0)
    started = time.monotonic()
    name = cached_gemma()
    results: dict[str, object] = {"n_queries": PROBES.n_queries, "domains": PROTECTED}

    results["learning_rate_0"] = tally(learning_rate_0(name))

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    files = starter_domains()
    monitor = Monitor(
        model,
        AutoTokenizer.from_pretrained(name),
        sae=SAE_FOLDER,
        train_data=word_problems(400),
        domains={domain: files[domain] for domain in PROTECTED},
        config=PROBES,
    )
    monitor.forecast()
    results["other_batches"] = {tokens: tally([monitor.check(0, batch_tokens=tokens)]) for tokens in LAYOUTS}

    model.load_state_dict({key: value.bfloat16().float() for key, value in model.state_dict().items()})
    results["rounded_to_bfloat16"] = tally([monitor.check(0)])
    results["seconds"] = time.monotonic() - started
    (Path(__file__).parent / "same_weights.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
