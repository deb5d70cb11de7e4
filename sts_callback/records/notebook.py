"""Records as tables in a notebook: plain HTML in which every text is escaped, without script or style."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

_UNKNOWN = "\N{EN DASH}"


class _Interval(Protocol):
    """A number with its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


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


def change(found: _Interval | None) -> str:
    """A change of NLL with its interval."""
    if found is None or math.isnan(found.value):
        return _UNKNOWN
    ends = "" if math.isnan(found.low) else f" [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{found.value:+.2f}{ends}"


def percent(share: float, digits: int = 0) -> str:
    """A share as a percentage."""
    return _UNKNOWN if math.isnan(share) else f"{share:.{digits}%}"
