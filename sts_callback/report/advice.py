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
from sts_callback.records import Record

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


def advice_on(
    threatened: Sequence[str], output_dir: Path, best_checkpoint: int, learning_rate: float, step: int, *, has_sae: bool
) -> list[Advice]:
    """What to do about a no-go or an alarm.

    Args:
        threatened: the domains that it is about.
        output_dir: of the run.
        best_checkpoint: step of the best checkpoint on disk; 0 if none keeps the budgets.
        learning_rate: that of the run; NaN if it is not known.
        step: of the check; 0 before training, where there is nothing to go back to.
        has_sae: whether the run has one.

    """
    shipped = starter_domains()
    own = [word for name in threatened if name not in shipped for word in ("--domain", f"{name}=FILE")]
    protect = [*own, *(word for name in threatened for word in ("--protect", name))]
    found = []
    if step:
        back = output_dir / f"checkpoint-{best_checkpoint}"
        none = "No checkpoint of an earlier check keeps the budgets: start again, and save more often (save_steps)."
        found.append(Advice(f"Go back to {back}, the best on disk." if best_checkpoint else none))
    given = (*_MODEL, "--sae", "SAE" if has_sae else NO_SAE, *_TRAIN)
    run = ("--run-dir", str(output_dir)) if step else ()
    found.append(
        Advice("Find the rows behind it:", ("sts-callback", "blame", *given, *protect, *run))
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
            ("sts-callback", "rehearse", *given, *protect, "--learning-rate", *lower),
        )
    )
    return found
