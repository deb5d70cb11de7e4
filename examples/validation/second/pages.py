"""RESULTS.md of the second round. How far it is shown always, outcomes only when they are opened."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from sts_callback.metrics.calibration import Pair, fit
from validation.alarms import Table, share
from validation.pages import table, wrapped
from validation.plan import stored
from validation.scores import Scores, spearman, student
from validation.second import tables
from validation.second.calibration import SHIPPED
from validation.second.outcomes import DOMAINS, Happened, Rehearsed
from validation.second.plan import ANSWERED, CALIBRATION, FORECASTS, HERE, REHEARSALS, RUNS, SETTINGS, STEP_ZERO
from validation.second.tables import Runs, Told

LATER = ("aqua-rat", "logiqa-zh")
"""Fine-tunes that were run after the others had been opened; they judge whether the expected change decides."""
_FEWEST_RIGHT, _FEWEST_NAMED = 0.9, 0.5  # of the domains named, the harmed ones; of the harmed ones, the domains named


def write_report(*, opened: bool) -> None:
    """Make RESULTS.md.

    Args:
        opened: whether outcomes are shown; without, only what has been stored.

    """
    rehearsals, runs = ({line["key"]: line for line in stored(file)} for file in (REHEARSALS, RUNS))
    whole = [name for name in SETTINGS["fine_tunes"] if all(key in rehearsals and key in runs for key in _keys(name))]
    come = f"{len(whole)} of {len(SETTINGS['fine_tunes'])} fine-tunes that are in whole"
    made = f"Made by `examples/validate_second.py report` from {come}; `PROTOCOL.md` says what is what."
    lines = [
        "# Known before step 1, warned before it is done? The second round",
        "",
        *wrapped(made + ("" if opened else " Outcomes have not been opened.")),
    ]
    if opened and whole:
        lines += sections(all_told(whole, rehearsals, runs), json.loads(CALIBRATION.read_text())["threshold"]["value"])
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n")


def _keys(fine_tune: str) -> list[str]:
    return [f"{fine_tune}/{name}" for name in SETTINGS["runs"]]


def all_told(fine_tunes: Sequence[str], rehearsals: Mapping[str, Any], runs: Mapping[str, Any]) -> list[Told]:
    """The runs of fine-tunes with what was known of them; lines by key."""
    zero, shipped = json.loads(STEP_ZERO.read_text()), json.loads(SHIPPED.read_text())
    pairs = [Pair(group, *(math.nan if v is None else v for v in values)) for group, *values in shipped["pairs"]]
    one, two = (fit(pairs, two_doses=two_doses) for two_doses in (False, True))
    assert one is not None and two is not None
    forecasts, answered = ({line["fine_tune"]: line for line in stored(file)} for file in (FORECASTS, ANSWERED))
    return [
        Told(
            Happened.of(runs[key], zero),
            Rehearsed.of(rehearsals[key], zero, one, two),
            scores(forecasts[fine_tune], answered.get(fine_tune), zero),
        )
        for fine_tune in fine_tunes
        for key in _keys(fine_tune)
    ]


def scores(forecast: Mapping[str, Any], answered: Mapping[str, Any] | None, zero: Mapping[str, Any]) -> Scores:
    """The forecast's scores, those that need answers only once they are there."""
    found = {
        "NLL at step 0": np.array([sum(zero["check"][name]["nll"]) / sum(zero["check"][name]["n"]) for name in DOMAINS]),
        "STS_net": np.array([forecast["domains"][name]["sts_net"]["value"] for name in DOMAINS]),
    }
    if answered is not None:
        keys = {"NLL change in context": "nll_change", "gradient alignment": "gradient_change"}
        with_sign = {
            title: np.array([answered["domains"][name][key]["value"] for name in DOMAINS]) for title, key in keys.items()
        }
        found |= with_sign | {"ranks of both": sum(stats.rankdata(values) for values in with_sign.values())}
    return found


def sections(told: Runs, threshold: float) -> list[str]:
    """All that is reported.

    Args:
        told: runs that are in.
        threshold: of the fitted rule.

    """
    parts: dict[str, Runs] = {"all": told}
    parts |= {name: some for name in SETTINGS["runs"] if (some := [t for t in told if t.run.setting == name])}
    by_setting = {name: some for name, some in parts.items() if name != "all"}
    checks = [(f"Alarms in training, {name} runs, check by check", tables.by_check(some)) for name, some in by_setting.items()]
    found: list[tuple[str, Table]] = [
        ("Targets", targets(parts)),
        ("Runs", tables.run_by_run(told)),
        ("Before step 1: named domains", tables.before_training(parts, threshold)),
        ("Harm in order", tables.harm_orders(parts)),
        ("AUROC of harm", tables.areas(parts)),
        ("Signs of clear changes", tables.signs(parts)),
        ("Movement in order", tables.movement_orders(parts)),
        ("The calibration", tables.calibrated(parts)),
        ("Alarms in training", tables.in_training(parts)),
        *checks,
    ]
    lines = [
        "",
        *wrapped(
            "Correlations are over the 12 domains within each run, then averaged over fine-tunes; intervals are 95 %, by "
            "Student's t over fine-tunes. What these share, the domains and the questions asked there, is not in them. Of harmed "
            f"domains {tables.by_loss_alone(told)} have as many right answer tokens as before, or more. KL on the training rows "
            f"after five steps orders the runs' mean changes with Spearman {tables.divergences(told)}."
        ),
    ]
    for title, rows in found:
        lines += ["", f"## {title}", "", *table(rows)]
    judges = [t for t in by_setting.get("long", ()) if t.run.fine_tune in LATER]
    if {t.run.fine_tune for t in judges} == set(LATER):
        lines += ["", "## Does the expected change decide?", "", *wrapped(decision(judges, threshold))]
    return lines


