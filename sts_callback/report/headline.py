"""The verdict in one sentence, its reasons, and what one must know before trusting it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sts_callback.policy import worst_share
from sts_callback.records import POWER, Check, Decision, Record, Verdict
from sts_callback.records.remedies import BudgetFinding
from sts_callback.records.run import Logged, RunSettings
from sts_callback.report.formatting import counted, in_a_row, listing, percent, percent_1
from sts_callback.report.trials import answers

Stage = Literal["forecast", "rehearsal", "check"]
"""What a verdict is on."""

_BEFORE: dict[Decision, str] = {
    "go": "no sign of harm to {protected} before training",
    "watch": "{threatened} may pass a budget by the end of training",
    "no-go": "training is expected to make {threatened} worse",
    "not covered": "nothing speaks against {threatened}, but most of the change there lies outside the SAE",
    "cannot tell": "the evidence does not suffice for {threatened}",
}
_DURING: dict[Decision, str] = {
    "go": "within budget: {protected}",
    "watch": "{threatened} may be on course to pass a budget: not surely, or not for long enough to alarm",
    "no-go": "{standing}",
    "not covered": "nothing speaks against {threatened}, but most of the change there lies outside the SAE",
    "cannot tell": "the evidence does not suffice for {threatened}",
}
_SENTENCES: dict[Stage, dict[Decision, str]] = {
    "forecast": _BEFORE,
    "rehearsal": _BEFORE | {"go": "no sign of harm to {protected} after the rehearsed steps"},
    "check": _DURING,
}
_OF_TRIALS: dict[BudgetFinding, Decision] = {"within": "go", "beyond": "no-go", "cannot tell": "cannot tell"}
_NOTHING_PROTECTED = "No domain was protected, so there is nothing to judge; the numbers below are for reading."
_NOTHING_JUDGED = "There is no verdict: neither a forecast nor a check could be read."


@dataclass(frozen=True)
class Headline(Record):
    """What someone in a hurry reads."""

    decision: Decision | None
    """None if nothing was judged."""
    step: int
    """Number of optimizer steps done. 0 for a forecast."""
    sentence: str
    threatened: tuple[str, ...]
    reasons: Mapping[str, str]
    """Reasons for the domains that the decision is about, or for all."""
    other_reasons: Mapping[str, str]
    """Reasons for the other protected domains."""
    notes: tuple[str, ...]
    """What limits how far the verdict can be trusted."""


def headline(logged: Logged) -> Headline:
    """Put the newest verdict of a run into words.

    Args:
        logged: all that could be read of the run.

    """
    verdict = logged.verdict
    notes = tuple(_notes(logged))
    if logged.trials is not None:
        return Headline(_OF_TRIALS[logged.trials.finding], 0, answers(logged.trials)[0], (), {}, {}, notes)
    if verdict is None:
        return Headline(None, 0, _NOTHING_JUDGED, (), {}, {}, notes)
    if not verdict.reasons:
        return Headline(None, verdict.step, _NOTHING_PROTECTED, (), {}, {}, notes)
    since, is_first = alarms_since([check.verdict for check in logged.checks]), len(logged.checks) == 1
    told = sentence(verdict, stage_of(logged), since)
    at = f"At step {verdict.step}, {'the first check, ' if is_first and verdict.alarmed else ''}"
    told = f"{at}{told}." if logged.checks else f"{told[0].upper()}{told[1:]}."
    about = verdict.threatened or tuple(verdict.reasons)
    return Headline(
        decision=verdict.decision,
        step=verdict.step,
        sentence=told,
        threatened=verdict.threatened,
        reasons={name: reason for name, reason in verdict.reasons.items() if name in about},
        other_reasons={name: reason for name, reason in verdict.reasons.items() if name not in about},
        notes=notes,
    )


def stage_of(logged: Logged) -> Stage:
    """What the newest verdict of a run is on."""
    return "check" if logged.checks else "rehearsal" if logged.rehearsal_verdict else "forecast"


def sentence(verdict: Verdict, stage: Stage, since: Mapping[str, int] | None = None) -> str:
    """What a verdict on protected domains says: a sentence without its capital and its full stop.

    Args:
        verdict: with reasons.
        stage: of the run that it is on.
        since: of alarms that stand, the steps of the checks that began them.

    """
    return _SENTENCES[stage][verdict.decision].format(
        threatened=listing(verdict.threatened),
        standing=_standing(verdict, since or {}),
        protected=listing(list(verdict.reasons)),
    )


def alarms_since(verdicts: Iterable[Verdict], before: Mapping[str, int] | None = None) -> dict[str, int]:
    """The alarms that stand after the last of some checks, with the step of the check that began each.

    Args:
        verdicts: on the checks, in order.
        before: the same after the checks before these.

    """
    since = dict(before or {})
    for verdict in verdicts:
        since = {name: since.get(name, verdict.step) for name in verdict.alarmed}
    return since


def _standing(verdict: Verdict, since: Mapping[str, int]) -> str:
    """Which of the threatened domains are over their budgets and which on course to pass them, and since when."""

    def when(names: Sequence[str]) -> str:
        steps = sorted({since.get(name, verdict.step) for name in names})
        return "" if steps == [verdict.step] else f" since step {listing([str(step) for step in steps])}"

    over, course = ([n for n in verdict.threatened if verdict.states.get(n) == state] for state in ("over", "on course"))
    parts = []
    if over:
        parts.append(f"{listing(over)} {'is' if len(over) == 1 else 'are'} over {_theirs(over)}{when(over)}")
    if course:
        parts.append(f"{listing(course)} {'is' if len(course) == 1 else 'are'} on course to pass {_theirs(course)}{when(course)}")
    if not parts:  # a verdict from before there were states
        worse = verdict.threatened
        parts.append(f"{listing(worse)} {'has' if len(worse) == 1 else 'have'} got worse{when(worse)}")
    return ", and ".join(parts)


def _theirs(names: Sequence[str]) -> str:
    return "its budget" if len(names) == 1 else "their budgets"


def _notes(logged: Logged) -> Iterator[str]:
    verdicts = [check.verdict for check in logged.checks]
    before, by = logged.verdict_before, "rehearsal" if logged.rehearsal_verdict else "forecast"
    if verdicts and before is not None and before.reasons:
        yield f"Before training, the {by} said: {before.decision}."
    in_context = logged.forecast_verdict
    if logged.rehearsal_verdict and in_context is not None and in_context.reasons:
        yield f"In context, without any step, the forecast said: {in_context.decision}."
    if logged.forecast is not None and logged.trials is None and logged.verdict is not None and not logged.verdict.alarmed:
        yield from (in_a_sentence(c) for c in logged.forecast.checks if c.name == POWER and c.status == "warn")
    if logged.rehearsal is not None and logged.rehearsal.skipped:
        yield f"The run was not rehearsed: {logged.rehearsal.skipped}"
    if logged.forecast is not None and not verdicts and logged.trials is None:
        yield "No drift check can be read: this is what was expected before training, not what training did."
    yield from ended_notes(verdicts)
    if found := [check.snapshot for check in logged.checks if check.snapshot.step == logged.best_checkpoint]:
        assert logged.settings is not None  # else none would be the best
        used = percent(worst_share(found[0], logged.settings.policy))
        yield f"Best checkpoint on disk: checkpoint-{found[0].step}; the domain worst off there had used up {used} of its budget."
    if logged.forecast is not None and logged.forecast.train_source == "own rollouts":
        yield "The forecast stands on the model's own best-rewarded rollouts of the first step, not on reference answers."
    last_step = verdicts[-1].step if verdicts else 0
    if lost := [fault.step for fault in logged.faults if fault.what.startswith("drift check") and fault.step > last_step]:
        yield f"A drift check at step {lost[-1]} failed, so the verdict is older than it should be."
    elif logged.faults:
        yield f"{counted(len(logged.faults), 'failure')} of ours, which training survived: see Faults."
    yield from logged.unreadable


def in_a_sentence(check: Check) -> str:
    """What a check before the forecast has found, and what to do about it."""
    return check.brief or f"{'; '.join(filter(None, (f'{check.name}: {check.found}', check.remedy)))}."


def ended_notes(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Which alarms have ended, in a sentence each.

    Args:
        verdicts: on all checks, in order.

    """
    for name, steps in ended_alarms(verdicts).items():
        yield f"An alarm for {name} stood at step {steps[0]}" + (f" to {steps[-1]}" if len(steps) > 1 else "") + " and ended."


