"""The content of a report, without its form: built from records, frozen, plain Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from sts_callback.config import PlainBudget
from sts_callback.records import (
    UNKNOWN,
    Decision,
    DriftSnapshot,
    Estimate,
    Forecast,
    Record,
    Snippet,
    State,
    TopActivatingExamples,
    Verdict,
)
from sts_callback.records.record import StoredAs
from sts_callback.records.rehearsal import Rehearsal, Trials
from sts_callback.records.remedies import Attribution
from sts_callback.records.run import Fault, JudgedCheck, Logged, Postponed, RunSettings
from sts_callback.report.advice import Advice, advice_on, to_rank_rows, to_report_again
from sts_callback.report.headline import Headline, headline
from sts_callback.report.summary import Summary, of_run

_NAN = math.nan
_MOST_FEATURES = 24  # of which texts are quoted; what a reader looks at, and what keeps the page small
_LONGEST_SIDE, _LONGEST_TOKEN = 90, 40  # characters of a quotation


@dataclass(frozen=True)
class Stretch(Record):
    """Consecutive checks with the same verdict on the same domains."""

    decision: Decision
    threatened: tuple[str, ...]
    first_step: int
    last_step: int
    n_checks: int


@dataclass(frozen=True)
class Series(Record):
    """One domain over all checks, in the order of their steps."""

    drift: tuple[Estimate, ...]
    """Relative drift at each check."""
    nll_change: tuple[Estimate, ...]
    """Change of the answers' NLL at each check, in nats per token."""
    alarmed_at: tuple[int, ...]
    """Steps of checks that alarmed for it."""
    watched_at: tuple[int, ...]
    """Steps of checks at which it may have been threatened, not surely or not for long enough to alarm."""
    states: tuple[str, ...] = ()
    """How it stood against its budget at each check; empty texts where it is not protected, or nothing was judged."""


@dataclass(frozen=True)
class Drift(Record):
    """Drift and harm, check by check."""

    steps: tuple[int, ...]
    series: Mapping[str, Series]
    """Curves of the training data, then of each domain."""
    verdicts: tuple[Stretch, ...]
    latest: DriftSnapshot
    latest_reasons: Mapping[str, str]
    latest_states: Mapping[str, State]
    """Where each protected domain stands; empty in files from before there were states."""
    n_features: int
    """Number of features that count as those that moved most."""
    n_shared: tuple[int, ...]
    """Number of these that the forecast named, at each check."""
    share_on_forecast: tuple[float, ...]
    """Share of the training data's drift on the forecast's features, at each check."""
    superseded_at: int
    """First step at which the training data itself had really moved. 0 if there is none."""
    output_drift: Annotated[tuple[Estimate, ...], StoredAs("text_drift")]
    """Drift of what the policy writes, at each check. NaN without rollouts."""


@dataclass(frozen=True)
class FeatureRow(Record):
    """Top activating examples of a feature, and why the feature is listed."""

    words: TopActivatingExamples
    """Examples with shortened quotations."""
    forecast_rank: int
    """Its rank among the forecast's features, from 1, the most shifted. 0 if it is not among them."""
    moved_rank: int
    """Its rank among the features that training moved most at the last check. 0 if it is not among them."""


@dataclass(frozen=True)
class Cost(Record):
    """Time in seconds. NaN if unknown."""

    n_checks: int
    checks_s: float
    longest_check_s: float
    overhead_share: float
    """Time of checks as a share of that of training."""
    training_s: float
    """Seconds of training itself, up to the last check."""
    postponed: tuple[Postponed, ...]


@dataclass(frozen=True)
class FaultRow(Record):
    """A fault and how often it occurred."""

    first: Fault
    n_times: int
    last_step: int


