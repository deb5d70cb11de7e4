"""From sums per query to records: every number computed once more in NumPy, and cases whose answer is known beforehand."""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

import samples
from sts_callback.data.probes import ProbeSet, Query
from sts_callback.measure import scoring
from sts_callback.measure.accumulators import ZERO_SHOT, DriftStats, ProbeStats, Shift
from sts_callback.measure.scoring import DOMAIN_ICL, FILLER, TRAIN_ICL, ForecastScorer, rank_agreement
from sts_callback.measure.step_zero import StepZeroStats
from sts_callback.metrics.scores import matched_sets
from sts_callback.metrics.sums import SKETCH_WIDTH, SparseActs
from sts_callback.records import DomainForecast, Estimate

N_QUERIES, N_DRAWS, D_SAE, D_IN, N_FEATURES = 24, 8, 60, 5, 6
NAN = float("nan")
Array = NDArray[np.float64]


def probes(name: str = "law", n_queries: int = N_QUERIES, n_draws: int = N_DRAWS) -> ProbeSet:
    """Query i has an answer of 2 + i % 3 tokens and 5 + i % 4 bytes."""
    queries = tuple(Query((5, 6, 7), (8,) * (2 + i % 3), (True,) * 3, answer_bytes=5 + i % 4) for i in range(n_queries))
    return ProbeSet(name, queries, ((9, 9),) * n_draws, n_cut=3)


def shift(rng: np.random.Generator, tokens: Array, by_feature: Array | None = None) -> Shift:
    """Squared differences in proportion to a query's tokens, and to a weight of each feature if given."""
    weight = np.ones(D_SAE) if by_feature is None else by_feature
    features = rng.uniform(0.5, 1.5, (len(tokens), D_SAE)) * weight * tokens[:, None]
    raw = rng.uniform(1, 2, len(tokens)) * tokens
    return Shift(*(torch.from_numpy(x).float() for x in (features, raw, raw * rng.uniform(0.1, 0.5, len(tokens)))))


def reading(seed: int = 0, by_feature: Array | None = None, **changes: Any) -> ProbeStats:
    """Random sums; feature j is j + 1 times as active as the first; plain prose shifts all features alike."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(8, 20, N_QUERIES).astype(np.float64)
    sums = {
        "activity": rng.uniform(0.5, 1.5, (N_QUERIES, D_SAE)) * np.arange(1, D_SAE + 1) * tokens[:, None],
        "sq_norm": rng.uniform(20, 30, N_QUERIES) * tokens,
        "raw": rng.normal(0.5, 1, (N_QUERIES, D_IN)) * tokens[:, None],
        "raw_sq_norm": rng.uniform(50, 60, N_QUERIES) * tokens,
    }
    n_answer = np.array([2 + i % 3 for i in range(N_QUERIES)])
    fields: dict[str, Any] = {
        **{name: torch.from_numpy(values).float() for name, values in sums.items()},
        "n_tokens": torch.from_numpy(tokens).long(),
        "n_masked": 7,
        "n_not_finite": 0,
        "shifts": {name: shift(rng, tokens, None if name == FILLER else by_feature) for name in (DOMAIN_ICL, TRAIN_ICL, FILLER)},
        "n_answer": torch.from_numpy(n_answer),
        "gradients": None,
        "nll": {name: torch.from_numpy(rng.uniform(1, 3, N_QUERIES) * n_answer) for name in (ZERO_SHOT, TRAIN_ICL, FILLER)},
        "right": {
            name: right_tokens(rng, n_answer, share) for name, share in ((ZERO_SHOT, 0.5), (TRAIN_ICL, 0.7), (FILLER, 0.4))
        },
        "counted": torch.ones(int(tokens.sum()), dtype=torch.bool),
        "acts": SparseActs.of(torch.ones(3, D_SAE)),
        "sketches": torch.zeros(3, 2, SKETCH_WIDTH),
    }
    return ProbeStats(**(fields | changes))


def right_tokens(rng: np.random.Generator, n_answer: NDArray[np.int64], share: float) -> torch.Tensor:
    """About this share of the tokens of each answer, and none behind its end."""
    return torch.from_numpy((rng.uniform(size=(N_QUERIES, 4)) < share) & (np.arange(4) < n_answer[:, None]))


def concentrated(where: range = range(20, 20 + N_FEATURES), times: float = 30.0) -> Array:
    """Some features shift far more than the rest."""
    weights = np.ones(D_SAE)
    weights[where.start : where.stop] = times
    return weights


def gradients(seed: int = 0) -> torch.Tensor:
    """Of each query, with a direction in common."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=D_SAE) + 0.1 * rng.normal(size=(N_QUERIES, D_SAE)))


