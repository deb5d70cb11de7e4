"""The one table of a forecast, a rehearsal or a check: what a person asks first, as words. Terminal and page both show it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sts_callback.config import Budget, PlainBudget, PolicyConfig
from sts_callback.policy import judge_domains, rests_on_expected
from sts_callback.records import (
    UNKNOWN,
    Decision,
    DomainDrift,
    DomainForecast,
    DriftSnapshot,
    Estimate,
    Forecast,
    Record,
    Verdict,
    downwards,
)
from sts_callback.records.rehearsal import Rehearsal
from sts_callback.records.run import Logged
from sts_callback.report.formatting import (
    budget,
    counted,
    harm_form,
    in_nats,
    listing,
    nats,
    percent,
    percent_1,
    seconds,
    with_ends,
)
from sts_callback.runs.ledger import LEVEL

Standing = Literal["", "within", "on course", "over", "cannot tell"]
"""Of a protected domain, how it stands against its budget; empty for others and where nothing was judged."""

_BY_DECISION: Mapping[Decision, Standing] = {"go": "within", "no-go": "over"}
_MOST_OTHERS = 6  # unprotected domains that are shown
_CHANGE = "Change: of the answers' NLL, nats a token, + is worse; 95% intervals."
_MANY_CHECKS = 10  # as many as a long run plans: no word is lost on what pays for more
_AT_THE_END = "expected at the end"


@dataclass(frozen=True)
class Row(Record):
    """A domain."""

    name: str
    cells: tuple[str, ...]
    """Under the summary's titles."""
    standing: Standing
    is_threatened: bool
    is_protected: bool


@dataclass(frozen=True)
class Summary(Record):
    """A table of at most six columns, and what it rests on."""

    titles: tuple[str, ...]
    """Of the columns behind the domain's name."""
    rows: tuple[Row, ...]
    """Threatened domains, protected ones, others; the worst first. The training data itself comes last."""
    basis: str
    """In a sentence."""
    legend: str
    """What the columns hold."""
    decides: str = ""
    """Which figure decides, where another that is shown seems to say something else; else empty."""


class _Column(NamedTuple):
    title: str
    cell: Callable[[str], str]
    """Its text, by the name of a domain."""


def of_forecast(
    forecast: Forecast, verdict: Verdict, policy: PolicyConfig | None, expected: Mapping[str, Estimate] | None = None
) -> Summary:
    """What training examples in context do.

    Args:
        forecast: to be shown.
        verdict: on it.
        policy: with the protected domains; None where that is not known.
        expected: change of each domain's NLL at the end of the run, in nats per token, by past runs.

    """
    domains, budgets, expected = forecast.domains, policy.budgets if policy else {}, expected or {}
    judged = judge_domains(forecast, policy) if policy else {}
    standings = {name: _BY_DECISION.get(found.decision, "cannot tell") for name, found in judged.items()}
    columns = [
        *([_Column(_AT_THE_END, lambda name: _change(expected.get(name)))] if expected else []),
        _Column("in context", lambda name: _harm(domains[name], budgets.get(name))),
        _Column("moves", lambda name: percent(domains[name].transfer.value)),
    ]
    basis = f"By {_queries(domains.values())}, training examples in context; rate and length unknown."
    told = f" Expected: by past runs of like length and rate, {percent(LEVEL)} intervals." if expected else ""
    legend = f"{_CHANGE} Moves: 100% as the training data.{told}"
    decides = _decides(verdict, budgets, domains, expected, "in context")
    return _made(domains, columns, verdict, standings, budgets, (basis, legend), decides)


