"""From rehearsed changes to the end of a run: what is expected, how sure it is, and when nothing is said."""

from __future__ import annotations

import json
import math
from importlib.resources import files

import numpy as np
import pytest

from sts_callback.metrics.calibration import FEWEST_GROUPS, Pair, fit

N_GROUPS, N_DOMAINS = 8, 20


def pairs(seed: int, *, noise: float = 0.05, shared: float = 0.0) -> list[Pair]:
    """Ends that lie on a plane but for noise, some of which a group shares."""
    draw = np.random.default_rng(seed)
    found = []
    for group in range(N_GROUPS):
        off = shared * draw.standard_normal()
        for _ in range(N_DOMAINS):
            own, at_multiple = draw.normal(0, 0.1), draw.normal(0.1, 0.3)
            end = 0.02 + 1.5 * own + 0.2 * at_multiple + off + noise * draw.standard_normal()
            found.append(Pair(str(group), own, at_multiple, end))
    return found


def test_one_dose_is_taken_as_it_is() -> None:
    calibration = fit(pairs(0), two_doses=False)
    assert calibration is not None
    assert calibration.expected(0.07).value == 0.07
    assert calibration.expected(0.07, math.nan).value == 0.07


def test_two_doses_find_the_plane() -> None:
    calibration = fit(pairs(0, noise=1e-6), two_doses=True)
    assert calibration is not None
    assert (calibration.intercept, calibration.own, calibration.at_multiple) == pytest.approx((0.02, 1.5, 0.2), abs=1e-4)
    assert calibration.expected(0.1, 0.5).value == pytest.approx(0.27, abs=1e-4)
    assert math.isnan(calibration.expected(0.1).value)


@pytest.mark.parametrize("two_doses", [False, True])
def test_intervals_hold_the_ends_of_groups_that_it_has_not_seen(two_doses: bool) -> None:
    held = []
    for seed in range(40):
        some = pairs(seed, shared=0.05)
        calibration = fit([p for p in some if p.group != "0"], two_doses=two_doses)
        assert calibration is not None
        expected = [(calibration.expected(p.own, p.at_multiple), p.end) for p in some if p.group == "0"]
        held += [e.low <= end <= e.high for e, end in expected]
    assert 0.93 <= np.mean(held) <= 0.995


def test_the_interval_lies_where_ends_were_and_grows_with_what_is_expected() -> None:
    calibration = fit([Pair(str(g), x, math.nan, x + 0.1) for g in range(8) for x in (-0.1, 0.0, 0.1)], two_doses=False)
    assert calibration is not None
    middle = calibration.expected(0.0)
    assert middle.low > 0.0 and middle.low < 0.1 < middle.high
    wide = calibration.expected(1.0)
    assert wide.high - wide.low > middle.high - middle.low


def test_groups_count_alike_whatever_their_size() -> None:
    few = [Pair(str(g), x, 0.0, 2 * x) for g in range(4) for x in (0.1, 0.2)]
    many = [Pair("many", x, 0.0, 0.0) for x in (0.1, 0.2)]
    once, often = (fit([*few, *many * n], two_doses=True) for n in (1, 50))
    assert once is not None and often is not None
    assert often.own == pytest.approx(once.own)


def test_too_few_groups_say_nothing() -> None:
    some = [p for p in pairs(0) if int(p.group) < FEWEST_GROUPS]
    assert fit(some, two_doses=True) is not None
    assert fit([p for p in some if p.group != "0"], two_doses=True) is None
    assert fit([p._replace(at_multiple=math.nan) for p in some], two_doses=True) is None
    assert fit([p._replace(end=math.nan) for p in some], two_doses=False) is None


def test_what_is_shipped_can_be_fitted() -> None:
    shipped = json.loads((files("sts_callback") / "runs" / "rehearsed.json").read_text(encoding="utf-8"))
    assert tuple(shipped["columns"]) == Pair._fields
    some = [Pair(group, *(math.nan if v is None else v for v in values)) for group, *values in shipped["pairs"]]
    one, two = (fit(some, two_doses=two_doses) for two_doses in (False, True))
    assert one is not None and two is not None
    assert one.n_groups == two.n_groups == 8
    assert two.own > 0 and two.at_multiple > 0
