"""Counts of the rows of training data and domains, as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from sts_callback.data.counts import RowsRead, most_frequent
from sts_callback.report.terminal.text import new_table, rendered, wrapped

_INDENT = "  "


def rows_table(reads: Sequence[RowsRead], *, colour: bool | None = None) -> str:
    """Show rows read, used, left out and cut, one line per source; below, the reasons and notes."""
    table = new_table("rows of", "there", "read", "used", "left out", "cut")
    for one in reads:
        numbers = (one.n_rows, one.n_read, one.n_used, sum(one.left_out.values()), one.n_cut)
        table.add_row(Text("  " + one.name), *(f"{number:,}" for number in numbers))
    legend = (
        "read: until there are enough; of several turns, the first is the answer.\n"
        "cut: prompts or answers longer than max_tokens."
    )
    return rendered([table, Text(legend, style="dim"), *wrapped(_doubts(reads), "yellow", _INDENT), Text("")], colour)


def rows_doubts(reads: Sequence[RowsRead], *, colour: bool | None = None) -> str:
    """Show what was cut, the reasons for rows left out, and notes, without the table; empty if there are none."""
    cut = [f"{one.n_cut} of {one.n_used} of {one.name}" for one in reads if one.n_cut]
    lines = [f"rows drawn as probes, cut to max_tokens: {', '.join(cut)}"] if cut else []
    return rendered([*wrapped([*lines, *_doubts(reads)], "yellow", _INDENT)], colour)


def _doubts(reads: Sequence[RowsRead]) -> list[str]:
    lines, noted = list[str](), dict[str, list[str]]()
    for one in reads:
        lines += [f"{one.name}: {n:,} left out: {reason}" for reason, n in most_frequent(one.left_out)]
        if one.unread:
            lines.append(f"{one.name}: columns not read: {', '.join(one.unread)}")
        for note in one.notes:
            noted.setdefault(note, []).append(one.name)
    return [*lines, *(f"{', '.join(names)}: {note}" for note, names in noted.items())]
