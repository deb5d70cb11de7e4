"""Reinforcement learning: does a forecast from the policy's own rollouts come true, and one from what has really moved?

    python examples/grpo.py

One GRPO run of Gemma 3 270M on sums of two numbers, whose reward is whether the sum is right; LoRA, 20 steps of 16 prompts with 4
completions each. There are no reference answers: the forecast is made from the best-rewarded rollouts of the first step. At each
check the scores are computed again with the features that training has really moved. Both are compared, over all shipped
domains, with the drift and the change of answer NLL at the end: the paper's section 6 finds the first weak and the second
strong. Settings were fixed before the run; results go to `grpo.json` beside this file. (A first run, with terms up to 60 and
a rate of 1e-3, was thrown away: of its first answers 6 % were right, of those after the first step none: nothing was learned.)
"""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from datasets import Dataset
from scipy import stats
from transformers import set_seed
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from demo import SAE_FOLDER
from gemma import cached_gemma
from sts_callback import ProbeConfig, STSCallback
from sts_callback.runs.directory import RunDirectory
from tuning import ON_CPU, to_tune

STEPS, N_PROMPTS, N_COMPLETIONS, CHECK_ON = 20, 16, 4, 5
PROBES = ProbeConfig(n_queries=12, max_tokens=48, n_domain_demonstrations=2)
SCORES = ("sts_act", "sts_icl", "sts_rel", "sts_cross", "sts_net")


def prompts(n: int) -> list[dict[str, str]]:
    """Sums to be finished, behind two that are."""
    draw = random.Random(0)
    numbers = [[draw.randint(2, 20) for _ in range(6)] for _ in range(n)]
    return [{"prompt": f"{a} + {b} = {a + b}\n{c} + {d} = {c + d}\n{e} + {f} ="} for a, b, c, d, e, f in numbers]


def is_right(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """1 for a completion that begins with the sum, else 0."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        terms = [int(number) for number in re.findall(r"\d+", prompt)[-2:]]
        begins = re.match(r"\s*(\d+)\b", completion)
        rewards.append(float(begins is not None and int(begins.group(1)) == sum(terms)))
    return rewards


def main() -> None:
    logging.set_verbosity_error()
    set_seed(0)
    callback = STSCallback(sae=SAE_FOLDER, protect="all", check_on=CHECK_ON, max_overhead=None, probes=PROBES)
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            **to_tune(cached_gemma(), callback),
            reward_funcs=callback.tap(is_right),
            args=GRPOConfig(
                output_dir=out,
                max_steps=STEPS,
                per_device_train_batch_size=N_PROMPTS * N_COMPLETIONS,
                num_generations=N_COMPLETIONS,
                max_completion_length=6,
                learning_rate=2e-4,
                logging_steps=1,
                seed=0,
                **ON_CPU,
            ),
            train_dataset=Dataset.from_list(prompts(400)),
        )
        callback.attach(trainer)
        trainer.train()
        checks = RunDirectory(Path(out) / "sts").checks_before(STEPS)
        rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    forecast, last = callback.forecast, checks[-1]
    assert forecast is not None
    names = sorted(forecast.domains)
    outcomes = {
        "movement": [last.domains[n].relative_drift.value for n in names],
        "harm": [abs(last.domains[n].nll_change.value) for n in names],
    }
    said = {"forecast from rollouts": {s: [getattr(forecast.domains[n], s).value for n in names] for s in SCORES}}
    for check in checks:
        said[f"realised features, step {check.step}"] = {s: [getattr(check.domains[n], s) for n in names] for s in SCORES}
    results = {
        "train_source": forecast.train_source,
        "rewards": rewards,
        "n_shared": {check.step: check.n_shared for check in checks},
        "text_drift": {check.step: check.output_drift.to_dict() for check in checks},
        "outcomes": {"domains": names, **outcomes},
        "spearman": {
            source: {
                s: {kind: float(stats.spearmanr(v, outcome).statistic) for kind, outcome in outcomes.items()}
                for s, v in by.items()
            }
            for source, by in said.items()
        },
        "verdict": callback.verdict.to_dict() if callback.verdict else None,
    }
    (Path(__file__).parent / "grpo.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["spearman"], indent=1))


if __name__ == "__main__":
    main()
