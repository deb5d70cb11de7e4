"""From records and thresholds to a verdict with reasons. Movement and harm are two questions; a verdict is about harm.

Harm is judged by the NLL of answers, whether or not the hooked layer has moved: what changes above it harms as well. What was not
seen is never a `go`: no number, numbers that are not finite, too many tokens left out, a layer that training cannot move.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from sts_callback.config import PolicyConfig, require
from sts_callback.errors import CannotTell
from sts_callback.records import Decision, DomainDrift, DomainForecast, DriftSnapshot, Estimate, Forecast, Verdict
from sts_callback.records.remedies import BudgetFinding

Judgement: TypeAlias = tuple[Decision, str]
"""A decision and, in a sentence, why."""

_DIVERGED: Judgement = "cannot tell", "the model gives NaN or infinite numbers: training has diverged."
_CANNOT_MOVE = (
    "no weight at or below the SAE's layer is trained, so nothing can drift there; take an SAE of a layer above the lowest one "
    "that is trained."
)
NOISE_MARGIN = 10
"""Drift that is called movement must be this many times what another batch layout makes of unchanged weights."""


def judge_forecast(forecast: Forecast, policy: PolicyConfig) -> Verdict:
    """Decide before training.

    A protected domain is threatened if the training demonstrations raise the NLL of its answers beyond its budget. They are a
    weaker push than training and know nothing of its rate and length: a forecast without harm is no promise of none.

    Returns:
        The gravest of the domains' decisions: `no-go`, `not covered`, `cannot tell`, `go`.

    """
    return _verdict(judge_domains(forecast, policy), step=0)


def judge_domains(forecast: Forecast, policy: PolicyConfig) -> dict[str, Judgement]:
    """Decide before training on each protected domain by itself.

    Returns:
        For each, what `judge_forecast` makes its verdict of: `go`, `no-go`, `not covered` or `cannot tell`, and why.

    Raises:
        ConfigError: if a protected domain was not measured.

    """
    _require_measured(policy, forecast.domains)
    return {name: _forecast_threat(forecast, name, budget, policy) for name, budget in policy.budgets.items()}


def judge_drift(history: Sequence[DriftSnapshot], policy: PolicyConfig) -> Verdict:
    """Decide after a check.

    Args:
        history: all checks so far, the newest last.
        policy: thresholds.

    Returns:
        `no-go` (an alarm) if a protected domain's NLL has risen beyond its budget at each of the last `patience` checks, `watch`
        if at the newest one only; else the gravest of `not covered`, `cannot tell` and `go`.

    Raises:
        ConfigError: if there is no check, or a protected domain was not measured.

    """
    require(len(history) > 0, "history", history, "at least one check")
    for snapshot in history[-policy.patience :]:
        _require_measured(policy, snapshot.domains)
    recent = [_drift_threats(snapshot, policy) for snapshot in history[-policy.patience :]]
    judged = recent[-1]
    for name, (decision, reason) in judged.items():
        held = len(recent) == policy.patience and all(threats[name][0] == "no-go" for threats in recent)
        if decision == "no-go" and not held:
            judged[name] = "watch", reason
    diverged = {name: _DIVERGED for name in history[-1].diverged}  # also what nobody protects: the model is broken
    verdict, drift = _verdict(judged | diverged, step=history[-1].step), history[-1].train.relative_drift.value
    return replace(verdict, supersedes_forecast=drift >= policy.min_drift)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values of several tests so that the chance of any false alarm stays what it is for one.

    Args:
        p_values: by name; NaN where there was no test.

    Returns:
        Adjusted p-values, at most 1; NaN stays NaN and counts as no test.

    Source: S. Holm, Scandinavian Journal of Statistics 6, 1979.

    """
    known = sorted((name for name, p in p_values.items() if not math.isnan(p)), key=lambda name: p_values[name])
    adjusted, so_far = dict.fromkeys(p_values, math.nan), 0.0
    for rank, name in enumerate(known):
        so_far = max(so_far, min(1.0, (len(known) - rank) * p_values[name]))
        adjusted[name] = so_far
    return adjusted


def fewest_queries(policy: PolicyConfig) -> int:
    """How many queries each protected domain needs so that all signs alike can pass the test of a rise."""
    return math.ceil(math.log2(max(1, len(policy.budgets)) / policy.alpha))


def short_of_queries(n_queries: Mapping[str, int], policy: PolicyConfig) -> dict[str, int]:
    """Protected domains that could never alarm, however bad the harm, and the queries that they have.

    Args:
        n_queries: of each set.
        policy: whose test is to be passed.

    """
    return {name: n_queries[name] for name in policy.budgets if name in n_queries and n_queries[name] < fewest_queries(policy)}


def require_power(n_queries: Mapping[str, int], policy: PolicyConfig) -> None:
    """Refuse probes that could never raise an alarm, however bad the harm.

    Args:
        n_queries: of each set.
        policy: whose test is to be passed.

    Raises:
        CannotTell: with the protected domains that have too few.

    """
    if short := short_of_queries(n_queries, policy):
        raise CannotTell(
            f"n_queries: {', '.join(f'{name} has {n}' for name, n in short.items())}; an alarm for one of "
            f"{len(policy.budgets)} protected domains at alpha {policy.alpha} takes {fewest_queries(policy)}. Give more rows, "
            "raise ProbeConfig(n_queries=...), or protect fewer domains."
        )


def judge_budget(change: Estimate, budget: float) -> BudgetFinding:
    """Whether a change of a domain's NLL keeps its budget: the test of harm by budget and interval alone.

    Args:
        change: of the NLL of its answers, nats a token, with its 95 % interval.
        budget: in the same unit.

    Returns:
        `within` if the interval lies under the budget, `beyond` if the change reaches it and the interval lies above 0, else
        `cannot tell`.

    """
    worse, _ = _worsens(change, budget)
    return "cannot tell" if worse is None else "beyond" if worse else "within"


