"""Records as tables in a notebook: plain HTML in which every text is escaped, without script or style."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sts_callback.records.numbers import UNKNOWN, nats, with_ends

if TYPE_CHECKING:
    from sts_callback.records.results import Estimate


def table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    """A table.

    Args:
        caption: what it shows.
        titles: of its columns.
        rows: their cells; the first names the row.
        note: a line below it.

    """
    head = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    made = f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"{made}<p>{html.escape(note)}</p>"


def change(found: Estimate | None) -> str:
    """A change of NLL with its interval."""
    return UNKNOWN if found is None else with_ends(found, nats)
