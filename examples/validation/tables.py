"""The tables of one half: each score against what happened. No model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from sts_callback.policy import judge_budget
from sts_callback.records import Estimate
from validation.alarms import Table, share
from validation.data import CATEGORIES, DOMAINS
from validation.plan import SETTINGS
from validation.scores import (
    HARM,
    RIVALS,
    Scores,
    harm,
    is_clear,
    is_harmed,
    margins,
    net_by_size,
    partial_spearman,
    pearson,
    recorded,
    right_signs,
    signed,
    spearman,
    student,
)

OTHERS = ("STS_net", "STS_cross", "gradient alignment", "NLL change in context", *RIVALS)
"""Scores that are held against the other measures of change too."""
SIZES = (25, 50, 100, 200, 400, 800, 1600)
"""Numbers of features; the forecast's own is 100."""
LAYER_SCORES = ("STS_net", "STS_cross", "STS_rel", "STS_ICL", "STS_act", "raw shift over that by plain prose", "raw shift")
"""Scores that depend on the layer; those by NLL do not."""


def ranking(runs: list[dict[str, Any]], scores: Mapping[str, Scores], realised: Mapping[str, np.ndarray]) -> Table:
    """Scores that all fine-tunes have, by how well they rank, best first.

    Args:
        runs: all that count.
        scores: by fine-tune.
        realised: what happened, by run.

    """
    if not runs:
        return [["no run"]]
    found = []
    for name in (n for n in scores[runs[0]["fine_tune"]] if all(n in scores[run["fine_tune"]] for run in runs)):
        ranks, lines, given = ({} for _ in range(3))
        for run in runs:
            score, outcome = scores[run["fine_tune"]][name], realised[run["run"]]
            ranks[run["run"]], lines[run["run"]] = spearman(score, outcome), pearson(score, outcome)
            given[run["run"]] = partial_spearman(score, outcome, scores[run["fine_tune"]]["NLL at step 0"])
        by_tune, lines_by_tune = by_fine_tune(runs, ranks), by_fine_tune(runs, lines)
        row = [
            f"*{name}*" if name in RIVALS else name,
            pooled(runs, ranks),
            *(f"{np.mean(list(by_fine_tune(runs, values).values())):.2f}".replace("nan", "-") for values in (lines, given)),
        ]
        both = (f"{value:.2f} ({lines_by_tune[tune]:.2f})" for tune, value in by_tune.items())
        found.append((np.mean(list(by_tune.values())), [*row, *both]))
    head = [
        "score (*rival*)",
        "Spearman [interval]",
        "Pearson",
        "given NLL at step 0",
        *(f"{tune} (Pearson)" for tune in by_fine_tune(runs, {run["run"]: 0.0 for run in runs})),
    ]
    return [head, *(row for _, row in sorted(found, key=lambda pair: -np.nan_to_num(pair[0], nan=-2)))]