@dataclass(frozen=True)
class ReportData(Record):
    """The content of a report."""

    headline: Headline
    budgets: Mapping[str, PlainBudget]
    """Protected domains and their budgets; NaN where the log does not tell."""
    domains: tuple[str, ...]
    """All domains in the order of the report: threatened, protected, then those that move most."""
    settings: RunSettings | None
    forecast: Forecast | None
    forecast_verdict: Verdict | None
    trials: Trials | None
    transfers: Mapping[str, Mapping[str, float]]
    """Transfer of each domain by each SAE, the deciding SAE first. Empty if there was only one."""
    drift: Drift | None
    features: tuple[FeatureRow, ...]
    n_features_untold: int
    """Number of features with examples in the log that the report leaves out."""
    blame: Attribution | None
    cost: Cost
    faults: tuple[FaultRow, ...]
    unreadable: tuple[str, ...]
    rehearsal: Rehearsal | None = None
    rehearsal_verdict: Verdict | None = None
    summary: Summary | None = None
    """The one table of what was measured last; None where nothing was."""
    advice: tuple[Advice, ...] = ()
    """What to do about a no-go or an alarm."""
    to_rank_rows: tuple[Advice, ...] = ()
    """How the training rows to blame come into the report."""
    to_report_again: Advice | None = None
    """How the report is written again."""
    has_sae: bool = True
    """Whether an SAE was used; true also if that cannot be read."""


def build(logged: Logged, output_dir: Path = Path("OUTPUT_DIR")) -> ReportData:
    """Build the content of a report from the folder of a run.

    Args:
        logged: all that could be read. Any part may be missing.
        output_dir: of the run, for the commands that are advised.

    """
    top, features = headline(logged), _told_features(logged)
    return ReportData(
        headline=top,
        budgets=_budgets(logged),
        domains=_order(logged, top.threatened),
        settings=logged.settings,
        forecast=logged.forecast,
        forecast_verdict=logged.forecast_verdict,
        trials=logged.trials,
        transfers=_transfers(logged),
        drift=_drift(logged.checks) if logged.checks else None,
        features=features,
        n_features_untold=len(logged.top_examples) - len(features),
        blame=_told_blame(logged.blame) if logged.blame else None,
        cost=_cost(logged),
        faults=_told_faults(logged.faults),
        unreadable=logged.unreadable,
        rehearsal=logged.rehearsal,
        rehearsal_verdict=logged.rehearsal_verdict,
        summary=of_run(logged),
        advice=tuple(_advice(logged, output_dir)),
        to_rank_rows=tuple(_to_rank_rows(logged, output_dir, top.threatened)),
        to_report_again=to_report_again(output_dir),
        has_sae=logged.has_sae,
    )


def _advice(logged: Logged, output_dir: Path) -> list[Advice]:
    verdict = logged.verdict
    if verdict is None:
        return []
    budgets = logged.settings.policy.budgets if logged.settings else {}
    return advice_on(verdict, output_dir, logged.best_checkpoint, logged.given, budgets, has_sae=logged.has_sae)


def _to_rank_rows(logged: Logged, output_dir: Path, threatened: Sequence[str]) -> list[Advice]:
    names = threatened or tuple(_budgets(logged)) or _order(logged, ())
    return to_rank_rows(names, output_dir, logged.given, logged.settings.policy.budgets if logged.settings else {})


def _budgets(logged: Logged) -> dict[str, PlainBudget]:
    if logged.settings is not None:
        return dict(logged.settings.policy.budgets)
    verdicts = [*(c.verdict for c in logged.checks[-1:]), *([logged.verdict_before] if logged.verdict_before else [])]
    return {name: _NAN for verdict in verdicts for name in verdict.reasons}


def _order(logged: Logged, threatened: Sequence[str]) -> tuple[str, ...]:
    """Sort domains: threatened, protected, others; each by drift if there is any, else by transfer."""
    sizes: dict[str, float] = {}
    if logged.forecast is not None:
        sizes = {n: d.transfer.value for n, d in logged.forecast.domains.items()}
    if logged.checks:
        sizes = {n: d.relative_drift.value for n, d in logged.checks[-1].snapshot.domains.items()}
    protected = _budgets(logged)
    return tuple(sorted(sizes, key=lambda n: (n not in threatened, n not in protected, math.isnan(sizes[n]), -sizes[n])))


def _transfers(logged: Logged) -> dict[str, dict[str, float]]:
    if logged.forecast is None or not logged.other_forecasts:
        return {}
    return {
        f"{number}: {f.identity.sae_name} at {f.identity.hook_name}": {  # the same SAE may be given twice
            name: d.transfer.value for name, d in f.domains.items()
        }
        for number, f in enumerate((logged.forecast, *logged.other_forecasts), 1)
    }


