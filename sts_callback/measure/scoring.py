"""Sums per query to records: scores with their intervals and reference points, baselines beside them. No model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy import stats

from sts_callback.config import Unit
from sts_callback.data.probes import ProbeSet
from sts_callback.measure.accumulators import ZERO_SHOT, DriftStats, ProbeStats
from sts_callback.measure.step_zero import StepZeroStats
from sts_callback.metrics import scores, statistics
from sts_callback.metrics.statistics import interval, p_above, rank_ranges, resampled_ratios
from sts_callback.metrics.sums import token_mean
from sts_callback.records import UNKNOWN, DomainDrift, DomainForecast, Estimate, Forecast, Score, TokenAccuracy, harm_in

DOMAIN_ICL, TRAIN_ICL, FILLER = "own demonstrations", "training demonstrations", "neutral"
"""Contexts beside `ZERO_SHOT`."""
_N_TOP = 10  # drifted features that a record names
_NAN = float("nan")


class ForecastScorer:
    """Scores domains against the training data's reading; `domain` for each, then `ranked`."""

    def __init__(self, train: ProbeStats, n_features: int) -> None:
        """Choose the shifted features."""
        self.mean_shift = token_mean(train.shifts[TRAIN_ICL].features, train.n_tokens)
        """Mean squared shift of each feature on the training data, `(d_sae,)`."""
        self.features = scores.shifted_features(self.mean_shift, n_features)
        """D_N."""
        self._train_raw = token_mean(train.raw, train.n_tokens)
        self._train_gradients, self._train_n_answer = train.gradients, train.n_answer
        self._n_draws = 0
        self._own_scores: dict[str, float] = {}
        self._net: dict[str, torch.Tensor] = {}

    def domain(self, probes: ProbeSet, reading: ProbeStats) -> DomainForecast:
        """Score one set; the training data itself comes first, as the reference of the others.

        Args:
            probes: the set.
            reading: of it.

        """
        n, alone = reading.n_tokens, torch.arange(len(probes.queries))
        group = torch.tensor([probes.group(i) for i in alone.tolist()])
        self._n_draws = self._n_draws or len(probes.demo_sets)
        taught_group = group % self._n_draws  # a small training set has fewer draws, which then come again
        taught, own = reading.shifts[TRAIN_ICL], reading.shifts.get(DOMAIN_ICL, reading.shifts[TRAIN_ICL])
        taught_total = taught.total
        sets = scores.matched_sets(token_mean(reading.activity, n), self.features)
        nll, nll_change, bits_change, accuracy, accuracy_change = UNKNOWN, UNKNOWN, UNKNOWN, _NAN, UNKNOWN
        if reading.nll:
            risen = reading.nll[TRAIN_ICL] - reading.nll[FILLER]
            n_right = {context: right.sum(dim=1) for context, right in reading.right.items()}
            nll = estimate(reading.nll[ZERO_SHOT], reading.n_answer, alone)
            nll_change = estimate(risen, reading.n_answer, taught_group)
            bits_change = in_bits(probes, risen, taught_group)
            accuracy = _ratio(n_right[ZERO_SHOT], reading.n_answer)
            accuracy_change = estimate(n_right[TRAIN_ICL] - n_right[FILLER], reading.n_answer, taught_group)
        filler = reading.shifts[FILLER]
        on_features = (taught.features - filler.features)[:, list(self.features)].sum(dim=1)
        if not taught.features.shape[1]:  # then net is 1 - 1 / raw_over_prose, which orders domains as that does
            on_features = taught.raw - filler.raw
        return DomainForecast(
            name=probes.name,
            n_queries=len(probes.queries),
            n_tokens=int(n.sum()),
            n_masked=reading.n_masked,
            n_cut=probes.n_cut,
            n_answer_tokens=int(reading.n_answer.sum()),
            sts_act=self._score("sts_act", reading.activity, n, alone, sets),
            sts_icl=self._score("sts_icl", own.features, n, group, sets),
            sts_rel=self._score("sts_rel", own.features, own.total, group, sets),
            sts_cross=self._score("sts_cross", taught.features, taught_total, taught_group, sets),
            sts_net=self._net_score(probes.name, on_features, taught_total, taught_group),
            rank=(0, 0),
            p_above_next=_NAN,
            relative_shift=estimate(taught_total, reading.sq_norm, taught_group),
            raw_shift=estimate(taught.raw, reading.raw_sq_norm, taught_group),
            raw_over_prose=estimate(taught.raw, reading.shifts[FILLER].raw, taught_group),
            sae_error_share=_share(taught.sae_error, taught.raw),
            cosine=float(torch.cosine_similarity(token_mean(reading.raw, n), self._train_raw, dim=0)),
            nll=nll,
            nll_change=nll_change,
            gradient_change=self._gradient_change(reading.gradients, reading.n_answer),
            bits_change=bits_change,
            accuracy=accuracy,
            accuracy_change=accuracy_change,
        )

    def ranked(self, domains: Mapping[str, DomainForecast]) -> dict[str, DomainForecast]:
        """The same records, each with its place in the order of transfer."""
        ranges = rank_ranges({name: self._net[name] for name in domains})
        scored = [name for name in domains if not math.isnan(domains[name].sts_net.value)]
        order = sorted(scored, key=lambda name: -domains[name].sts_net.value)
        above = {one: float((self._net[one] > self._net[after]).double().mean()) for one, after in itertools.pairwise(order)}
        return {
            name: dataclasses.replace(d, rank=ranges[name], p_above_next=above.get(name, _NAN)) for name, d in domains.items()
        }

    def _score(
        self, name: str, values: torch.Tensor, denominator: torch.Tensor, group: torch.Tensor, sets: torch.Tensor
    ) -> Score:
        """The sum of per-query, per-feature values over D_N, against a denominator per query; NaN without features."""
        if not values.shape[1]:
            return Score(_NAN, _NAN, _NAN, _NAN, _NAN)
        found = estimate(values[:, list(self.features)].sum(dim=1), denominator, group)
        random = scores.mean_over_sets(values.double().sum(dim=0), sets) / float(denominator.double().sum() or _NAN)
        own = self._own_scores.setdefault(name, found.value)
        return Score(found.value, found.low, found.high, random, own)

    def _net_score(self, name: str, on_features: torch.Tensor, denominator: torch.Tensor, group: torch.Tensor) -> Score:
        """Keeps the resamples too, for the ranks."""
        value, resamples = _ratio(on_features, denominator), resampled_ratios(on_features, denominator, group)
        low, high = interval(value, resamples, int(group.max()) + 1)
        self._net[name] = resamples
        own = self._own_scores.setdefault("sts_net", value if low > 0 else _NAN)
        return Score(value, low, high, 0.0, own)

    def _gradient_change(self, gradients: torch.Tensor | None, n_answer: torch.Tensor) -> Estimate:
        if gradients is None or self._train_gradients is None or not self._train_n_answer.any():
            return UNKNOWN
        train = self._train_gradients.double()
        whole = train.sum(dim=0)
        # The square of a mean, without its noise: products of different queries only.
        n_pairs = float(self._train_n_answer.sum()) ** 2 * (1 - 1 / len(train))
        squared = float(whole.square().sum() - train.square().sum()) / n_pairs
        if squared <= 0:
            return UNKNOWN
        descent = -(gradients.double() @ whole) / float(self._train_n_answer.sum()) / squared
        return estimate(descent, n_answer, torch.arange(len(n_answer)))


