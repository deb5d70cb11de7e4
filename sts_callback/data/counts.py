"""Counts for one source of rows: how many were read, used and left out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_N_REASONS = 5  # shown for each source


@dataclass(frozen=True)
class RowsRead:
    """What happened to the rows of the training data or of one domain. Only as many are read as probes need."""

    name: str
    n_rows: int
    """Rows in the source. For a stream, rows in the sample taken from it."""
    n_read: int
    """Rows that were read. Reading stops when there are enough."""
    n_used: int
    """Examples that probes are made from. A packed row holds several."""
    n_cut: int
    """Prompts or answers among them that were too long and were cut."""
    left_out: Mapping[str, int]
    """Rows that could not be used, counted by reason."""
    unread: tuple[str, ...]
    """Columns that are not used."""
    notes: tuple[str, ...]
    """What else one should know when reading the numbers."""


def most_frequent(left_out: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent reasons, then all others together: reasons that quote their row differ from row to row."""
    first = Counter(left_out).most_common(_N_REASONS)
    others = sum(left_out.values()) - sum(n for _, n in first)
    return [*first, ("other reasons", others)] if others else first


def told(left_out: Mapping[str, int]) -> str:
    """Each reason with its count."""
    return "; ".join(f"{n:,} x {reason}" for reason, n in most_frequent(left_out))
