"""How often does the alarm go off without harm?

    python examples/false_alarms.py

No model: the noise is real, taken from the validation's 24 runs (`validation/stored`), 60 questions in each of 20 domains. A
domain's changes of NLL by the end of a run are centred, so that its questions as a whole have not changed, and 12 of them are
drawn for a check, with replacement, each with its answer's tokens. Asked are

- the size of the test: how often it passes for one domain at one check, by how skewed the changes are;
- false runs: how often any of 20 protected domains alarms within so many checks, the policy at its defaults, where nothing has
  truly changed, and where every domain is truly worse by half its budget, which it may be.

A run reads the same queries at each check, and what a query says at one check it partly says at the next: how far, the three
checks of these runs tell. What becomes of it over 50 checks they do not. So two extremes are simulated. Queries that *forget*
pass on their change from check to check with a fixed probability and else take another question's, so that correlation dies
away. Queries that *remember* come back to their own, so that any two checks correlate as the first and the last stored one do.

Results go to `false_alarms.json` beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from sts_callback.config import DEFAULT_BUDGET, PolicyConfig
from sts_callback.measure.scoring import estimate
from sts_callback.policy import judge_drift
from sts_callback.records import DriftSnapshot, Estimate
from validation.data import DOMAINS
from validation.plan import RUNS, SETTINGS, STEP_ZERO, stored

POLICY = PolicyConfig(budgets=dict.fromkeys(DOMAINS, DEFAULT_BUDGET))
CHECKS = (1, 10, 50)
RISES = (0.0, DEFAULT_BUDGET / 2)
N_QUERIES: int = SETTINGS["n_checked"]
N_RUNS, N_SAMPLES = 480, 500  # simulated runs of each kind; draws of each domain's questions in each run

Shape = tuple[int, ...]


def centred(changes: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """Changes of NLL without their mean per token; sums and tokens per query, queries on the last axis."""
    left: np.ndarray = changes - changes.sum(axis=-1, keepdims=True) / n_tokens.sum(axis=-1, keepdims=True) * n_tokens
    return left


def p_values(changes: np.ndarray) -> np.ndarray:
    """What `p_of_rise` gives for each row by all patterns of signs, many rows at once.

    Args:
        changes: `(n_rows, n_queries)`.

    Returns:
        `(n_rows,)`.

    """
    n = changes.shape[1]
    signs = 1.0 - 2.0 * (np.arange(2**n) >> np.arange(n)[:, None] & 1)
    parts = np.array_split(changes, math.ceil(len(changes) / 256))
    return np.concatenate([(p @ signs >= p.sum(axis=1, keepdims=True) - 1e-9).mean(axis=1) for p in parts])


def sizes(changes: np.ndarray, rng: np.random.Generator) -> list[float]:
    """How often the test passes for one domain whose queries as a whole have not changed.

    Args:
        changes: centred, `(n_sets, n_questions)`.
        rng: draws them.

    Returns:
        For each tenth of the sets, the most left-skewed first.

    """
    n_sets, n_questions = changes.shape
    drawn = changes[np.arange(n_sets)[:, None, None], rng.integers(n_questions, size=(n_sets, N_SAMPLES, N_QUERIES))]
    passed = (p_values(drawn.reshape(-1, N_QUERIES)) <= POLICY.alpha).reshape(n_sets, N_SAMPLES).mean(axis=1)
    return [float(passed[tenth].mean()) for tenth in np.array_split(np.argsort(stats.skew(changes, axis=1)), 10)]


def forgetting(correlation: float, n_questions: int, shape: Shape, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Which question each query shows, check after check, where neighbouring checks correlate so and others ever less."""
    shown = rng.integers(n_questions, size=shape)
    while True:
        yield shown
        shown = np.where(rng.random(shape) < correlation, shown, rng.integers(n_questions, size=shape))


