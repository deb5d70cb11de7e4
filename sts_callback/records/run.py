"""Records of a run's folder beside forecasts and checks, and all of the folder as one record."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

from sts_callback import __version__
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.records import DriftSnapshot, Forecast, Record, TopActivatingExamples, Verdict
from sts_callback.records.rehearsal import Rehearsal, Trials
from sts_callback.records.remedies import Attribution

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "sae-lens")


@dataclass(frozen=True)
class Looks(Record):
    """The planned checks of a run, over which its test spends the error that it may make."""

    last_step: int
    """Where training ends."""
    every: int = 0
    """The user's own checks come every so many steps; 0: at steps that are not known beforehand, or never."""
    after: int = 0
    """Only later steps are planned for: where a run was taken up to go on beyond its first plan."""

    @property
    def between(self) -> tuple[int, ...]:
        """Steps of checks that come by themselves, evenly on a log scale: 1, 2, 5, 10, 20, 50, 100, ..."""
        powers = (10**n for n in range(len(str(self.last_step))))
        return tuple(s for power in powers for s in (power, 2 * power, 5 * power) if self.after < s <= self.last_step)

    @property
    def steps(self) -> tuple[int, ...]:
        """All planned steps, in order; the last one is among them."""
        own = range(self.every, self.last_step, self.every) if self.every else ()
        return tuple(sorted({*self.between, *(s for s in own if s > self.after), self.last_step}))

    def next_after(self, step: int) -> int:
        """The first planned step after one; 0 if none is left."""
        return next((planned for planned in self.steps if planned > step), 0)


@dataclass(frozen=True)
class Given(Record):
    """What a run was given, as a command takes it. A text is empty, a number 0, where that is not known."""

    model: str = ""
    """Folder or hub id."""
    sae: str = ""
    """The one that decides."""
    train: str = ""
    """File of the training rows."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Files of the user's own domains; empty for one that was no file."""
    learning_rate: float = 0.0
    """At the peak of its schedule."""
    steps: int = 0
    """Planned optimizer steps."""
    batch_size: int = 0
    """Rows in a step on one device."""
    lora_r: int | None = None
    """Rank of the LoRA adapter that is trained; 0: all parameters are trained; None: something else, or not known."""
    probes: Mapping[str, int] = field(default_factory=dict)
    """Numbers of its `ProbeConfig` that are not the default, by name: without them a command would measure otherwise."""


@dataclass(frozen=True)
class RunSettings(Record):
    """Settings of a run and versions of packages."""

    policy: PolicyConfig
    probes: ProbeConfig
    check_on: str
    """`save`, `evaluate`, or a number of steps."""
    action: str
    """Action on an alarm: its name, or the name of the user's function."""
    max_overhead: float
    """Share of training time that checks may take. 1 or more means no limit."""
    versions: Mapping[str, str]
    """Of Python, of this package and of those that it stands on."""
    looks: Looks | None = None
    """The planned checks; None in files from before there was a plan."""
    given: Given = field(default_factory=Given)

    @classmethod
    def of(
        cls,
        policy: PolicyConfig,
        probes: ProbeConfig,
        *,
        check_on: object,
        action: object,
        max_overhead: float,
        looks: Looks | None,
        given: Given,
    ) -> RunSettings:
        """The settings of a run that begins now, with the versions that are installed.

        Args:
            policy: thresholds and budgets.
            probes: how texts become probes.
            check_on: as the callback has it.
            action: likewise; of a function, its name is kept.
            max_overhead: likewise.
            looks: the planned checks; None where there are to be none.
            given: model, SAE and data, as a command takes them.

        """
        named = str(getattr(action, "__qualname__", action))
        versions = {"python": platform.python_version(), **installed_versions(_PACKAGES)}
        return cls(policy, probes, str(check_on), named, max_overhead, versions, looks, given)


@dataclass(frozen=True)
class TimeSpent(Record):
    """Time spent in a session until a check. A resumed run counts from its resumption."""

    checks_s: float
    """Seconds spent on checks."""
    training_s: float
    """Seconds spent on training itself."""


@dataclass(frozen=True)
class Postponed(Record):
    """A check that was due and was skipped."""

    step: int
    reason: str


@dataclass(frozen=True)
class Fault(Record):
    """A failure of ours that training survived."""

    step: int
    what: str
    """What failed."""
    error: str
    trace: str
    """Python's traceback; empty if there is none."""


@dataclass(frozen=True)
class JudgedCheck(Record):
    """A drift check with its verdict."""

    snapshot: DriftSnapshot
    verdict: Verdict
    time: TimeSpent | None
    """None in logs without it."""


@dataclass(frozen=True)
class Logged(Record):
    """All that can be read of a run's folder. What is missing is None or empty."""

    settings: RunSettings | None
    forecast: Forecast | None
    forecast_verdict: Verdict | None
    other_forecasts: tuple[Forecast, ...]
    """Forecasts by further SAEs."""
    checks: tuple[JudgedCheck, ...]
    """Checks in the order of their steps."""
    top_examples: tuple[TopActivatingExamples, ...]
    blame: Attribution | None
    """Result of `blame`, if it was run."""
    postponed: tuple[Postponed, ...]
    faults: tuple[Fault, ...]
    unreadable: tuple[str, ...]
    """What is there and cannot be read, with the reason, a sentence a file."""
    rehearsal: Rehearsal | None = None
    rehearsal_verdict: Verdict | None = None
    """None also where the run was not rehearsed."""
    trials: Trials | None = None
    """Rates and mixtures that were rehearsed side by side, by `sts-callback rehearse`."""
    best_checkpoint: int = 0
    """Step of the checkpoint that is there at which the domain worst off by its budget was best off; 0 if none is known."""
    ended_at: int = 0
    """Optimizer steps done when training ended; 0 if it runs, has died, or ended before that was written."""

    @property
    def has_sae(self) -> bool:
        """Whether an SAE was used; true if that cannot be read."""
        return self.forecast is None or self.forecast.identity.has_sae

    @property
    def has_ended(self) -> bool:
        """Whether it is known that no further check will come."""
        looks = self.settings.looks if self.settings else None
        return self.ended_at > 0 or bool(self.checks and looks and self.checks[-1].snapshot.step >= looks.last_step)

    @property
    def verdict(self) -> Verdict | None:
        """The newest: the last check's, else the rehearsal's, else the forecast's."""
        return self.checks[-1].verdict if self.checks else self.verdict_before

    @property
    def verdict_before(self) -> Verdict | None:
        """Before the first step: the rehearsal's, else the forecast's."""
        return self.rehearsal_verdict or self.forecast_verdict

    @property
    def given(self) -> Given:
        """What the run was given, as far as that is known; a rate that its settings do not have is that of its rehearsal."""
        found = self.settings.given if self.settings else Given()
        rehearsed = self.rehearsal.learning_rate if self.rehearsal else math.nan
        return found if found.learning_rate or math.isnan(rehearsed) else replace(found, learning_rate=rehearsed)

    @property
    def is_empty(self) -> bool:
        """Whether nothing could be read."""
        return not (self.forecast or self.checks or self.top_examples or self.postponed or self.faults)


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Get the versions of this package and of others.

    Args:
        packages: names as for pip; those that are not installed are left out.

    """
    found = {"sts-callback": __version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
