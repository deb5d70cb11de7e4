"""What past runs teach: correlations, fits and intervals against known answers, and how often the intervals hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from past import forecast_of, lawful_runs, run
from sts_callback.runs.ledger import LEVEL, Entry, Expectations
from sts_callback.runs.track_record import expectations, track_records

NAN = float("nan")
NEW = {"law": (0.4, 0.02, 0.03), "code": (0.7, 0.04, -0.01)}


def simulated(rng: np.random.Generator, n: int, *, slope: float, n_domains: int = 6) -> list[Entry]:
    """Runs of which each has a level of its own, as other learning rates would give it, and domains with noise."""
    runs = []
    for i in range(n):
        level, domains = rng.normal(scale=0.5), {}
        for j in range(n_domains):
            transfer, shift, change = rng.uniform(0.1, 0.9), math.exp(rng.normal(-3)), rng.normal(scale=0.1)
            drift = math.exp(-2 + slope * transfer + level + rng.normal(scale=0.3))
            worse = slope * change + 0.1 * (level + rng.normal())
            domains[f"domain{j}"] = transfer, shift, change, drift, worse
        runs.append(run(domains, data=f"data{i}"))
    return runs


def of_run(expected: Expectations | None, entry: Entry) -> dict[str, float]:
    """The share of a run's outcomes that lie in the intervals."""
    assert expected is not None
    shares = {}
    for question in ("relative_drift", "nll_change"):
        inside = [
            interval.low <= getattr(entry.domains[name], question).value <= interval.high
            for name, interval in getattr(expected, question).items()
        ]
        shares[question] = float(np.mean(inside))
    return shares


def forecast_before(entry: Entry) -> Any:
    return forecast_of({n: (d.transfer, d.relative_shift, d.context_nll_change) for n, d in entry.domains.items()}, "new data")


def test_without_runs_nothing_is_told() -> None:
    assert track_records(()) == ()
    assert expectations((), forecast_of(NEW)) is None


def test_the_order_of_domains_is_told_for_movement_and_harm_apart() -> None:
    domains = {  # movement in the order forecast, harm in the opposite one
        "a": (0.1, 0.1, 0.3, 0.2, 0.1),
        "b": (0.2, 0.1, 0.2, 0.3, 0.2),
        "c": (0.3, 0.1, 0.1, 0.5, 0.3),
    }
    other = {**domains, "b": (0.2, 0.1, 0.2, 0.6, 0.4)}  # ranks 1, 3, 2 and 1, 3, 2 the other way round: half
    (record,) = track_records([run(domains, "one"), run(other, "two")])
    assert record.movement.spearman.value == pytest.approx((1 + 0.5) / 2)
    assert record.harm.spearman.value == pytest.approx((-1 - 0.5) / 2)
    assert math.isnan(record.movement.spearman.low)
    assert (record.n_runs, record.n_training_sets, record.movement.n_rows, record.movement.n_training_sets) == (2, 2, 6, 2)
    assert not record.movement.is_known and math.isnan(record.harm.coverage)


def test_the_interval_of_the_correlation_is_that_of_a_mean() -> None:
    base = {name: (0.1 * i, 0.1, 0.1 * i, 0.1 * i, 0.1 * i) for i, name in enumerate("abc", 1)}
    swapped = {**base, "b": (0.2, 0.1, 0.2, 0.3, 0.3), "c": (0.3, 0.1, 0.3, 0.2, 0.2)}
    runs = [run(base if i % 2 else swapped, f"data{i}") for i in range(8)]
    (record,) = track_records(runs)
    values = np.array([1, 0.5] * 4)
    reach = 2.365 * values.std(ddof=1) / math.sqrt(8)
    assert record.movement.spearman.value == pytest.approx(0.75)
    assert record.movement.spearman.low == pytest.approx(0.75 - reach, abs=0.02)
    assert record.movement.spearman.high == pytest.approx(0.75 + reach, abs=0.02)


@pytest.mark.parametrize("n_domains", [1, 2])
def test_an_order_takes_three_domains(n_domains: int) -> None:
    (record,) = track_records(lawful_runs(6, n_domains))
    assert math.isnan(record.movement.spearman.value)


def test_domains_all_alike_have_no_order() -> None:
    (record,) = track_records([run({name: (0.5, 0.1, 0.1, 0.2, 0.1) for name in "abc"}, f"data{i}") for i in range(6)])
    assert math.isnan(record.movement.spearman.value)
    assert not record.movement.is_fit_better