TRAIN, LAW = reading(0, concentrated()), reading(1, concentrated(times=10.0))


def scored(
    law: ProbeStats = LAW, train: ProbeStats = TRAIN, **changes: Any
) -> tuple[ForecastScorer, DomainForecast, DomainForecast]:
    """The scorer, and the records of the training data and of one domain."""
    options: dict[str, Any] = {"train_gradients": gradients(), "gradients": gradients(), "n_features": N_FEATURES} | changes
    train, law = (
        dataclasses.replace(train, gradients=options["train_gradients"]),
        dataclasses.replace(law, gradients=options["gradients"]),
    )
    scorer = ForecastScorer(train, options["n_features"])
    return scorer, scorer.domain(probes("train"), train), scorer.domain(probes(), law)


def interval_by_formula(above: Array, below: Array, n_groups: int) -> tuple[float, float]:
    """Student's interval of a ratio by the linearised standard error, queries taken in turn by groups."""
    group = np.arange(len(above)) % n_groups
    a, b = (np.bincount(group, weights=x, minlength=n_groups) for x in (above, below))
    ratio = a.sum() / b.sum()
    error = math.sqrt(n_groups / (n_groups - 1) * ((a - ratio * b) ** 2).sum()) / b.sum()
    reach = stats.t.ppf(0.975, n_groups - 1) * error
    return ratio - reach, ratio + reach


def assert_estimate(found: Estimate, above: Array, below: Array, n_groups: int) -> None:
    assert found.value == pytest.approx(above.sum() / below.sum(), rel=1e-5)
    low, high = interval_by_formula(above, below, n_groups)
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)
    assert (found.low + found.high) / 2 == pytest.approx(found.value, rel=1e-6)


def test_shifted_features_are_those_that_shift_most_on_the_training_data() -> None:
    scorer = ForecastScorer(TRAIN, N_FEATURES)
    mean = TRAIN.shifts[TRAIN_ICL].features.double().numpy().sum(axis=0) / TRAIN.n_tokens.sum().item()
    assert scorer.mean_shift.numpy() == pytest.approx(mean, rel=1e-6)
    assert scorer.features == tuple(np.argsort(-mean)[:N_FEATURES].tolist())
    assert sorted(scorer.features) == list(range(20, 20 + N_FEATURES))


def test_every_score_is_that_of_its_equation() -> None:
    scorer, _, law = scored()
    columns, tokens = list(scorer.features), LAW.n_tokens.double().numpy()
    taught, own = (LAW.shifts[name].features.double().numpy() for name in (TRAIN_ICL, DOMAIN_ICL))
    activity = LAW.activity.double().numpy()
    assert_estimate(law.sts_act, activity[:, columns].sum(axis=1), tokens, N_QUERIES)
    assert_estimate(law.sts_icl, own[:, columns].sum(axis=1), tokens, N_DRAWS)
    assert_estimate(law.sts_rel, own[:, columns].sum(axis=1), own.sum(axis=1), N_DRAWS)
    assert_estimate(law.sts_cross, taught[:, columns].sum(axis=1), taught.sum(axis=1), N_DRAWS)
    assert_estimate(law.relative_shift, taught.sum(axis=1), LAW.sq_norm.double().numpy(), N_DRAWS)
    raw = LAW.shifts[TRAIN_ICL].raw.double().numpy()
    assert_estimate(law.raw_shift, raw, LAW.raw_sq_norm.double().numpy(), N_DRAWS)
    assert_estimate(law.raw_over_prose, raw, LAW.shifts[FILLER].raw.double().numpy(), N_DRAWS)
    assert law.sae_error_share == pytest.approx(LAW.shifts[TRAIN_ICL].sae_error.double().numpy().sum() / raw.sum(), rel=1e-6)
    neutral = LAW.shifts[FILLER].features.double().numpy()
    assert_estimate(law.sts_net, (taught - neutral)[:, columns].sum(axis=1), taught.sum(axis=1), N_DRAWS)
    one, other = (r.raw.double().numpy().sum(axis=0) for r in (LAW, TRAIN))
    assert law.cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-5)


