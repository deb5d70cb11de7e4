"""What rehearsed rates and mixtures come to, in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from sts_callback.records.rehearsal import Trials


def answers(found: Trials) -> list[str]:
    """The largest rate of each mixture and the least replay of each rate, in a sentence each.

    Args:
        found: what was tried.

    """
    return [*(_rate_answer(found, replay) for replay in found.mixtures), *_replay_answers(found)]


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
