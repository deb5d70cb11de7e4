"""What each score said before training, and what training did: numbers by fine-tune and domain. No model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from sts_callback.records import Estimate
from validation.data import DOMAINS

Means = Mapping[str, np.ndarray]
Scores = dict[str, np.ndarray]
"""By the name of a score, one number for each of `DOMAINS`; for all but signed ones, large says that a domain changes much."""

HARM, CLEAR = 0.1, 2.0  # nats per token, and times its standard error
RIVALS = ("cosine of mean activations", "raw shift", "raw shift over that by plain prose", "NLL at step 0")
"""Scores that need no SAE."""


def recorded(forecast: Mapping[str, Any]) -> Scores:
    """The scores that a forecast itself has.

    Args:
        forecast: a line of `forecasts.jsonl`.

    """
    domains = [forecast["domains"][name] for name in DOMAINS]
    return {
        title: np.array([d[key]["value"] if isinstance(d[key], dict) else d[key] for d in domains], dtype=float)
        for title, key in (
            ("STS_act", "sts_act"),
            ("STS_ICL", "sts_icl"),
            ("STS_rel", "sts_rel"),
            ("STS_cross", "sts_cross"),
            ("STS_net", "sts_net"),
            ("relative shift", "relative_shift"),
            ("cosine of mean activations", "cosine"),
            ("raw shift", "raw_shift"),
            ("raw shift over that by plain prose", "raw_over_prose"),
            ("NLL at step 0", "nll"),
        )
    }


def expected(forecast: Mapping[str, Any], means: Means, n_features: int) -> Scores:
    """All scores of one fine-tune.

    Args:
        forecast: its line in `forecasts.jsonl`.
        means: `sums.npz`.
        n_features: N.

    """
    fine_tune, said, with_sign = forecast["fine_tune"], recorded(forecast), signed(forecast)
    taught, neutral, own, gradients, activity = (
        _of_domains(means, key) for key in (fine_tune, "neutral", "own demonstrations", "gradient", "activity")
    )
    train = {key: means[f"train/{fine_tune}/{key}"].astype(float) for key in ("training demonstrations", "neutral", "gradient")}
    contrast = np.argsort(train["neutral"] - train["training demonstrations"])[:n_features]
    found = {
        **said,
        "STS_cross, features above plain prose": taught[:, contrast].sum(axis=1) / taught.sum(axis=1),
        "STS_rel, features above plain prose": own[:, contrast].sum(axis=1) / own.sum(axis=1),
        "shift on the features, over activity": said["relative shift"] * said["STS_cross"],
        "relative shift over that by plain prose": taught.sum(axis=1) / neutral.sum(axis=1),
        "cosine of shifts": _cosines(np.sqrt(taught), np.sqrt(train["training demonstrations"])),
        **{title: np.abs(values) for title, values in with_sign.items()},
        "cosine of gradients": np.abs(_cosines(gradients, train["gradient"])),
        "cosine of root activities": _cosines(np.sqrt(activity), np.sqrt(means[f"train/{fine_tune}/activity"])),
    }
    for pair in (
        ("STS_cross", "cosine of mean activations"),
        ("STS_cross", "relative shift"),
        ("STS_cross", "NLL change in context"),
        ("STS_net", "cosine of mean activations"),
        ("STS_net", "cosine of root activities"),
    ):
        found["ranks of " + " and ".join(pair)] = stats.rankdata(found[pair[0]]) + stats.rankdata(found[pair[1]])
    return found


def net_by_size(fine_tune: str, means: Means, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """STS_net with other numbers of features than the forecast's, for each of `DOMAINS`."""
    taught, neutral = (_of_domains(means, key) for key in (fine_tune, "neutral"))
    most_shifted = np.argsort(-means[f"train/{fine_tune}/training demonstrations"])
    net, total = (taught - neutral)[:, most_shifted], taught.sum(axis=1)
    return {n: net[:, :n].sum(axis=1) / total for n in sizes}


def signed(forecast: Mapping[str, Any]) -> Scores:
    """Scores that tell a direction: above 0 is worse."""
    return {
        title: np.array([forecast["domains"][name][key]["value"] for name in DOMAINS], dtype=float)
        for title, key in (("NLL change in context", "nll_change"), ("gradient alignment", "gradient_change"))
    }