def estimate(numerator: torch.Tensor, denominator: torch.Tensor, group: torch.Tensor) -> Estimate:
    """A ratio of sums over queries, with its interval.

    Args:
        numerator: per query, `(n_queries,)`.
        denominator: per query, `(n_queries,)`.
        group: what is resampled together, `(n_queries,)`.

    """
    value = _ratio(numerator, denominator)
    low, high = interval(value, resampled_ratios(numerator, denominator, group), int(group.max()) + 1)
    return Estimate(value, low, high)


def rank_agreement(one: Forecast, other: Forecast) -> float:
    """How far two forecasts, by SAEs of different layers say, order the domains alike.

    Returns:
        Spearman's correlation of their scores, in [-1, 1]; NaN with fewer than three domains or where all are alike.

    """
    found = [[d.sts_net.value for d in f.domains.values()] for f in (one, other)]
    if len(found[0]) < 3 or any(len(set(values)) < 2 for values in found):
        return _NAN
    return float(stats.spearmanr(*found).statistic)


def step_zero_stats(reading: ProbeStats) -> StepZeroStats:
    """What later checks need of a reading."""
    own = reading.shifts.get(DOMAIN_ICL, reading.shifts[TRAIN_ICL])
    return StepZeroStats(
        counted=reading.counted,
        acts=reading.acts,
        sketches=reading.sketches,
        n_tokens=reading.n_tokens,
        sq_norm=reading.sq_norm,
        raw_sq_norm=reading.raw_sq_norm,
        nll=reading.zero_shot_nll,
        mean_activity=token_mean(reading.activity, reading.n_tokens),
        mean_own_shift=token_mean(own.features, reading.n_tokens),
        mean_train_shift=token_mean(reading.shifts[TRAIN_ICL].features, reading.n_tokens),
        mean_filler_shift=token_mean(reading.shifts[FILLER].features, reading.n_tokens),
        right=reading.right.get(ZERO_SHOT),
    )


