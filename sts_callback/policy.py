"""From records and thresholds to a verdict with reasons. Movement and harm are two questions; a verdict is about harm.

Harm is judged by the NLL of answers, whether or not the hooked layer has moved and whatever the SAE can express: what changes
elsewhere harms as well. What was not seen is never a `go`: no number, numbers that are not finite, too many tokens left out, a
layer that training cannot move.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sts_callback.config import DIGITS, N_LOOKS, Budget, PolicyConfig, Unit, require
from sts_callback.power import fewest_at
from sts_callback.records import Decision, DomainDrift, DomainForecast, DriftSnapshot, Estimate, Forecast, State, Verdict
from sts_callback.records.rehearsal import Rehearsal
from sts_callback.records.remedies import BudgetFinding

NOISE_MARGIN = 10
"""Drift that is called movement must be this many times what another batch layout makes of unchanged weights."""
_UNITS: Mapping[Unit, str] = {"nats/token": "nats a token", "bits/byte": "bits a byte", "points": "points of token accuracy"}
EXPECTED_OVER = 1.34
"""What a change expected at the end must come to, as a multiple of the budget, to be called over it. The least that named at
most 2 % of the domains without harm in the validation's first round, fine-tunes left out one by one."""
_BY_EXPECTED = "expected at "  # how a reason begins that rests on the change expected at the end
_SUSPICION = 0.05
"""Level of the test, of one domain at one check by itself, from which on a domain is watched."""


class Judgement(NamedTuple):
    """What is made of one protected domain."""

    decision: Decision
    reason: str
    """In a sentence."""
    state: State = "inconclusive"
    """Where its answers stand against its budget, at a check."""


_DIVERGED = Judgement("cannot tell", "the model gives NaN or infinite numbers: training has diverged.")
_CANNOT_MOVE = (
    "no weight at or below the layer that is read is trained, so nothing can drift there; read one above the lowest that is "
    "trained"
)


def judge_forecast(forecast: Forecast, policy: PolicyConfig) -> Verdict:
    """Decide before training.

    A protected domain is threatened if the training demonstrations take from its answers what is beyond its budget. They are a
    weaker push than training and know nothing of its rate and length: a forecast without harm is no promise of none.

    Args:
        forecast: of a model that has not been trained yet.
        policy: thresholds, and budgets of domains that were measured.

    Returns:
        The gravest of the domains' decisions: `no-go`, `cannot tell`, `go`.

    Raises:
        ConfigError: if a protected domain was not measured.

    """
    return _verdict(judge_domains(forecast, policy), step=0)


def judge_domains(forecast: Forecast, policy: PolicyConfig) -> dict[str, Judgement]:
    """Decide before training on each protected domain by itself.

    Returns:
        For each, what `judge_forecast` makes its verdict of: `go`, `no-go` or `cannot tell`, and why.

    Raises:
        ConfigError: if a protected domain was not measured.

    """
    _require_measured(policy, forecast.domains)
    return {name: _forecast_threat(forecast, name, budget, policy) for name, budget in policy.limits.items()}


def judge_drift(history: Sequence[DriftSnapshot], policy: PolicyConfig, levels: Sequence[float] = ()) -> Verdict:
    """Decide after a check.

    Args:
        history: the checks so far, the newest last; those before the last `patience` do not matter.
        policy: thresholds.
        levels: for each, its part of the error that the run may make (see `judge_check`). By default `alpha` over ten checks; a
            loop that makes more, say 40, gives `[policy.alpha / 40] * len(history)`.

    Returns:
        `no-go` (an alarm) if a protected domain is `on course` or `over` at each of the last `patience` checks, `watch` if at the
        newest one only or not for sure; else the gravest of `cannot tell` and `go`.

    Raises:
        ConfigError: if there is no check, a protected domain was not measured, or there are not as many levels as checks.

    """
    require(len(history) > 0, "history", history, "at least one check")
    levels = levels or [policy.alpha / N_LOOKS] * len(history)
    require(len(levels) == len(history), "levels", levels, f"one for each of {len(history)} checks")
    recent = list(zip(history, levels, strict=True))[-policy.patience :]
    judged_each = [judge_check(snapshot, policy, level) for snapshot, level in recent]
    judged = judged_each[-1]
    for name, found in judged.items():
        held = len(recent) == policy.patience and all(each[name].decision == "no-go" for each in judged_each)
        if found.decision == "no-go" and not held:
            judged[name] = found._replace(decision="watch")
    has_moved = history[-1].train.relative_drift.value >= policy.min_drift
    return replace(_verdict_on(history[-1], judged, levels[-1]), supersedes_forecast=has_moved)


