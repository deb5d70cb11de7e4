"""The parts that a forecast, a rehearsal and a check share: the verdict in a line, the table, its basis, what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sts_callback.config import PlainBudget
from sts_callback.records import Decision, Verdict, in_capitals
from sts_callback.records.run import Given
from sts_callback.report.advice import advice_on
from sts_callback.report.formatting import counted
from sts_callback.report.headline import Stage, sentence
from sts_callback.report.summary import Standing, Summary
from sts_callback.report.terminal.text import WIDTH, new_table, wrapped

COLOURS: dict[Decision, str] = {
    "go": "green",
    "watch": "yellow",
    "no-go": "bold red",
    "not covered": "magenta",
    "cannot tell": "magenta",
}
_STANDINGS: dict[Standing, str] = {
    "": "",
    "within": "green",
    "on course": "red",
    "over": "bold red",
    "cannot tell": "magenta",
}
_KEPT = "\N{NO-BREAK SPACE}"  # at which textwrap breaks no line
_MOST_REASONS = 3  # of domains of which it cannot be told


def verdict_line(
    what: str, verdict: Verdict, stage: Stage, since: Mapping[str, int] | None = None, *, is_first: bool = False
) -> Text:
    """The verdict in a sentence.

    Args:
        what: was judged.
        verdict: on it.
        stage: of the run.
        since: of alarms that stand, the steps of the checks that began them.
        is_first: whether no check was made before.

    """
    if not verdict.reasons:
        return Text(f"{what}: no domain is protected, so there is nothing to judge", style="bold")
    told = sentence(verdict, stage, since)
    at_first = " at the first check" if is_first and verdict.alarmed else ""  # and nobody knows since when
    first, *rest = textwrap.wrap(
        f"{what}: {in_capitals(verdict.decision, verdict.step)}{at_first}, {told}", WIDTH, subsequent_indent="  "
    )
    return Text("\n".join([first, *rest]), style=COLOURS[verdict.decision])


def summary_parts(summary: Summary) -> list[Text | Table]:
    """The table and, below it, what it rests on."""
    table = new_table("domain", *summary.titles)
    for row in summary.rows:
        *cells, against = row.cells if row.standing else (*row.cells, "")
        table.add_row(
            Text(("! " if row.is_threatened else "  ") + row.name),
            *cells,
            *([Text(against, style=_STANDINGS[row.standing])] if row.standing else []),
        )
    below = [summary.decides] if summary.decides else []
    return [table, *wrapped([*below, summary.basis, summary.legend], "dim")]


def open_reasons(verdict: Verdict) -> list[Text]:
    """Where it cannot be told, why: no number in the table says it."""
    if verdict.decision not in ("cannot tell", "not covered"):
        return []
    more = len(verdict.threatened) - _MOST_REASONS
    shown = {name: verdict.reasons[name] for name in verdict.threatened[:_MOST_REASONS]}
    return [*reason_lines(shown), *wrapped([f"  {counted(more, 'more domain')} likewise."] if more > 0 else [])]


def reason_lines(reasons: Mapping[str, str]) -> list[Text]:
    """Reasons by the domains that they are about."""
    return wrapped(f"{name}: {reason}" for name, reason in reasons.items())


def advice_lines(
    verdict: Verdict, output_dir: Path, given: Given | None, budgets: Mapping[str, PlainBudget], *, has_sae: bool
) -> list[Text]:
    """What to do about a no-go or an alarm; nothing about other verdicts."""
    advice = advice_on(verdict, output_dir, verdict.best_checkpoint, given or Given(), budgets, has_sae=has_sae)
    lines = [Text("What to do:", style="bold")] if advice else []
    for one in advice:
        lines += [
            Text("  " + line) for line in textwrap.wrap(one.what, WIDTH - 2, break_long_words=False, break_on_hyphens=False)
        ]
        if one.command:
            words = " ".join(part.replace(" ", _KEPT) for part in one.parts)
            typed = textwrap.wrap(words, WIDTH - 10, break_long_words=False, break_on_hyphens=False)
            shown = "    " + " \\\n      ".join(typed).replace(_KEPT, " ")
            lines.append(Text(shown, no_wrap=True))  # also where a path is longer than a line
    return lines
