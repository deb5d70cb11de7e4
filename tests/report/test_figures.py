"""Numbers in the form in which they are read."""

from __future__ import annotations

import math

import pytest

from samples import estimate
from sts_callback.report import figures

NAN = math.nan


@pytest.mark.parametrize("form", [figures.percent, figures.percent_1, figures.nats, figures.plain, figures.tiny, figures.seconds])
def test_what_is_unknown_is_a_dash(form: figures.Form) -> None:
    assert form(NAN) == form(math.inf) == figures.UNKNOWN


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.percent(0.256), "26%"),
        (figures.percent_1(1.0), "100.0%"),
        (figures.nats(0.1), "+0.10"),
        (figures.nats(-2), "-2.00"),
        (figures.nats(-0.004), "0.00"),
        (figures.plain(0.125), "0.125"),
        (figures.plain(8_081_398.0), "8.08M"),
        (figures.plain(-999.6), "-1k"),
        (figures.plain(2e15), "2e+03T"),
        (figures.tiny(2.5e-7), "2.5e-07"),
        (figures.tiny(0), "0"),
        (figures.seconds(0), "0.0 s"),
        (figures.seconds(9.96), "10 s"),
        (figures.seconds(119.4), "119 s"),
        (figures.seconds(120), "2 min"),
        (figures.seconds(7200), "2.0 h"),
        (figures.listing([]), ""),
        (figures.listing(["a"]), "a"),
        (figures.listing(["a", "b"]), "a and b"),
        (figures.listing(["a", "b", "c", "d"], 2), "a, b and 2 more"),
        (figures.counted(1, "check"), "1 check"),
        (figures.counted(0, "check"), "0 checks"),
        (figures.in_a_row(1), "one check"),
        (figures.in_a_row(2), "2 checks in a row"),
        (figures.interval(estimate(1, 0.5, 2), figures.percent), "50% to 200%"),
        (figures.interval(estimate(1, NAN, NAN), figures.percent), ""),
    ],
)
def test_numbers_are_written_as_read(shown: str, expected: str) -> None:
    assert shown == expected
