"""How sure a number is: answers found by hand, textbook formulas, and what intervals and p-values promise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import stats

from sts_callback.metrics.statistics import (
    LEVEL,
    detectable_rise,
    fewest_for_t,
    holm,
    interval,
    p_above,
    queries_for_rise,
    rank_ranges,
    resampled_ratios,
)

ALONE = torch.arange


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerators and denominators of queries of unlike length."""
    rng = np.random.default_rng(seed)
    below = rng.uniform(10, 50, n)
    return torch.from_numpy(below * rng.normal(0.5, 0.2, n)), torch.from_numpy(below)


def test_of_two_groups_each_resample_is_the_ratio_of_one() -> None:
    resamples = resampled_ratios(tensor(1, 2, 6, 3), tensor(4, 4, 10, 10), torch.tensor([0, 1, 0, 1]), n_resamples=4000)
    values, counts = resamples.unique(return_counts=True)
    assert values.tolist() == pytest.approx([5 / 14, 7 / 14])
    assert counts[0] / 4000 == pytest.approx(0.5, abs=0.03)


def test_of_three_queries_each_resample_takes_two() -> None:
    """1, 2 and 6 with denominators 1: pairs 11, 12, 16, 22, 26, 66."""
    resamples = resampled_ratios(tensor(1, 2, 6), torch.ones(3), ALONE(3), n_resamples=9000)
    values, counts = resamples.unique(return_counts=True)
    assert values.tolist() == [1, 1.5, 2, 3.5, 4, 6]
    assert (counts / 1000).tolist() == pytest.approx([1, 2, 1, 2, 2, 1], abs=0.15)  # of 9 equally likely draws


def test_a_ratio_that_is_the_same_in_all_queries_does_not_vary() -> None:
    below = drawn(12)[1]
    assert resampled_ratios(below / 4, below, ALONE(12)).tolist() == pytest.approx([0.25] * 2000)


def test_its_spread_is_the_standard_error_of_a_mean_when_denominators_are_alike() -> None:
    values = drawn(9)[0]
    resamples = resampled_ratios(values, torch.ones(9), ALONE(9), n_resamples=40_000)
    assert float(resamples.std()) == pytest.approx(stats.sem(values.numpy()), rel=0.02)
    assert float(resamples.mean()) == pytest.approx(float(values.mean()), rel=0.01)


def test_its_spread_is_the_linearised_and_the_jackknife_standard_error_of_a_ratio() -> None:
    n = 60
    above, below = drawn(n)
    found = float(resampled_ratios(above, below, ALONE(n), n_resamples=40_000).std())
    ratio = above.sum() / below.sum()
    linearised = math.sqrt(n / (n - 1) * float((above - ratio * below).square().sum())) / float(below.sum())
    left_out = (above.sum() - above) / (below.sum() - below)
    jackknife = math.sqrt((n - 1) / n * float((left_out - left_out.mean()).square().sum()))
    assert found == pytest.approx(linearised, rel=0.03)
    assert found == pytest.approx(jackknife, rel=0.03)


def test_queries_of_a_group_are_taken_together() -> None:
    above, below = drawn(12)
    group = ALONE(12) % 4
    sums = [torch.stack([x[group == g].sum() for g in range(4)]) for x in (above, below)]
    assert torch.allclose(resampled_ratios(above, below, group), resampled_ratios(*sums, ALONE(4)), rtol=1e-12)


def test_with_one_seed_domains_are_resampled_alike_and_with_another_otherwise() -> None:
    above, below = drawn(12)
    first = resampled_ratios(above, below, ALONE(12))
    assert torch.allclose(resampled_ratios(3 * above, below, ALONE(12)), 3 * first, rtol=1e-12)
    assert not torch.allclose(resampled_ratios(above, below, ALONE(12), seed=1), first)


def test_integer_and_half_precision_sums_are_taken_as_they_are() -> None:
    found = resampled_ratios(torch.tensor([1, 3]), torch.tensor([2, 2]), ALONE(2))
    assert found.dtype == torch.float64
    assert set(found.tolist()) == {0.5, 1.5}
    assert set(resampled_ratios(tensor(1, 3).half(), tensor(2, 2).half(), ALONE(2)).tolist()) == {0.5, 1.5}


def test_of_one_group_nothing_can_be_resampled() -> None:
    resamples = resampled_ratios(tensor(1, 2), tensor(1, 1), torch.zeros(2, dtype=torch.int64))
    assert resamples.shape == (2000,)
    assert resamples.isnan().all()
    assert all(math.isnan(end) for end in interval(1.5, resamples, 1))