def realised_features(train: DriftStats, n_features: int) -> tuple[int, ...]:
    """The features that training moved most on the training data."""
    return scores.shifted_features(token_mean(train.shift.features, train.n_tokens), n_features)


def domain_drifts(
    sets: Sequence[ProbeSet],
    readings: Mapping[str, DriftStats],
    step_zero: Mapping[str, StepZeroStats],
    forecast_features: tuple[int, ...],
    n_features: int,
) -> tuple[tuple[int, ...], dict[str, DomainDrift]]:
    """Score the drift of all sets.

    Args:
        sets: that of the training data first.
        readings: of each set.
        step_zero: of each set.
        forecast_features: what the forecast named.
        n_features: how many features are called those that moved most.

    Returns:
        These, and the drift of each set by its name.

    """
    realised = realised_features(readings[sets[0].name], n_features)
    drifts = {s.name: domain_drift(s, readings[s.name], step_zero[s.name], forecast_features, realised) for s in sets}
    return realised, drifts


def domain_drift(
    probes: ProbeSet,
    reading: DriftStats,
    step_zero: StepZeroStats,
    forecast_features: tuple[int, ...],
    realised: tuple[int, ...],
) -> DomainDrift:
    """Score the drift of one set."""
    mean_drift = token_mean(reading.shift.features, reading.n_tokens)
    n_answer = torch.tensor([len(q.answer) for q in probes.queries])
    answers = answer_change(probes, reading, step_zero.nll, step_zero.right)
    nll, p_worse, n_lost = _NAN, _NAN, 0
    if reading.nll is not None:
        nll, n_lost = _ratio(reading.nll, n_answer), int((~reading.nll.isfinite()).sum())
        p_worse = p_above(answers.risen.tolist(), n_answer.tolist(), 0.0)
    return DomainDrift(
        name=probes.name,
        n_queries=len(probes.queries),
        n_tokens=int(reading.n_tokens.sum()),
        n_masked=reading.n_masked,
        relative_drift=relative_drift(reading, step_zero),
        raw_drift=raw_drift(reading, step_zero),
        sae_error_share=_share(reading.shift.sae_error, reading.shift.raw),
        share_on_forecast=scores.shift_share(mean_drift, forecast_features),
        top_features=tuple((j, scores.shift_share(mean_drift, (j,))) for j in scores.shifted_features(mean_drift, _N_TOP)),
        sts_act=scores.activity_score(step_zero.mean_activity, realised),
        sts_icl=scores.shift_score(step_zero.mean_own_shift, realised),
        sts_rel=scores.shift_share(step_zero.mean_own_shift, realised),
        sts_cross=scores.shift_share(step_zero.mean_train_shift, realised),
        sts_net=scores.net_share(step_zero.mean_train_shift, step_zero.mean_filler_shift, realised),
        nll=nll,
        nll_change=answers.nll,
        p_worse=p_worse,
        query_changes=tuple(answers.risen.tolist()),
        query_answer_tokens=tuple(n_answer.tolist()),
        n_not_finite=reading.n_not_finite + n_lost,
        bits_change=answers.bits,
        query_answer_bytes=probes.answer_bytes,
        accuracy=answers.accuracy,
    )


