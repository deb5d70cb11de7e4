"""A rehearsal as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.text import Text

from sts_callback.config import PlainBudget
from sts_callback.records import Forecast, Verdict
from sts_callback.records.rehearsal import Rehearsal, Trial, Trials
from sts_callback.records.run import Given
from sts_callback.report import formatting
from sts_callback.report.summary import of_rehearsal
from sts_callback.report.terminal.check import worse_on_its_own_data
from sts_callback.report.terminal.forecast import doubts
from sts_callback.report.terminal.text import FINDING_COLOURS, new_table, rendered, wrapped
from sts_callback.report.terminal.verdict import advice_lines, open_reasons, summary_parts, verdict_line
from sts_callback.report.trials import answers, replay_words


def rehearsal_view(
    rehearsal: Rehearsal,
    verdict: Verdict,
    forecast: Forecast,
    in_context: Verdict,
    budgets: Mapping[str, PlainBudget],
    *,
    max_overhead: float = 1.0,
    given: Given | None = None,
    colour: bool | None = None,
) -> str:
    """A rehearsal: the verdict, a row a domain, what it rests on, how the forecast fits to it, and what to do about a no-go.

    Args:
        rehearsal: with doses.
        verdict: on it.
        forecast: of the run.
        in_context: the verdict on that.
        budgets: of the protected domains.
        max_overhead: share of the training's time that checks may take; from 1 on there is no limit.
        given: what the run was given, for the commands that are advised.
        colour: as for the others.

    """
    own = rehearsal.doses[0]
    beside = []
    if in_context.reasons:
        beside.append(f"The forecast, by examples in context, said: {in_context.decision}. It does not know the rate.")
    if own.check.has_sae:
        moved = len(own.check.realised_features)
        beside.append(f"The forecast named {own.check.n_shared} of the {moved} features that these steps moved most.")
    beside += worse_on_its_own_data(own.check)
    return rendered(
        [
            verdict_line("STS rehearsal", verdict, "rehearsal"),
            *summary_parts(of_rehearsal(rehearsal, verdict, budgets, max_overhead)),
            *(wrapped([" ".join(beside)], "dim") if beside else []),
            *doubts(forecast),
            *open_reasons(verdict),
            *advice_lines(verdict, Path("OUTPUT_DIR"), given, budgets, has_sae=own.check.has_sae),
        ],
        colour,
    )


def not_rehearsed(rehearsal: Rehearsal, *, colour: bool | None = None) -> str:
    """Why a run was not rehearsed."""
    return rendered([*wrapped([f"STS: this run is not rehearsed: {rehearsal.skipped}"], "yellow")], colour)


def trials_table(found: Trials, *, colour: bool | None = None) -> str:
    """Rates and mixtures: for each the protected domain that has lost most of its budget, and what follows for the choice."""
    first, *_ = found.trials
    table = new_table("replay", "rate", "worst domain", "change", "95 %", "verdict")
    for trial in found.trials:
        worst = trial.worst(found.limits).name
        rate, name, harm, ends, state = _cells(found, trial, worst)
        style = FINDING_COLOURS[trial.finding]
        table.add_row(Text(replay_words(trial.replay)), rate, name, Text(harm, style=style), ends, Text(state, style=style))
    n_steps = first.rehearsal.doses[0].n_steps
    note = (
        f"{n_steps} real steps each, then put back ({found.adapter}, {found.seconds:.0f} s). Change of the domain's answers, in "
        f"the unit of its budget, + is worse. A run goes on for {first.rehearsal.steps_planned} steps: what is within its budget "
        "here may pass it later, so keep the callback on."
    )
    first_answer, *others = answers(found)
    style = FINDING_COLOURS[found.finding]
    return rendered([*wrapped([f"STS rehearse: {first_answer}", *others], style), table, *wrapped([note], "dim")], colour)


def trials_details(found: Trials, *, colour: bool | None = None) -> str:
    """All protected domains at each rate and mixture."""
    table = new_table("replay", "rate", "domain", "change", "95 %", "verdict")
    for trial in found.trials:
        for name in found.limits:
            table.add_row(Text(replay_words(trial.replay)), *_cells(found, trial, name))
    return rendered([Text("Every protected domain", style="bold"), table], colour)


def _cells(found: Trials, trial: Trial, name: str) -> tuple[str, Text, str, str, str]:
    unit = found.limits[name].unit
    harm, form = trial.check.domains[name].harm_in(unit), formatting.harm_form(unit)
    state = trial.verdict.states.get(name, "inconclusive")
    return f"{trial.learning_rate:g}", Text(name), form(harm.value), formatting.interval(harm, form), state