def test_a_law_without_noise_is_found_and_told_to_be_better_than_the_mean() -> None:
    expected = expectations(lawful_runs(6), forecast_of(NEW))
    assert expected is not None
    for name, (transfer, shift, change) in NEW.items():
        drift, harm = expected.relative_drift[name], expected.nll_change[name]
        for end in (drift.value, drift.low, drift.high):
            assert end == pytest.approx(2 * math.exp(transfer) * shift**0.5)
        for end in (harm.value, harm.low, harm.high):
            assert end == pytest.approx(0.05 + 2 * change)
    for skill in (expected.past.movement, expected.past.harm):
        assert skill.is_fit_better
        assert skill.error == pytest.approx(0, abs=1e-9)
        assert skill.error_of_mean > 0.01


def test_where_the_forecast_says_nothing_the_mean_is_expected() -> None:
    outcomes = [0.1, 0.2, 0.4, 0.8, 0.1, 0.4]
    runs = [
        run(
            {name: (transfer, 0.1, change, outcome, outcome) for name, transfer, change in (("a", 0.2, 0.1), ("b", 0.8, 0.3))},
            f"{i}",
        )
        for i, outcome in enumerate(outcomes)
    ]
    expected = expectations(runs, forecast_of(NEW))
    assert expected is not None
    assert not expected.past.movement.is_fit_better and not expected.past.harm.is_fit_better
    for name in NEW:
        assert expected.relative_drift[name].value == pytest.approx(math.exp(np.mean(np.log(outcomes))))
        assert expected.nll_change[name].value == pytest.approx(np.mean(outcomes))
    without = [np.mean(outcomes[:i] + outcomes[i + 1 :]) for i in range(6)]
    off = np.subtract(outcomes, without)
    assert expected.past.harm.error_of_mean == pytest.approx(math.sqrt(np.mean(off**2)))
    # Jackknife+ by hand: six sets of the weight 1/7 each, so that 80 % takes all six.
    ends = [(mean - abs(rest), mean + abs(rest)) for mean, rest in zip(without, off, strict=True)]
    assert expected.nll_change["law"].low == pytest.approx(min(low for low, _ in ends))
    assert expected.nll_change["law"].high == pytest.approx(max(high for _, high in ends))


def test_the_interval_is_jackknife_plus_over_training_sets() -> None:
    """Against the definition, written out with loops."""
    runs = simulated(np.random.default_rng(3), 9, slope=3)
    runs = [*runs[:-1], dataclasses.replace(runs[-1], domains=dict(list(runs[-1].domains.items())[:2]))]  # a smaller one
    expected = expectations(runs, forecast_of(NEW))
    assert expected is not None and expected.past.harm.is_fit_better
    points = [[(d.context_nll_change, d.nll_change.value) for d in entry.domains.values()] for entry in runs]
    for name, (_, _, new) in NEW.items():
        lows, highs = [], []
        for i, own in enumerate(points):
            slope, intercept = np.polyfit(*np.array([p for j, some in enumerate(points) if j != i for p in some]).T, 1)
            for x, y in own:
                residual, weight = abs(y - slope * x - intercept), 1 / len(own) / (len(points) + 1)
                lows.append((slope * new + intercept - residual, weight))
                highs.append((slope * new + intercept + residual, weight))
        found = expected.nll_change[name]
        for end, ordered in ((found.high, sorted(highs)), (found.low, sorted(lows, reverse=True))):
            total = np.cumsum([weight for _, weight in ordered])
            assert end == pytest.approx(ordered[int(np.argmax(total >= LEVEL - 1e-9))][0])


@pytest.mark.parametrize(("n", "is_enough"), [(4, False), (5, True)])
def test_five_training_sets_are_enough(n: int, is_enough: bool) -> None:
    expected = expectations(lawful_runs(n), forecast_of(NEW))
    assert (expected is not None) == is_enough
    if expected is not None:
        ends = [e for some in (expected.relative_drift, expected.nll_change) for e in some.values()]
        assert all(math.isfinite(x) for e in ends for x in (e.low, e.high))
        assert math.isfinite(expected.past.harm.coverage)


