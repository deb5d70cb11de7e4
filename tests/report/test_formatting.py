"""Numbers in the form in which they are read."""

from __future__ import annotations

import math

import pytest

from samples import estimate
from sts_callback.report import formatting

NAN = math.nan


@pytest.mark.parametrize(
    "form", [formatting.percent, formatting.percent_1, formatting.nats, formatting.plain, formatting.tiny, formatting.seconds]
)
def test_what_is_unknown_is_a_dash(form: formatting.Form) -> None:
    assert form(NAN) == form(math.inf) == formatting.UNKNOWN


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formatting.percent(0.256), "26%"),
        (formatting.percent_1(1.0), "100.0%"),
        (formatting.nats(0.1), "+0.10"),
        (formatting.nats(-2), "-2.00"),
        (formatting.nats(-0.004), "0.00"),
        (formatting.plain(0.125), "0.125"),
        (formatting.plain(8_081_398.0), "8.08M"),
        (formatting.plain(-999.6), "-1k"),
        (formatting.plain(2e15), "2e+03T"),
        (formatting.tiny(2.5e-7), "2.5e-07"),
        (formatting.tiny(0), "0"),
        (formatting.seconds(0), "0.0 s"),
        (formatting.seconds(9.96), "10 s"),
        (formatting.seconds(119.4), "119 s"),
        (formatting.seconds(120), "2 min"),
        (formatting.seconds(7200), "2.0 h"),
        (formatting.listing([]), ""),
        (formatting.listing(["a"]), "a"),
        (formatting.listing(["a", "b"]), "a and b"),
        (formatting.listing(["a", "b", "c", "d"], 2), "a, b and 2 more"),
        (formatting.counted(1, "check"), "1 check"),
        (formatting.counted(0, "check"), "0 checks"),
        (formatting.in_a_row(1), "one check"),
        (formatting.in_a_row(2), "2 checks in a row"),
        (formatting.interval(estimate(1, 0.5, 2), formatting.percent), "50% to 200%"),
        (formatting.interval(estimate(1, NAN, NAN), formatting.percent), ""),
    ],
)
def test_numbers_are_written_as_read(shown: str, expected: str) -> None:
    assert shown == expected
