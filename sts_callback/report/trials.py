"""What rehearsed rates and mixtures come to, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from sts_callback.config import PlainBudget, limits_of
from sts_callback.records.rehearsal import Trial, Trials
from sts_callback.report import formatting
from sts_callback.report.summary import standing_of


def answers(found: Trials) -> list[str]:
    """The largest rate of each mixture and the least replay of each rate, in a sentence each.

    Args:
        found: what was tried.

    """
    return [*(_rate_answer(found, replay) for replay in found.mixtures), *_replay_answers(found)]


def ahead(n_rates: int, n_mixtures: int, n_steps: int, n_queries: int) -> str:
    """What is to be done, before the first trial.

    Args:
        n_rates: to try.
        n_mixtures: to try each rate with.
        n_steps: of one trial.
        n_queries: that its check reads, those of the training data included.

    """
    trials, rates, mixtures = (
        formatting.counted(n, what) for n, what in ((n_rates * n_mixtures, "trial"), (n_rates, "rate"), (n_mixtures, "mixture"))
    )
    each = f"{n_steps} training steps and one pass over {n_queries} queries each"
    return f"STS rehearse: a forecast first, then {trials} ({rates}, {mixtures}) of {each}."


def trial_line(trial: Trial, number: int, n_trials: int, budgets: Mapping[str, PlainBudget]) -> str:
    """A trial in a line, once it is done.

    Args:
        trial: that was made.
        number: its place among all, from 1.
        n_trials: how many there are to be.
        budgets: of the protected domains, at least one.

    """
    limits = limits_of(budgets)
    worst = trial.worst(limits)
    unit = limits[worst.name].unit
    change = formatting.with_ends(worst.harm_in(unit), formatting.harm_form(unit))
    standing = standing_of(trial.verdict.states.get(worst.name, "inconclusive"))
    how = f"rate {trial.learning_rate:g}, " + (f"replay {replay_words(trial.replay)}" if trial.replay else "no replay")
    return (
        f"Trial {number} of {n_trials}, {how}: {trial.verdict.decision}; worst domain {worst.name} {change}, {standing}, "
        f"budget {formatting.budget(budgets[worst.name])}; {formatting.seconds(trial.rehearsal.seconds)}"
    )


def replay_words(replay: Mapping[str, float]) -> str:
    """A mixture in words."""
    return ", ".join(f"{share:.0%} {name}" for name, share in replay.items()) or "none"


def _rate_answer(found: Trials, replay: Mapping[str, float]) -> str:
    rate, where = found.largest_rate(replay), f"with {replay_words(replay)}" if replay else "without replay"
    if rate is not None:
        return f"Largest rate that keeps every budget {where}: {rate:g}."
    lowest = found.of(replay)[0]
    if lowest.finding == "beyond":
        return f"No rate tried keeps every budget {where}; try one under {lowest.learning_rate:g}."
    return f"Cannot tell {where}: not sure at {lowest.learning_rate:g}; give more queries (--n-queries), or try a lower rate."


def _replay_answers(found: Trials) -> list[str]:
    """For each rate that is too high without replay, how little replay is enough."""
    answers = []
    for rate in sorted({trial.learning_rate for trial in found.trials}):
        least = found.least_replay(rate)
        if least is None and len(found.mixtures) > 1:
            answers.append(f"At {rate:g} no mixture tried is sure to keep every budget.")
        elif least:
            answers.append(f"Least replay that keeps every budget at {rate:g}: {replay_words(least)}.")
    return answers