def test_the_likelihood_is_that_of_its_equation() -> None:
    _, _, law = scored()
    n_answer = LAW.n_answer.double().numpy()
    assert_estimate(law.nll, LAW.nll[ZERO_SHOT].numpy(), n_answer, N_QUERIES)
    risen = (LAW.nll[TRAIN_ICL] - LAW.nll[FILLER]).numpy()
    assert law.nll_change.value == pytest.approx(risen.sum() / n_answer.sum(), rel=1e-6)
    low, high = interval_by_formula(risen, n_answer, N_DRAWS)
    assert law.nll_change.high - law.nll_change.low == pytest.approx(high - low, rel=0.1)


def test_counts_are_those_of_the_reading_and_the_probes() -> None:
    _, train, law = scored()
    assert (law.name, law.n_queries, law.n_masked, law.n_cut) == ("law", N_QUERIES, 7, 3)
    assert (law.n_tokens, law.n_answer_tokens) == (int(LAW.n_tokens.sum()), 3 * N_QUERIES)
    assert (train.name, train.rank, math.isnan(train.p_above_next)) == ("train", (0, 0), True)


def test_the_lower_anchor_is_the_mean_over_random_sets_of_like_activity() -> None:
    scorer, _, law = scored()
    tokens = LAW.n_tokens.double().numpy()
    sets = matched_sets(torch.from_numpy(LAW.activity.double().numpy().sum(axis=0) / tokens.sum()), scorer.features).numpy()
    for found, values, below in (
        (law.sts_act, LAW.activity, tokens.sum()),
        (law.sts_icl, LAW.shifts[DOMAIN_ICL].features, tokens.sum()),
        (law.sts_rel, LAW.shifts[DOMAIN_ICL].features, LAW.shifts[DOMAIN_ICL].features.sum().item()),
        (law.sts_cross, LAW.shifts[TRAIN_ICL].features, LAW.shifts[TRAIN_ICL].features.sum().item()),
    ):
        sums = values.double().numpy().sum(axis=0)
        assert found.random == pytest.approx(np.mean([sums[one].sum() for one in sets]) / below, rel=1e-5)


def test_net_of_plain_prose_stands_between_that_and_training_data_that_is_clear_of_it() -> None:
    _, train, law = scored()
    assert train.sts_net.low > 0
    assert (law.sts_net.random, law.sts_net.own) == (0.0, train.sts_net.value)
    assert law.transfer.value == pytest.approx(law.sts_net.value / train.sts_net.value)
    as_prose = dataclasses.replace(TRAIN, shifts={**TRAIN.shifts, FILLER: TRAIN.shifts[TRAIN_ICL]})
    _, train, law = scored(train=as_prose)
    assert train.sts_net.value == 0
    assert math.isfinite(law.sts_net.value) and math.isnan(law.transfer.value)


SCORES = ("sts_act", "sts_icl", "sts_rel", "sts_cross", "sts_net")


@pytest.mark.parametrize("name", SCORES)
def test_the_upper_anchor_is_the_training_data_which_stands_at_exactly_1(name: str) -> None:
    _, train, law = scored()
    own = getattr(train, name)
    assert own.own == own.value
    assert getattr(law, name).own == own.value
    if name != "sts_act":  # random features match in activity, so there is little between its anchors
        assert own.normalise(own.value) == 1.0


def test_training_data_without_demonstrations_of_its_own_is_scored_by_the_training_ones() -> None:
    train = dataclasses.replace(TRAIN, shifts={name: TRAIN.shifts[name] for name in (TRAIN_ICL, FILLER)})
    _, found, _ = scored(train=train)
    assert found.sts_rel.value == found.sts_cross.value
    columns = list(ForecastScorer(train, N_FEATURES).features)
    taught = TRAIN.shifts[TRAIN_ICL].features.double()
    assert found.sts_icl.value == pytest.approx(float(taught[:, columns].sum() / TRAIN.n_tokens.sum()), rel=1e-6)


