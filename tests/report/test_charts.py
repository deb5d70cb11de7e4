"""Pictures: numbers land where they belong, and whatever they are, a picture comes of it."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from samples import estimate
from sts_callback.report.formatting import percent
from sts_callback.report.html.charts import Axis, Line, lines, row

NAN = math.nan
UNKNOWN = estimate(NAN, NAN, NAN)
UNIT = Axis(0, 1)


def paths(picture: str, cls: str) -> list[str]:
    """What is drawn of one class."""
    svg = re.search(r"<svg.*?</svg>", picture, re.DOTALL)
    assert svg
    return [path.attrib["d"] for path in ET.fromstring(svg[0]) if cls in path.attrib["class"].split()]


def drawn(*points: tuple[float, float], **more: object) -> str:
    curve = Line([(step, estimate(value)) for step, value in points], "movement")
    return lines([curve], Axis(0, 100), UNIT, label="", form=percent, **more)  # type: ignore[arg-type]


def test_an_axis_lays_numbers_from_0_to_100_and_holds_on_to_what_is_beyond() -> None:
    axis = Axis(-1, 3)
    assert [axis.at(x) for x in (-9, -1, 0, 1, 3, 9)] == [0, 0, 25, 50, 100, 100]


def test_an_axis_shows_all_values_and_fixed_numbers() -> None:
    axis = Axis.over([estimate(0.5, 0.4, 0.6), estimate(2), UNKNOWN], 0.0, NAN, 3.0)
    assert axis.low == 0
    assert 3 < axis.high < 3.2
    assert Axis.over([estimate(-1)], 0.0).low < -1


def test_a_wild_interval_does_not_flatten_the_values() -> None:
    axis = Axis.over([estimate(1, -1e6, 1e6)], 0.0)
    assert -2 < axis.low < -1
    assert 2 < axis.high < 3


@pytest.mark.parametrize("values", [[], [UNKNOWN], [estimate(0)], [estimate(1e-12)], [estimate(1e12, -1e13, 1e13)]])
def test_any_values_make_an_axis_with_ticks(values: list) -> None:
    axis = Axis.over(values, 0.0)
    assert axis.low <= 0 < axis.high
    assert 2 <= len(axis.ticks()) <= 9


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (UNIT, [0, 0.5, 1]),
        (Axis(0, 0.43), [0, 0.2, 0.4]),
        (Axis(-0.7, 1.1), [-0.5, 0, 0.5, 1]),
        (Axis(0, 0.64), [0, 0.2, 0.4, 0.6]),
        (Axis(0, 200), [0, 50, 100, 150, 200]),
    ],
)
def test_ticks_are_round_numbers(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks(3) == pytest.approx(ticks)


def test_a_row_has_a_dot_a_whisker_bars_and_a_second_number() -> None:
    picture = row(UNIT, estimate(0.5, 0.25, 0.75), "harm", label="l", bars=[(0.1, "zero"), (7, "zero"), (NAN, "x")])
    assert paths(picture, "dot") == ["M50.00 50.00h.001"]
    assert paths(picture, "whisker") == ["M25.0 50H75.0"]
    assert paths(picture, "bar") == ["M10.0 0V100"]


def test_what_is_unknown_leaves_an_empty_row() -> None:
    picture = row(UNIT, UNKNOWN, "harm", label="l")
    assert paths(picture, "dot") == paths(picture, "whisker") == []


def test_a_curve_goes_up_with_its_numbers_and_is_dotted_at_each() -> None:
    picture = drawn((0, 0.0), (50, 0.5), (100, 1.0))
    assert paths(picture, "curve") == ["M0.0 100.00L50.0 50.00L100.0 0.00"]
    assert len(paths(picture, "dot")) == 3


def test_a_curve_is_broken_where_nothing_was_measured() -> None:
    picture = drawn((0, NAN), (10, 0.5), (20, 0.5), (30, NAN), (40, 0.5), (50, NAN))
    assert len(paths(picture, "curve")) == 1
    assert len(paths(picture, "dot")) == 3


def test_one_check_is_a_dot_with_a_whisker() -> None:
    curve = Line([(10, estimate(0.5, 0.25, 0.75))], "harm")
    picture = lines([curve], Axis(0, 10), UNIT, label="", form=percent)
    assert paths(picture, "whisker") == ["M100.0 25.00V75.00"]
    assert paths(picture, "curve") == paths(picture, "band") == []


def test_many_checks_have_a_band_and_only_the_last_dot() -> None:
    curve = Line([(step, estimate(0.5, 0.25, 0.75)) for step in range(100)], "harm")
    picture = lines([curve], Axis(0, 99), UNIT, label="", form=percent)
    assert len(paths(picture, "band")) == len(paths(picture, "curve")) == len(paths(picture, "dot")) == 1


def test_levels_and_marks_lie_where_they_are() -> None:
    picture = drawn((0, 0.1), (100, 0.1), levels=[(0.25, "threshold"), (9, "threshold"), (NAN, "x")], marks=[(50, "alarm")])
    assert paths(picture, "level") == ["M0 75.0H100"]
    assert paths(picture, "mark") == ["M50.0 90V100"]


def test_steps_along_the_axis_are_whole() -> None:
    curve = Line([(1, estimate(0.5))], "harm")
    picture = lines([curve], Axis(0, 1), UNIT, label="", form=percent)
    assert re.findall(r">([^<]*)</span>", picture.split('class="x"')[1]) == ["0", "1"]