def by_fine_tune(runs: Iterable[Mapping[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Means over the runs of each fine-tune, of numbers or of arrays of one shape."""
    groups: dict[str, list[Any]] = {}
    for run in runs:
        groups.setdefault(run["fine_tune"], []).append(values[run["run"]])
    return {name: np.mean(group, axis=0) for name, group in groups.items()}


def pooled(runs: Iterable[Mapping[str, Any]], values: Mapping[str, float]) -> str:
    """Mean over fine-tunes of correlations by run, with its interval over them."""
    means = np.array(list(by_fine_tune(runs, values).values()))
    if len(means) == 0:
        return "-"
    found = student(means)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("nan", "-")


def reach(runs: list[dict[str, Any]], realised: Mapping[str, Mapping[str, np.ndarray]]) -> Table:
    """How far two runs of the same fine-tune agree: at two rates, and with two seeds."""
    rows: Table = [["what", "gentle with harsh", "so for one order of both at most", "first with second seed"]]
    names = {run["run"] for run in runs}
    rates = [(r["run"], f"{r['fine_tune']}/harsh/{r['seed']}") for r in runs if r["setting"] == "gentle"]
    seeds = [(r["run"], f"{r['fine_tune']}/{r['setting']}/1") for r in runs if r["seed"] == 0]
    for what, values in realised.items():
        by_rate, by_seed = (
            [spearman(values[one], values[other]) for one, other in pairs if other in names] for pairs in (rates, seeds)
        )
        at_most = f"{np.mean([math.sqrt((1 + r) / 2) for r in by_rate]):.2f}" if by_rate else "-"
        rows.append([what, _mean_and_range(by_rate), at_most, _mean_and_range(by_seed)])
    return rows


def _mean_and_range(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def other_measures(
    runs: list[dict[str, Any]],
    scores: Mapping[str, Scores],
    zero: Mapping[str, Any],
    moved: Mapping[str, np.ndarray],
    absolute: Mapping[str, np.ndarray],
) -> Table:
    """Raw drift, late NLL and margin: how large, how far they go with the main measures, and what ranks them."""
    settings, everywhere = list(SETTINGS["learning_rates"]), list(range(len(DOMAINS)))
    options = [DOMAINS.index(name) for name in CATEGORIES]
    rows: Table = [["measure", *(f"median, {setting}" for setting in settings), "with the measure above", *OTHERS]]
    for title, places, style, above, measured in (
        ("raw drift", everywhere, ".1%", moved, lambda run: np.array([run["after"][name]["raw_drift"] for name in DOMAINS])),
        ("late change of NLL", everywhere, "+.2f", absolute, lambda run: harm(run, zero, "late")[0]),
        (
            "change of margin",
            options,
            "+.2f",
            absolute,
            lambda run: np.array([np.mean(margins(run["after"], zero, n) - margins(zero, zero, n)) for n in CATEGORIES]),
        ),
    ):
        found = {run["run"]: measured(run) for run in runs}
        medians = (np.median([v for run in runs if run["setting"] == setting for v in found[run["run"]]]) for setting in settings)
        agreement = {name: spearman(np.abs(values), above[name][places]) for name, values in found.items()}
        by_score = (
            {r["run"]: spearman(scores[r["fine_tune"]][name][places], np.abs(found[r["run"]])) for r in runs} for name in OTHERS
        )
        cells = (f"{median:{style}}" for median in medians)
        rows.append([title, *cells, *(pooled(runs, values) for values in (agreement, *by_score))])
    return rows


def by_size(
    runs: list[dict[str, Any]],
    means: Mapping[str, np.ndarray],
    moved: Mapping[str, np.ndarray],
    absolute: Mapping[str, np.ndarray],
) -> Table:
    """STS_net by the number of its features."""
    scores = {run["fine_tune"]: net_by_size(run["fine_tune"], means, SIZES) for run in runs}
    rows: Table = [["features", "share of the training data's shift", "movement", "absolute change"]]
    for n in SIZES:
        shares = []
        for fine_tune in scores:
            shift = np.sort(means[f"train/{fine_tune}/training demonstrations"].astype(float))
            shares.append(shift[-n:].sum() / shift.sum())
        found = ({r["run"]: spearman(scores[r["fine_tune"]][n], w[r["run"]]) for r in runs} for w in (moved, absolute))
        rows.append([str(n), f"{min(shares):.0%} to {max(shares):.0%}", *(pooled(runs, values) for values in found)])
    return rows


def by_layer(
    runs: list[dict[str, Any]],
    forecasts: Mapping[str, Mapping[str, Any]],
    moved: Mapping[str, Mapping[str, np.ndarray]],
    absolute: Mapping[str, np.ndarray],
) -> Table:
    """Scores by the SAEs of several layers.

    Args:
        runs: those whose movement was measured at all of these.
        forecasts: by layer, then by fine-tune.
        moved: by layer, then by run.
        absolute: change of answer NLL by run.

    """
    rows: Table = [["by the SAE of", "score (*rival*)", *(f"movement in {layer}" for layer in moved), "absolute change"]]
    for layer, lines in forecasts.items():
        scores = {fine_tune: recorded(line) for fine_tune, line in lines.items()}
        for name in LAYER_SCORES:
            found = (
                {r["run"]: spearman(scores[r["fine_tune"]][name], realised[r["run"]]) for r in runs}
                for realised in (*moved.values(), absolute)
            )
            rows.append([layer, f"*{name}*" if name in RIVALS else name, *(pooled(runs, values) for values in found)])
    return rows


def above_chance(zero: Mapping[str, Any]) -> str:
    """The domains in which the untuned model finds the right option likelier than a wrong one clearly more often than not."""
    names = [
        name
        for name in CATEGORIES
        if stats.binomtest(int((margins(zero, zero, name) > 0).sum()), SETTINGS["n_wrong"], alternative="greater").pvalue < 0.05
    ]
    return ", ".join(names) or "none"


def directions(runs: list[dict[str, Any]], forecasts: Mapping[str, Any], changed: Mapping[str, Any]) -> Table:
    """How often a signed score has the sign of a clear change."""
    hits: dict[str, list[bool]] = {}
    signs = []
    for run in runs:
        value, error = changed[run["run"]]
        signs += (value[is_clear(value, error)] > 0).tolist()
        for name, score in signed(forecasts[run["fine_tune"]]).items():
            hits.setdefault(name, []).extend(right_signs(score, value, error))
    worse = float(np.mean(signs)) if signs else math.nan
    rows = [[name, f"{np.mean(right):.0%} of {len(right)}"] for name, right in hits.items()]
    side = "worse" if worse >= 0.5 else "better"
    return [["says", "sign right"], *rows, [f"always {side} (the majority)", f"{max(worse, 1 - worse):.0%} of {len(signs)}"]]


def verdicts(runs: list[dict[str, Any]], forecasts: Mapping[str, Any], changed: Mapping[str, Any]) -> Table:
    """How often each finding before training was followed by harm."""
    followed: dict[tuple[str, str], list[bool]] = {}
    for run in runs:
        harmed = is_harmed(*changed[run["run"]])
        for place, name in enumerate(DOMAINS):
            change = Estimate(**forecasts[run["fine_tune"]]["domains"][name]["nll_change"])
            finding = {"within": "go", "beyond": "no-go"}.get(judge_budget(change, HARM), "cannot tell")
            followed.setdefault((finding, run["setting"]), []).append(bool(harmed[place]))
    settings = list(SETTINGS["learning_rates"])
    rows = [
        [finding, *(share(sum(hits), len(hits)) for hits in (followed.get((finding, setting), []) for setting in settings))]
        for finding in ("no-go", "cannot tell", "go")
    ]
    return [["verdict", *(f"harmed, {setting}" for setting in settings)], *rows]


def run_by_run(
    runs: list[dict[str, Any]],
    forecasts: Mapping[str, Any],
    zero: Mapping[str, Any],
    moved: Mapping[str, np.ndarray],
    changed: Mapping[str, Any],
) -> Table:
    head = [
        "run",
        "loss, first and last 5 steps",
        "overlap (by others)",
        "drift, median (most)",
        "NLL change, median (worst)",
        "error",
        "late",
    ]
    rows = [head]
    for run in runs:
        value, error = changed[run["run"]]
        drift, late = moved[run["run"]], harm(run, zero, "late")[0]
        worst, most = int(np.argmax(value)), int(np.argmax(drift))
        first, last = np.mean(run["loss"][:5]), np.mean(run["loss"][-5:])
        rows.append(
            [
                run["run"],
                f"{first:.2f}, {last:.2f}",
                f"{run['checks'][-1]['n_shared']} ({overlap_of_others(run, forecasts):.0f})",
                f"{np.median(drift):.1%} ({DOMAINS[most]} {drift[most]:.1%})",
                f"{np.median(value):+.2f} ({DOMAINS[worst]} {value[worst]:+.2f})",
                f"{error.mean():.2f}",
                f"{np.nanmedian(late):+.2f}",
            ]
        )
    return rows


def overlap_of_others(run: Mapping[str, Any], forecasts: Mapping[str, Any]) -> float:
    """How many of the features that moved most in a run the forecasts of the other fine-tunes named, on average."""
    moved = set(run["checks"][-1]["realised_features"])
    return float(np.mean([len(moved & set(f["features"])) for name, f in forecasts.items() if name != run["fine_tune"]]))


def early(
    runs: list[dict[str, Any]], moved: Mapping[str, np.ndarray], absolute: Mapping[str, np.ndarray], changed: Mapping[str, Any]
) -> Table:
    """What checks on the way tell of the end: ranks, signs, and what came of domains that kept their budgets so far."""
    settings = list(SETTINGS["learning_rates"])
    kept = [f"budget kept so far, harmed at the end, {setting}" for setting in settings]
    rows = [
        [
            "after steps",
            "made anew, with movement",
            "drift so far, with movement",
            "made anew, with harm",
            "change so far, with harm",
            "sign right",
            *(f"sign right, {setting}" for setting in settings),
            *kept,
        ]
    ]
    for i, step in enumerate(SETTINGS["training"]["checks"]):
        anew_moved, anew_harmed, drifts, losses = ({} for _ in range(4))
        signs: dict[str, list[bool]] = {setting: [] for setting in settings}
        harmed: dict[str, list[bool]] = {setting: [] for setting in settings}
        for run in runs:
            domains = [run["checks"][i]["domains"][name] for name in DOMAINS]
            so_far = np.array([d["nll_change"]["value"] for d in domains])
            drifts[run["run"]] = spearman(np.array([d["relative_drift"]["value"] for d in domains]), moved[run["run"]])
            losses[run["run"]] = spearman(np.abs(so_far), absolute[run["run"]])
            anew = np.array([d["sts_net"] for d in domains])
            anew_moved[run["run"]], anew_harmed[run["run"]] = (spearman(anew, w[run["run"]]) for w in (moved, absolute))
            value, error = changed[run["run"]]
            signs[run["setting"]] += right_signs(so_far, value, error)
            is_kept = [judge_budget(Estimate(**d["nll_change"]), HARM) == "within" for d in domains]
            harmed[run["setting"]] += is_harmed(value, error)[is_kept].tolist()
        shares = (share(sum(hits), len(hits)) for hits in harmed.values())
        found = (pooled(runs, values) for values in (anew_moved, drifts, anew_harmed, losses))
        told = (
            f"{np.mean(right):.0%} of {len(right)}" for right in ([r for each in signs.values() for r in each], *signs.values())
        )
        rows.append([str(step), *found, *told, *shares])
    return rows


def elsewhere(runs: list[dict[str, Any]], realised: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each run, Spearman of what happened with the domains' mean ranks in other fine-tunes' runs at the same rate."""
    found = {}
    for run in runs:
        others = [r for r in runs if r["setting"] == run["setting"] and r["fine_tune"] != run["fine_tune"]]
        ranks = [stats.rankdata(realised[other["run"]]) for other in others]
        found[run["run"]] = spearman(np.mean(ranks, axis=0), realised[run["run"]]) if ranks else math.nan
    return found