def _require_measured(policy: PolicyConfig, domains: Collection[str]) -> None:
    for name in policy.budgets:
        require(name in domains, "protect", name, f"one that was measured, {sorted(domains)}")


def _cannot_read(forecast: Forecast, name: str, policy: PolicyConfig) -> str | None:
    """Why a forecast says nothing about one of its domains, in a sentence; None if it does."""
    domain = forecast.domains[name]
    if doubt := _too_much_masked(domain, policy):
        return doubt
    if not forecast.can_move:
        return _CANNOT_MOVE
    if forecast.noise_floor * NOISE_MARGIN > policy.min_drift:
        return f"unchanged weights alone drift by {forecast.noise_floor:.1%}; drift from {policy.min_drift:.0%} counts."
    if not math.isfinite(domain.sts_net.value):
        return "nothing shifted in context."
    return None


def _verdict(judged: dict[str, Judgement], step: int) -> Verdict:
    order: tuple[Decision, ...] = ("no-go", "watch", "not covered", "cannot tell", "go")
    decision: Decision = next((d for d in order if any(found == d for found, _ in judged.values())), "go")
    threatened = tuple(name for name, (found, _) in judged.items() if found == decision) if decision != "go" else ()
    return Verdict(decision, threatened, {name: reason for name, (_, reason) in judged.items()}, step)


def _forecast_threat(forecast: Forecast, name: str, budget: float, policy: PolicyConfig) -> Judgement:
    if doubt := _cannot_read(forecast, name, policy):
        return "cannot tell", doubt
    domain, transfer = forecast.domains[name], forecast.domains[name].transfer
    known = math.isfinite(transfer.value)
    extent = f"transfer {transfer.value:.0%}, {transfer.low:.0%} to {transfer.high:.0%}" if known else "transfer unknown"
    worse, sentence = _worsens(domain.nll_change, budget)
    if worse is None:
        return "cannot tell", f"direction unsure ({sentence}; {extent})."
    if worse:
        return "no-go", f"NLL rises in context ({sentence}; {extent})."
    return _safe(f"no harm in context ({sentence}; {extent})", domain.sae_error_share, policy)


def _drift_threats(snapshot: DriftSnapshot, policy: PolicyConfig) -> dict[str, Judgement]:
    p_values = holm({name: snapshot.domains[name].p_worse for name in policy.budgets})
    return {name: _drift_threat(snapshot, name, budget, p_values[name], policy) for name, budget in policy.budgets.items()}


def _drift_threat(snapshot: DriftSnapshot, name: str, budget: float, p_value: float, policy: PolicyConfig) -> Judgement:
    domain = snapshot.domains[name]
    if domain.n_not_finite:
        return _DIVERGED
    worse, sentence = _worsens(domain.nll_change, budget)
    if worse and domain.n_queries < fewest_queries(policy):
        return (
            "cannot tell",
            f"{domain.n_queries} queries are too few for an alarm, {fewest_queries(policy)} are needed ({sentence}).",
        )
    moved = _movement(domain, policy)
    if worse and p_value <= policy.alpha:
        return "no-go", f"NLL rose ({sentence}, p {_p(p_value)}); {moved}."
    if doubt := _too_much_masked(domain, policy) or ("" if snapshot.can_move else _CANNOT_MOVE):
        return "cannot tell", doubt
    if worse is None or worse:
        return "cannot tell", f"NLL change unsure ({sentence}); {moved}."
    return _safe(f"no harm ({sentence}); {moved}", domain.sae_error_share, policy)


def _movement(domain: DomainDrift, policy: PolicyConfig) -> str:
    """How far a representation has drifted, in words."""
    drift = domain.relative_drift.value
    kind, size = ("raw drift", domain.raw_drift) if drift < policy.min_drift <= domain.raw_drift else ("drift", drift)
    if math.isnan(size):
        return "drift unknown"
    if size < policy.min_drift:
        return f"representation has not drifted ({kind} {size:.1%}, under {policy.min_drift:.0%})"
    return f"representation drifted ({kind} {size:.1%}, at least {policy.min_drift:.0%})"


def _too_much_masked(domain: DomainForecast | DomainDrift, policy: PolicyConfig) -> str:
    """Why too few tokens of a domain were compared, in a sentence; empty if enough were."""
    if not domain.n_tokens:
        return "none of its tokens could be compared."
    share = domain.n_masked / (domain.n_masked + domain.n_tokens)
    if share <= policy.max_masked_share:
        return ""
    return f"{share:.0%} of its tokens are attention sinks, more than {policy.max_masked_share:.0%}."


def _safe(reason: str, sae_error_share: float, policy: PolicyConfig) -> Judgement:
    """What speaks for no harm holds only for what the SAE can see."""
    if sae_error_share > policy.max_unseen:
        return "not covered", f"{reason}, but {sae_error_share:.0%} of the change lies outside the SAE."
    return "go", f"{reason}."


def _worsens(change: Estimate, budget: float) -> tuple[bool | None, str]:
    """Whether a change of NLL is beyond the budget; None if its interval does not allow to say."""
    if not (math.isfinite(change.value) and math.isfinite(change.low)):
        return None, "answer NLL unknown"
    sentence = f"answer NLL {change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}] nats a token, budget {budget:.2f}"
    if change.value >= budget:
        return (True if change.low > 0 else None), sentence
    return (False if change.high < budget else None), sentence


def _p(p_value: float) -> str:
    return "under 0.001" if p_value < 0.001 else f"{p_value:.3f}"
