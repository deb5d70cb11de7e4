"""Numbers for reading, the same in a notebook, on a terminal and on a page. One that could not be measured is a dash."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sts_callback.records.results import Estimate

UNKNOWN = "\N{EN DASH}"

Form = Callable[[float], str]
"""A function that formats a number."""


def percent(share: float, digits: int = 0) -> str:
    """Format a share as a percentage."""
    return f"{share:.{digits}%}" if math.isfinite(share) else UNKNOWN


def nats(change: float) -> str:
    """Format a change of NLL, with its sign if it is not 0."""
    if not math.isfinite(change):
        return UNKNOWN
    return f"{change:+.2f}" if abs(change) >= 0.005 else "0.00"


def with_ends(found: Estimate, form: Form) -> str:
    """Format a number with its interval, if that is known."""
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return form(found.value)
    return f"{form(found.value)} [{form(found.low)}, {form(found.high)}]"