def decision(runs: Runs, threshold: float) -> str:
    """Whether the fitted rule may decide, by runs that it was not chosen on.

    Args:
        runs: long runs of the later fine-tunes.
        threshold: of the fitted rule, nats a token.

    """
    harmed = np.concatenate([t.run.harmed for t in runs])
    hit = np.concatenate([t.rehearsed.expected >= threshold for t in runs])
    n_right, n_hit, n_harmed = int((hit & harmed).sum()), int(hit.sum()), int(harmed.sum())
    decides = n_hit > 0 and n_right >= _FEWEST_RIGHT * n_hit and n_right >= _FEWEST_NAMED * n_harmed
    return (
        f"In the long runs of {' and '.join(LATER)}, made after the others had been opened, rule 2 names "
        f"{share(n_hit, harmed.size)} of the domains. Of these {share(n_right, n_hit)} are harmed (at least {_FEWEST_RIGHT:.0%} "
        f"were asked for); of the harmed ones it names {share(n_right, n_harmed)} (at least {_FEWEST_NAMED:.0%}). So by the rule "
        f"set beforehand the expected change {'decides' if decides else 'does not decide'} where a rehearsal has a tenfold dose."
    )


def targets(parts: Mapping[str, Runs]) -> Table:
    """What was aimed at, and what came of it."""

    def correlation(order: Callable[[Told], np.ndarray], outcome: Callable[[Told], np.ndarray]) -> list[str]:
        return [tables.pooled(runs, lambda told: spearman(order(told), outcome(told))) for runs in parts.values()]

    def both(told: Told) -> np.ndarray:
        found: np.ndarray = 2 * stats.rankdata(told.rehearsed.drift) + stats.rankdata(told.scores["STS_net"])
        return found

    over = [tables.named(runs, lambda told: told.rehearsed.own.over) for runs in parts.values()]
    training = tables.in_training(parts)[1:]
    right = [tables.right_sign(runs, lambda told: told.rehearsed.expected) for runs in parts.values()]
    leads = [np.concatenate([tables.relative_lead(told) for told in runs]) for runs in parts.values()]
    return [
        ["", "target", *parts],
        ["harmed domains named before step 1 (over)", "at least 70 %", *(caught for caught, _ in over)],
        ["others named", "at most 3 %", *(others for _, others in over)],
        [
            "lead over first crossing, first alarm before or in training, median",
            "long: at least 0.25",
            *(f"{np.median(lead):.2f} of {len(lead)}" if len(lead) else "-" for lead in leads),
        ],
        ["sign of clear changes", "at least 85 %", *(f"{sum(r)} of {len(r)} ({np.mean(r):.0%})" if r else "-" for r in right)],
        [
            "expected change, Spearman with the change",
            "at least 0.65",
            *correlation(lambda t: t.rehearsed.expected, lambda t: t.run.change),
        ],
        [
            "the same, absolute",
            "at least 0.55, ahead of every rival",
            *correlation(lambda t: np.abs(t.rehearsed.expected), lambda t: np.abs(t.run.change)),
        ],
        [
            "ahead of the rivals in absolute change, mean (worst rival's lead)",
            "above 0",
            *(_ahead(runs) for runs in parts.values()),
        ],
        ["movement", "at least 0.75", *correlation(both, lambda t: t.run.drift)],
        ["harmed domains caught in training", "at least 85 %", *(row[1] for row in training)],
        ["others alarmed", "at most 3.5 %", *(row[2] for row in training)],
        ["of these under half the budget at the end", "0", *(row[3] for row in training)],
        ["lead in training, median (range)", "above 0", *(row[4] for row in training)],
    ]


def _ahead(runs: Runs) -> str:
    """By how much the expected change is ahead of the best rival in absolute change, paired by fine-tune."""
    differences = {}
    for name in dict.fromkeys(name for told in runs for name in told.orders() if name.startswith("*")):

        def ahead(told: Told, name: str = name) -> float:
            rival = told.orders().get(name)
            if rival is None:
                return math.nan
            change = np.abs(told.run.change)
            return spearman(np.abs(told.rehearsed.expected), change) - spearman(np.abs(rival), change)

        differences[name] = tables.by_fine_tune(runs, ahead)
    name, worst = min(differences.items(), key=lambda pair: float(pair[1].mean()) if len(pair[1]) else math.inf)
    found = student(worst)
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}] of {name.strip('*')}".replace("nan", "-")
