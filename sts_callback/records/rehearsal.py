"""What a rehearsal found: a few real steps of the run, measured and put back before its first one. Frozen, plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from sts_callback.config import Budget, PlainBudget, Unit, limits_of
from sts_callback.records import UNKNOWN, Decision, DomainDrift, DriftSnapshot, Estimate, Identity, Record, Verdict, notebook
from sts_callback.records.numbers import percent
from sts_callback.records.remedies import BudgetFinding, mildest

TENFOLD = 10.0
"""Multiple of the run's own rate at which a second dose tells what a long run comes to; past runs have this one."""


@dataclass(frozen=True)
class Dose(Record):
    """Rehearsed steps at one rate, and the check after them."""

    multiple: float
    """The rate over the schedule's peak: 1 is the run's own."""
    learning_rate: float
    """That of the first group of parameters; NaN where the optimizer finds its own."""
    n_steps: int
    """Optimizer steps at this rate, after those of the doses before."""
    check: DriftSnapshot
    """Its step counts rehearsed steps, of all doses up to this one."""


@dataclass(frozen=True)
class Rehearsal(Record):
    """Doses of a run before its first step, or why there are none."""

    doses: tuple[Dose, ...]
    """The run's own rate first; each goes on from the weights that the one before has left."""
    steps_planned: int
    """Optimizer steps of the run."""
    rate_sum: float
    """Learning rates of all steps of the run, added up; NaN where the schedule does not say beforehand."""
    seconds: float
    """Wall-clock time, checks included."""
    step_s: float = math.nan
    """Wall-clock time of one rehearsed step; NaN in records of earlier versions."""
    skipped: str = ""
    """Why the run was not rehearsed, in a sentence; empty if it was."""
    n_parameters: int = 0
    """Of the model, with its adapter."""
    expected: Mapping[str, Estimate] = field(default_factory=dict)
    """Change of each domain's NLL at the end of the run, in nats per token, with the interval for a single domain; empty where no
    past runs of a model of this size tell."""

    @property
    def learning_rate(self) -> float:
        """The run's highest; NaN without doses."""
        return self.doses[0].learning_rate if self.doses else math.nan

    @property
    def steps_of_a_check(self) -> float:
        """How many steps of training take as long as a check; NaN if that is not known."""
        return self.doses[0].check.seconds / self.step_s if self.doses and self.step_s > 0 else math.nan

    @property
    def tenfold(self) -> DriftSnapshot | None:
        """The check after steps at ten times the run's own rate; None if there were none."""
        return next((dose.check for dose in self.doses if dose.multiple == TENFOLD), None)

    def expected_in(self, unit: Unit, name: str) -> Estimate:
        """What a domain is expected to have lost at the end of the run, in a budget's unit, above 0 is worse; else unknown."""
        found, own = self.expected.get(name, UNKNOWN), self.doses[0].check.domains[name]
        if unit == "nats/token":
            return found
        if unit == "points" or not own.query_answer_bytes:
            return UNKNOWN
        factor = sum(own.query_answer_tokens) / sum(own.query_answer_bytes) / math.log(2)
        return Estimate(*(factor * end for end in vars(found).values()))

    def _repr_html_(self) -> str:
        """For a notebook."""
        steps = [f"{dose.n_steps} steps at {dose.learning_rate:.2g}" for dose in self.doses]
        names = self.doses[0].check.domains if self.doses else ()
        rows = [
            (
                name,
                notebook.change(self.expected.get(name)),
                *(notebook.change(dose.check.domains[name].nll_change) for dose in self.doses),
                percent(self.doses[0].check.domains[name].relative_drift.value, 1),
            )
            for name in names
        ]
        return notebook.table(
            f"Rehearsal of {self.steps_planned} steps",
            ("domain", "expected at the end", *steps, "moved"),
            rows,
            self.skipped or "Changes of the answers' NLL, nats a token, + is worse. All steps were put back.",
        )


@dataclass(frozen=True)
class Trial(Record):
    """One way to train, rehearsed: a learning rate and a mixture."""

    learning_rate: float
    """At the schedule's peak."""
    replay: Mapping[str, float]
    """Share of rows from each other source, in (0, 1); empty for the training data alone."""
    rehearsal: Rehearsal
    """With one dose, at that rate."""
    verdict: Verdict
    """Of that dose."""

    @property
    def check(self) -> DriftSnapshot:
        """What was measured after its steps."""
        return self.rehearsal.doses[0].check

    @property
    def finding(self) -> BudgetFinding:
        """`within`: every budget is kept; `beyond`: one is passed, or on course to be; else `cannot tell`."""
        findings: dict[Decision, BudgetFinding] = {"go": "within", "no-go": "beyond"}
        return findings.get(self.verdict.decision, "cannot tell")

    def worst(self, limits: Mapping[str, Budget]) -> DomainDrift:
        """The protected domain that has lost most of its budget.

        Args:
            limits: budgets of the protected domains, at least one.

        """
        used = {name: self.check.domains[name].share_of(limit) for name, limit in limits.items()}
        return self.check.domains[max(used, key=lambda name: math.inf if math.isnan(used[name]) else used[name])]


@dataclass(frozen=True)
class Trials(Record):
    """Learning rates and mixtures side by side."""

    identity: Identity
    adapter: str
    """What is trained, in words."""
    trials: tuple[Trial, ...]
    """By mixture, the training data alone first; within one by rate, the lowest first."""
    budgets: Mapping[str, PlainBudget]
    """Of the protected domains."""
    seconds: float
    """Wall-clock time of all rehearsals."""

    def _repr_html_(self) -> str:
        """For a notebook."""
        rows = [
            (
                ", ".join(f"{share:.0%} {name}" for name, share in trial.replay.items()) or "none",
                f"{trial.learning_rate:g}",
                trial.finding,
                *(notebook.change(trial.check.domains[name].nll_change) for name in self.budgets),
            )
            for trial in self.trials
        ]
        titles = ("replay", "rate", "budgets", *self.budgets)
        note = "Changes of the answers' NLL, nats a token, + is worse. All steps were put back."
        return notebook.table("Rates and mixtures, rehearsed", titles, rows, note)

    @property
    def finding(self) -> BudgetFinding:
        """`within`: some trial keeps every budget; `beyond`: none does; `cannot tell`: some may."""
        return mildest(trial.finding for trial in self.trials)

    @property
    def limits(self) -> Mapping[str, Budget]:
        """The budgets with their units."""
        return limits_of(self.budgets)

    @property
    def mixtures(self) -> tuple[Mapping[str, float], ...]:
        """That were tried, each once."""
        return tuple({tuple(sorted(trial.replay.items())): trial.replay for trial in self.trials}.values())

    def of(self, replay: Mapping[str, float]) -> tuple[Trial, ...]:
        """The trials of a mixture, the lowest rate first."""
        return tuple(trial for trial in self.trials if trial.replay == replay)

    def largest_rate(self, replay: Mapping[str, float]) -> float | None:
        """The largest rate up to which a mixture keeps every budget; None if it does not at the lowest that was tried."""
        largest = None
        for trial in self.of(replay):
            if trial.finding != "within":
                break
            largest = trial.learning_rate
        return largest

    def least_replay(self, learning_rate: float) -> Mapping[str, float] | None:
        """The mixture with the least replay that keeps every budget at a rate; None if none does."""
        kept = [trial.replay for trial in self.trials if trial.learning_rate == learning_rate and trial.finding == "within"]
        return min(kept, key=lambda replay: sum(replay.values()), default=None)