def test_a_domain_that_shifts_without_regard_to_the_features_stands_about_0_and_one_like_the_training_data_about_1() -> None:
    _, _, anywhere = scored(reading(2))
    _, _, alike = scored(reading(3, concentrated()))
    _, _, elsewhere = scored(reading(4, concentrated(range(40, 40 + N_FEATURES))))
    assert anywhere.sts_cross.normalised.value == pytest.approx(0, abs=0.02)
    assert alike.sts_cross.normalised.value == pytest.approx(1, abs=0.02)
    assert elsewhere.sts_cross.normalised.value < 0.05


def test_where_nothing_shifts_scores_are_unknown() -> None:
    nothing = Shift(torch.zeros(N_QUERIES, D_SAE), torch.zeros(N_QUERIES), torch.zeros(N_QUERIES))
    _, _, law = scored(dataclasses.replace(LAW, shifts=dict.fromkeys((DOMAIN_ICL, TRAIN_ICL, FILLER), nothing)))
    assert math.isnan(law.sts_cross.value)
    assert math.isnan(law.sts_net.value)
    assert math.isnan(law.transfer.value)
    assert math.isnan(law.sae_error_share)
    assert law.relative_shift.value == law.raw_shift.value == law.sts_icl.value == 0.0


def test_where_no_token_counts_scores_are_unknown() -> None:
    none = {
        name: torch.zeros_like(getattr(LAW, name))
        for name in ("n_tokens", "activity", "sq_norm", "raw", "raw_sq_norm", "counted")
    }
    nothing = Shift(torch.zeros(N_QUERIES, D_SAE), torch.zeros(N_QUERIES), torch.zeros(N_QUERIES))
    _, _, law = scored(dataclasses.replace(LAW, **none, shifts=dict.fromkeys((DOMAIN_ICL, TRAIN_ICL, FILLER), nothing)))
    assert law.n_tokens == 0
    assert all(math.isnan(getattr(law, name).value) for name in (*SCORES, "relative_shift", "raw_shift", "raw_over_prose"))
    assert math.isfinite(law.nll_change.value)


def test_what_a_transcoder_leaves_is_unknown() -> None:
    blind = {name: dataclasses.replace(s, sae_error=torch.full((N_QUERIES,), NAN)) for name, s in LAW.shifts.items()}
    _, _, law = scored(dataclasses.replace(LAW, shifts=blind))
    assert math.isnan(law.sae_error_share)
    assert math.isfinite(law.raw_shift.value)


def test_without_a_head_likelihoods_are_unknown_and_the_rest_is_not() -> None:
    _, _, law = scored(dataclasses.replace(LAW, nll={}), gradients=None, train_gradients=None)
    for found in (law.nll, law.nll_change, law.gradient_change):
        assert all(math.isnan(x) for x in (found.value, found.low, found.high))
    assert math.isfinite(law.sts_cross.value)


def test_the_gradient_change_is_that_of_a_step_that_gains_the_training_data_one_nat_a_token() -> None:
    """With equal gradients in all training queries nothing needs correction, and a step of 1 / |g|^2 along -g gains one nat."""
    g = torch.arange(1, D_SAE + 1, dtype=torch.float64) / D_SAE
    n_answer = TRAIN.n_answer.double()
    train_gradients = g.expand(N_QUERIES, -1) * n_answer.sum() / N_QUERIES  # mean over answer tokens: g
    domain = gradients(5)
    _, first, law = scored(train_gradients=train_gradients, gradients=domain)
    assert first.gradient_change.value == pytest.approx(-1)
    by_token = domain.numpy().sum(axis=0) / float(LAW.n_answer.sum())
    step = -g.numpy() / (g.numpy() @ g.numpy())
    assert law.gradient_change.value == pytest.approx(by_token @ step)
    assert_estimate(law.gradient_change, domain.numpy() @ step, LAW.n_answer.double().numpy(), N_QUERIES)


