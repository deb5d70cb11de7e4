"""A rehearsal as text."""

from __future__ import annotations

import textwrap

from rich.text import Text

from sts_callback.records import Verdict
from sts_callback.records.rehearsal import Dose, Rehearsal
from sts_callback.report.terminal.forecast import COLOURS, moved_lines, reason_lines
from sts_callback.report.terminal.text import WIDTH, rendered


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


def _steps(dose: Dose) -> str:
    return f"{dose.n_steps} steps at a rate of {dose.learning_rate:.2g}"
