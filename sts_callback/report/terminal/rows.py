"""Counts of the rows of training data and domains, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from sts_callback.data.counts import RowsRead, most_frequent
from sts_callback.report.terminal.text import WIDTH, new_table, rendered


def rows_table(reads: Sequence[RowsRead], *, colour: bool | None = None) -> str:
    """Show rows read, used, left out and cut, one line per source; below, the reasons and notes."""
    table = new_table("rows of", "there", "read", "used", "left out", "cut")
    for one in reads:
        numbers = (one.n_rows, one.n_read, one.n_used, sum(one.left_out.values()), one.n_cut)
        table.add_row(Text("  " + one.name), *(f"{number:,}" for number in numbers))
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
    lines: list[str] = []
    for one in reads:
        lines += [f"{one.name}: {n:,} left out: {reason}" for reason, n in most_frequent(one.left_out)]
        if one.unread:
            lines.append(f"{one.name}: columns not read: {', '.join(one.unread)}")
        lines += [f"{one.name}: {note}" for note in one.notes]
    legend = (
        "read: until there are enough; of several turns, the first is the answer.\n"
        "cut: prompts or answers longer than max_tokens."
    )
    parts: list[Text | Table] = [
        table,
        Text(legend, style="dim"),
        *(Text(part, style="yellow") for line in lines for part in wrap.wrap(line)),
        Text(""),
    ]
    return rendered(parts, colour)
