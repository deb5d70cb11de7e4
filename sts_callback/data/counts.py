"""What came of the rows of one source: read, used, left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_N_REASONS = 5  # told of each source


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


def most_frequent(left_out: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent reasons, then all others as one: what quotes its row may be another for each."""
    first = Counter(left_out).most_common(_N_REASONS)
    others = sum(left_out.values()) - sum(n for _, n in first)
    return [*first, ("other reasons", others)] if others else first


def told(left_out: Mapping[str, int]) -> str:
    """Reasons with their numbers."""
    return "; ".join(f"{n:,} x {reason}" for reason, n in most_frequent(left_out))
