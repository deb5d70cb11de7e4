"""RESULTS.md and its plots, from the lines that the stages left. The held-out half is shown only when it is opened."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from validation.alarms import Table, last_evidence, monitor, over_all, rate, within_runs
from validation.data import DOMAINS
from validation.mixtures import additivity
from validation.plan import (
    CANDIDATES,
    COSTS,
    FORECASTS,
    HERE,
    LAYER_FORECASTS,
    LAYER_RUNS,
    MIXTURES,
    RUNS,
    SETTINGS,
    STEP_ZERO,
    SUMS,
    planned,
    sae_folder,
    stored,
)
from validation.scores import (
    CLEAR,
    HARM,
    Means,
    Scores,
    expected,
    harm,
    movement,
    recorded,
    signed_orders,
    spearman,
)
from validation.tables import (
    above_chance,
    by_fine_tune,
    by_layer,
    by_size,
    directions,
    early,
    elsewhere,
    other_measures,
    pooled,
    ranking,
    reach,
    run_by_run,
    verdicts,
)

mpl.use("svg")
from matplotlib import pyplot as plt

LOOKS = {
    (setting, seed): {"color": color, "marker": marker}
    for setting, color in (("gentle", "tab:blue"), ("harsh", "tab:red"))
    for seed, marker in ((0, "o"), (1, "x"))
}
"""Of the runs in a plot."""
INTERVALS = (
    "Intervals: 95 % by Student's t over fine-tunes. Errors of measurement that fine-tunes have each for itself are part of "
    "their spread; what they share, the 20 domains and the questions asked there, is not."
)


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
    orders = {name: signed_orders(line, scores[name]) for name, line in forecasts.items()}
    for title, key in halves:
        own = Happened.of([run for run in runs if run["fine_tune"] in SETTINGS["fine_tunes"][key]], zero)
        if own.runs:
            lines += ["", f"## {title}: {len(own.runs)} runs", *half(own, scores, orders, forecasts, zero, means, key)]
    if opened:
        lines += ["", f"## Both halves: {len(runs)} runs", *both(Happened.of(runs, zero), scores, orders, forecasts, zero)]
    if COSTS.exists():
        lines += ["", "## What the scores cost", *costs(json.loads(COSTS.read_text()))]
    mixed = stored(MIXTURES)
    if mixed:
        lines += ["", f"## Mixtures: {len(mixed)} runs", *mixtures(mixed, {run["run"]: run for run in runs}, zero)]
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Happened:
    """What some runs did, by run."""

    runs: list[dict[str, Any]]
    moved: dict[str, np.ndarray]
    changed: dict[str, tuple[np.ndarray, np.ndarray]]
    """Change of answer NLL and its error."""

    @classmethod
    def of(cls, runs: list[dict[str, Any]], zero: Mapping[str, Any]) -> Happened:
        """Read runs."""
        return cls(runs, {run["run"]: movement(run) for run in runs}, {run["run"]: harm(run, zero) for run in runs})

    @property
    def value(self) -> dict[str, np.ndarray]:
        """Change of answer NLL."""
        return {name: change for name, (change, _) in self.changed.items()}

    @property
    def absolute(self) -> dict[str, np.ndarray]:
        """How large that is."""
        return {name: np.abs(change) for name, change in self.value.items()}

    @property
    def clear(self) -> list[dict[str, Any]]:
        """Runs whose changes spread clearly farther than their errors."""
        return [run for run in self.runs if np.std(self.changed[run["run"]][0]) >= CLEAR * self.changed[run["run"]][1].mean()]


def half(
    happened: Happened,
    scores: Mapping[str, Scores],
    orders: Mapping[str, Scores],
    forecasts: Mapping[str, Any],
    zero: Mapping[str, Any],
    means: Means,
    key: str,
) -> list[str]:
    """Tables and plots of one half."""
    runs, moved, absolute, clear = happened.runs, happened.moved, happened.absolute, happened.clear
    plot_pairs(runs, scores, moved, absolute, HERE / f"{key}.svg")
    return [
        "",
        "### Movement: which domains' representation moves most?",
        "",
        *wrapped(
            "Correlation over the 20 domains of each score with the relative feature drift at the end; given NLL at step 0: "
            f"Spearman's, with the ranks of that taken out of both. {INTERVALS}"
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
        "### Harm with its sign: which domains fare worst?",
        "",
        *wrapped(
            "The same with the change itself, above 0 where a domain has become worse. The NLL change in context and gradient "
            "alignment keep their signs here; the others have none, so that large says worse."
        ),
        "",
        *table(ranking(clear, orders, happened.value)),
        "",
        "### What any forecast could reach",
        "",
        *wrapped(
            "Spearman's correlation over domains of what happened in one run with what happened in another of the same "
            "fine-tune. A forecast does not know the rate: where two rates agree by r, one order for both can agree with them by "
            "about sqrt((1 + r) / 2) on average and no more."
        ),
        "",
        *table(reach(runs, {"movement": moved, "absolute change": absolute, "change with its sign": happened.value})),
        "",
        "### Other measures of change",
        "",
        *wrapped(
            "Raw drift is that of activations without an SAE; late, NLL after the first "
            f"{SETTINGS['n_first']} answer tokens, where a new style is spent; margin, by how much the right option of MMLU-Pro "
            "is likelier than a wrong one, nats per token. Spearman's correlations of sizes: with the measure above (movement or "
            "harm), then of scores with this one. Accuracy is told only where the untuned model is above chance "
            f"(p < 0.05, {SETTINGS['n_wrong']} questions each): of the 14 domains of MMLU-Pro, in {above_chance(zero)}."
        ),
        "",
        *table(other_measures(runs, scores, zero, moved, absolute)),
        "",
        "### By the number of features",
        "",
        *wrapped(
            "Spearman of STS_net with movement and with absolute change, by how many of the most shifted features it counts."
        ),
        "",
        *table(by_size(runs, means, moved, absolute)),
        *layers(runs, forecasts, moved, absolute),
        "",
        "### Run by run",
        "",
        *wrapped(
            "Overlap: of the 100 features that moved most on the training data, how many its forecast had named, and how many "
            "the forecasts of the other fine-tunes on average."
        ),
        "",
        *table(run_by_run(runs, forecasts, zero, moved, happened.changed)),
        *outcome(happened, forecasts, zero),
        "",
        f"![Scores against what happened]({key}.svg)",
    ]


def both(
    happened: Happened,
    scores: Mapping[str, Scores],
    orders: Mapping[str, Scores],
    forecasts: Mapping[str, Any],
    zero: Mapping[str, Any],
) -> list[str]:
    """All fine-tunes in small tables."""
    lines = [
        "",
        *wrapped(
            f"All {len(scores)} fine-tunes. Choices were made on half of them, so that figures may be too good. {INTERVALS}"
        ),
    ]
    for title, runs, said, realised in (
        ("Movement", happened.runs, scores, happened.moved),
        ("Harm: absolute change of answer NLL", happened.clear, scores, happened.absolute),
        ("Harm with its sign", happened.clear, orders, happened.value),
    ):
        lines += ["", f"### {title}", "", *table([row[:4] for row in ranking(runs, said, realised)])]
    return [*lines, *outcome(happened, forecasts, zero)]


def outcome(happened: Happened, forecasts: Mapping[str, Any], zero: Mapping[str, Any]) -> list[str]:
    """What forecasts, verdicts, checks and alarms said of domains, and what came of them."""
    runs, within = happened.runs, within_runs(happened.runs, happened.changed, last_evidence)
    mixed = [run for run in runs if run["run"] in within]
    return [
        "",
        "### Direction",
        "",
        *table(directions(runs, forecasts, happened.changed)),
        "",
        "### The verdict before training",
        "",
        *wrapped(
            f"What `forecast` would say of each domain with a budget of {HARM} nats per token, by the NLL change in context, and "
            "how many of these domains training harmed."
        ),
        "",
        *table(verdicts(runs, forecasts, happened.changed)),
        "",
        "### Early in the run",
        "",
        *wrapped(
            "What a check after so many steps, of 12 other questions a domain, tells of what is measured at the end: Spearman of "
            f"sizes, signs of clear changes, and the harm of domains that had kept their budget of {HARM} by the whole interval. "
            "Made anew: STS_net of step 0 with the features that have moved by then, the paper's late forecast."
        ),
        "",
        *table(early(runs, happened.moved, happened.absolute, happened.changed)),
        "",
        "### The monitor",
        "",
        *wrapped(
            "An alarm for one of the 20 domains, all protected, by the checks after 5, 20 and 40 steps, over which a run spends "
            "its error: one-sided t test against half the budget, Holm over domains. Each check had 12 queries a domain; with "
            "the first 16 measured questions, asked after 5 and 20 steps as well, there are 28, and harm is then by the other 44 "
            "questions. Lead: "
            f"steps between the alarm and the first checkpoint at which the measured NLL was up by {HARM}; the first checkpoint "
            "is itself after 5 steps. AUROC of the last check's evidence over all runs together: "
            f"{over_all(runs, happened.changed, last_evidence):.3f}; knowing only a run's learning rate gives "
            f"{over_all(runs, happened.changed, rate):.3f}. Within runs, over the {len(within)} of {len(runs)} that have harmed "
            f"domains and others: {pooled(mixed, within)}."
        ),
        "",
        *table(monitor(runs, zero, happened.changed)),
    ]


def layers(
    runs: list[dict[str, Any]], forecasts: Mapping[str, Any], moved: Mapping[str, np.ndarray], absolute: Mapping[str, np.ndarray]
) -> list[str]:
    """The ablation over the layer, by the runs that were made again for it."""
    again = {line["run"]: line for line in stored(LAYER_RUNS)}
    both = [run for run in runs if run["run"] in again]
    if not both:
        return []
    (here, quality_here), (there, quality_there) = (sae(SETTINGS[key]) for key in ("sae", "other_sae"))
    forecasts_there = {line["fine_tune"]: line for line in stored(LAYER_FORECASTS)}
    moved_there = {run["run"]: movement(again[run["run"]]) for run in both}
    agreement_of_movement = {name: spearman(moved[name], values) for name, values in moved_there.items()}
    agreement_of_forecasts = {
        run["run"]: spearman(*(recorded(lines[run["fine_tune"]])["STS_net"] for lines in (forecasts, forecasts_there)))
        for run in both
    }
    overlaps = [again[run["run"]]["n_shared"] for run in both]
    losses = [np.abs(np.subtract(run["loss"], again[run["run"]]["loss"])).max() for run in both]
    return [
        "",
        "### By the SAE of another layer",
        "",
        *wrapped(
            f"Runs made again to be measured at {there} too: {', '.join(run['run'] for run in both)}; no loss of a step differs "
            f"from that of the first time by more than {max(losses):.1g} nats. The SAE of {here} leaves {quality_here}, that of "
            f"{there} {quality_there}. Of the 100 features that the latter named, {min(overlaps)} to {max(overlaps)} were among "
            f"those that moved most there. The two layers agree by {pooled(both, agreement_of_forecasts)} in the order of "
            f"domains by STS_net, and by {pooled(both, agreement_of_movement)} in the order by movement (Spearman)."
        ),
        "",
        *table(by_layer(both, {here: forecasts, there: forecasts_there}, {here: moved, there: moved_there}, absolute)),
    ]


def sae(name: str) -> tuple[str, str]:
    """Layer and quality of an SAE."""
    config, metrics = (json.loads((sae_folder(name) / file).read_text()) for file in ("cfg.json", "metrics.json"))
    quality = f"{metrics['fvu']:.3f} of the variance unexplained at {metrics['l0']:.0f} active features a token"
    return f"layer {config['metadata']['hook_name'].split('.')[1]}", quality


def costs(seconds: Mapping[str, list[float]]) -> list[str]:
    """Of each score, against that of the cheapest."""
    typical = {name: float(np.median(of_each)) for name, of_each in seconds.items()}
    cheapest = min(typical.values())
    rows = [[name, f"{value / cheapest:.1f}"] for name, value in sorted(typical.items(), key=lambda pair: pair[1])]
    return [
        "",
        *wrapped(
            f"Time for the {SETTINGS['probes']['n_queries']} queries of {DOMAINS[0]} behind the demonstrations of one fine-tune, "
            "against the least: a pass over the bare queries up to the SAE's layer. Median of "
            f"{SETTINGS['n_timings']} rounds, side by side in one run; what all domains share is read before."
        ),
        "",
        *table([["score", "time"], *rows]),
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
                label, look = f"{run['setting']} {run['seed']}", LOOKS[run["setting"], run["seed"]]
                axis.scatter(scores[name][score], realised, s=16, linewidths=1, label=label, **look)
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
