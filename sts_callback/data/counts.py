"""What came of the rows of one source: read, used, left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RowsRead:
    """The rows of the training data or of one domain, as far as probes needed them."""

    name: str
    n_rows: int
    """In the source; of a stream, in the sample of it."""
    n_read: int
    """Looked at: reading stops when there are enough."""
    n_used: int
    """Examples that probes are made of; a packed row holds several."""
    n_cut: int
    """Of those, prompts or answers that were too long."""
    left_out: Mapping[str, int]
    """Rows that could not be used, by reason."""
    unread: tuple[str, ...]
    """Columns that say nothing to us."""
    notes: tuple[str, ...]
    """What else a reader of the numbers must know."""


def told(left_out: Mapping[str, int]) -> str:
    """Reasons with their numbers, the most frequent first."""
    return "; ".join(f"{n} x {reason}" for reason, n in sorted(left_out.items(), key=lambda item: -item[1]))
