"""Tables and text in 80 columns, with colours only on a terminal."""

from __future__ import annotations

import io
import os
import sys
import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sts_callback.records import Snippet
from sts_callback.records.remedies import BudgetFinding

WIDTH = 80
FINDING_COLOURS: dict[BudgetFinding, str] = {"within": "green", "beyond": "bold red", "cannot tell": "magenta"}
"""Of what was found about budgets."""


def new_table(first: str, *titles: str) -> Table:
    """Make an empty table. Its first column takes the width that the others leave."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), width=WIDTH)
    table.add_column(first, overflow="fold", ratio=1)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def marked(head: str, snippet: Snippet, n_before: int) -> Text:
    """Format a snippet as one line, with the active token in brackets."""
    before, token, after = (" ".join(part.split()) for part in (snippet.before, snippet.token, snippet.after))
    line = Text(f"{head}...{before[-n_before:]} ")
    line.append(f"[{token or chr(0x2423)}]", style="bold yellow")
    line.append(f" {after}")
    line.truncate(WIDTH, overflow="ellipsis")
    return line


def wrapped(told: Iterable[str], style: str = "", indent: str = "") -> list[Text]:
    """Sentences as lines, further ones of each further in."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")
    return [Text(line, style=style) for text in told for line in wrap.wrap(text)]


def rendered(parts: list[Text | Table], colour: bool | None) -> str:
    """Join parts, one below the other. Colours are as asked; None means only on a terminal, and there not with `NO_COLOR`."""
    show = sys.stdout.isatty() and not os.environ.get("NO_COLOR") if colour is None else colour
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        force_terminal=show,
        color_system="standard" if show else None,
        highlight=False,
    )
    for part in parts:
        if isinstance(part, Table):
            _space(part, console)
        console.print(part, soft_wrap=isinstance(part, Text) and bool(part.no_wrap))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines())


def _space(table: Table, console: Console) -> None:
    """Keep columns two spaces apart where all of them fit: intervals hold spaces themselves."""
    table.width, table.padding = None, (0, 2, 0, 0)
    natural = Measurement.get(console, console.options.update(max_width=2 * WIDTH), table).maximum
    table.width, table.padding = WIDTH, (0, 2 if natural <= WIDTH else 1, 0, 0)