def of_rehearsal(
    rehearsal: Rehearsal, verdict: Verdict, budgets: Mapping[str, PlainBudget], max_overhead: float = 1.0
) -> Summary:
    """What a few real steps have done, and what is expected at the end.

    Args:
        rehearsal: with doses.
        verdict: on it.
        budgets: of the protected domains.
        max_overhead: share of the training's time that checks may take; from 1 on there is no limit.

    """
    own, *further = rehearsal.doses
    then = "".join(f", then {dose.n_steps} at {dose.learning_rate:.2g}" for dose in further)
    basis = (
        f"By {own.n_steps} steps at the peak rate of {own.learning_rate:.2g}{then}, put back; "
        f"{rehearsal.steps_planned} are planned; "
        f"{_queries(own.check.domains.values())}; {seconds(rehearsal.seconds)}." + _cost_of_checks(rehearsal, max_overhead)
    )
    legend = _CHANGE + (" Expected: by past runs of a model of this size." if rehearsal.expected else "")
    expected = (_AT_THE_END, rehearsal.expected)
    return _of_snapshot(own.check, verdict, budgets, expected, f"after {own.n_steps} steps", (basis, legend))


def _cost_of_checks(rehearsal: Rehearsal, max_overhead: float) -> str:
    """What a check takes, and where few are paid for, how many; empty if that is not known."""
    cost = rehearsal.steps_of_a_check
    if not math.isfinite(cost):
        return ""
    told, n_paid = f" A check takes as long as {cost:.2g} steps of training", int(max_overhead * rehearsal.steps_planned / cost)
    if max_overhead >= 1 or n_paid >= _MANY_CHECKS:
        return f"{told}."
    left = "no time for a check" if n_paid == 0 else f"time for {counted(n_paid, 'check')}"
    remedy = "max_overhead=None checks whenever asked"
    return f"{told}; max_overhead={max_overhead:g} leaves {left} before the last one, {remedy}."


def of_check(
    snapshot: DriftSnapshot,
    verdict: Verdict,
    budgets: Mapping[str, PlainBudget],
    expected: Mapping[str, Estimate] | None = None,
    next_step: int = 0,
) -> Summary:
    """What training has done since step 0.

    Args:
        snapshot: the check.
        verdict: on it.
        budgets: of the protected domains.
        expected: change of each domain's NLL at the end of the run, as the rehearsal had it.
        next_step: of the next planned check; 0 if none is known.

    """
    following = f" Next planned check: step {next_step}." if next_step else ""
    basis = f"By {_queries(snapshot.domains.values())}, against step 0; {seconds(snapshot.seconds)}.{following}"
    legend = _CHANGE + (" Expected: by the rehearsal." if expected else "")
    title = _AT_THE_END if next_step else "was expected"
    return _of_snapshot(snapshot, verdict, budgets, (title, expected or {}), "now", (basis, legend))


def of_run(logged: Logged) -> Summary | None:
    """The newest of what a run has left: its last check, its rehearsal or its forecast; None if it has none of them."""
    policy = logged.settings.policy if logged.settings else None
    budgets = policy.budgets if policy else {}
    if logged.checks:
        last, expected = logged.checks[-1], logged.rehearsal.expected if logged.rehearsal else {}
        return of_check(last.snapshot, last.verdict, budgets, expected, next_check(logged))
    if logged.rehearsal is not None and logged.rehearsal.doses and logged.rehearsal_verdict is not None:
        limit = logged.settings.max_overhead if logged.settings else 1.0
        return of_rehearsal(logged.rehearsal, logged.rehearsal_verdict, budgets, limit)
    if logged.forecast is not None and logged.forecast_verdict is not None:
        return of_forecast(logged.forecast, logged.forecast_verdict, policy)
    return None


def next_check(logged: Logged) -> int:
    """The step of the next planned check of a run; 0 if there is none, or the plan is not known."""
    done = max([check.snapshot.step for check in logged.checks] + [skipped.step for skipped in logged.postponed], default=0)
    looks = logged.settings.looks if logged.settings else None
    return looks.next_after(done) if looks else 0


def standing_of(state: str) -> Standing:
    """A state at a check, as a person is told it; any other text as none."""
    found: dict[str, Standing] = {"within": "within", "on course": "on course", "over": "over", "inconclusive": "cannot tell"}
    return found.get(state, "")


