"""What a rehearsal found: a few real steps of the run, measured and put back before its first one. Frozen, plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sts_callback.records import DriftSnapshot, Estimate, Record


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
    skipped: str = ""
    """Why the run was not rehearsed, in a sentence; empty if it was."""
    expected: Mapping[str, Estimate] = field(default_factory=dict)
    """Change of the NLL of domains at the end of the run, in nats per token, where past runs tell; by name."""
