"""What to do about a threat: the checkpoint to go back to, and commands that find its cause and a rate without it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sts_callback.config import DEFAULT_BUDGET, NO_SAE, PlainBudget
from sts_callback.data.starter import starter_domains
from sts_callback.records import Record, Verdict
from sts_callback.records.run import Given
from sts_callback.report.formatting import listing

_PUT = {
    "MODEL": "the model's folder or hub id",
    "SAE": "the SAE's folder or name",
    "FILE": "a file of your rows, as Dataset.to_json writes it",
    "RATE": "rates below the run's own",
}
"""What stands in a command for what is not known of a run, and what the user puts there."""


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
        parts: list[list[str]] = [[]]
        for word in self.command:
            if word.startswith("--"):
                parts.append([])
            parts[-1].append(word)
        return [shlex.join(part) for part in parts]


def advice_on(
    verdict: Verdict,
    output_dir: Path,
    best_checkpoint: int,
    given: Given,
    budgets: Mapping[str, PlainBudget],
    *,
    has_sae: bool,
) -> list[Advice]:
    """What to do about a no-go or an alarm; nothing about other verdicts.

    Args:
        verdict: at step 0 it is one before training, where there is nothing to go back to.
        output_dir: of the run.
        best_checkpoint: step of the best checkpoint on disk; 0 if none keeps the budgets.
        given: what the run was given.
        budgets: of the protected domains.
        has_sae: whether the run has one.

    """
    if verdict.decision != "no-go":
        return []
    found = []
    if verdict.step:
        back = output_dir / f"checkpoint-{best_checkpoint}"
        none = "No checkpoint of an earlier check keeps the budgets: start again, at a lower rate or without the rows behind it."
        found.append(Advice(f"Go back to {back}, the best on disk." if best_checkpoint else none))
    of_threat, of_all = (_protecting(names, given, budgets) for names in (verdict.threatened, tuple(verdict.reasons)))
    if has_sae:
        run = ("--run-dir", str(output_dir)) if verdict.step else ()
        found.append(Advice("Find the rows behind it:", ("sts-callback", "blame", *_given(given), *of_threat, *run)))
    else:
        model, train = _model_and_train(given)
        train_one = ("sts-callback", "sae", "train", *model, *train, "--out", "sae")
        found.append(Advice("To find the rows behind it (sts-callback blame), train an SAE first:", train_one))
    options, unknown = _as_in_the_run(given)
    add = f"; add {listing(unknown)} as in your run" if unknown else ""
    asked = (*_given(given, has_sae=has_sae), *(of_all or of_threat), *options, "--learning-rate", *_lower(given.learning_rate))
    found.append(Advice(f"Find a rate that keeps the budget{add}:", ("sts-callback", "rehearse", *asked)))
    return [*found, *_to_fill_in(found)]


def to_rank_rows(names: Sequence[str], output_dir: Path, given: Given, budgets: Mapping[str, PlainBudget]) -> list[Advice]:
    """How the training rows to blame come into the report of a run with an SAE.

    Args:
        names: domains that they are to be ranked by.
        output_dir: of the run.
        given: what the run was given.
        budgets: of the protected domains.

    """
    words = ("sts-callback", "blame", *_given(given), *_protecting(names, given, budgets), "--run-dir", str(output_dir))
    found = [Advice("To have them here:", words)]
    return [*found, *_to_fill_in(found)]


def to_report_again(output_dir: Path) -> Advice:
    """How the report of a run is written again."""
    return Advice("This page again, from the same folder:", ("sts-callback", "report", str(output_dir)))


def _model_and_train(given: Given) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("--model", given.model or "MODEL"), ("--train", given.train or "FILE")


def _given(given: Given, *, has_sae: bool = True) -> tuple[str, ...]:
    """Options by which a command measures what the run measured."""
    model, train = _model_and_train(given)
    probes = (word for name, n in given.probes.items() for word in (f"--{name.replace('_', '-')}", str(n)))
    return (*model, "--sae", given.sae or ("SAE" if has_sae else NO_SAE), *train, *probes)


def _lower(rate: float) -> tuple[str, ...]:
    return (f"{rate / 10:.1g}", f"{rate / 3:.1g}") if rate else ("RATE",)


def _as_in_the_run(given: Given) -> tuple[list[str], list[str]]:
    """Options of `rehearse` by which its steps are like the run's, and the names of those whose value is not known."""
    adapter = ("--full",) if given.lora_r == 0 else ("--lora-r", given.lora_r)
    asked = (adapter, ("--batch-size", given.batch_size), ("--steps-planned", given.steps))
    options = [str(word) for words in asked if all(words) for word in words]
    return options, [str(name) for name, *value in asked if not all(value)]


def _protecting(names: Sequence[str], given: Given, budgets: Mapping[str, PlainBudget]) -> list[str]:
    shipped = starter_domains()
    own = [name for name in names if name in given.domains or name not in shipped]
    files = [word for name in own for word in ("--domain", f"{name}={given.domains.get(name) or 'FILE'}")]
    limits = {name: budgets.get(name, DEFAULT_BUDGET) for name in names}
    protected = [name if limit == DEFAULT_BUDGET else f"{name}={limit}" for name, limit in limits.items()]
    return [*files, *(word for one in protected for word in ("--protect", one))]


def _to_fill_in(found: Sequence[Advice]) -> list[Advice]:
    """One line for all that the commands leave open; nothing where they leave nothing open."""
    ends = {word.rpartition("=")[2] for one in found for word in one.command}
    told = [f"{name} by {what}" for name, what in _PUT.items() if name in ends]
    return [Advice(f"Replace {listing(told)}.")] if told else []