def _drift(checks: Sequence[JudgedCheck]) -> Drift:
    snapshots, latest = [c.snapshot for c in checks], checks[-1]
    superseding = (c.snapshot.step for c in checks if c.verdict.supersedes_forecast)
    return Drift(
        steps=tuple(s.step for s in snapshots),
        series={name: _series(name, checks) for name in (latest.snapshot.train.name, *latest.snapshot.domains)},
        verdicts=tuple(_stretches(c.verdict for c in checks)),
        latest=latest.snapshot,
        latest_reasons=latest.verdict.reasons,
        latest_states=latest.verdict.states,
        n_features=len(latest.snapshot.realised_features),
        n_shared=tuple(s.n_shared for s in snapshots),
        share_on_forecast=tuple(s.train.share_on_forecast for s in snapshots),
        superseded_at=next(superseding, 0),
        output_drift=tuple(s.output_drift for s in snapshots),
    )


def _series(name: str, checks: Sequence[JudgedCheck]) -> Series:
    sets = [{c.snapshot.train.name: c.snapshot.train, **c.snapshot.domains}.get(name) for c in checks]
    steps: dict[str, list[int]] = {"no-go": [], "watch": []}
    for check in checks:
        if name in check.verdict.threatened and check.verdict.decision in steps:
            steps[check.verdict.decision].append(check.snapshot.step)
    return Series(
        drift=tuple(UNKNOWN if d is None else d.relative_drift for d in sets),
        nll_change=tuple(UNKNOWN if d is None else d.nll_change for d in sets),
        alarmed_at=tuple(steps["no-go"]),
        watched_at=tuple(steps["watch"]),
        states=tuple(c.verdict.states.get(name, "") for c in checks),
    )


def _stretches(verdicts: Iterable[Verdict]) -> Iterable[Stretch]:
    for (decision, threatened), same in itertools.groupby(verdicts, key=lambda v: (v.decision, v.threatened)):
        steps = [verdict.step for verdict in same]
        yield Stretch(decision, threatened, steps[0], steps[-1], len(steps))


def _told_features(logged: Logged) -> tuple[FeatureRow, ...]:
    """Take the features of the forecast and those that moved most at the last check, in turn."""
    by_number = {words.feature: words for words in logged.top_examples}
    shifted = logged.forecast.features if logged.forecast is not None else ()
    moved = tuple(j for j, _ in logged.checks[-1].snapshot.train.top_features) if logged.checks else ()
    wanted = [j for pair in itertools.zip_longest(shifted, moved) for j in pair if j in by_number]
    rest = () if logged.forecast or logged.checks else by_number  # without these, any feature is better than none
    return tuple(
        FeatureRow(
            words=replace(by_number[j], snippets={name: _short(some) for name, some in by_number[j].snippets.items()}),
            forecast_rank=shifted.index(j) + 1 if j in shifted else 0,
            moved_rank=moved.index(j) + 1 if j in moved else 0,
        )
        for j in list(dict.fromkeys([*wanted, *rest]))[:_MOST_FEATURES]
    )


def _told_blame(found: Attribution) -> Attribution:
    """Shorten the quotations."""
    domains = {
        name: replace(d, rows=tuple(replace(row, snippet=_short([row.snippet])[0]) for row in d.rows))
        for name, d in found.domains.items()
    }
    return replace(found, domains=domains)


def _short(snippets: Sequence[Snippet]) -> tuple[Snippet, ...]:
    return tuple(
        Snippet(s.before[-_LONGEST_SIDE:], s.token[:_LONGEST_TOKEN], s.after[:_LONGEST_SIDE], s.activation) for s in snippets
    )


def _cost(logged: Logged) -> Cost:
    durations = [c.snapshot.seconds for c in logged.checks]
    clocks = [c.time for c in logged.checks if c.time is not None]
    # Each session counts from its own start: its last time is the one before the next session starts at 0 again.
    last = [one for one, after in itertools.zip_longest(clocks, clocks[1:]) if not after or after.training_s < one.training_s]
    training_s = sum(clock.training_s for clock in last) if last else _NAN
    return Cost(
        n_checks=len(durations),
        checks_s=sum(durations, 0.0),
        longest_check_s=max(durations, default=_NAN),
        overhead_share=sum(clock.checks_s for clock in last) / training_s if training_s > 0 else _NAN,
        training_s=training_s,
        postponed=logged.postponed,
    )


def _told_faults(faults: Iterable[Fault]) -> tuple[FaultRow, ...]:
    same: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        same.setdefault((fault.what, fault.error), []).append(fault)
    return tuple(FaultRow(some[0], len(some), some[-1].step) for some in same.values())
