"""RESULTS.md and its plots, from the lines that the stages left. The held-out half is shown only when it is opened."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import stats

from sts_callback.policy import judge_budget
from sts_callback.records import Estimate
from validation.alarms import Table, auroc_of_evidence, monitor, share
from validation.data import DOMAINS
from validation.mixtures import additivity
from validation.plan import CANDIDATES, FORECASTS, HERE, MIXTURES, RUNS, SETTINGS, STEP_ZERO, SUMS, planned, stored
from validation.scores import (
    CLEAR,
    HARM,
    RIVALS,
    Scores,
    correlations,
    expected,
    harm,
    is_clear,
    is_harmed,
    movement,
    partial_spearman,
    right_signs,
    signed,
)

mpl.use("svg")
from matplotlib import pyplot as plt

N_BOOT = 2000


def write_report(*, opened: bool) -> None:
    """Make RESULTS.md and the plots.

    Args:
        opened: whether the held-out half is shown too.

    """
    forecasts = {line["fine_tune"]: line for line in stored(FORECASTS)}
    zero, means = json.loads(STEP_ZERO.read_text()), dict(np.load(SUMS))
    runs = stored(RUNS)
    scores = {name: expected(line, means, len(line["features"])) for name, line in forecasts.items()}
    for line in stored(CANDIDATES):
        found = scores[line["fine_tune"]].setdefault(f"STS_net, {line['kind']}", np.full(len(DOMAINS), np.nan))
        found[DOMAINS.index(line["domain"])] = line["net"]
    halves = [("Development half", "development")] + ([("Held-out half", "held_out")] if opened else [])
    lines = [
        "# Does the forecast come true?",
        "",
        *wrapped(
            f"Made by `examples/validate.py report` from {len(runs)} of {len(planned())} runs; `PROTOCOL.md` says what is what. "
            + ("" if opened else "The held-out half has not been opened.")
        ),
    ]
    for title, key in halves:
        own = [run for run in runs if run["fine_tune"] in SETTINGS["fine_tunes"][key]]
        if own:
            lines += ["", f"## {title}: {len(own)} runs", *half(own, scores, forecasts, zero, key)]
    mixed = stored(MIXTURES)
    if mixed:
        lines += ["", f"## Mixtures: {len(mixed)} runs", *mixtures(mixed, {run["run"]: run for run in runs}, zero)]
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")


def half(
    runs: list[dict[str, Any]], scores: Mapping[str, Scores], forecasts: Mapping[str, Any], zero: Mapping[str, Any], key: str
) -> list[str]:
    """Tables and plots of one half."""
    moved = {run["run"]: movement(run) for run in runs}
    changed = {run["run"]: harm(run, zero) for run in runs}
    clear = [run for run in runs if np.std(changed[run["run"]][0]) >= CLEAR * changed[run["run"]][1].mean()]
    absolute = {name: np.abs(value) for name, (value, _) in changed.items()}
    plot_pairs(runs, scores, moved, absolute, HERE / f"{key}.svg")
    return [
        "",
        "### Movement: which domains' representation moves most?",
        "",
        *wrapped(
            "Correlation over the 20 domains of each score with the relative feature drift at the end; given NLL at step 0: "
            "Spearman's, with the ranks of that taken out of both."
        ),
        "",
        *table(ranking(runs, scores, moved)),
        "",
        "### Harm: which domains' loss changes most?",
        "",
        *wrapped(
            f"The same with the absolute change of answer NLL, over the {len(clear)} of {len(runs)} runs whose changes spread at "
            "least twice as far as their mean standard error."
        ),
        "",
        *table(ranking(clear, scores, absolute)),
        "",
        *wrapped(
            "What moved against what changed, after the fact: Spearman "
            f"{pooled(runs, {r['run']: spearman(moved[r['run']], absolute[r['run']]) for r in runs})} of drift with absolute "
            "change. What the domain did in the runs of the other fine-tunes here, at the same rate (mean rank): Spearman "
            f"{pooled(runs, elsewhere(runs, moved))} with movement, {pooled(clear, elsewhere(clear, absolute))} with absolute "
            "change."
        ),
        "",
        "### Direction",
        "",
        *table(directions(runs, forecasts, changed)),
        "",
        "### The verdict before training",
        "",
        *wrapped(
            f"What `forecast` would say of each domain with a budget of {HARM} nats per token, by the NLL change in context, and "
            "how many of these domains training harmed."
        ),
        "",
        *table(verdicts(runs, forecasts, changed)),
        "",
        "### Run by run",
        "",
        *table(run_by_run(runs, zero, moved, changed)),
        "",
        "### Early in the run",
        "",
        *wrapped(
            "What a check after so many steps, of 12 other questions a domain, tells of what is measured at the end: Spearman of "
            f"sizes, signs of clear changes, and the harm of domains that had kept their budget of {HARM} by the whole interval."
        ),
        "",
        *table(early(runs, moved, absolute, changed)),
        "",
        "### The monitor",
        "",
        *wrapped(
            "An alarm for one of the 20 domains, all protected, by the checks after 5, 20 and 40 steps of 12 queries each. Lead: "
            f"steps between the alarm and the first checkpoint at which the measured NLL was up by {HARM}; the first checkpoint "
            f"is itself after 5 steps. AUROC of the last check's evidence: {auroc_of_evidence(runs, changed):.3f}."
        ),
        "",
        *table(monitor(runs, zero, changed)),
        "",
        f"![Scores against what happened]({key}.svg)",
    ]


def mixtures(mixed: list[dict[str, Any]], runs: Mapping[str, Any], zero: Mapping[str, Any]) -> list[str]:
    """How far changes add up, and what replay keeps."""
    adds: Table = [["mixture", "of", "r with the mean of its sources", "typical miss", "miss of the better source alone"]]
    replay = SETTINGS["mixtures"]["replay"]
    kept: Table = [["run", "loss, last 5 steps", *replay["domains"], "median of all 20"]]
    arms: dict[str, list[Mapping[str, Any]]] = {
        "no replay": [runs[name] for seed in replay["seeds"] if (name := f"{replay['base']}/{replay['setting']}/{seed}") in runs]
    }
    for line in mixed:
        alone = [runs.get(f"{source}/{line['setting']}/{line['seed']}") for source in line["rows"]]
        if "+" not in line["name"]:
            arms.setdefault(line["name"].partition(", ")[2], []).append(line)
        elif all(alone):
            for title, measured, digits in (("movement", movement, ".1%"), ("harm", lambda run: harm(run, zero)[0], ".2f")):
                found = additivity(measured(line), np.stack([measured(run) for run in alone]))
                misses = (f"{found[key]:{digits}}" for key in ("miss", "miss of one source"))
                adds.append([f"{line['name']}, {line['setting']}", title, f"{found['r']:.2f}", *misses])
    for name, lines in arms.items():
        for line in lines:
            value, error = harm(line, zero)
            cells = [f"{value[i]:+.2f} ± {error[i]:.2f}" for i in map(DOMAINS.index, replay["domains"])]
            kept.append([f"{name}, seed {line['seed']}", f"{np.mean(line['loss'][-5:]):.2f}", *cells, f"{np.median(value):+.2f}"])
    return [
        "",
        "### Do changes add up?",
        "",
        *wrapped("A mixture's changes against the mean of those that its two sources, each alone, made at the same rate."),
        "",
        *table(adds),
        "",
        "### Replay by score",
        "",
        *wrapped(
            f"Change of answer NLL, nats per token, where {replay['share']:.0%} of the rows of {replay['setting']} "
            f"{replay['base']} are replay: of all four domains, or of the two expected to move most or least. The loss is of "
            "what was trained on, replay included."
        ),
        "",
        *table(kept),
    ]


def ranking(runs: list[dict[str, Any]], scores: Mapping[str, Scores], realised: Mapping[str, np.ndarray]) -> Table:
    """Scores by how well they rank, best first."""
    if not runs:
        return [["no run"]]
    found = []
    for name in scores[runs[0]["fine_tune"]]:
        ranks, lines, given = ({} for _ in range(3))
        for run in runs:
            score = {name: scores[run["fine_tune"]][name]}
            ranks[run["run"]] = correlations(score, realised[run["run"]])[name]
            lines[run["run"]] = correlations(score, realised[run["run"]], stats.pearsonr)[name]
            given[run["run"]] = partial_spearman(score[name], realised[run["run"]], scores[run["fine_tune"]]["NLL at step 0"])
        by_tune = by_fine_tune(runs, ranks)
        row = [
            f"*{name}*" if name in RIVALS else name,
            pooled(runs, ranks),
            *(f"{np.mean(list(by_fine_tune(runs, values).values())):.2f}".replace("nan", "-") for values in (lines, given)),
        ]
        found.append((np.mean(list(by_tune.values())), [*row, *(f"{value:.2f}" for value in by_tune.values())]))
    head = [
        "score (*rival*)",
        "Spearman [interval]",
        "Pearson",
        "given NLL at step 0",
        *by_fine_tune(runs, {run["run"]: 0.0 for run in runs}),
    ]
    return [head, *(row for _, row in sorted(found, key=lambda pair: -np.nan_to_num(pair[0], nan=-2)))]


def by_fine_tune(runs: Iterable[Mapping[str, Any]], values: Mapping[str, float]) -> dict[str, float]:
    """Means over the runs of each fine-tune."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(run["fine_tune"], []).append(values[run["run"]])
    return {name: float(np.mean(group)) for name, group in groups.items()}