def test_its_sign_tells_gain_from_harm() -> None:
    g = gradients()
    mean = g.mean(dim=0)
    across = gradients(6)
    across = across - (across @ mean)[:, None] * mean / mean.square().sum()
    cases = {"the same": (g, -1.0), "opposite": (-g, 1.0), "orthogonal": (across, 0.0), "twice": (2 * g, -2.0)}
    for name, (domain, expected) in cases.items():
        found = scored(gradients=domain)[2].gradient_change
        assert found.value == pytest.approx(expected, abs=0.05), name
        assert found.low <= found.value <= found.high


def test_noise_in_the_training_gradients_does_not_shrink_it() -> None:
    """The squared length of a noisy mean is too large; products of different queries alone are right on average."""
    rng, signal = np.random.default_rng(0), np.full(D_SAE, 0.1)
    lengths = []
    for _ in range(60):
        noisy = torch.from_numpy(signal + rng.normal(0, 0.3, (N_QUERIES, D_SAE)))
        scorer = ForecastScorer(dataclasses.replace(TRAIN, gradients=noisy), N_FEATURES)
        domain = dataclasses.replace(TRAIN, gradients=torch.from_numpy(np.tile(signal, (N_QUERIES, 1))))
        found = scorer.domain(probes("train"), domain)
        lengths.append(-found.gradient_change.value)
    assert np.mean(lengths) == pytest.approx(1, abs=0.1)  # were the noise left in, it would be 0.73


