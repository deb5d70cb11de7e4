"""What to do about a threat: the checkpoint to go back to, and commands that find its cause and a rate without it."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sts_callback.config import NO_SAE
from sts_callback.data.starter import starter_domains
from sts_callback.records import Record, Verdict

_MODEL, _TRAIN = ("--model", "MODEL"), ("--train", "FILE")
"""What no record of a run knows as the user spells it, like the SAE."""


@dataclass(frozen=True)
class Advice(Record):
    """One thing to do."""

    what: str
    """In a sentence, or before a command."""
    command: tuple[str, ...] = ()
    """Its words; those in capitals are the user's to fill in."""

    @property
    def parts(self) -> list[str]:
        """The command as it is typed, in parts between which a line may end: an option and its values stay together."""
        return re.split(r" (?=--)", shlex.join(self.command))


def advice_on(verdict: Verdict, output_dir: Path, best_checkpoint: int, learning_rate: float, *, has_sae: bool) -> list[Advice]:
    """What to do about a no-go or an alarm; nothing about other verdicts.

    Args:
        verdict: at step 0 it is one before training, where there is nothing to go back to.
        output_dir: of the run.
        best_checkpoint: step of the best checkpoint on disk; 0 if none keeps the budgets.
        learning_rate: that of the run; NaN if it is not known.
        has_sae: whether the run has one.

    """
    if verdict.decision != "no-go":
        return []
    found = []
    if verdict.step:
        back = output_dir / f"checkpoint-{best_checkpoint}"
        none = "No checkpoint of an earlier check keeps the budgets: start again, at a lower rate or without the rows behind it."
        found.append(Advice(f"Go back to {back}, the best on disk." if best_checkpoint else none))
    given = (*_MODEL, "--sae", "SAE" if has_sae else NO_SAE, *_TRAIN)
    run = ("--run-dir", str(output_dir)) if verdict.step else ()
    found.append(
        Advice("Find the rows behind it:", ("sts-callback", "blame", *given, *_protecting(verdict.threatened), *run))
        if has_sae
        else Advice(
            "To find the rows behind it (sts-callback blame), train an SAE first:",
            ("sts-callback", "sae", "train", *_MODEL, *_TRAIN, "--out", "DIR"),
        )
    )
    lower: tuple[str, ...] = ("RATE",)
    if math.isfinite(learning_rate):
        lower = (f"{learning_rate / 10:.1g}", f"{learning_rate / 3:.1g}")
    found.append(
        Advice(
            "Find a rate that keeps the budget; add --lora-r, --batch-size and --steps-planned as in your run:",
            (
                "sts-callback",
                "rehearse",
                *given,
                *_protecting(tuple(verdict.reasons) or verdict.threatened),
                "--learning-rate",
                *lower,
            ),
        )
    )
    return found


def _protecting(names: Sequence[str]) -> list[str]:
    shipped = starter_domains()
    own = [word for name in names if name not in shipped for word in ("--domain", f"{name}=FILE")]
    return [*own, *(word for name in names for word in ("--protect", name))]
