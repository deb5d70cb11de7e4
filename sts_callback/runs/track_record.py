"""Learn from the ledger: how good past forecasts were, and what they predict for a new one. No model, no files.

Only runs of the same model, SAE and hook point are combined. Runs on the same training and probe texts have the same forecast, so
one says nothing new about another. They are left out, resampled and counted together, as one training set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sts_callback.records import Estimate, Forecast, Identity
from sts_callback.runs.ledger import FEWEST, LEVEL, DomainEntry, Entry, Expectations, Skill, TrackRecord, is_gain

_N_RESAMPLES = 2000
_RCOND = 1e-5  # relative to the largest singular value; below it predictors count as constant. For squares it is squared
_NAN = float("nan")

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True)
class _Rows:
    """Forecasts and outcomes for one question, a row for each domain and run. All numbers of a row are known."""

    score: Floats
    """The score by which the forecast ranks domains, `(n_rows,)`."""
    predictors: Floats
    """Predictors of the outcome, `(n_rows, n_predictors)`."""
    outcome: Floats
    """`(n_rows,)`"""
    run: Ints
    """`(n_rows,)`"""
    training_set: Ints
    """`(n_rows,)`, from 0 without gaps."""

    @property
    def n_sets(self) -> int:
        return int(self.training_set.max(initial=-1)) + 1

    def where(self, mask: NDArray[np.bool_]) -> _Rows:
        """Select rows and renumber training sets."""
        numbered: Ints = np.unique(self.training_set[mask], return_inverse=True)[1]
        return _Rows(self.score[mask], self.predictors[mask], self.outcome[mask], self.run[mask], numbered)


def track_records(entries: Sequence[Entry]) -> tuple[TrackRecord, ...]:
    """How good past forecasts were, for each model, SAE and hook point, in the order of their first runs."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_kind(entry.identity), []).append(entry)
    return tuple(_track_record(group) for group in groups.values())


def expectations(entries: Sequence[Entry], forecast: Forecast) -> Expectations | None:
    """Predict the outcome of a forecast from past runs of the same model, SAE and hook point.

    Args:
        entries: runs of any model and SAE; others than the forecast's are ignored.
        forecast: forecast of a new run.

    Returns:
        For each domain the expected relative drift (averaged as a logarithm) and NLL change, each with an interval that holds a
        single outcome with a probability of about `LEVEL`, or more if there are few training sets. None if there are fewer than
        `FEWEST` of them.

    """
    own = [entry for entry in entries if _kind(entry.identity) == _kind(forecast.identity)]
    movement, harm = _rows(own, _movement), _rows(own, _harm)
    if max(movement.n_sets, harm.n_sets) < FEWEST:
        return None

    def expected(rows: _Rows, predictors: Iterable[tuple[float, ...]]) -> dict[str, Floats]:
        if rows.n_sets < FEWEST:
            return {}
        return dict(zip(forecast.domains, _predicted(rows, np.array(list(predictors))), strict=True))

    domains = forecast.domains.values()
    drift = expected(movement, (_movement_predictors(d.transfer.value, d.relative_shift.value) for d in domains))
    change = expected(harm, ((d.nll_change.value,) for d in domains))
    return Expectations(
        past=_track_record(own),
        relative_drift={name: Estimate(*np.exp(ends).tolist()) for name, ends in drift.items()},
        nll_change={name: Estimate(*ends.tolist()) for name, ends in change.items()},
    )


def _kind(identity: Identity) -> tuple[str, ...]:
    """What must be equal to combine runs. It includes the model's name, as the fingerprint covers its configuration only."""
    return identity.model, identity.model_name, identity.sae, identity.hook_name


def _track_record(entries: Sequence[Entry]) -> TrackRecord:
    return TrackRecord(
        identity=entries[-1].identity,
        n_runs=len(entries),
        n_training_sets=len({entry.identity.probes for entry in entries}),
        movement=_skill(_rows(entries, _movement)),
        harm=_skill(_rows(entries, _harm)),
    )


