"""A rehearsal as text."""

from __future__ import annotations

import textwrap

from rich.text import Text

from sts_callback.records import Estimate, Verdict
from sts_callback.records.rehearsal import Dose, Rehearsal, Trials
from sts_callback.report import formatting
from sts_callback.report.terminal.forecast import COLOURS, reason_lines
from sts_callback.report.terminal.text import FINDING_COLOURS, WIDTH, downwards, new_table, rendered
from sts_callback.report.trials import answers, replay_words

_STATES: dict[str, str] = {"within": "green", "on course": "red", "over": "bold red", "inconclusive": "magenta"}


def rehearsal_lines(rehearsal: Rehearsal, verdict: Verdict | None, *, colour: bool | None = None) -> str:
    """A rehearsal: what its steps have done to each domain, what is expected at the end of the run, and the verdict.

    Args:
        rehearsal: with doses or without.
        verdict: what follows; None where there are no doses.
        colour: as for the others.

    """
    if verdict is None:
        told = textwrap.wrap(f"STS: this run is not rehearsed: {rehearsal.skipped}", WIDTH)
        return rendered([Text(line, style="yellow") for line in told], colour)
    own = rehearsal.doses[0]
    head = Text(f"STS rehearsal: {verdict.decision.upper()}", style=COLOURS[verdict.decision])
    head.append(f"; {_steps(own)}, then put back; {rehearsal.seconds:.0f} s", style="not bold default")
    told = ["domain", f"after {own.n_steps} steps", *(["at the end, expected"] if rehearsal.expected else []), "drift", "budget"]
    table = new_table(*told)
    worst_first = sorted(own.check.domains.values(), key=lambda d: (d.name not in verdict.states, downwards(d.nll_change.value)))
    for domain in worst_first:
        state = verdict.states.get(domain.name, "")
        expected = rehearsal.expected.get(domain.name)
        table.add_row(
            Text("  " + domain.name),
            _with_interval(domain.nll_change),
            *([_with_interval(expected)] if expected else []),
            f"{domain.relative_drift.value:.1%}",
            Text(state, style=_STATES.get(state, "")),
        )
    features = len(own.check.realised_features)
    notes = ["Change of the answers' NLL, nats a token, with 95 % intervals; above 0 is worse."]
    if rehearsal.expected:
        notes.append("Expected: by runs of a model of this size that were rehearsed and then made.")
    notes.append(f"The forecast named {own.check.n_shared} of the {features} features that these steps moved most.")
    dim = [Text("  " + line, style="dim") for line in textwrap.wrap(" ".join(notes), WIDTH - 2)]
    return rendered([head, table, *dim, *reason_lines(verdict)], colour)


def _with_interval(estimate: Estimate) -> str:
    ends = formatting.interval(estimate, formatting.nats)
    return f"{formatting.nats(estimate.value)} [{ends.replace(' to ', ', ')}]" if ends else formatting.nats(estimate.value)


def trials_table(found: Trials, *, colour: bool | None = None) -> str:
    """Rates and mixtures: for each the protected domain that has lost most of its budget, and what follows for the choice."""
    first, *_ = found.trials
    table = new_table("replay", "rate", "worst domain", "change", "95 %", "verdict")
    for trial in found.trials:
        worst = trial.worst(found.limits)
        budget = found.limits[worst.name]
        harm, form = worst.harm_in(budget.unit), formatting.harm_form(budget.unit)
        style = FINDING_COLOURS[trial.finding]
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
            *(
                Text(line, style=FINDING_COLOURS[found.finding])
                for answer in answers(found)
                for line in textwrap.wrap(answer, WIDTH)
            ),
            Text("\n" + textwrap.fill(note, WIDTH), style="dim"),
        ],
        colour,
    )


def _steps(dose: Dose) -> str:
    return f"{dose.n_steps} steps at a rate of {dose.learning_rate:.2g}"
