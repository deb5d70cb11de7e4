"""The monitor against harm: which domains alarmed, when, and whether training had harmed them. No model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from sts_callback.config import PolicyConfig
from sts_callback.metrics.statistics import p_above
from sts_callback.policy import judge_drift
from sts_callback.records import DriftSnapshot, Estimate
from validation.data import DOMAINS
from validation.plan import SETTINGS
from validation.scores import HARM, is_harmed, ratio

Table = list[list[str]]
ON_THE_WAY: int = SETTINGS["n_on_the_way"]
"""Questions of each domain, the first ones, that were measured at the first checks too."""


def monitor(runs: list[dict[str, Any]], zero: Mapping[str, Any], changed: Mapping[str, Any]) -> Table:
    """Alarms against harm, under the default policy and others, by the checks' queries and with those measured on the way."""
    rows: Table = [
        ["queries", "patience", "alpha of a run", "harmed and alarmed", "false alarms", "lead in steps, median (range)"]
    ]
    as_checked = [checks_of(run) for run in runs], [is_harmed(*changed[run["run"]]) for run in runs]
    asked_more = [with_more_queries(run, zero) for run in runs], [harmed_elsewhere(run, zero) for run in runs]
    for (checks, harm), patience, alpha in itertools.product((as_checked, asked_more), (1, 2), (0.01, 0.05)):
        policy = PolicyConfig(budgets=dict.fromkeys(DOMAINS, HARM), patience=patience, alpha=alpha)
        right, false, leads = 0, 0, []
        for run, snapshots, hurt in zip(runs, checks, harm, strict=True):
            alarms = first_alarms(snapshots, policy)
            for name, is_hurt in zip(DOMAINS, hurt.tolist(), strict=True):
                right += name in alarms and is_hurt
                false += name in alarms and not is_hurt
                if name in alarms and is_hurt:
                    leads.append(harmed_at(run, zero, name) - alarms[name])
        lead = f"{np.median(leads):.0f} ({min(leads)} to {max(leads)})" if leads else "-"
        n_harmed, n_all = int(sum(h.sum() for h in harm)), sum(map(len, harm))
        n_queries = str(checks[0][0].domains[DOMAINS[0]].n_queries)
        cells = [n_queries, str(patience), f"{alpha:g}", f"{right} of {n_harmed}", share(false, n_all - n_harmed), lead]
        rows.append(cells)
    return rows


def checks_of(run: Mapping[str, Any]) -> list[DriftSnapshot]:
    """All checks of a run."""
    return [DriftSnapshot.from_dict(check) for check in run["checks"]]


def with_more_queries(run: Mapping[str, Any], zero: Mapping[str, Any]) -> list[DriftSnapshot]:
    """The same as if each domain's questions that were measured on the way had been queries too."""
    found = []
    for check in checks_of(run):
        domains = {}
        for name in DOMAINS:
            now = run["on_the_way"].get(str(check.step), {}).get(name) or run["after"][name]["nll"][:ON_THE_WAY]
            more, n = np.subtract(now, zero[name]["nll"][:ON_THE_WAY]), zero[name]["n"][:ON_THE_WAY]
            domain = check.domains[name]
            changes, tokens = (*domain.query_changes, *more.tolist()), (*domain.query_answer_tokens, *n)
            value, error = ratio(np.array(changes), np.array(tokens, dtype=float))
            reach = float(stats.t.ppf(0.975, len(changes) - 1)) * error
            domains[name] = dataclasses.replace(
                domain,
                n_queries=len(changes),
                nll_change=Estimate(value, value - reach, value + reach),
                query_changes=changes,
                query_answer_tokens=tokens,
            )
        found.append(dataclasses.replace(check, domains=domains))
    return found


def harmed_elsewhere(run: Mapping[str, Any], zero: Mapping[str, Any]) -> np.ndarray:
    """Which domains were harmed by the questions that were not measured on the way."""
    rest = [
        ratio(
            np.subtract(run["after"][name]["nll"], zero[name]["nll"])[ON_THE_WAY:],
            np.array(zero[name]["n"], dtype=float)[ON_THE_WAY:],
        )
        for name in DOMAINS
    ]
    return is_harmed(*(np.array(part) for part in zip(*rest, strict=True)))


def first_alarms(snapshots: Sequence[DriftSnapshot], policy: PolicyConfig) -> dict[str, int]:
    """The step of each domain's first alarm, where these checks are all that were planned."""
    levels = [policy.alpha / len(snapshots)] * len(snapshots)
    alarms: dict[str, int] = {}
    for i, snapshot in enumerate(snapshots, 1):
        for name in judge_drift(snapshots[:i], policy, levels[:i]).alarmed:
            alarms.setdefault(name, snapshot.step)
    return alarms


def last_evidence(run: Mapping[str, Any]) -> np.ndarray:
    """Of each domain, the last check's p-value of a change above half the budget, negative."""
    last = checks_of(run)[-1].domains
    return np.array([-p_above(last[name].query_changes, last[name].query_answer_tokens, HARM / 2) for name in DOMAINS])


def harmed_at(run: Mapping[str, Any], zero: Mapping[str, Any], name: str) -> int:
    """The first checkpoint at which the measured questions' NLL was up."""
    for step, found in run["on_the_way"].items():
        nll = np.array(found[name])
        n = np.array(zero[name]["n"][: len(nll)], dtype=float)
        if ratio(nll - np.array(zero[name]["nll"][: len(nll)]), n)[0] >= HARM:
            return int(step)
    return int(SETTINGS["training"]["steps"])


def auroc(evidence: np.ndarray, harmed: np.ndarray) -> float:
    ranks = stats.rankdata(evidence)
    n = int(harmed.sum())
    return float((ranks[harmed].sum() - n * (n + 1) / 2) / (n * (len(harmed) - n)))


def over_all(
    runs: list[dict[str, Any]], changed: Mapping[str, Any], evidence: Callable[[Mapping[str, Any]], np.ndarray]
) -> float:
    """How well evidence tells harmed domains from others, those of all runs together; NaN where all or none are harmed.

    Args:
        runs: all that count.
        changed: by run, change of NLL and its error.
        evidence: of a run, one number for each domain.

    """
    harmed = np.concatenate([is_harmed(*changed[run["run"]]) for run in runs])
    return auroc(np.concatenate([evidence(run) for run in runs]), harmed) if 0 < harmed.sum() < len(harmed) else math.nan


def within_runs(
    runs: list[dict[str, Any]], changed: Mapping[str, Any], evidence: Callable[[Mapping[str, Any]], np.ndarray]
) -> dict[str, float]:
    """The same for each run that has domains of both kinds."""
    found = {run["run"]: over_all([run], changed, evidence) for run in runs}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def rate(run: Mapping[str, Any]) -> np.ndarray:
    """Evidence that knows nothing but the learning rate."""
    return np.full(len(DOMAINS), SETTINGS["learning_rates"][run["setting"]])


def share(n: int, of: int) -> str:
    return f"{n} of {of} ({n / max(1, of):.1%})"
