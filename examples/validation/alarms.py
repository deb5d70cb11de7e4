"""The monitor against harm: which domains alarmed, when, and whether training had harmed them. No model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from sts_callback.config import PolicyConfig
from sts_callback.policy import holm, judge_drift
from sts_callback.records import DriftSnapshot
from validation.data import DOMAINS
from validation.plan import SETTINGS
from validation.scores import HARM, is_harmed, ratio

Table = list[list[str]]


def monitor(runs: list[dict[str, Any]], zero: Mapping[str, Any], changed: Mapping[str, Any]) -> Table:
    """Alarms against harm, under the default policy and others."""
    harm_of = {run["run"]: is_harmed(*changed[run["run"]]) for run in runs}
    everything = np.concatenate(list(harm_of.values()))
    rows: Table = [["patience", "alpha", "harmed and alarmed", "false alarms", "lead in steps, median (range)"]]
    for patience, alpha in itertools.product((1, 2), (0.01, 0.05)):
        policy = PolicyConfig(budgets=dict.fromkeys(DOMAINS, HARM), patience=patience, alpha=alpha)
        right, false, leads = 0, 0, []
        for run in runs:
            alarms = first_alarms(run, policy)
            for name, hurt in zip(DOMAINS, harm_of[run["run"]].tolist(), strict=True):
                right += name in alarms and hurt
                false += name in alarms and not hurt
                if name in alarms and hurt:
                    leads.append(harmed_at(run, zero, name) - alarms[name])
        lead = f"{np.median(leads):.0f} ({min(leads)} to {max(leads)})" if leads else "-"
        rows.append([str(patience), f"{alpha:g}", f"{right} of {everything.sum()}", share(false, int((~everything).sum())), lead])
    return rows


def first_alarms(run: Mapping[str, Any], policy: PolicyConfig) -> dict[str, int]:
    """The step of each domain's first alarm."""
    snapshots = [DriftSnapshot.from_dict(check) for check in run["checks"]]
    alarms: dict[str, int] = {}
    for i, snapshot in enumerate(snapshots):
        for name in judge_drift(snapshots[: i + 1], policy).alarmed:
            alarms.setdefault(name, snapshot.step)
    return alarms


def last_evidence(run: Mapping[str, Any]) -> np.ndarray:
    """Of each domain, the last check's corrected p-value, negative."""
    last = DriftSnapshot.from_dict(run["checks"][-1])
    p_values = holm({name: last.domains[name].p_worse for name in DOMAINS})
    return np.array([-p_values[name] for name in DOMAINS])


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