def test_many_runs_on_the_same_data_are_one_training_set() -> None:
    one = lawful_runs(1)[0]
    sweep = [dataclasses.replace(one, forecast=f"{i}") for i in range(9)]
    assert expectations(sweep, forecast_of(NEW)) is None
    (record,) = track_records(sweep)
    assert (record.n_runs, record.n_training_sets) == (9, 1)
    runs = simulated(np.random.default_rng(0), 6, slope=1)
    (record,), (swept,) = track_records(runs), track_records([*runs, *(dataclasses.replace(runs[0], forecast=x) for x in "abc")])
    assert swept.movement.spearman.value == pytest.approx(record.movement.spearman.value)


@pytest.mark.parametrize("other", [{"model": "x"}, {"model_name": "x"}, {"sae": "x"}, {"hook_name": "x"}])
def test_other_models_saes_and_hooks_are_never_mixed_in(other: dict[str, str]) -> None:
    own, foreign = lawful_runs(6), simulated(np.random.default_rng(0), 6, slope=-5)
    foreign = [dataclasses.replace(e, identity=dataclasses.replace(e.identity, **other)) for e in foreign]
    mixed = [entry for pair in zip(own, foreign, strict=True) for entry in pair]
    assert expectations(mixed, forecast_of(NEW)) == expectations(own, forecast_of(NEW))
    assert expectations(own, forecast_of(NEW, **other)) is None
    assert track_records(mixed) == (*track_records(own), *track_records(foreign))


def test_another_name_of_the_same_sae_is_no_other_group() -> None:
    assert len(track_records([*lawful_runs(2), *lawful_runs(2, sae_name="a copy")])) == 1


def test_what_did_not_move_or_was_not_measured_is_left_out() -> None:
    runs = lawful_runs(6)
    still = run({name: (0.5, 0.1, 0.1, 0.0, NAN) for name in "abc"}, "still")
    assert expectations([*runs, still], forecast_of(NEW)) is not None
    (with_still,), (without,) = track_records([*runs, still]), track_records(runs)
    assert (with_still.movement, with_still.harm) == (without.movement, without.harm)
    assert with_still.n_runs == 7


def test_a_model_without_a_head_has_expectations_of_movement_only() -> None:
    runs = lawful_runs(6)
    headless = [
        dataclasses.replace(entry, domains={n: dataclasses.replace(d, context_nll_change=NAN) for n, d in entry.domains.items()})
        for entry in runs
    ]
    expected = expectations(headless, forecast_of({"law": (0.4, 0.02, NAN)}))
    assert expected is not None
    assert set(expected.relative_drift) == {"law"}
    assert expected.nll_change == {}
    assert not expected.past.harm.is_known


def test_a_number_that_is_missing_in_the_forecast_is_missing_in_what_is_expected() -> None:
    expected = expectations(lawful_runs(6), forecast_of({"law": (NAN, 0.02, 0.1), "code": (0.5, 0.02, 0.1)}))
    assert expected is not None
    assert math.isnan(expected.relative_drift["law"].value)
    assert math.isfinite(expected.relative_drift["code"].value)


def test_a_transfer_far_beyond_its_anchors_does_not_run_away() -> None:
    near, far = (expectations(lawful_runs(6), forecast_of({"law": (transfer, 0.02, 0.1)})) for transfer in (1.0, 120.0))
    assert near is not None and far is not None
    assert near.relative_drift == far.relative_drift


@pytest.mark.parametrize(("n", "n_times", "most"), [(5, 60, 0.98), (12, 30, 0.95)])
def test_the_interval_holds_about_as_often_as_it_says_and_more_with_few_runs(n: int, n_times: int, most: float) -> None:
    rng = np.random.default_rng(n)
    shares: dict[str, list[float]] = {"relative_drift": [], "nll_change": []}
    told: dict[str, list[float]] = {"relative_drift": [], "nll_change": []}
    for _ in range(n_times):
        *past, new = simulated(rng, n + 1, slope=2)
        expected = expectations(past, forecast_before(new))
        assert expected is not None
        for question, share in of_run(expected, new).items():
            shares[question].append(share)
        told["relative_drift"].append(expected.past.movement.coverage)
        told["nll_change"].append(expected.past.harm.coverage)
    for question in shares:
        assert 0.75 <= np.mean(shares[question]) <= most
        assert np.mean(told[question]) == pytest.approx(np.mean(shares[question]), abs=0.1)


def test_the_level_is_what_five_training_sets_can_give() -> None:
    """And so can the four that are left when one is taken out, with what was never seen for a fifth; three cannot."""
    assert 3 / 4 < LEVEL <= 4 / 5
