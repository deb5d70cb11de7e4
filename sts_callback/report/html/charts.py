"""Charts as inline SVG: pure functions of numbers. They stretch to any width. All text is outside them, as HTML.

Each chart has 100 by 100 units, which stretch to the space. Lines and dots do not stretch: a dot is a line of no length with a
round end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sts_callback.records import Estimate
from sts_callback.report.html.markup import Html, join, tag

_MOST_DOTS = 40  # more would overlap
_WIDEST = 1.5  # intervals may widen an axis to at most this multiple of the span of the values


@dataclass(frozen=True)
class Axis:
    """A range of numbers that is mapped to 0 to 100."""

    low: float
    high: float

    @classmethod
    def over(cls, estimates: Iterable[Estimate], *fixed: float) -> Axis:
        """Make an axis that shows all values, fixed numbers and, unless they are very wide, intervals.

        Args:
            estimates: the estimates to draw.
            fixed: numbers that must be on the axis, at least one.

        """
        known = [e for e in estimates if math.isfinite(e.value)]
        values = [*(e.value for e in known), *(x for x in fixed if math.isfinite(x))]
        low, high = min(values), max(values)
        room = _WIDEST * (high - low)
        ends = [x for e in known for x in (e.low, e.high) if math.isfinite(x)]
        low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
        margin = 0.04 * (high - low) or 0.5
        return cls(low - margin if low < 0 else low, high + margin)

    def at(self, number: float) -> float:
        """Map a number to [0, 100]. Numbers outside the range are put at its ends."""
        return round(min(100.0, max(0.0, 100 * (number - self.low) / (self.high - self.low))), 2)

    def ticks(self, about: int = 4) -> tuple[float, ...]:
        """Round numbers on the axis."""
        span = self.high - self.low
        size = 10.0 ** math.floor(math.log10(span / about))
        step = min((m * size for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(span / step / about)))
        first = math.ceil(self.low / step - 1e-9)
        return tuple(k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1))


@dataclass(frozen=True)
class Line:
    """A curve over steps with its interval."""

    points: Sequence[tuple[float, Estimate]]
    kind: str
    """Class in the style sheet, by what the curve shows."""


def row(axis: Axis, estimate: Estimate, kind: str, *, label: str, bars: Iterable[tuple[float, str]] = ()) -> Html:
    """Draw an estimate on a horizontal axis: a dot with a whisker.

    Args:
        axis: the axis.
        estimate: the number.
        kind: class in the style sheet.
        label: text for those who do not see the chart.
        bars: numbers at which to draw a vertical bar, each with its class.

    """
    parts = [_stroke(f"M{axis.at(x)} 0V100", f"bar {cls}") for x, cls in bars if axis.low <= x <= axis.high]
    parts.append(_stroke("M0 50H100", "rule"))
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        parts.append(_stroke(f"M{axis.at(estimate.low)} 50H{axis.at(estimate.high)}", f"whisker {kind}"))
    if math.isfinite(estimate.value):
        parts.append(_dot(axis.at(estimate.value), 50, f"dot {kind}"))
    return _picture("row", label, parts)


def lines(
    curves: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    label: str,
    form: Callable[[float], str],
    levels: Iterable[tuple[float, str]] = (),
    marks: Iterable[tuple[float, str]] = (),
    along: Iterable[tuple[float, str]] | None = None,
) -> Html:
    """Draw curves over steps with their intervals and the numbers along both axes.

    Args:
        curves: what to draw.
        x: of steps.
        y: of values.
        label: what it shows, for those who do not see it.
        form: how a value is written.
        levels: values at which to draw a line across, each with its class.
        marks: steps at which to draw a mark at the foot, each with its class.
        along: places on `x` with what to write there; by default round numbers of steps.

    """
    ticks = y.ticks(3)
    parts = [_stroke(f"M0 {100 - y.at(tick)}H100", "grid") for tick in ticks]
    parts += [_stroke(f"M{x.at(step)} 90V100", f"mark {cls}") for step, cls in marks]
    parts += [_stroke(f"M0 {100 - y.at(level)}H100", f"level {cls}") for level, cls in levels if y.low <= level <= y.high]
    for curve in curves:
        parts += _curve(curve, x, y)
    upright = [tag("span", form(tick), style=f"bottom:{y.at(tick)}%") for tick in ticks]
    if along is None:
        along = [(step, f"{step:.0f}") for step in x.ticks(4) if step == int(step)]
    written = [tag("span", words, style=f"left:{x.at(place)}%") for place, words in along]
    return tag(
        "div",
        tag("div", *upright, class_="y", aria_hidden="true"),
        _picture("lines", label, parts),
        tag("div", *written, class_="x", aria_hidden="true"),
        class_="plot",
    )


def _curve(curve: Line, x: Axis, y: Axis) -> list[Html]:
    """Draw band, line and dots. They have gaps where nothing was measured."""
    parts: list[Html] = []
    for stretch in _stretches(curve.points):
        places = [(x.at(step), e) for step, e in stretch]
        ends = [(at, e) for at, e in places if math.isfinite(e.low) and math.isfinite(e.high)]
        if len(ends) > 1:
            there = [f"{at} {100 - y.at(e.high):.2f}" for at, e in ends]
            back = [f"{at} {100 - y.at(e.low):.2f}" for at, e in reversed(ends)]
            parts.append(tag("path", d=f"M{'L'.join(there + back)}Z", class_=f"band {curve.kind}"))
        elif ends:
            at, e = ends[0]
            parts.append(_stroke(f"M{at} {100 - y.at(e.high):.2f}V{100 - y.at(e.low):.2f}", f"whisker {curve.kind}"))
        heights = [(at, 100 - y.at(e.value)) for at, e in places]
        if len(heights) > 1:
            parts.append(_stroke("M" + "L".join(f"{at} {height:.2f}" for at, height in heights), f"curve {curve.kind}"))
        shown = heights if len(curve.points) <= _MOST_DOTS else heights[-1:]
        parts += [_dot(at, height, f"dot {curve.kind}") for at, height in shown]
    return parts


def _stretches(points: Sequence[tuple[float, Estimate]]) -> list[list[tuple[float, Estimate]]]:
    found: list[list[tuple[float, Estimate]]] = [[]]
    for step, estimate in points:
        if math.isfinite(estimate.value):
            found[-1].append((step, estimate))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _stroke(path: str, cls: str) -> Html:
    return tag("path", d=path, class_=cls)


def _dot(x: float, y: float, cls: str) -> Html:
    return tag("path", d=f"M{x:.2f} {y:.2f}h.001", class_=cls)


def _picture(cls: str, label: str, parts: Iterable[Html]) -> Html:
    return tag("svg", join(*parts), class_=cls, viewBox="0 0 100 100", preserveAspectRatio="none", role="img", aria_label=label)