def judge_check(snapshot: DriftSnapshot, policy: PolicyConfig, level: float) -> dict[str, Judgement]:
    """Decide on each protected domain by one check alone.

    The test: is the harm, in the budget's unit, above half the budget? One-sided Student t over queries, corrected for the number
    of protected domains (Holm). With `level` the error of a whole run over its number of checks, that is the chance that any
    alarm of the run is false, as long as none of its domains has got worse by half its budget.

    Args:
        snapshot: the check.
        policy: thresholds.
        level: chance of a false alarm that this check may add; 0: it may not alarm.

    Returns:
        By name: `no-go` if the test passes, then with the state `over` if the change has reached the budget and `on course` if
        not; `watch` if the test would pass for one domain at one check alone; `go` if the whole interval is `within` the budget;
        else `cannot tell`.

    Raises:
        ConfigError: if a protected domain was not measured.

    """
    _require_measured(policy, snapshot.domains)
    from sts_callback.metrics.statistics import holm  # SciPy, which reading a verdict does not take

    p_values = {name: _p_of_harm(snapshot.domains[name], budget) for name, budget in policy.limits.items()}
    corrected = holm(p_values)
    return {
        name: _judged(snapshot, name, budget, p_values[name], corrected[name] <= level > 0, policy, level)
        for name, budget in policy.limits.items()
    }


def judge_rehearsal(rehearsal: Rehearsal, policy: PolicyConfig) -> Verdict:
    """Decide before training by what a few real steps have done.

    The check after the steps at the run's own rate is judged as one in training. In a long run at a low rate a few steps do
    next to nothing, so that a `go` there becomes `watch` if the change expected at the end is clearly over the budget. Only an
    expectation from steps at ten times the rate counts; that from the run's own is the check itself. It is no `no-go`: of the
    domains that it names too few were harmed for that in the validation's second round.

    Args:
        rehearsal: one that was made.
        policy: thresholds; the one check here may make all of the error that a run may.

    Returns:
        As `judge_drift`, at step 0.

    Raises:
        ConfigError: if the run was not rehearsed, or a protected domain was not measured.

    """
    own = [dose.check for dose in rehearsal.doses if dose.multiple == 1]
    require(len(own) == 1, "rehearsal", rehearsal.skipped, "one with a dose at the run's own rate")
    (check,) = own
    judged = judge_check(check, policy, policy.alpha)
    for name, budget in policy.limits.items() if rehearsal.tenfold else ():
        found, expected = judged[name], rehearsal.expected_in(budget.unit, name)
        if found.decision in ("go", "cannot tell") and expected.value >= EXPECTED_OVER * budget.value:
            at_the_end = f"{_BY_EXPECTED}{_told(expected, budget)} at the end, over its budget of {_limit(budget)}"
            judged[name] = Judgement("watch", f"{at_the_end}; {found.reason}", found.state)
    return replace(_verdict_on(check, judged, policy.alpha), step=0)


def rests_on_expected(verdict: Verdict, name: str) -> bool:
    """Whether a rehearsal's verdict on a domain rests on the change expected at the end, not on that after its steps."""
    return verdict.reasons.get(name, "").startswith(_BY_EXPECTED)


def worst_headroom(snapshot: DriftSnapshot, policy: PolicyConfig) -> float:
    """How far the protected domain that is worst off is from its budget.

    Returns:
        Least of budgets less harm, in the budgets' unit, or as shares of the budgets where these have several units; below 0
        where a budget is exceeded. NaN if that is not known of all, or no domain is protected.

    """
    _require_measured(policy, snapshot.domains)
    one_unit = len({budget.unit for budget in policy.limits.values()}) == 1
    left = [
        (budget.value - snapshot.domains[name].harm_in(budget.unit).value) / (1 if one_unit else budget.value)
        for name, budget in policy.limits.items()
    ]
    return min(left) if left and all(map(math.isfinite, left)) else math.nan


def worst_share(snapshot: DriftSnapshot, policy: PolicyConfig) -> float:
    """How much of its budget the protected domain that is worst off has used up.

    Returns:
        1 at the budget; NaN as for `worst_headroom`, and where the model has diverged.

    """
    _require_measured(policy, snapshot.domains)
    used = [snapshot.domains[name].share_of(budget) for name, budget in policy.limits.items()]
    return max(used) if used and all(map(math.isfinite, used)) and not snapshot.diverged else math.nan


def judge_budget(harm: Estimate, budget: Budget) -> BudgetFinding:
    """Whether harm keeps a budget, by the harm and its interval alone.

    Args:
        harm: what a domain's answers have lost, in the budget's unit, with its 95 % interval.
        budget: what they may lose.

    Returns:
        `within` if the interval lies under the budget, `beyond` if the harm reaches it and the interval lies above 0, else
        `cannot tell`.

    """
    worse = _worsens(harm, budget)
    return "cannot tell" if worse is None else "beyond" if worse else "within"


