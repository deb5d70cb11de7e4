"""From records and thresholds to a verdict with reasons. Movement and harm are two questions; only both together are a threat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sts_callback.config import PolicyConfig
from sts_callback.records import Decision, DomainDrift, DriftSnapshot, Forecast, Verdict


def judge_forecast(forecast: Forecast, policy: PolicyConfig) -> Verdict:
    """Decide before training.

    A protected domain is threatened if training is expected to move it (the training demonstrations shift it on the same
    features as the training data itself) and to worsen it (they raise the NLL of its answers beyond its budget).
    Demonstrations are a weaker push than training, so a forecast without harm is no promise of none: it says where to look.

    Returns:
        `no-go` if a domain is threatened, else `cannot tell` if for one the evidence does not suffice, else `go`.

    """
    judged = {name: _forecast_threat(forecast, name, budget, policy) for name, budget in policy.budgets.items()}
    return _verdict(judged, step=0)


def judge_drift(history: Sequence[DriftSnapshot], policy: PolicyConfig) -> Verdict:
    """Decide after a check.

    Args:
        history: all checks so far, the newest last.
        policy: thresholds.

    Returns:
        `no-go` (an alarm) if a protected domain has moved and worsened at each of the last `patience` checks, `watch` if at
        the newest one only, `cannot tell` if one cannot be judged, else `go`.

    """
    newest = history[-1]
    judged: dict[str, tuple[Decision, str]] = {}
    for name, budget in policy.budgets.items():
        decision, reason = _drift_threat(newest.domains[name], budget, policy)
        recent = history[-policy.patience :]
        held = len(recent) == policy.patience and all(
            _drift_threat(snapshot.domains[name], budget, policy)[0] == "no-go" for snapshot in recent
        )
        if decision == "no-go" and not held:
            decision = "watch"
        judged[name] = decision, reason
    return _verdict(judged, step=newest.step)


def _verdict(judged: dict[str, tuple[Decision, str]], step: int) -> Verdict:
    order: tuple[Decision, ...] = ("no-go", "watch", "cannot tell", "go")
    decision: Decision = next((d for d in order if any(found == d for found, _ in judged.values())), "go")
    threatened = tuple(name for name, (found, _) in judged.items() if found == decision) if decision != "go" else ()
    return Verdict(decision, threatened, {name: reason for name, (_, reason) in judged.items()}, step)


def _forecast_threat(forecast: Forecast, name: str, budget: float, policy: PolicyConfig) -> tuple[Decision, str]:
    domain = forecast.domains[name]
    masked_share = domain.n_masked / max(1, domain.n_masked + domain.n_tokens)
    if masked_share > policy.max_masked_share:
        return (
            "cannot tell",
            f"{masked_share:.0%} of its tokens are attention sinks, more than {policy.max_masked_share:.0%}.",
        )
    transfer = forecast.transfer(domain)
    if not math.isfinite(transfer):
        return "cannot tell", "nothing shifted in context, so no transfer can be read off."
    moves = transfer >= policy.min_transfer
    extent = f"{transfer:.0%} of the training data's own transfer, {'at least' if moves else 'under'} {policy.min_transfer:.0%}"
    if not moves:
        return "go", f"expected to stay ({extent})."
    worse, sentence = _worsens(domain.nll_change, domain.nll_change_se, budget, policy)
    if worse is None:
        return "cannot tell", f"expected to move ({extent}), in an unknown direction ({sentence})."
    if worse:
        return "no-go", f"expected to move ({extent}) and to worsen ({sentence})."
    return "go", f"expected to move ({extent}), without harm in context ({sentence})."


def _drift_threat(domain: DomainDrift, budget: float, policy: PolicyConfig) -> tuple[Decision, str]:
    if not math.isfinite(domain.relative_drift):
        return "cannot tell", "no token could be compared with step 0."
    moved = domain.relative_drift >= policy.min_drift
    extent = f"drift {domain.relative_drift:.1%}, {'at least' if moved else 'under'} {policy.min_drift:.0%}"
    worse, sentence = _worsens(domain.nll_change, domain.nll_change_se, budget, policy)
    if not moved:
        return "go", f"has not moved ({extent}; {sentence})."
    if worse is None:
        return "cannot tell", f"has moved ({extent}), direction unsure ({sentence})."
    if worse:
        return "no-go", f"has moved ({extent}) and worsened ({sentence})."
    return "go", f"has moved ({extent}) without harm ({sentence})."


def _worsens(change: float, error: float, budget: float, policy: PolicyConfig) -> tuple[bool | None, str]:
    """Whether a change of NLL is beyond the budget; None if its error does not allow to say."""
    if not (math.isfinite(change) and math.isfinite(error)):
        return None, "answer NLL unknown"
    sentence = f"answer NLL {change:+.2f} ± {error:.2f} nats a token, budget {budget:.2f}"
    if change >= budget:
        return (True if change >= policy.n_standard_errors * error else None), sentence
    return (False if change + policy.n_standard_errors * error < budget else None), sentence