def test_an_interval_reaches_as_far_as_student_says() -> None:
    """Of -1, 0 and 1 the standard deviation is 1; Student's quantile for 9 degrees of freedom stands in every table: 2.262."""
    low, high = interval(5.0, tensor(-1, 0, 1), 10)
    assert (low, high) == (pytest.approx(5 - 2.262, abs=5e-4), pytest.approx(5 + 2.262, abs=5e-4))


@pytest.mark.parametrize(("n_groups", "quantile"), [(2, 12.706), (4, 3.182), (8, 2.365), (32, 2.040)])
def test_few_groups_make_it_wider(n_groups: int, quantile: float) -> None:
    low, high = interval(0.0, tensor(-1, 0, 1), n_groups)
    assert high == pytest.approx(quantile, abs=5e-4)
    assert low == -high


def test_it_is_the_t_interval_of_scipy_for_a_mean() -> None:
    values = drawn(10)[0]
    found = interval(float(values.mean()), resampled_ratios(values, torch.ones(10), ALONE(10), n_resamples=40_000), 10)
    scipys = stats.ttest_1samp(values.numpy(), 0).confidence_interval(LEVEL)
    assert found == (pytest.approx(scipys.low, rel=0.03), pytest.approx(scipys.high, rel=0.03))


class Design(NamedTuple):
    n_queries: int
    n_draws: int
    query_effect: float
    draw_effect: float


LENGTHS = np.arange(20, 61)  # tokens; their mean is 40, their variance 140
TRUE_SHARE = 0.2 + 0.004 * 140 / 40  # the share rises with length, so that a ratio of sums is not a mean of ratios


def covered(design: Design, *, by_draws: bool, n_experiments: int = 500) -> float:
    """Share of experiments whose interval holds the true share of tokens."""
    rng, hits = np.random.default_rng(0), 0
    draw = np.arange(design.n_queries) % design.n_draws
    group = torch.from_numpy(draw if by_draws else np.arange(design.n_queries))
    for seed in range(n_experiments):
        lengths = rng.choice(LENGTHS, design.n_queries)
        shares = 0.2 + 0.004 * (lengths - 40) + rng.normal(0, design.query_effect, design.n_queries)
        shares += rng.normal(0, design.draw_effect, design.n_draws)[draw]
        above, below = torch.from_numpy(shares * lengths), torch.from_numpy(lengths)
        value = float(above.sum() / below.sum())
        resamples = resampled_ratios(above, below, group, n_resamples=300, seed=seed)
        low, high = interval(value, resamples, int(group.max()) + 1)
        hits += low < TRUE_SHARE < high
    return hits / n_experiments


@pytest.mark.parametrize("sizes", [(32, 8), (8, 4), (32, 32), (8, 8)], ids=str)
@pytest.mark.parametrize("effects", [(0.1, 0.0), (0.1, 0.1), (0.02, 0.1)], ids=str)
def test_intervals_hold_the_truth_as_often_as_they_promise(sizes: tuple[int, int], effects: tuple[float, float]) -> None:
    assert 0.90 <= covered(Design(*sizes, *effects), by_draws=True) <= 0.98


def test_intervals_over_queries_hold_it_too_where_draws_do_not_matter() -> None:
    assert 0.90 <= covered(Design(32, 8, 0.1, 0.0), by_draws=False) <= 0.98


def test_intervals_that_forget_the_draws_do_not_which_is_why_groups_are_resampled() -> None:
    assert covered(Design(32, 8, 0.1, 0.1), by_draws=False) < 0.85


def above(changes: Sequence[float], threshold: float = 0.0) -> float:
    """Of answers of one token each."""
    return p_above(changes, [1] * len(changes), threshold)