def beside_loss(domain: DomainDrift, budget: Budget) -> str:
    """What has become of the answers' tokens where their NLL has risen: it may rise while no fewer of them are right.

    Args:
        domain: at a check.
        budget: of the domain.

    Returns:
        Half a sentence; empty where that is not known, or is what the budget itself is about.

    """
    found = domain.accuracy
    if budget.unit == "points" or found is None or not _is_known(found.change):
        return ""
    told = f"token accuracy {found.then:.1%} to {found.now:.1%}"
    if found.change.high < 0:
        return told
    return f"by loss alone: {told}{', no sure fall' if found.change.value < 0 else ''}"


def _require_measured(policy: PolicyConfig, domains: Collection[str]) -> None:
    for name in policy.budgets:
        require(name in domains, "protect", name, f"one that was measured, {sorted(domains)}")


def _cannot_read(forecast: Forecast, name: str, policy: PolicyConfig) -> str | None:
    """Why a forecast says nothing about one of its domains, in a sentence; None if it does."""
    domain = forecast.domains[name]
    if doubt := _too_much_masked(domain, policy):
        return f"{doubt}."
    if not forecast.can_move:
        return f"{_CANNOT_MOVE}."
    if forecast.noise_floor * NOISE_MARGIN > policy.min_drift:
        return f"unchanged weights alone drift by {forecast.noise_floor:.1%}; drift from {policy.min_drift:.0%} counts."
    if not math.isfinite(domain.sts_net.value):
        return "nothing shifted in context."
    return None


def _verdict(judged: dict[str, Judgement], step: int) -> Verdict:
    order: tuple[Decision, ...] = ("no-go", "watch", "cannot tell", "go")
    decision: Decision = next((d for d in order if any(found.decision == d for found in judged.values())), "go")
    threatened = tuple(name for name, found in judged.items() if found.decision == decision) if decision != "go" else ()
    return Verdict(decision, threatened, {name: found.reason for name, found in judged.items()}, step)


def _verdict_on(check: DriftSnapshot, judged: dict[str, Judgement], level: float) -> Verdict:
    diverged = {name: _DIVERGED for name in check.diverged}  # also what nobody protects: the model is broken
    states = {name: found.state for name, found in judged.items()}
    return replace(_verdict(judged | diverged, check.step), states=states, level=level)


def _forecast_threat(forecast: Forecast, name: str, budget: Budget, policy: PolicyConfig) -> Judgement:
    if doubt := _cannot_read(forecast, name, policy):
        return Judgement("cannot tell", doubt)
    domain, transfer = forecast.domains[name], forecast.domains[name].transfer
    known = math.isfinite(transfer.value)
    extent = f"transfer {transfer.value:.0%}, {transfer.low:.0%} to {transfer.high:.0%}" if known else "transfer unknown"
    extent += _outside(domain, policy)
    harm, is_accuracy = domain.harm_in(budget.unit), budget.unit == "points"
    sentence = f"{'' if is_accuracy else 'answer NLL '}{_told(harm, budget)}, budget {_limit(budget)}"
    if not _is_known(harm):
        sentence = _unknown(budget)
    worse = _worsens(harm, budget)
    if worse is None:
        return Judgement("cannot tell", f"direction unsure ({sentence}; {extent}).")
    if worse:
        return Judgement("no-go", f"{'token accuracy falls' if is_accuracy else 'NLL rises'} in context ({sentence}; {extent}).")
    return Judgement("go", f"no harm in context ({sentence}; {extent}).")


def _p_of_harm(domain: DomainDrift, budget: Budget) -> float:
    """Whether its answers have lost more than half the budget, before correction; NaN if that is not known."""
    from sts_callback.metrics.statistics import p_above  # likewise

    return p_above(*domain.query_harm_in(budget.unit), budget.value / 2)