def remembering(correlation: float, n_questions: int, shape: Shape, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The same where any two checks correlate so."""
    own = rng.integers(n_questions, size=shape)
    while True:
        yield np.where(rng.random(shape) < math.sqrt(correlation), own, rng.integers(n_questions, size=shape))


def could_alarm(changes: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """Checks in which some domain reaches its budget and some p-value may stand Holm's correction; the others need no test.

    Turning the signs of changes that are no rise lowers no sum, so that with m of them p is at least 2^m in 2^n.

    Args:
        changes: `(n_checks, n_domains, n_queries)`.
        n_tokens: likewise.

    """
    least_p = 2.0 ** ((changes <= 0).sum(axis=-1) - changes.shape[-1])
    possible: np.ndarray = (least_p * changes.shape[1] <= POLICY.alpha).any(axis=1) & (
        changes.sum(axis=-1) >= DEFAULT_BUDGET * n_tokens.sum(axis=-1)
    ).any(axis=1)
    return possible


def alarms(check: DriftSnapshot, changes: np.ndarray, n_tokens: np.ndarray) -> bool:
    """Whether a check alarms.

    Args:
        check: all of it but what follows.
        changes: sums of NLL per domain and query, `(n_domains, n_queries)`.
        n_tokens: likewise.

    """
    domains = {}
    for i, (name, p_value) in enumerate(zip(POLICY.budgets, p_values(changes).tolist(), strict=True)):
        change = Estimate(math.nan, math.nan, math.nan)
        if p_value <= POLICY.alpha:  # an interval takes long, and no other domain can alarm
            sums, n = torch.from_numpy(changes[i]), torch.from_numpy(n_tokens[i])
            change = estimate(sums, n, torch.arange(len(n)))
        domains[name] = dataclasses.replace(check.domains[name], nll_change=change, p_worse=p_value)
    return bool(judge_drift([dataclasses.replace(check, domains=domains)], POLICY).alarmed)


def first_alarms(
    checks: list[DriftSnapshot], changes: np.ndarray, n_tokens: np.ndarray, shown: Iterator[np.ndarray], n_checks: int
) -> np.ndarray:
    """At which check each of some runs alarms first, counted from 1; infinite where none does.

    Args:
        checks: of each run, what stands in for all of its checks but the changes.
        changes: of all questions, `(n_runs, n_domains, n_questions)`.
        n_tokens: likewise.
        shown: which of them each query shows, for check after check, `(n_runs, n_domains, n_queries)`.
        n_checks: in each run.

    """
    first = np.full(len(checks), math.inf)
    for number, places in zip(range(1, n_checks + 1), shown, strict=False):
        now, n = (np.take_along_axis(each, places, axis=-1) for each in (changes, n_tokens))
        for run in np.flatnonzero(np.isinf(first) & could_alarm(now, n)):
            if alarms(checks[run], now[run], n[run]):
                first[run] = number
    return first


def correlations(runs: list[list[DriftSnapshot]]) -> tuple[float, float]:
    """How far a domain's queries agree, in mean over domains and runs: at neighbouring checks, and at the first and the last."""
    changes, n_tokens = (
        np.array([[[getattr(check.domains[d], field) for d in DOMAINS] for check in run] for run in runs], dtype=float)
        for field in ("query_changes", "query_answer_tokens")
    )
    left = centred(changes, n_tokens)
    left /= np.linalg.norm(left, axis=-1, keepdims=True)
    between = [float((left[:, a] * left[:, b]).sum(axis=-1).mean()) for a, b in ((slice(1, None), slice(-1)), (0, -1))]
    return between[0], between[1]


WALKS = {"forget": forgetting, "remember": remembering}


def main() -> None:
    started = time.process_time()
    zero = json.loads(STEP_ZERO.read_text())
    n_tokens = np.array([zero[name]["n"] for name in DOMAINS], dtype=float)
    before = np.array([zero[name]["nll"] for name in DOMAINS])
    results: dict[str, Any] = {"n_queries": N_QUERIES, "n_domains": len(DOMAINS), "simulated_runs": N_RUNS, "false_runs": []}
    everything = []
    for setting in SETTINGS["learning_rates"]:
        runs = [run for run in stored(RUNS) if run["setting"] == setting]
        checks = [[DriftSnapshot.from_dict(check) for check in run["checks"]] for run in runs]
        after = np.array([[run["after"][name]["nll"] for name in DOMAINS] for run in runs])
        still = centred(after - before, n_tokens)
        everything.append(still.reshape(-1, still.shape[-1]))
        which = np.arange(N_RUNS) % len(runs)
        n = np.broadcast_to(n_tokens, (N_RUNS, *n_tokens.shape))
        for (name, walk), correlation in zip(WALKS.items(), correlations(checks), strict=True):
            for rise in tqdm(RISES, desc=f"{setting}, queries {name}"):
                shown = walk(correlation, still.shape[-1], (N_RUNS, len(DOMAINS), N_QUERIES), np.random.default_rng(0))
                worse = still[which] + rise * n
                first = first_alarms([checks[i][-1] for i in which], worse, n, shown, max(CHECKS))
                within = {str(k): float((first <= k).mean()) for k in CHECKS}
                line = {
                    "rate": setting,
                    "true_change": rise,
                    "queries": name,
                    "correlation": correlation,
                    "within_checks": within,
                }
                results["false_runs"].append(line)
    by_tenth = sizes(np.concatenate(everything), np.random.default_rng(0))
    results["size"] = {"alpha": POLICY.alpha, "all": float(np.mean(by_tenth)), "by_tenth": by_tenth}
    results["processor_seconds"] = round(time.process_time() - started)
    (Path(__file__).parent / "false_alarms.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