def signed_orders(forecast: Mapping[str, Any], unsigned: Scores) -> Scores:
    """All scores as orders from the worst to the best: those that tell a direction, their ranks together, and the others."""
    with_sign = signed(forecast)
    together = sum(stats.rankdata(values) for values in with_sign.values())
    return {**unsigned, **with_sign, "ranks of " + " and ".join(with_sign): together}


def movement(run: Mapping[str, Any]) -> np.ndarray:
    """Relative feature drift at the end, for each of `DOMAINS`."""
    return np.array([run["after"][name]["drift"]["value"] for name in DOMAINS], dtype=float)


def harm(run: Mapping[str, Any], zero: Mapping[str, Any], kind: str = "nll") -> tuple[np.ndarray, np.ndarray]:
    """Change of the answers' NLL in nats per token for each of `DOMAINS`, and its standard error over questions.

    Args:
        run: a line of `runs.jsonl`.
        zero: `step_zero.json`.
        kind: `nll`, or `late` for what comes after the first tokens.

    """
    counts = {"nll": "n", "late": "n_late"}[kind]
    pairs = [
        ratio(np.subtract(run["after"][name][kind], zero[name][kind]), np.array(zero[name][counts], dtype=float))
        for name in DOMAINS
    ]
    values, errors = zip(*pairs, strict=True)
    return np.array(values), np.array(errors)


def margins(answers: Mapping[str, Any], zero: Mapping[str, Any], name: str) -> np.ndarray:
    """By how much the right options of a domain's questions are likelier than wrong ones, nats per token, one for each question.

    Args:
        answers: `step_zero.json`, or what a line of `runs.jsonl` has of the tuned model.
        zero: `step_zero.json`.
        name: of the domain, one of MMLU-Pro.

    """
    wrong = np.array(answers[name]["wrong"])
    counts = zero[name]["n"][: len(wrong)]
    right: np.ndarray = np.array(answers[name]["nll"][: len(wrong)]) / counts
    difference: np.ndarray = wrong - right
    return difference


def is_clear(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Whether changes are clear of their errors."""
    clear: np.ndarray = np.abs(value) >= CLEAR * error
    return clear


def right_signs(said: np.ndarray, value: np.ndarray, error: np.ndarray) -> list[bool]:
    """For each change that is clear of its error, whether it was said with the right sign."""
    clear = is_clear(value, error)
    right: list[bool] = (np.sign(said[clear]) == np.sign(value[clear])).tolist()
    return right


def is_harmed(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Whether changes are harm: by the threshold, and clear of their errors."""
    harmed: np.ndarray = (value >= HARM) & is_clear(value, error)
    return harmed


def ratio(change: np.ndarray, n: np.ndarray) -> tuple[float, float]:
    """A change per token and its standard error, from sums and tokens of questions."""
    value = float(change.sum() / n.sum())
    left = change - value * n
    return value, float(np.sqrt(len(n) / (len(n) - 1) * (left**2).sum()) / n.sum())


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation; NaN where the first is the same for all."""
    return _correlation(one, other, stats.spearmanr)


def pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation; NaN where the first is the same for all."""
    return _correlation(one, other, stats.pearsonr)


def partial_spearman(one: np.ndarray, other: np.ndarray, given: np.ndarray) -> float:
    """Spearman's correlation of what is left of the ranks when those of a third are taken out linearly; NaN if nothing is."""
    r, one_given, other_given = (spearman(*pair) for pair in ((one, other), (one, given), (other, given)))
    left = (1 - one_given**2) * (1 - other_given**2)
    return (r - one_given * other_given) / float(np.sqrt(left)) if left > 1e-12 else float("nan")


def student(values: np.ndarray) -> Estimate:
    """Mean of correlations with its 95 % interval by Student's t, cut off where no correlation can be.

    Args:
        values: independent ones, `(n,)`; errors of measurement that each has for itself are part of their spread.

    Returns:
        With fewer than two values an interval of NaN.

    """
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    reach = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(mean, max(-1.0, mean - reach), min(1.0, mean + reach))


def _of_domains(means: Means, key: str) -> np.ndarray:
    """Means of one kind, `(n_domains, d_sae)`."""
    return np.stack([means[f"{name}/{key}"] for name in DOMAINS]).astype(float)


def _cosines(rows: np.ndarray, one: np.ndarray) -> np.ndarray:
    return rows @ one / (np.linalg.norm(rows, axis=1) * np.linalg.norm(one))


def _correlation(one: np.ndarray, other: np.ndarray, correlate: Callable[..., Any]) -> float:
    return float(correlate(one, other).statistic) if len(set(one.tolist())) > 1 else float("nan")
