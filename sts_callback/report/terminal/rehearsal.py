"""A rehearsal as text."""

from __future__ import annotations

import textwrap

from rich.text import Text

from sts_callback.config import Budget
from sts_callback.records import Verdict
from sts_callback.records.rehearsal import Dose, Rehearsal, Trials
from sts_callback.records.remedies import BudgetFinding
from sts_callback.report import formatting
from sts_callback.report.terminal.forecast import COLOURS, moved_lines, reason_lines
from sts_callback.report.terminal.text import WIDTH, new_table, rendered
from sts_callback.report.trials import answers, replay_words

_FINDINGS: dict[BudgetFinding, str] = {"within": "green", "beyond": "bold red", "cannot tell": "magenta"}


def rehearsal_lines(rehearsal: Rehearsal, verdict: Verdict | None, *, colour: bool | None = None) -> str:
    """A rehearsal: for each dose a line of how far it has moved each domain, and what follows from the run's own rate.

    Args:
        rehearsal: with doses or without.
        verdict: what follows; None where there are no doses.
        colour: as for the others.

    """
    if verdict is None:
        told = textwrap.wrap(f"STS: this run is not rehearsed: {rehearsal.skipped}", WIDTH)
        return rendered([Text(line, style="yellow") for line in told], colour)
    own, *further = rehearsal.doses
    head = Text(f"STS rehearsal: {verdict.decision.upper()}", style=COLOURS[verdict.decision])
    head.append(f"; {_steps(own)}, then put back; {rehearsal.seconds:.0f} s", style="not bold default")
    lines = [head, Text("  drift (change of NLL) by these steps:", style="dim"), *moved_lines(own.check)]
    features = len(own.check.realised_features)
    shared = f"  the forecast named {own.check.n_shared} of the {features} features that they moved most"
    lines.append(Text(shared, style="dim"))
    for dose in further:
        lines.append(Text(f"  and after {_steps(dose)} more, {dose.multiple:.1f} times that:", style="dim"))
        lines += moved_lines(dose.check)
    return rendered([*lines, *reason_lines(verdict)], colour)


def trials_table(found: Trials, *, colour: bool | None = None) -> str:
    """Rates and mixtures: for each the protected domain that has lost most of its budget, and what follows for the choice."""
    first, *_ = found.trials
    table = new_table("replay", "rate", "worst domain", "change", "95 %", "verdict")
    for trial in found.trials:
        worst = trial.worst(found.budgets)
        budget = Budget.of(found.budgets[worst.name])
        harm, form = worst.harm_in(budget.unit), formatting.harm_form(budget.unit)
        style = _FINDINGS[trial.finding]
        state = trial.verdict.states.get(worst.name, "inconclusive")
        table.add_row(
            Text(replay_words(trial.replay)),
            f"{trial.learning_rate:g}",
            Text(worst.name),
            Text(form(harm.value), style=style),
            formatting.interval(harm, form),
            Text(state, style=style),
        )
    n_steps = first.rehearsal.doses[0].n_steps
    head = f"STS rehearse: {n_steps} real steps each, then put back ({found.adapter}, {found.seconds:.0f} s)"
    note = (
        f"Change of the domain's answers after {n_steps} steps, in the unit of its budget. A run goes on for "
        f"{first.rehearsal.steps_planned} steps: what is within its budget here may pass it later, so keep the callback on."
    )
    return rendered(
        [
            Text(head, style="bold"),
            table,
            Text(),
            *(Text(line, style=_FINDINGS[found.finding]) for answer in answers(found) for line in textwrap.wrap(answer, WIDTH)),
            Text("\n" + textwrap.fill(note, WIDTH), style="dim"),
        ],
        colour,
    )


def _steps(dose: Dose) -> str:
    return f"{dose.n_steps} steps at a rate of {dose.learning_rate:.2g}"