def ended_alarms(verdicts: Sequence[Verdict]) -> dict[str, list[int]]:
    """Find domains whose alarm has ended, with the steps of the checks that alarmed.

    Args:
        verdicts: verdicts of all checks, in order.

    """
    alarmed: dict[str, list[int]] = {}
    for verdict in verdicts:
        for name in verdict.alarmed:
            alarmed.setdefault(name, []).append(verdict.step)
    return {name: steps for name, steps in alarmed.items() if name not in verdicts[-1].alarmed}


def alarm_rule(settings: RunSettings, steps: Sequence[int]) -> str:
    """What an alarm of a run takes, in sentences.

    Args:
        settings: of the run.
        steps: of the checks that were made.

    """
    policy, held = settings.policy, in_a_row(settings.policy.patience)
    if settings.looks is None:
        return (
            "An alarm took a rise of NLL of at least the budget, its interval above 0, and a permutation test at "
            f"{policy.alpha:g} over all protected domains of a check together, all that at {held}; this was an earlier version."
        )
    planned = settings.looks.steps
    n_made = len({*planned} & {*steps})
    made = f", of which {n_made} {'was' if n_made == 1 else 'were'} made" if n_made < len(planned) else ""
    return (
        f"An alarm takes harm that is surely above half the budget (one-sided t test over queries), at {held}. The test "
        f"may err in {percent_1(policy.alpha)} of runs, over all protected domains and "
        f"{counted(len(planned), 'planned check')} together{made}."
    )
