"""Results of past runs, as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from sts_callback.records import Estimate
from sts_callback.report.terminal.text import WIDTH, new_table, rendered
from sts_callback.runs.ledger import FEWEST, LEVEL, Expectations, Skill, TrackRecord

_LEGEND = (
    "Spearman: of the forecast's number with the outcome over the domains of a run,\n"
    "mean over training sets. off by: what is expected for a set from all others\n"
    "against its outcome, typically, drift by a factor, NLL in nats a token; beside\n"
    "it the same of their plain mean. inside: outcomes within their "
    f"{LEVEL:.0%} intervals."
)


def ledger_table(records: Sequence[TrackRecord], *, colour: bool | None = None) -> str:
    """Show how good past forecasts were: a table for each model, SAE and hook point."""
    parts: list[Text | Table] = []
    for record in records:
        identity = record.identity
        parts.append(Text(f"{identity.model_name}, {identity.sae_name}\nat {identity.hook_name}", style="bold"))
        parts.append(Text(_runs(record)))
        table = new_table("forecast by", "domains", "Spearman", "95 %", "off by", "mean off by", "inside")
        for name, skill, size in _questions(record):
            table.add_row(
                Text("  " + name),
                f"{skill.n_rows}",
                *(("", "") if math.isnan(skill.spearman.value) else _spearman(skill.spearman)),
                *((size(skill.error), size(skill.error_of_mean), f"{skill.coverage:.0%}") if skill.is_known else ("", "", "")),
            )
        parts += [table, *(Text(line, style="yellow") for line in _doubts(record)), Text("")]
    parts.append(Text(_LEGEND, style="dim"))
    return rendered(parts, colour)


def expectations_table(expected: Expectations, *, colour: bool | None = None) -> str:
    """Show what past runs predict: one row per domain, and the error when a past run is left out."""
    interval = f"{100 * LEVEL:.0f} %"
    table = new_table("expected from past runs", "drift", interval, "NLL change", interval)
    for name in expected.relative_drift or expected.nll_change:
        drift, change = expected.relative_drift.get(name), expected.nll_change.get(name)
        table.add_row(
            Text("  " + name),
            *((f"{drift.value:.1%}", f"{drift.low:.1%} to {drift.high:.1%}") if drift else ("", "")),
            *((f"{change.value:+.2f}", f"{change.low:+.2f} to {change.high:+.2f}") if change else ("", "")),
        )
    told = [
        f"{name} off by {size(skill.error if skill.is_fit_better else skill.error_of_mean)}, {skill.coverage:.0%} inside"
        for name, skill, size in _questions(expected.past)
        if skill.is_known
    ]
    lines = [
        f"{_runs(expected.past)} of this model and SAE; a set left out: {'; '.join(told)}.",
        "For training of like length and rate only: a forecast knows neither.",
    ]
    foot = [Text(part, style="dim") for line in lines for part in textwrap.wrap(line, WIDTH)]
    return rendered([table, *foot, *(Text(line, style="yellow") for line in _doubts(expected.past))], colour)


def _questions(record: TrackRecord) -> tuple[tuple[str, Skill, Callable[[float], str]], ...]:
    """Movement and harm, each with the format of its errors."""
    return (
        ("movement: transfer", record.movement, lambda error: f"x {math.exp(min(error, 99)):.3g}"),
        ("harm: NLL change", record.harm, lambda error: f"{error:.3f}"),
    )


def _runs(record: TrackRecord) -> str:
    sets = "1 training set" if record.n_training_sets == 1 else f"{record.n_training_sets} training sets"
    return f"{record.n_runs} run{'s' * (record.n_runs != 1)} on {sets}"


def _spearman(estimate: Estimate) -> tuple[str, str]:
    interval = "" if math.isnan(estimate.low) else f"{estimate.low:+.2f} to {estimate.high:+.2f}"
    return f"{estimate.value:+.2f}", interval


def _doubts(record: TrackRecord) -> list[str]:
    """Say where past runs are too few, and where the forecast predicts no better than their mean."""
    sentences = []
    for name, skill, _ in _questions(record):
        if not skill.is_known:
            sentences.append(
                f"{name}: too few runs to judge by: {skill.n_training_sets} of the {FEWEST} training sets that it takes."
            )
        elif not skill.is_fit_better:
            sentences.append(f"{name}: the forecast says no more than the mean of past outcomes, which is expected instead.")
    return [line for sentence in sentences for line in textwrap.wrap(sentence, WIDTH)]