_Question = Callable[[DomainEntry], tuple[float, tuple[float, ...], float]]
"""From a domain to its score, predictors and outcome."""


def _movement(domain: DomainEntry) -> tuple[float, tuple[float, ...], float]:
    predictors = _movement_predictors(domain.transfer, domain.relative_shift)
    return domain.transfer, predictors, _log(domain.relative_drift.value)


def _movement_predictors(transfer: float, relative_shift: float) -> tuple[float, ...]:
    """Clip transfer: far beyond its reference points it is mostly noise, which a straight line would follow."""
    return float(np.clip(transfer, 0, 1)), _log(relative_shift)


def _harm(domain: DomainEntry) -> tuple[float, tuple[float, ...], float]:
    return domain.context_nll_change, (domain.context_nll_change,), domain.nll_change.value


def _log(number: float) -> float:
    return (
        math.log(number) if number > 0 else _NAN
    )  # a run that moved nothing, such as one at rate 0, says nothing about movement


def _rows(entries: Sequence[Entry], question: _Question) -> _Rows:
    found: list[tuple[Any, ...]] = []
    for run, entry in enumerate(entries):
        for domain in entry.domains.values():
            score, predictors, outcome = question(domain)
            if all(map(math.isfinite, (score, *predictors, outcome))):
                found.append((score, predictors, outcome, run, entry.identity.probes))
    scores, predictors, outcomes, runs, probes = zip(*found, strict=True) if found else ((), (), (), (), ())
    numbered = {fingerprint: number for number, fingerprint in enumerate(dict.fromkeys(probes))}
    return _Rows(
        score=np.array(scores, dtype=float),
        predictors=np.array(predictors, dtype=float),
        outcome=np.array(outcomes, dtype=float),
        run=np.array(runs, dtype=np.intp),
        training_set=np.array([numbered[fingerprint] for fingerprint in probes], dtype=np.intp),
    )


def _skill(rows: _Rows) -> Skill:
    is_enough = rows.n_sets >= FEWEST
    error, error_of_mean = _errors(rows) if is_enough else (_NAN, _NAN)
    return Skill(
        n_training_sets=rows.n_sets,
        n_rows=len(rows.outcome),
        spearman=_agreement(rows),
        error=error,
        error_of_mean=error_of_mean,
        coverage=_coverage(rows) if is_enough else _NAN,
    )


def _agreement(rows: _Rows) -> Estimate:
    """Spearman's correlation over the domains of a run: mean over training sets of the mean over their runs.

    Returns:
        In [-1, 1]. The interval takes the bootstrap's standard error over training sets and Student's quantile. Runs with fewer
        than three domains, or with equal values only, have no correlation.

    """
    of_set: dict[int, list[float]] = {}
    for run in np.unique(rows.run):
        score, outcome = rows.score[rows.run == run], rows.outcome[rows.run == run]
        if len(score) >= 3 and np.ptp(score) > 0 and np.ptp(outcome) > 0:
            correlation = float(stats.spearmanr(score, outcome).statistic)
            of_set.setdefault(int(rows.training_set[rows.run == run][0]), []).append(correlation)
    means = np.array([np.mean(some) for some in of_set.values()])
    if not len(means):
        return Estimate(_NAN, _NAN, _NAN)
    value = float(means.mean())
    if len(means) < FEWEST:
        return Estimate(value, _NAN, _NAN)
    resamples = np.random.default_rng(0).choice(means, (_N_RESAMPLES, len(means))).mean(axis=1)
    unbiased = math.sqrt(len(means) / (len(means) - 1))
    reach = float(stats.t.ppf(0.975, len(means) - 1)) * float(resamples.std()) * unbiased
    return Estimate(value, max(-1.0, value - reach), min(1.0, value + reach))


