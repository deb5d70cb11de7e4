"""How often does the alarm go off without harm, and how often with it?

    python examples/false_alarms.py

No model: the noise is real, taken from the validation's 24 runs (`validation/stored`), 60 questions in each of 20 domains. A
domain's changes of NLL by the end of a run are centred, so that its questions as a whole have not changed; queries are drawn from
them, with replacement, each with its answer's tokens. Asked are

- the size of the test: how often it passes for one domain at one check where the true change is half the budget, the most that is
  no harm to it, by how skewed the changes are;
- false runs: how often any of 20 protected domains alarms within a run of so many checks, the policy at its defaults, where
  nothing has truly changed, and where every domain is truly worse by half its budget;
- power: how often a domain alarms in a run of ten checks, one of 20 that are protected, by its true change and its queries.

A run reads the same queries at each check, and what a query says at one check it partly says at the next: how far, the three
checks of these runs tell. What becomes of it over 50 checks they do not. So two extremes are simulated. Queries that *forget*
pass on their change from check to check with a fixed probability and else take another question's, so that correlation dies
away. Queries that *remember* come back to their own, so that any two checks correlate as the first and the last stored one do.

Results go to `false_alarms.json` beside this file.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tqdm import tqdm

from sts_callback.config import DEFAULT_BUDGET, PolicyConfig, ProbeConfig
from sts_callback.records import DriftSnapshot
from validation.data import DOMAINS
from validation.plan import RUNS, SETTINGS, STEP_ZERO, stored

POLICY = PolicyConfig(budgets=dict.fromkeys(DOMAINS, DEFAULT_BUDGET))
CHECKS = (1, 10, 50)
RISES = (0.0, DEFAULT_BUDGET / 2)
HARMS = (0.1, 0.2, 0.3)
N_QUERIES = ProbeConfig.n_queries
FEWER = (12, 28, N_QUERIES)
N_RUNS, N_SAMPLES = 1000, 500  # simulated runs of each kind; draws of each domain's questions in each run

Shape = tuple[int, ...]


def centred(changes: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """Changes of NLL without their mean per token; sums and tokens per query, queries on the last axis."""
    left: np.ndarray = changes - changes.sum(axis=-1, keepdims=True) / n_tokens.sum(axis=-1, keepdims=True) * n_tokens
    return left


def p_values(changes: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """What `p_above` gives for half the budget, many domains at once.

    Args:
        changes: sums of NLL per query, `(..., n_queries)`, not all alike.
        n_tokens: likewise.

    Returns:
        `(...)`.

    """
    found: np.ndarray = stats.ttest_1samp(changes - DEFAULT_BUDGET / 2 * n_tokens, 0, axis=-1, alternative="greater").pvalue
    return found


def sizes(changes: np.ndarray, n_tokens: np.ndarray, level: float, rng: np.random.Generator) -> list[float]:
    """How often the test passes for one domain whose questions as a whole have got worse by half the budget.

    Args:
        changes: centred, `(n_sets, n_questions)`.
        n_tokens: likewise.
        level: of the test.
        rng: draws them.

    Returns:
        For each tenth of the sets, the most left-skewed first.

    """
    n_sets, n_questions = changes.shape
    places = np.arange(n_sets)[:, None, None], rng.integers(n_questions, size=(n_sets, N_SAMPLES, N_QUERIES))
    n = n_tokens[places]
    passed = (p_values(changes[places] + DEFAULT_BUDGET / 2 * n, n) <= level).mean(axis=1)
    order = np.argsort(stats.skew(changes, axis=1))
    return [float(passed[tenth].mean()) for tenth in np.array_split(order, 10)]


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


WALKS = {"forget": forgetting, "remember": remembering}


@dataclasses.dataclass(frozen=True)
class Noise:
    """What runs at one learning rate did to questions, less what they did to domains as a whole."""

    still: np.ndarray
    """Centred changes, `(n_stored_runs, n_domains, n_questions)`."""
    n_tokens: np.ndarray
    """Of their answers, `(n_domains, n_questions)`."""
    correlation: Mapping[str, float]
    """By how queries keep their noise, the correlation of two checks."""

    def p_values(self, rise: float, n_queries: int, walk: str, n_checks: int, n_runs: int = N_RUNS) -> np.ndarray:
        """P-values of all domains at all checks of simulated runs, `(n_checks, n_runs, n_domains)`.

        Args:
            rise: true change of every domain, nats a token.
            n_queries: of each domain.
            walk: how they keep their noise.
            n_checks: in each run.
            n_runs: simulated.

        """
        changes = self.still[np.arange(n_runs) % len(self.still)] + rise * self.n_tokens
        n = np.broadcast_to(self.n_tokens, changes.shape)
        shape = (n_runs, len(self.n_tokens), n_queries)
        shown = WALKS[walk](self.correlation[walk], self.still.shape[-1], shape, np.random.default_rng(0))
        found = []
        for places in itertools.islice(shown, n_checks):
            found.append(p_values(*(np.take_along_axis(each, places, axis=-1) for each in (changes, n))))
        return np.stack(found)


def alarmed(found: np.ndarray, n_checks: int) -> np.ndarray:
    """Whether any domain alarms within runs of so many checks, `(n_runs,)`: by Holm, the first to pass is the least p-value.

    Args:
        found: from `Noise.p_values`.
        n_checks: that share the error of a run.

    """
    least: np.ndarray = found[:n_checks].min(axis=(0, 2))
    return least * found.shape[-1] <= POLICY.alpha / n_checks


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


def main() -> None:
    started = time.process_time()
    zero: Mapping[str, Any] = json.loads(STEP_ZERO.read_text())
    n_tokens = np.array([zero[name]["n"] for name in DOMAINS], dtype=float)
    before = np.array([zero[name]["nll"] for name in DOMAINS])
    results: dict[str, Any] = {
        "n_queries": N_QUERIES,
        "n_domains": len(DOMAINS),
        "alpha": POLICY.alpha,
        "simulated_runs": N_RUNS,
        "false_runs": [],
        "power": [],
    }
    everything = []
    for setting in SETTINGS["learning_rates"]:
        runs = [run for run in stored(RUNS) if run["setting"] == setting]
        checks = [[DriftSnapshot.from_dict(check) for check in run["checks"]] for run in runs]
        after = np.array([[run["after"][name]["nll"] for name in DOMAINS] for run in runs])
        noise = Noise(centred(after - before, n_tokens), n_tokens, dict(zip(WALKS, correlations(checks), strict=True)))
        everything.append(noise.still.reshape(-1, noise.still.shape[-1]))
        for walk, rise in tqdm(list(itertools.product(WALKS, RISES)), desc=f"{setting}, false runs"):
            made = noise.p_values(rise, N_QUERIES, walk, max(CHECKS))
            line = {"rate": setting, "true_change": rise, "queries": walk, "correlation": noise.correlation[walk]}
            within = {str(k): float(alarmed(made, k).mean()) for k in CHECKS}
            results["false_runs"].append({**line, "within_checks": within})
        for n_queries, harm in tqdm(list(itertools.product(FEWER, HARMS)), desc=f"{setting}, power"):
            # As if all others had not changed, so that Holm's correction is the full one.
            passed = noise.p_values(harm, n_queries, "remember", 10) * len(DOMAINS) <= POLICY.alpha / 10
            once, ever = float(passed[0].mean()), float(passed.any(axis=0).mean())
            results["power"].append({"rate": setting, "n_queries": n_queries, "true_change": harm, "one": once, "ten": ever})
    by_level = {}
    for level in (0.05, 0.01, 0.001):
        tokens = np.tile(n_tokens, (len(np.concatenate(everything)) // len(DOMAINS), 1))
        by_tenth = sizes(np.concatenate(everything), tokens, level, np.random.default_rng(0))
        by_level[f"{level:g}"] = {"all": float(np.mean(by_tenth)), "by_tenth": by_tenth}
    results["size"] = by_level
    results["processor_seconds"] = round(time.process_time() - started)
    (Path(__file__).parent / "false_alarms.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