def _judged(
    snapshot: DriftSnapshot, name: str, budget: Budget, p_value: float, passed: bool, policy: PolicyConfig, level: float
) -> Judgement:
    domain, harm, limit = snapshot.domains[name], snapshot.domains[name].harm_in(budget.unit), _limit(budget)
    moved = _movement(snapshot, domain, policy)
    if domain.n_not_finite:
        return _DIVERGED
    if not (math.isfinite(harm.value) and math.isfinite(p_value)):
        return Judgement("cannot tell", f"{_unknown(budget)}; {moved}.")
    at = f"at {_told(harm, budget)} after {_steps(snapshot.step)}"
    against = f"p {_p(p_value)} against half of it"
    if passed and domain.n_queries < (fewest := fewest_at(policy, level)):
        few = f"{domain.n_queries} queries are too few for an alarm, {fewest} are needed"
        return Judgement("cannot tell", f"{at}, budget {limit}: {few}; {moved}.")
    if passed:
        is_over = harm.value >= budget.value
        where = f"over its budget of {limit}" if is_over else f"on course to pass {limit}"
        beside = beside_loss(domain, budget)
        reason = f"{at}, {where} ({against}){beside and f'; {beside}'}; {moved}."
        return Judgement("no-go", reason, "over" if is_over else "on course")
    is_within = harm.high < budget.value
    state: State = "within" if is_within else "inconclusive"
    if p_value <= _SUSPICION:
        why = "not sure enough for an alarm" if level > 0 else "at a check beyond the planned ones, which alone may alarm"
        return Judgement("watch", f"{at}, perhaps on course to pass {limit} ({against}, {why}); {moved}.", state)
    if is_within and _unseen(snapshot, domain, policy):  # never a go where the layer could not be looked at
        return Judgement("cannot tell", f"{at}, within its budget of {limit}; {moved}.", state)
    if is_within:
        return Judgement("go", f"{at}, within its budget of {limit}; {moved}.", state)
    return Judgement("cannot tell", f"{at}, too unsure for a budget of {limit}; {moved}.", state)


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


def _movement(snapshot: DriftSnapshot, domain: DomainDrift, policy: PolicyConfig) -> str:
    """How far a representation has drifted, and how much of that was seen, in words."""
    if doubt := _unseen(snapshot, domain, policy):
        return f"drift unknown: {doubt}"
    drift = domain.relative_drift.value
    kind, size = ("raw drift", domain.raw_drift) if drift < policy.min_drift <= domain.raw_drift else ("drift", drift)
    if math.isnan(size):
        return "drift unknown"
    if size < policy.min_drift:
        return f"representation has not drifted ({kind} {size:.1%}, under {policy.min_drift:.0%})"
    return f"representation drifted ({kind} {size:.1%}, at least {policy.min_drift:.0%}{_outside(domain, policy)})"


def _unseen(snapshot: DriftSnapshot, domain: DomainDrift, policy: PolicyConfig) -> str:
    """Why a check says nothing of a domain's movement; empty if it does."""
    return _too_much_masked(domain, policy) or ("" if snapshot.can_move else _CANNOT_MOVE)


def _outside(domain: DomainForecast | DomainDrift, policy: PolicyConfig) -> str:
    """Half a sentence where most of the movement is nothing that the dictionary can express."""
    share = domain.sae_error_share
    if not share > policy.max_unseen:
        return ""
    return f", {'all' if share >= 0.995 else format(share, '.0%')} of it outside the SAE"


def _too_much_masked(domain: DomainForecast | DomainDrift, policy: PolicyConfig) -> str:
    """Why too few tokens of a domain were compared; empty if enough were."""
    if not domain.n_tokens:
        return "none of its tokens could be compared"
    share = domain.n_masked / (domain.n_masked + domain.n_tokens)
    if share <= policy.max_masked_share:
        return ""
    return f"{share:.0%} of its tokens are attention sinks, more than {policy.max_masked_share:.0%}"


def _worsens(harm: Estimate, budget: Budget) -> bool | None:
    """Whether harm is beyond a budget; None if its interval does not allow to say."""
    if not _is_known(harm):
        return None
    if harm.value >= budget.value:
        return True if harm.low > 0 else None
    return False if harm.high < budget.value else None


def _is_known(estimate: Estimate) -> bool:
    return math.isfinite(estimate.value) and math.isfinite(estimate.low)


def _told(harm: Estimate, budget: Budget) -> str:
    """Harm with its interval, as a change of NLL or of token accuracy: the one rises by it, the other falls."""
    sign, form = (-1 if budget.unit == "points" else 1), f"+.{DIGITS[budget.unit]}f"
    value, *ends = (sign * number + 0.0 for number in vars(harm).values())  # no -0.0
    return f"{value:{form}} [{min(ends):{form}}, {max(ends):{form}}] {_UNITS[budget.unit]}"


def _limit(budget: Budget) -> str:
    return f"{budget.value:.{DIGITS[budget.unit]}f}"


def _unknown(budget: Budget) -> str:
    return f"{'token accuracy' if budget.unit == 'points' else 'answer NLL'} unknown"


def _p(p_value: float) -> str:
    return "under 0.001" if p_value < 0.001 else f"{p_value:.3f}"
