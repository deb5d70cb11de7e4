"""Format numbers for reading. A number that could not be measured is a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sts_callback.config import DIGITS, PlainBudget, Unit
from sts_callback.records import Estimate, TokenAccuracy
from sts_callback.records.numbers import UNKNOWN as UNKNOWN
from sts_callback.records.numbers import Form as Form
from sts_callback.records.numbers import nats as nats
from sts_callback.records.numbers import percent as percent
from sts_callback.records.numbers import with_ends as with_ends
from sts_callback.records.remedies import SourceAttribution

_N_NAMED = 5  # sources with too few rows


def percent_1(share: float) -> str:
    """Format a share as a percentage with one decimal."""
    return percent(share, 1)


def budget(given: PlainBudget) -> str:
    """A budget: in nats a token a bare number, else with its unit."""
    if isinstance(given, str):
        return given
    return f"{given:.2f}" if math.isfinite(given) else UNKNOWN


def in_nats(given: PlainBudget) -> float:
    """A budget as a threshold among changes of NLL in nats a token; NaN if it is none of these."""
    return math.nan if isinstance(given, str) else given


def accuracy(found: TokenAccuracy | None) -> str:
    """Token accuracy then and now."""
    return f"{percent_1(found.then)} to {percent_1(found.now)}" if found else UNKNOWN


def points(change: float) -> str:
    """A change of a share in percentage points, with its sign if it has one."""
    if not math.isfinite(change):
        return UNKNOWN
    return f"{100 * change:+.1f}" if abs(change) >= 0.0005 else "0.0"


def harm_form(unit: Unit) -> Form:
    """How harm in a budget's unit is written."""
    return lambda harm: f"{harm:+.{DIGITS[unit]}f}" if math.isfinite(harm) else UNKNOWN


def plain(number: float) -> str:
    """Format with three digits and a letter for thousands."""
    if not math.isfinite(number):
        return UNKNOWN
    for letter in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:.3g}T"


def tiny(number: float) -> str:
    """Format a number that may be much smaller than 1."""
    return f"{number:.1e}" if math.isfinite(number) and number else plain(number)


def seconds(duration: float) -> str:
    """Format a duration."""
    if not math.isfinite(duration):
        return UNKNOWN
    if duration < 9.95:
        return f"{duration:.1f} s"
    if duration < 119.5:
        return f"{duration:.0f} s"
    minutes = round(duration / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def interval(estimate: Estimate, form: Form) -> str:
    """Format the two ends of an interval."""
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return ""
    return f"{form(estimate.low)} to {form(estimate.high)}"


def listing(names: Sequence[str], most: int = 6) -> str:
    """Join names for a sentence."""
    shown = list(names[:most])
    if len(names) > most:
        shown.append(f"{len(names) - most} more")
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def counted(n: int, noun: str) -> str:
    """Format a count with its noun."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def in_a_row(n_checks: int) -> str:
    """Say how long something must hold."""
    return "one check" if n_checks == 1 else f"{n_checks} checks in a row"


def too_few_rows(sources: Sequence[SourceAttribution]) -> str:
    """Which training sources have too few rows for a mean score, each with their number; empty if none has."""
    few = [one for one in sources if one.has_few_rows]
    if not few:
        return ""
    named = ", ".join(f"{one.name:.30} ({one.n_read})" for one in few[:_N_NAMED])
    others = f" and {counted(len(few) - _N_NAMED, 'more source')}" if len(few) > _N_NAMED else ""
    return f"By source, too few rows read for a mean: {named}{others}."