def test_gradients_of_which_nothing_is_in_common_tell_nothing() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(N_QUERIES // 2)
    _, _, law = scored(train_gradients=torch.ones(N_QUERIES, D_SAE) * signs[:, None])
    assert math.isnan(law.gradient_change.value)


def ranked(*domains: tuple[str, ProbeStats]) -> dict[str, DomainForecast]:
    scorer = ForecastScorer(TRAIN, N_FEATURES)
    scorer.domain(probes("train"), TRAIN)
    return scorer.ranked({name: scorer.domain(probes(name), r) for name, r in domains})


def test_domains_are_ranked_by_transfer_the_most_moved_first() -> None:
    found = ranked(
        ("low", reading(1)), ("high", reading(2, concentrated(times=20))), ("middle", reading(3, concentrated(times=5)))
    )
    assert list(found) == ["low", "high", "middle"]
    assert {name: d.rank for name, d in found.items()} == {"high": (1, 1), "middle": (2, 2), "low": (3, 3)}
    assert (found["high"].p_above_next, found["middle"].p_above_next) == (1.0, 1.0)
    assert math.isnan(found["low"].p_above_next)


def test_domains_alike_share_their_ranks() -> None:
    found = ranked(("one", reading(1)), ("other", reading(2)), ("high", reading(3, concentrated())))
    assert [found[name].rank for name in ("high", "one", "other")] == [(1, 1), (2, 3), (2, 3)]
    first = max(("one", "other"), key=lambda name: found[name].transfer.value)
    assert 0.5 <= found[first].p_above_next < 1


def test_ranking_changes_nothing_else_and_a_domain_without_a_score_comes_last() -> None:
    nothing = Shift(torch.zeros(N_QUERIES, D_SAE), torch.zeros(N_QUERIES), torch.zeros(N_QUERIES))
    silent = dataclasses.replace(LAW, shifts=dict.fromkeys((DOMAIN_ICL, TRAIN_ICL, FILLER), nothing))
    found = ranked(("low", reading(1)), ("silent", silent), ("high", reading(2, concentrated())))
    assert {name: d.rank for name, d in found.items()} == {"high": (1, 1), "low": (2, 2), "silent": (3, 3)}
    assert found["high"].p_above_next == 1.0
    assert math.isnan(found["low"].p_above_next)
    (alone,) = ranked(("high", reading(2, concentrated()))).values()
    assert dataclasses.replace(found["high"], p_above_next=NAN).to_json() == alone.to_json()


def test_an_estimate_by_hand() -> None:
    """Three queries of equal size with 1, 2 and 6: mean 3, standard deviation sqrt(7), Student's quantile 4.303."""
    found = scoring.estimate(torch.tensor([2.0, 4.0, 12.0]), torch.full((3,), 2.0), torch.arange(3))
    assert found.value == 3.0
    assert found.high - found.value == pytest.approx(4.303 * math.sqrt(7 / 3), rel=0.05)
    nothing = scoring.estimate(torch.zeros(3), torch.zeros(3), torch.arange(3))
    assert all(math.isnan(x) for x in (nothing.value, nothing.low, nothing.high))


def test_a_baseline_keeps_what_drift_needs() -> None:
    step_zero = scoring.step_zero_stats(LAW)
    tokens = LAW.n_tokens.sum().item()
    for found, sums in (
        (step_zero.mean_activity, LAW.activity),
        (step_zero.mean_own_shift, LAW.shifts[DOMAIN_ICL].features),
        (step_zero.mean_train_shift, LAW.shifts[TRAIN_ICL].features),
        (step_zero.mean_filler_shift, LAW.shifts[FILLER].features),
    ):
        assert found.numpy() == pytest.approx(sums.double().numpy().sum(axis=0) / tokens)
    for name in ("counted", "acts", "sketches", "n_tokens", "sq_norm", "raw_sq_norm"):
        assert getattr(step_zero, name) is getattr(LAW, name)
    assert torch.equal(step_zero.nll, LAW.nll[ZERO_SHOT])
    assert step_zero.right is LAW.right[ZERO_SHOT]
    headless = scoring.step_zero_stats(dataclasses.replace(LAW, nll=MappingProxyType({}), right=MappingProxyType({})))
    assert headless.nll.isnan().all()
    assert headless.right is None


def drift_reading(**changes: Any) -> DriftStats:
    rng = np.random.default_rng(7)
    fields: dict[str, Any] = {
        "n_tokens": LAW.n_tokens,
        "n_masked": 4,
        "n_not_finite": 0,
        "shift": shift(rng, LAW.n_tokens.double().numpy(), concentrated(range(30, 40))),
        "nll": LAW.nll[ZERO_SHOT] + torch.from_numpy(rng.normal(1, 1, N_QUERIES)),
        "right": right_tokens(rng, LAW.n_answer.numpy(), 0.4),
    }
    return DriftStats(**(fields | changes))


STEP_ZERO: StepZeroStats = scoring.step_zero_stats(LAW)


def test_every_number_of_a_drift_is_that_of_its_equation() -> None:
    now = drift_reading()
    realised = scoring.realised_features(now, 10)
    assert sorted(realised) == list(range(30, 40))
    law = scoring.domain_drift(probes(), now, STEP_ZERO, (30, 31, 0), realised)
    drift, columns = now.shift.features.double().numpy(), list(realised)
    assert (law.name, law.n_queries, law.n_tokens, law.n_masked) == ("law", N_QUERIES, int(LAW.n_tokens.sum()), 4)
    assert_estimate(law.relative_drift, drift.sum(axis=1), LAW.sq_norm.double().numpy(), N_QUERIES)
    assert law.raw_drift == pytest.approx(float(now.shift.raw.double().sum() / LAW.raw_sq_norm.double().sum()))
    assert law.sae_error_share == pytest.approx(float(now.shift.sae_error.double().sum() / now.shift.raw.double().sum()))
    assert law.share_on_forecast == pytest.approx(drift[:, [30, 31, 0]].sum() / drift.sum())
    assert [j for j, _ in law.top_features] == np.argsort(-drift.sum(axis=0))[:10].tolist()
    assert [share for _, share in law.top_features] == pytest.approx(np.sort(drift.sum(axis=0) / drift.sum())[::-1][:10].tolist())
    tokens = LAW.n_tokens.sum().item()
    own, taught = (LAW.shifts[name].features.double().numpy() for name in (DOMAIN_ICL, TRAIN_ICL))
    assert law.sts_act == pytest.approx(LAW.activity.double().numpy()[:, columns].sum() / tokens)
    assert law.sts_icl == pytest.approx(own[:, columns].sum() / tokens)
    assert law.sts_rel == pytest.approx(own[:, columns].sum() / own.sum())
    assert law.sts_cross == pytest.approx(taught[:, columns].sum() / taught.sum())


def test_a_change_of_likelihood_is_that_of_its_equation_and_tested_over_queries() -> None:
    now = drift_reading()
    law = scoring.domain_drift(probes(), now, STEP_ZERO, (1,), (1,))
    assert now.nll is not None
    risen, n_answer = (now.nll - LAW.nll[ZERO_SHOT]).numpy(), LAW.n_answer.double().numpy()
    assert law.nll == pytest.approx(now.nll.sum().item() / n_answer.sum())
    assert_estimate(law.nll_change, risen, n_answer, N_QUERIES)
    assert law.p_worse == pytest.approx(float(stats.ttest_1samp(risen, 0, alternative="greater").pvalue))
    better = scoring.domain_drift(probes(), drift_reading(nll=LAW.nll[ZERO_SHOT] - 1), STEP_ZERO, (1,), (1,))
    assert better.nll_change.high < 0
    assert better.p_worse == pytest.approx(1, abs=1e-3)


def test_a_change_of_likelihood_in_bits_is_by_the_bytes_of_the_answers_text() -> None:
    now = drift_reading()
    law = scoring.domain_drift(probes(), now, STEP_ZERO, (1,), (1,))
    assert now.nll is not None
    n_bytes = np.array([5.0 + i % 4 for i in range(N_QUERIES)])
    assert law.query_answer_bytes == tuple(n_bytes.astype(int).tolist())
    assert_estimate(law.bits_change, (now.nll - LAW.nll[ZERO_SHOT]).numpy() / math.log(2), n_bytes, N_QUERIES)
    assert law.harm_in("bits/byte") == law.bits_change
    taken, over = law.query_harm_in("bits/byte")
    assert sum(taken) / sum(over) == pytest.approx(law.bits_change.value)
    without = tuple(dataclasses.replace(q, answer_bytes=None if i == 7 else 5) for i, q in enumerate(probes().queries))
    unknown = scoring.domain_drift(dataclasses.replace(probes(), queries=without), now, STEP_ZERO, (1,), (1,))
    assert math.isnan(unknown.harm_in("bits/byte").value)
    assert unknown.query_harm_in("bits/byte") == ((), ())


def test_token_accuracy_by_hand() -> None:
    """Answers of 2, 3 and 4 tokens: one loses a token and gains none, one loses one for another, one gains two."""
    then = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    now = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    nothing = Shift(torch.zeros(3, D_SAE), torch.zeros(3), torch.zeros(3))
    reading = drift_reading(n_tokens=torch.ones(3), shift=nothing, nll=torch.tensor([1.0, 2.0, 3.0]), right=now)
    step_zero = dataclasses.replace(
        STEP_ZERO, n_tokens=torch.ones(3), sq_norm=torch.ones(3), raw_sq_norm=torch.ones(3), nll=torch.ones(3), right=then
    )
    law = scoring.domain_drift(probes(n_queries=3), reading, step_zero, (1,), (1,))
    found = law.accuracy
    assert found is not None
    assert (found.then, found.now) == (4 / 9, 5 / 9)
    assert (found.n_lost, found.n_gained, found.n_queries_lost) == (2, 3, 2)
    assert found.query_changes == (-1, 0, 2)
    assert_estimate(found.change, np.array([-1.0, 0.0, 2.0]), np.array([2.0, 3.0, 4.0]), 3)
    assert law.query_harm_in("points") == ((100, 0, -200), (2, 3, 4))
    harm = law.harm_in("points")
    assert (harm.value, harm.low, harm.high) == (
        pytest.approx(-100 / 9),
        pytest.approx(-100 * found.change.high),
        pytest.approx(-100 * found.change.low),
    )
    assert harm.low < harm.value < harm.high


def test_token_accuracy_is_unknown_where_step_zero_was_kept_without_it() -> None:
    law = scoring.domain_drift(probes(), drift_reading(), dataclasses.replace(STEP_ZERO, right=None), (1,), (1,))
    assert law.accuracy is None
    assert math.isfinite(law.nll_change.value)
    assert math.isnan(law.harm_in("points").value)


def test_what_examples_in_context_do_to_answers_is_told_in_every_unit() -> None:
    _, _, law = scored()
    n_answer, risen = LAW.n_answer.double().numpy(), (LAW.nll[TRAIN_ICL] - LAW.nll[FILLER]).numpy()
    n_right = {name: right.sum(dim=1).double().numpy() for name, right in LAW.right.items()}
    assert law.accuracy == n_right[ZERO_SHOT].sum() / n_answer.sum()
    assert_estimate(law.accuracy_change, n_right[TRAIN_ICL] - n_right[FILLER], n_answer, N_DRAWS)
    assert_estimate(law.bits_change, risen / math.log(2), np.array([5.0 + i % 4 for i in range(N_QUERIES)]), N_DRAWS)
    assert law.harm_in("nats/token") == law.nll_change
    assert law.harm_in("bits/byte") == law.bits_change
    assert law.harm_in("points").value == pytest.approx(-100 * law.accuracy_change.value)


def test_unchanged_weights_have_not_drifted() -> None:
    nothing = Shift(torch.zeros(N_QUERIES, D_SAE), torch.zeros(N_QUERIES), torch.zeros(N_QUERIES))
    same = drift_reading(shift=nothing, nll=LAW.nll[ZERO_SHOT], right=LAW.right[ZERO_SHOT].clone())
    law = scoring.domain_drift(probes(), same, STEP_ZERO, (1,), ())
    assert law.relative_drift == Estimate(0.0, 0.0, 0.0)
    assert law.nll_change == law.bits_change == Estimate(0.0, 0.0, 0.0)
    assert (law.raw_drift, law.p_worse, law.top_features) == (0.0, 1.0, ())
    assert law.accuracy is not None
    assert law.accuracy.then == law.accuracy.now > 0
    assert law.accuracy.change == law.harm_in("points") == Estimate(0.0, 0.0, 0.0)
    assert math.copysign(1, law.harm_in("points").value) == 1  # no minus before a nought
    assert (law.accuracy.n_lost, law.accuracy.n_gained, law.accuracy.n_queries_lost) == (0, 0, 0)


def test_tokens_that_have_become_sinks_do_not_make_the_drift_look_smaller() -> None:
    """Half of each query's tokens are gone, and with them half of the drift: per token it is the same."""
    tokens = torch.full((N_QUERIES,), 10)
    fifty = torch.full((N_QUERIES,), 50.0)
    step_zero = dataclasses.replace(STEP_ZERO, n_tokens=tokens, sq_norm=fifty, raw_sq_norm=fifty)
    per_feature, ones = torch.full((N_QUERIES, D_SAE), 1 / D_SAE), torch.ones(N_QUERIES)
    found = []
    for part in (1.0, 0.5):
        now = drift_reading(n_tokens=(tokens * part).long(), shift=Shift(per_feature * part, ones * part, ones * part))
        found.append(scoring.domain_drift(probes(), now, step_zero, (1,), (1,)))
    assert found[0].relative_drift.value == pytest.approx(found[1].relative_drift.value) == pytest.approx(0.02)
    assert found[0].raw_drift == pytest.approx(found[1].raw_drift) == pytest.approx(0.02)


def test_without_a_head_a_drift_has_no_likelihood() -> None:
    law = scoring.domain_drift(probes(), drift_reading(nll=None, right=None), STEP_ZERO, (1,), (1,))
    assert law.accuracy is None
    assert math.isnan(law.bits_change.value)
    assert all(math.isnan(x) for x in (law.nll, law.nll_change.value, law.p_worse))
    assert math.isfinite(law.relative_drift.value)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [((0.1, 0.2, 0.3), (1.0, 2.0, 9.0), 1.0), ((0.1, 0.2, 0.3), (3.0, 2.0, 1.0), -1.0), ((0.1, 0.3, 0.2), (1.0, 2.0, 3.0), 0.5)],
)
def test_two_forecasts_agree_as_far_as_they_order_domains_alike(one: Any, other: Any, expected: float) -> None:
    def of(values: tuple[float, ...]) -> Any:
        return samples.forecast(*(samples.domain_forecast(n, sts_net=v) for n, v in zip("abc", values, strict=True)))

    assert rank_agreement(of(one), of(other)) == pytest.approx(expected)


def test_agreement_of_two_domains_or_of_equal_ones_says_nothing() -> None:
    two = samples.forecast(samples.domain_forecast("a"), samples.domain_forecast("b", sts_net=0.9))
    alike = samples.forecast(*(samples.domain_forecast(n, sts_net=0.5) for n in "abc"))
    assert math.isnan(rank_agreement(two, two))
    assert math.isnan(rank_agreement(alike, alike))