@pytest.mark.parametrize(
    ("changes", "threshold", "t"),
    # Mean over its standard error by hand; Student's tail with 1 and 2 degrees of freedom has a formula.
    [
        ((1, 3), 0.0, 2.0),
        ((1, 3), 2.0, 0.0),
        ((1, 3), 3.0, -1.0),
        ((-1, -3), 0.0, -2.0),
        ((1, 2, 3), 0.0, 12**0.5),
        ((1, 2, 3), 2.0, 0.0),
    ],
)
def test_p_value_by_hand(changes: tuple[float, ...], threshold: float, t: float) -> None:
    tail = 0.5 - math.atan(t) / math.pi if len(changes) == 2 else 0.5 - t / (2 * math.sqrt(2 + t * t))
    assert above(changes, threshold) == pytest.approx(tail, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_p_value_is_that_of_a_t_test_of_what_lies_above_the_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(3, 40, 30)
    changes = n_tokens * rng.normal(0.1, 0.3, 30)
    excess = changes - 0.05 * n_tokens
    t = excess.mean() / (excess.std(ddof=1) / math.sqrt(30))
    assert p_above(changes.tolist(), n_tokens.tolist(), 0.05) == pytest.approx(float(stats.t.sf(t, 29)), abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "n_tokens", "threshold", "p"),
    [
        ((0, 0, 0, 0), (5, 5, 5, 5), 0.0, 1.0),  # unchanged weights are no rise
        ((0, 0, 0, 0), (5, 5, 5, 5), 0.05, 1.0),
        ((0.1,) * 7, (1,) * 7, 0.05, 0.0),
        ((0.05,) * 7, (1,) * 7, 0.05, 1.0),  # at the threshold is not above it
        ((0.1 * 3, 0.1 * 3, 0.3), (3, 3, 3), 0.1, 1.0),  # alike but for rounding
        ((0.7 + 1e-16, 0.7), (1, 1), 0.1, 0.0),
        ((-0.1,) * 7, (1,) * 7, 0.05, 1.0),
        ((0.5, 0.5), (1, 1), 0.05, 0.0),
    ],
)
def test_without_spread_all_are_above_or_none(
    changes: tuple[float, ...], n_tokens: tuple[int, ...], threshold: float, p: float
) -> None:
    assert p_above(changes, n_tokens, threshold) == p


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("spread", [0.0, 1e-17, 1e-16, 1e-15, 1e-14, 1e-12, 1e-6])
def test_hardly_any_spread_gives_neither_warnings_nor_nothing(spread: float, scale: float) -> None:
    changes = [scale * (1 + spread * i) for i in range(8)]
    assert above(changes, 0.5 * scale) == pytest.approx(0, abs=1e-9)
    assert above(changes, 2.0 * scale) == pytest.approx(1, abs=1e-9)


def test_a_change_of_many_tokens_counts_by_its_tokens() -> None:
    """All queries have changed by the threshold a token, whatever their length: as often above as below."""
    n_tokens = np.array([1, 2, 5, 40])
    assert p_above(
        (n_tokens * (0.1 + np.array([0.01, -0.005, 0.004, -0.0005]))).tolist(), n_tokens.tolist(), 0.1
    ) == pytest.approx(0.5)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.05), (0.05, 0.1), (0.1, 0.4)])
def test_a_higher_threshold_is_harder_to_be_above(low: float, high: float) -> None:
    changes = np.random.default_rng(0).normal(0.2, 1, 12)
    assert above(changes.tolist(), low) < above(changes.tolist(), high)


def test_one_sided_a_fall_is_no_rise() -> None:
    values = np.random.default_rng(0).normal(1, 1, 12)
    assert above(values.tolist()) < 0.01
    assert above((-values).tolist()) == pytest.approx(1 - above(values.tolist()))


@pytest.mark.parametrize("changes", [(1.0, math.nan), (1.0, math.inf), (1.0,), ()])
def test_without_two_known_changes_there_is_no_p_value(changes: tuple[float, ...]) -> None:
    assert math.isnan(above(changes))


@pytest.mark.parametrize("level", [0.005, 0.05, 0.25])
def test_false_alarms_are_as_rare_as_promised(level: float) -> None:
    rng = np.random.default_rng(0)
    found = np.mean([above(row, 0.05) <= level for row in rng.normal(0.05, 1, (2000, 9)).tolist()])
    assert found == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / 2000))


def test_false_alarms_are_rarer_with_heavy_tails() -> None:
    rng = np.random.default_rng(0)
    alarms = [above((rng.standard_t(2, 9) * rng.uniform(0.1, 5, 9)).tolist()) <= 0.05 for _ in range(600)]
    assert 0.02 < np.mean(alarms) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 600)


def test_a_real_rise_is_found() -> None:
    rng = np.random.default_rng(0)
    found = [above(rng.normal(1.5, 1, 9).tolist()) <= 0.01 for _ in range(100)]
    assert np.mean(found) > 0.9


@pytest.mark.parametrize("level", [0.25, 0.05, 0.005, 2.5e-4, 1e-6])
def test_the_fewest_queries_ask_for_twice_what_is_asked_where_the_spread_is_known(level: float) -> None:
    fewest = fewest_for_t(level)
    asked = {n: stats.t.isf(level, n - 1) / stats.norm.isf(level) for n in (fewest, fewest - 1) if n > 1}
    assert asked[fewest] <= 2 < asked.get(fewest - 1, math.inf)


def test_detectable_rise_by_the_table_of_student() -> None:
    """With 32 degrees of freedom the quantiles of 0.99 and 0.8 are 2.449 and 0.853."""
    assert detectable_rise(0.5, 33, 0.01) == pytest.approx(0.5 * (2.449 + 0.853), abs=1e-3)


