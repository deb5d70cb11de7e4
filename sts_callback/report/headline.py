"""The verdict in a sentence, its reasons, and what a reader must know before trusting it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sts_callback.records import Decision, Record, Verdict
from sts_callback.records.remedies import BudgetFinding
from sts_callback.records.run import Logged
from sts_callback.report.formatting import counted, listing
from sts_callback.report.trials import answers

_BEFORE: dict[Decision, str] = {
    "go": "Nothing measured before training points to harm in {protected}.",
    "watch": "Training is expected to threaten {threatened}.",
    "no-go": "Training is expected to make {threatened} worse.",
    "not covered": "Nothing speaks against {threatened}, but most of the change there lies outside the SAE.",
    "cannot tell": "The evidence does not suffice to say what training will do to {threatened}.",
}
_DURING: dict[Decision, str] = {
    "go": "At step {step}, no protected domain has been found worse by its budget ({protected}).",
    "watch": "At step {step}, {threatened} {have} got worse, not yet for long enough to alarm.",
    "no-go": "At step {step}, {threatened} {have} got worse.",
    "not covered": "At step {step} nothing speaks against {threatened}, but most of the change there lies outside the SAE.",
    "cannot tell": "At step {step}, the evidence does not suffice for {threatened}.",
}
_OF_TRIALS: dict[BudgetFinding, Decision] = {"within": "go", "beyond": "no-go", "cannot tell": "cannot tell"}
_NOTHING_PROTECTED = "No domain was protected, so there is nothing to judge; the numbers below are for reading."
_NOTHING_JUDGED = "There is no verdict: neither a forecast nor a check could be read."


@dataclass(frozen=True)
class Headline(Record):
    """What a reader in a hurry reads."""

    decision: Decision | None
    """None if nothing was judged."""
    step: int
    """Optimizer steps done; 0 for a forecast."""
    sentence: str
    threatened: tuple[str, ...]
    reasons: Mapping[str, str]
    """Of the domains that the decision is about, or of all."""
    other_reasons: Mapping[str, str]
    """Of the other protected domains."""
    notes: tuple[str, ...]
    """What bears on how far the verdict can be trusted."""


def headline(logged: Logged) -> Headline:
    """Put the newest verdict of a run into words.

    Args:
        logged: all that could be read of the run.

    """
    verdict = logged.verdict
    notes = tuple(_notes(logged))
    if logged.trials is not None:
        return Headline(_OF_TRIALS[logged.trials.finding], 0, " ".join(answers(logged.trials)), (), {}, {}, notes)
    if verdict is None:
        return Headline(None, 0, _NOTHING_JUDGED, (), {}, {}, notes)
    if not verdict.reasons:
        return Headline(None, verdict.step, _NOTHING_PROTECTED, (), {}, {}, notes)
    sentence = (_DURING if logged.checks else _BEFORE)[verdict.decision].format(
        step=verdict.step,
        threatened=listing(verdict.threatened),
        have="has" if len(verdict.threatened) == 1 else "have",
        protected=listing(list(verdict.reasons)),
    )
    about = verdict.threatened or tuple(verdict.reasons)
    return Headline(
        decision=verdict.decision,
        step=verdict.step,
        sentence=sentence,
        threatened=verdict.threatened,
        reasons={name: reason for name, reason in verdict.reasons.items() if name in about},
        other_reasons={name: reason for name, reason in verdict.reasons.items() if name not in about},
        notes=notes,
    )


def _notes(logged: Logged) -> Iterator[str]:
    verdicts = [check.verdict for check in logged.checks]
    before, by = logged.verdict_before, "rehearsal" if logged.rehearsal_verdict else "forecast"
    if verdicts and before is not None and before.reasons:
        yield f"Before training, the {by} said: {before.decision}."
    in_context = logged.forecast_verdict
    if logged.rehearsal_verdict and in_context is not None and in_context.reasons:
        yield f"In context, without any step, the forecast said: {in_context.decision}."
    if logged.rehearsal is not None and logged.rehearsal.skipped:
        yield f"The run was not rehearsed: {logged.rehearsal.skipped}"
    if logged.forecast is not None and not verdicts:
        yield "No drift check can be read: this is what was expected before training, not what training did."
    for name, steps in ended_alarms(verdicts).items():
        yield f"An alarm for {name} stood at step {steps[0]}" + (f" to {steps[-1]}" if len(steps) > 1 else "") + " and ended."
    if logged.forecast is not None and logged.forecast.train_source == "own rollouts":
        yield "The forecast stands on the model's own best-rewarded rollouts of the first step, not on reference answers."
    last_step = verdicts[-1].step if verdicts else 0
    if lost := [fault.step for fault in logged.faults if fault.what.startswith("drift check") and fault.step > last_step]:
        yield f"A drift check at step {lost[-1]} failed, so the verdict is older than it should be."
    elif logged.faults:
        yield f"{counted(len(logged.faults), 'failure')} of ours, which training survived: see Faults."
    yield from logged.unreadable


def ended_alarms(verdicts: Sequence[Verdict]) -> dict[str, list[int]]:
    """Domains about which there was an alarm and is none now, with the steps of the checks that alarmed.

    Args:
        verdicts: of all checks, in order.

    """
    alarmed: dict[str, list[int]] = {}
    for verdict in verdicts:
        for name in verdict.alarmed:
            alarmed.setdefault(name, []).append(verdict.step)
    return {name: steps for name, steps in alarmed.items() if name not in verdicts[-1].alarmed}