def relative_drift(reading: DriftStats, step_zero: ProbeStats | StepZeroStats) -> Estimate:
    """Squared feature drift of a set over its squared activity at step 0; without an SAE, that of raw activations."""
    drift = reading.shift.total * _token_scale(reading, step_zero)
    return estimate(drift, step_zero.sq_norm, torch.arange(len(drift)))


def raw_drift(reading: DriftStats, step_zero: ProbeStats | StepZeroStats) -> float:
    """The same of raw activations, estimated from sketches."""
    return _ratio(reading.shift.raw * _token_scale(reading, step_zero), step_zero.raw_sq_norm)


@dataclass(frozen=True)
class AnswerChange:
    """What has become of a set's answers."""

    risen: torch.Tensor
    """Change of each answer's NLL in nats, `(n_queries,)`; NaN without a language-model head."""
    nll: Estimate
    """The same of all together, in nats a token."""
    bits: Estimate
    """In bits a byte."""
    accuracy: TokenAccuracy | None

    def harm_in(self, unit: Unit) -> Estimate:
        """In a budget's unit; above 0 is worse."""
        return harm_in(unit, self.nll, self.bits, UNKNOWN if self.accuracy is None else self.accuracy.change)


def answer_change(probes: ProbeSet, now: DriftStats, nll: torch.Tensor, right: torch.Tensor | None) -> AnswerChange:
    """Compare a set's answers with those of step 0.

    Args:
        probes: the set.
        now: its reading.
        nll: of each answer at step 0, in nats, `(n_queries,)`.
        right: which of their tokens were right at step 0, see `Answers`; None if that was not kept.

    """
    alone = torch.arange(len(probes.queries))
    n_answer = torch.tensor([len(q.answer) for q in probes.queries])
    risen = torch.full(alone.shape, _NAN) if now.nll is None else now.nll - nll
    accuracy = None if now.right is None or right is None else _token_accuracy(now.right, right, n_answer)
    return AnswerChange(risen, estimate(risen, n_answer, alone), in_bits(probes, risen, alone), accuracy)


def _token_accuracy(now: torch.Tensor, then: torch.Tensor, n_answer: torch.Tensor) -> TokenAccuracy:
    change, lost = now.sum(dim=1) - then.sum(dim=1), then & ~now
    return TokenAccuracy(
        then=_ratio(then, n_answer),
        now=_ratio(now, n_answer),
        change=estimate(change, n_answer, torch.arange(len(n_answer))),
        n_lost=int(lost.sum()),
        n_gained=int((now & ~then).sum()),
        n_queries_lost=int(lost.any(dim=1).sum()),
        query_changes=tuple(change.tolist()),
    )


def in_bits(probes: ProbeSet, change: torch.Tensor, group: torch.Tensor) -> Estimate:
    """A change of the answers' NLL, in bits a byte of their text.

    Args:
        probes: with the answers; without the length of their text nothing is known.
        change: of each answer in nats, `(n_queries,)`.
        group: what is resampled together, `(n_queries,)`.

    """
    return estimate(change / math.log(2), torch.tensor(probes.answer_bytes), group) if probes.answer_bytes else UNKNOWN


def _token_scale(reading: DriftStats, step_zero: ProbeStats | StepZeroStats) -> float:
    """Drift and activity are means over their own tokens: some that counted at step 0 may be sinks now."""
    return float(step_zero.n_tokens.sum()) / max(1.0, float(reading.n_tokens.sum()))


def output_drift(now: tuple[torch.Tensor, torch.Tensor], then: tuple[torch.Tensor, torch.Tensor]) -> Estimate:
    """How far texts lie from others in the mean of their features, with its interval over texts.

    Args:
        now: of texts that the model writes now, sums of features and tokens, as `ProbeRunner.read_activity` gives them.
        then: the same of texts that it wrote at step 0, read with the same weights.

    """
    value, resamples = statistics.mean_distance(*now, *then)
    low, high = interval(value, resamples, min(len(now[1]), len(then[1])))
    return Estimate(value, low, high)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """At most 1: an SAE whose error changes by more than what it reads expresses nothing of the change."""
    found = _ratio(part, whole)
    return 1.0 if found > 1 else found


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> float:
    total = float(denominator.double().sum())
    return float(numerator.double().sum()) / total if total else math.nan