@pytest.mark.parametrize("power", [0.5, 0.8, 0.9])
@pytest.mark.parametrize(("n_queries", "alpha"), [(8, 0.05), (32, 0.01), (32, 0.002)])
def test_a_rise_of_that_size_is_found_as_often_as_promised(n_queries: int, alpha: float, power: float) -> None:
    """Against the exact power of the t-test, by the noncentral t distribution."""
    rise = detectable_rise(1.0, n_queries, alpha, power)
    exact = stats.nct.sf(stats.t.isf(alpha, n_queries - 1), n_queries - 1, rise)
    assert exact == pytest.approx(power, abs=0.05)


def test_nothing_is_detectable_with_one_query() -> None:
    assert math.isnan(detectable_rise(0.1, 1, 0.01))


@pytest.mark.parametrize("rise", [0.02, 0.1, 1.0])
def test_the_fewest_queries_for_a_rise_detect_it_and_one_less_does_not(rise: float) -> None:
    n = queries_for_rise(rise, 0.05, 32, 0.003)
    errors = [0.05 * math.sqrt(32 / some) for some in (n, n - 1)]
    assert detectable_rise(errors[0], n, 0.003) <= rise < detectable_rise(errors[1], n - 1, 0.003)


def test_without_scatter_two_queries_detect_any_rise() -> None:
    assert queries_for_rise(0.1, 0.0, 32, 0.003) == 2


def test_clear_ranks_are_certain() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.01, (3, 2000)))
    found = rank_ranges({name: noise[i] + middle for i, (name, middle) in enumerate([("a", 0.2), ("b", 0.6), ("c", 0.4)])})
    assert found == {"a": (3, 3), "b": (1, 1), "c": (2, 2)}


def test_domains_that_cannot_be_told_apart_share_their_ranks() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (3, 2000)))
    found = rank_ranges({"a": noise[0], "b": noise[1], "c": noise[2] - 5})
    assert found == {"a": (1, 2), "b": (1, 2), "c": (3, 3)}


def test_ties_take_the_best_of_their_ranks() -> None:
    one = torch.from_numpy(np.random.default_rng(0).normal(size=2000))
    assert rank_ranges({"a": one, "b": one.clone(), "c": one - 1}) == {"a": (1, 1), "b": (1, 1), "c": (3, 3)}


def test_what_moves_together_is_compared_pair_by_pair() -> None:
    shared = torch.from_numpy(np.random.default_rng(0).normal(size=2000))  # far larger than the difference
    assert rank_ranges({"a": shared, "b": shared + 0.001}) == {"a": (2, 2), "b": (1, 1)}


@pytest.mark.parametrize(("n_above", "expected"), [(40, (2, 2)), (100, (1, 2))])  # 2 % and 5 % of 2000 resamples
def test_a_rank_counts_from_a_fortieth_of_the_resamples_on(n_above: int, expected: tuple[int, int]) -> None:
    other = torch.zeros(2000)
    one = torch.where(torch.arange(2000) < n_above, 1.0, -1.0)
    assert rank_ranges({"one": one, "other": other})["one"] == expected


def test_a_single_domain_is_the_first() -> None:
    assert rank_ranges({"a": torch.randn(50)}) == {"a": (1, 1)}


def test_a_domain_without_a_score_ranks_last_and_moves_no_other() -> None:
    found = rank_ranges({"a": torch.full((50,), 0.2), "none": torch.full((50,), math.nan), "b": torch.full((50,), 0.4)})
    assert found == {"a": (2, 2), "none": (3, 3), "b": (1, 1)}


def test_holm_by_hand() -> None:
    """Of 0.01, 0.04, 0.03, 0.005 in order: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not fall below 0.06."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06), "d": pytest.approx(0.02)}
    assert list(found) == ["a", "b", "c", "d"]


def test_holm_of_one_of_none_and_of_unknown_ones() -> None:
    assert holm({"a": 0.02}) == {"a": 0.02}
    assert holm({}) == {}
    found = holm({"a": 0.4, "b": math.nan, "c": 0.9, "d": 0.01})
    assert math.isnan(found.pop("b"))
    assert found == {"a": pytest.approx(0.8), "c": pytest.approx(0.9), "d": pytest.approx(0.03)}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


@pytest.mark.slow  # the import takes seconds
def test_holm_equals_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for seed in range(20):
        p_values = np.random.default_rng(seed).uniform(0, 1, 7) ** 3
        found = list(holm({str(i): p for i, p in enumerate(p_values)}).values())
        assert found == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist(), abs=1e-12)