def pooled(runs: Iterable[Mapping[str, Any]], values: Mapping[str, float]) -> str:
    """Mean over fine-tunes, with a bootstrap interval over them."""
    means = np.array(list(by_fine_tune(runs, values).values()))
    if len(means) == 0:
        return "-"
    draws = np.random.default_rng(0).choice(means, (N_BOOT, len(means))).mean(axis=1)
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return f"{means.mean():.2f} [{low:.2f}, {high:.2f}]"


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
    runs: list[dict[str, Any]], zero: Mapping[str, Any], moved: Mapping[str, np.ndarray], changed: Mapping[str, Any]
) -> Table:
    head = [
        "run",
        "loss, first and last 5 steps",
        "overlap",
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
                str(run["checks"][-1]["n_shared"]),
                f"{np.median(drift):.1%} ({DOMAINS[most]} {drift[most]:.1%})",
                f"{np.median(value):+.2f} ({DOMAINS[worst]} {value[worst]:+.2f})",
                f"{error.mean():.2f}",
                f"{np.nanmedian(late):+.2f}",
            ]
        )
    return rows


def early(
    runs: list[dict[str, Any]], moved: Mapping[str, np.ndarray], absolute: Mapping[str, np.ndarray], changed: Mapping[str, Any]
) -> Table:
    """What checks on the way tell of the end: ranks, signs, and what came of domains that kept their budgets so far."""
    settings = list(SETTINGS["learning_rates"])
    kept = [f"budget kept so far, harmed at the end, {setting}" for setting in settings]
    rows = [["after steps", "drift so far, with movement", "change so far, with harm", "sign right", *kept]]
    for i, step in enumerate(SETTINGS["training"]["checks"]):
        drifts, losses, signs = {}, {}, []
        harmed: dict[str, list[bool]] = {setting: [] for setting in settings}
        for run in runs:
            domains = [run["checks"][i]["domains"][name] for name in DOMAINS]
            so_far = np.array([d["nll_change"]["value"] for d in domains])
            drifts[run["run"]] = spearman(np.array([d["relative_drift"]["value"] for d in domains]), moved[run["run"]])
            losses[run["run"]] = spearman(np.abs(so_far), absolute[run["run"]])
            value, error = changed[run["run"]]
            signs += right_signs(so_far, value, error)
            is_kept = [judge_budget(Estimate(**d["nll_change"]), HARM) == "within" for d in domains]
            harmed[run["setting"]] += is_harmed(value, error)[is_kept].tolist()
        shares = (share(sum(hits), len(hits)) for hits in harmed.values())
        rows.append([str(step), pooled(runs, drifts), pooled(runs, losses), f"{np.mean(signs):.0%} of {len(signs)}", *shares])
    return rows


