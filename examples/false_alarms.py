"""How often does the alarm go off when nothing is wrong?

    python examples/false_alarms.py

Four nulls on Gemma 3 270M, settings fixed beforehand, the policy at its defaults:

- a fine-tune with learning rate 0, checked at every step;
- the same weights in other batch layouts;
- the same weights rounded to bfloat16, as a checkpoint saved in it would be;
- weights that have really moved, but with no mean effect: random noise is added, each domain's per-query NLL changes are centred,
  scaled so that their spread is what a budget's worth of change would be hidden in, and get random signs, anew for each of many
  checks. Drift stays as measured, so only the test of harm stands between the null and an alarm.

Results go to `false_alarms.json` beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from demo import PROTECTED, SAE_FOLDER
from gemma import cached_gemma
from sts_callback import Monitor, PolicyConfig, ProbeConfig, STSCallback, judge_drift
from sts_callback.config import DEFAULT_BUDGET
from sts_callback.data.starter import starter_domains
from sts_callback.measure.scoring import estimate
from sts_callback.metrics.statistics import p_of_rise
from sts_callback.records import DriftSnapshot
from tuning import tuned
from word_problems import word_problems

PROBES = ProbeConfig(n_queries=12, max_tokens=40, n_domain_demonstrations=3)
POLICY = PolicyConfig(budgets=dict.fromkeys(PROTECTED, DEFAULT_BUDGET))
N_STEPS, LAYOUTS, N_CHECKS = 4, (64, 128, 256, 512), 2000
NOISE = 0.03  # standard deviation of the noise on each weight matrix, in multiples of its own


def tally(checks: Sequence[DriftSnapshot]) -> dict[str, float]:
    alarms = [name for s in checks for name in alarmed(s)]
    return {
        "checks": len(checks),
        "domain_checks": len(checks) * len(PROTECTED),
        "alarms": len(alarms),
        "largest_drift": max(d.relative_drift.value for s in checks for d in s.domains.values()),
        "largest_nll_change": max(abs(d.nll_change.value) for s in checks for d in s.domains.values()),
    }


def alarmed(check: DriftSnapshot) -> tuple[str, ...]:
    return judge_drift([check], POLICY).alarmed


def learning_rate_0(name: str) -> list[DriftSnapshot]:
    callback = STSCallback(sae=SAE_FOLDER, protect=PROTECTED, check_on=1, max_overhead=None, probes=PROBES, on_error="raise")
    lora = LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return tuned(name, word_problems(400), callback, lora, steps=N_STEPS, learning_rate=0.0)


def with_random_signs(moved: DriftSnapshot, generator: np.random.Generator) -> DriftSnapshot:
    """The same drift, but per-query NLL changes without a mean effect, as large as can hide one of the budget's size."""
    domains = {}
    for name, domain in moved.domains.items():
        changes = torch.tensor(domain.query_changes, dtype=torch.float64)
        n_answer = torch.tensor(domain.query_answer_tokens)
        centred = changes - changes.sum() / n_answer.sum() * n_answer
        signed = centred * torch.from_numpy(generator.choice([-1.0, 1.0], size=len(centred)))
        # A spread at which one check in six is beyond the budget by chance.
        per_token = float(signed.square().sum().sqrt() / n_answer.sum())
        signed = signed * (DEFAULT_BUDGET / per_token)
        domains[name] = dataclasses.replace(
            domain,
            nll_change=estimate(signed, n_answer, torch.arange(len(signed))),
            p_worse=p_of_rise(signed),
        )
    return dataclasses.replace(moved, domains=domains)


def main() -> None:
    logging.set_verbosity_error()
    set_seed(0)
    started = time.monotonic()
    name = cached_gemma()
    results: dict[str, object] = {"n_queries": PROBES.n_queries, "domains": PROTECTED}

    results["learning_rate_0"] = tally(learning_rate_0(name))
    print(json.dumps(results, indent=1), flush=True)

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

    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.bfloat16().float() for key, value in weights.items()})
    results["rounded_to_bfloat16"] = tally([monitor.check(0)])
    print(json.dumps(results, indent=1), flush=True)

    torch.manual_seed(0)
    model.load_state_dict(
        {k: v + NOISE * v.std() * torch.randn_like(v) if v.dim() == 2 and "layers" in k else v for k, v in weights.items()}
    )
    moved, generator = monitor.check(0), np.random.default_rng(0)
    checks = tqdm(range(N_CHECKS), desc="Checks without harm")
    n_alarms = sum(bool(alarmed(with_random_signs(moved, generator))) for _ in checks)
    results["random_signs"] = {
        "checks": N_CHECKS,
        "smallest_drift": min(d.relative_drift.value for d in moved.domains.values()),
        "checks_with_alarms": n_alarms,
        "budget_passed_by_chance_share": float(
            np.mean(
                [with_random_signs(moved, generator).domains[PROTECTED[0]].nll_change.value >= DEFAULT_BUDGET for _ in range(300)]
            )
        ),
    }
    results["seconds"] = time.monotonic() - started
    (Path(__file__).parent / "false_alarms.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