def _decides(
    verdict: Verdict,
    budgets: Mapping[str, PlainBudget],
    domains: Mapping[str, DomainForecast] | Mapping[str, DomainDrift],
    expected: Mapping[str, Estimate],
    when: str,
) -> str:
    """Which figure the verdict on a domain rests on, where another that is shown seems to say something else; else empty."""
    is_threat = verdict.decision in ("no-go", "watch")
    about = verdict.threatened if is_threat else tuple(budgets) if verdict.decision == "go" else ()
    by_expected, by_measured, by_test = list[str](), list[str](), list[str]()
    for name in (one for one in about if one in domains and one in budgets):
        limit, change = Budget.of(budgets[name]), expected.get(name, UNKNOWN)
        if rests_on_expected(verdict, name):
            by_expected.append(name)
        elif change.low <= 0 if is_threat else in_nats(budgets[name]) <= max(change.value, change.high):
            by_measured.append(name)
        if is_threat and name not in by_expected and domains[name].harm_in(limit.unit).low <= 0:
            by_test.append(name)
    told = (
        (by_expected, f"the expected change decides, not that {when}"),
        (by_measured, f"the change {when} decides, not the expected one"),
        (by_test, "a one-sided test against half the budget decides, not the interval"),
    )
    return " ".join(f"{listing(names)}: {what}." for names, what in told if names)


def _of_snapshot(
    snapshot: DriftSnapshot,
    verdict: Verdict,
    budgets: Mapping[str, PlainBudget],
    expected: tuple[str, Mapping[str, Estimate]],
    now: str,
    basis: tuple[str, str],
) -> Summary:
    title, changes = expected
    sets = {**snapshot.domains, snapshot.train.name: snapshot.train}
    standings = {name: standing_of(state) for name, state in verdict.states.items()}
    columns = [
        *([_Column(title, lambda name: _change(changes.get(name)))] if changes else []),
        _Column(now, lambda name: _harm(sets[name], budgets.get(name))),
        _Column("moved", lambda name: percent_1(sets[name].relative_drift.value)),
    ]
    decides = _decides(verdict, budgets, snapshot.domains, changes, now)
    return _made(snapshot.domains, columns, verdict, standings, budgets, basis, decides, train=snapshot.train.name)


def _made(
    domains: Mapping[str, DomainForecast] | Mapping[str, DomainDrift],
    columns: Sequence[_Column],
    verdict: Verdict,
    standings: Mapping[str, Standing],
    budgets: Mapping[str, PlainBudget],
    basis: tuple[str, str],
    decides: str,
    train: str = "",
) -> Summary:
    protected = budgets or verdict.reasons
    worst_first = sorted(
        domains,
        key=lambda name: (name not in verdict.threatened, name not in protected, *downwards(domains[name].nll_change.value)),
    )
    others = [name for name in worst_first if name not in protected]
    left_out = others[_MOST_OTHERS:]
    rows = tuple(
        Row(
            name,
            (*(column.cell(name) for column in columns), *([_against(standings, budgets, name)] if protected else [])),
            standings.get(name, ""),
            name in verdict.threatened,
            name in protected,
        )
        for name in [*(name for name in worst_first if name not in left_out), *([train] if train else [])]
    )
    titles = (*(column.title for column in columns), *(["budget"] if protected else []))
    more = f" {counted(len(left_out), 'more domain')} that nobody protects: in the report." if left_out else ""
    return Summary(titles, rows, basis[0], basis[1] + more, decides)


def _against(standings: Mapping[str, Standing], budgets: Mapping[str, PlainBudget], name: str) -> str:
    standing = standings.get(name, "")
    if standing in ("", "cannot tell") or name not in budgets:
        return standing
    return f"{standing} {'to ' if standing == 'on course' else ''}{budget(budgets[name])}"


def _harm(measured: DomainForecast | DomainDrift, given: PlainBudget | None) -> str:
    """In the unit of the domain's budget; of others, in nats a token."""
    limit = None if given is None else Budget.of(given)
    if limit is None or limit.unit == "nats/token":
        return _change(measured.nll_change)
    return with_ends(measured.harm_in(limit.unit), harm_form(limit.unit))


def _change(estimate: Estimate | None) -> str:
    return "" if estimate is None else with_ends(estimate, nats)


def _queries(domains: Iterable[DomainForecast | DomainDrift]) -> str:
    numbers = sorted({domain.n_queries for domain in domains})
    if not numbers:
        return "No query"
    some = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"{some} queries a domain"