def _predicted(rows: _Rows, predictors: Floats) -> Floats:
    """Predict outcomes with intervals, by least squares or, if that is no better, by the mean of the outcomes.

    This is the jackknife+ that leaves out whole training sets: each set's residuals are added to the prediction of the fit
    without that set. All sets have the same weight, and so has an unseen one. With `LEVEL` = 1 - alpha, an interval holds a new
    outcome with a probability of at least 1 - 2 alpha and about 1 - alpha, if the new training set is drawn like the past ones.

    Args:
        rows: at least `FEWEST` - 1 training sets.
        predictors: predictors of the new domains, `(n_new, n_predictors)`.

    Returns:
        Value, low and high, `(n_new, 3)`. NaN if a predictor that is used is NaN.

    Source: R. F. Barber, E. J. Candes, A. Ramdas, R. J. Tibshirani, Predictive inference with the jackknife+, Annals of
    Statistics 49, 2021, equation 1.4; for groups, Y. Lee, R. F. Barber, R. Willett, arXiv 2306.06342.

    """
    is_fit_better = is_gain(*_errors(rows))
    known, new = (_design(x, rows, with_predictors=is_fit_better) for x in (rows.predictors, predictors))
    fits = _fits_without_each(known, rows)
    residual = np.abs(rows.outcome - (known * fits[rows.training_set]).sum(axis=1))
    around = new @ fits[rows.training_set].T
    weight = 1 / np.bincount(rows.training_set)[rows.training_set] / (rows.n_sets + 1)
    value = new @ np.linalg.lstsq(known, rows.outcome, rcond=_RCOND)[0]
    return np.stack([value, -_upper_end(residual - around, weight), _upper_end(around + residual, weight)], axis=1)


def _upper_end(values: Floats, weight: Floats) -> Floats:
    """The smallest value, of `(n_new, n_rows)`, up to which `LEVEL` of the weight lies. Infinite if there is none."""
    order = np.argsort(values, axis=1)
    is_reached = np.cumsum(weight[order], axis=1) >= LEVEL - 1e-9
    ends = np.take_along_axis(values, np.take_along_axis(order, is_reached.argmax(axis=1)[:, None], axis=1), axis=1)[:, 0]
    return np.where(is_reached.any(axis=1), ends, math.inf)


def _errors(rows: _Rows) -> tuple[float, float]:
    """Root mean square errors of the fit and of the mean outcome, on each training set when it is left out."""
    squares = []
    for with_predictors in (True, False):
        known = _design(rows.predictors, rows, with_predictors=with_predictors)
        residual = rows.outcome - (known * _fits_without_each(known, rows)[rows.training_set]).sum(axis=1)
        squares.append((np.bincount(rows.training_set, residual**2) / np.bincount(rows.training_set)).mean())
    return float(np.sqrt(squares[0])), float(np.sqrt(squares[1]))


def _coverage(rows: _Rows) -> float:
    """Share of each training set's outcomes in the intervals from the others. All sets have the same weight."""
    shares = []
    for left_out in range(rows.n_sets):
        new, others = rows.where(rows.training_set == left_out), rows.where(rows.training_set != left_out)
        _, low, high = _predicted(others, new.predictors).T
        shares.append(((low <= new.outcome) & (new.outcome <= high)).mean())
    return float(np.mean(shares))


def _design(predictors: Floats, rows: _Rows, *, with_predictors: bool) -> Floats:
    """Columns for least squares: a constant and the predictors, centred by the rows; or the constant, which fits the mean."""
    centred = predictors - rows.predictors.mean(axis=0)
    return np.column_stack([np.ones(len(predictors)), *(centred.T if with_predictors else ())])


def _fits_without_each(known: Floats, rows: _Rows) -> Floats:
    """Least-squares coefficients, leaving out each training set in turn, `(n_sets, n_columns)`."""
    n_columns = known.shape[1]
    squares, products = np.zeros((rows.n_sets, n_columns, n_columns)), np.zeros((rows.n_sets, n_columns))
    np.add.at(squares, rows.training_set, known[:, :, None] * known[:, None, :])
    np.add.at(products, rows.training_set, known * rows.outcome[:, None])
    inverse = np.linalg.pinv(squares.sum(axis=0) - squares, rcond=_RCOND**2, hermitian=True)
    fits: Floats = (inverse @ (products.sum(axis=0) - products)[:, :, None])[:, :, 0]
    return fits