def elsewhere(runs: list[dict[str, Any]], realised: Mapping[str, np.ndarray]) -> dict[str, float]:
    """For each run, Spearman of what happened with the domains' mean ranks in other fine-tunes' runs at the same rate."""
    found = {}
    for run in runs:
        others = [r for r in runs if r["setting"] == run["setting"] and r["fine_tune"] != run["fine_tune"]]
        ranks = [stats.rankdata(realised[other["run"]]) for other in others]
        found[run["run"]] = spearman(np.mean(ranks, axis=0), realised[run["run"]]) if ranks else math.nan
    return found


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    return float(stats.spearmanr(one, other).statistic)


def plot_pairs(
    runs: list[dict[str, Any]],
    scores: Mapping[str, Scores],
    moved: Mapping[str, np.ndarray],
    absolute: Mapping[str, np.ndarray],
    file: Path,
) -> None:
    """STS_net against movement, and the NLL change in context against harm, a column a fine-tune."""
    mpl.rcParams["svg.hashsalt"] = "sts_callback"
    names = list(by_fine_tune(runs, {run["run"]: 0.0 for run in runs}))
    figure, axes = plt.subplots(2, len(names), figsize=(3.2 * len(names), 6), layout="constrained", squeeze=False)
    for column, name in enumerate(names):
        for run in (run for run in runs if run["fine_tune"] == name):
            for axis, score, realised in (
                (axes[0][column], "STS_net", moved[run["run"]]),
                (axes[1][column], "NLL change in context", absolute[run["run"]]),
            ):
                axis.scatter(scores[name][score], realised, s=12, label=f"{run['setting']} {run['seed']}")
                axis.set(xlabel=score, yscale="log")
        axes[0][column].set_title(name)
        axes[0][column].legend(fontsize=7)
    axes[0][0].set_ylabel("relative feature drift")
    axes[1][0].set_ylabel("absolute change of answer NLL")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def table(rows: Table) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
