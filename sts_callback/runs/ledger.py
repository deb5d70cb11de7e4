"""What finished runs leave behind for later ones: forecast against outcome, a line a run, in one file of the user's.

Numbers, names and fingerprints; no texts and no paths. Standard library only: what the lines teach is in `runs.track_record`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sts_callback.records import DomainDrift, DomainForecast, DriftSnapshot, Estimate, Forecast, Identity, Record, TrainSource
from sts_callback.records.rehearsal import Rehearsal

FEWEST = 5
"""Training sets below which nothing is expected from them."""
LEVEL = 0.8
"""Coverage that prediction intervals aim at: the highest round one at which `FEWEST` training sets, or one fewer when one is left
out, give a finite interval."""


def is_gain(error: float, error_of_mean: float) -> bool:
    """Whether a fit is better than the mean of the outcomes, by more than rounding."""
    return error < error_of_mean and not math.isclose(error, error_of_mean)


@dataclass(frozen=True)
class DomainEntry(Record):
    """What was forecast of one domain, and what the run's last check found."""

    transfer: float
    """Where STS_net stood between plain prose (0) and the training data itself (1)."""
    relative_shift: float
    """Squared shift by the training demonstrations over squared activity."""
    context_nll_change: float
    """Change of the answers' NLL by the training demonstrations, nats per token."""
    gradient_change: float
    """Change of it while a small step lowers the training data's own by one nat."""
    cosine: float
    """Cosine of the mean raw activation with that of the training data."""
    nll: float
    """NLL of the answers before training, nats per token."""
    relative_drift: Estimate
    """Outcome: squared feature drift over squared activity at step 0."""
    nll_change: Estimate
    """Outcome: change of the answers' NLL since step 0, nats per token; above 0 is worse."""
    rehearsed: tuple[float, ...] = ()
    """The same change after each dose of a rehearsal, the run's own rate first; empty without one."""

    @classmethod
    def of(cls, forecast: DomainForecast, drift: DomainDrift, rehearsed: Sequence[DomainDrift]) -> DomainEntry:
        """The numbers of one domain, before and after."""
        return cls(
            rehearsed=tuple(dose.nll_change.value for dose in rehearsed),
            transfer=forecast.transfer.value,
            relative_shift=forecast.relative_shift.value,
            context_nll_change=forecast.nll_change.value,
            gradient_change=forecast.gradient_change.value,
            cosine=forecast.cosine,
            nll=forecast.nll.value,
            relative_drift=drift.relative_drift,
            nll_change=drift.nll_change,
        )


@dataclass(frozen=True)
class Entry(Record):
    """One run."""

    identity: Identity
    forecast: str
    """SHA-256 of its forecast, by which a run that was resumed and ended twice is known for one."""
    steps: int
    """Optimizer steps done at its last check."""
    train_source: TrainSource
    domains: Mapping[str, DomainEntry]
    n_parameters: int = 0
    """Of the model, with its adapter; 0 where the run was not rehearsed."""
    multiples: tuple[float, ...] = ()
    """Of the run's own rate, at which it was rehearsed."""

    @classmethod
    def of(cls, forecast: Forecast, last: DriftSnapshot, rehearsal: Rehearsal | None = None) -> Entry:
        """The entry of a run.

        Args:
            forecast: made at its start.
            last: its last check.
            rehearsal: made before its first step, if it was.

        """
        doses = rehearsal.doses if rehearsal else ()
        as_read_back = Forecast.from_json(forecast.to_json())  # as a resumed run has it, where 0 may have become 0.0
        return cls(
            identity=forecast.identity,
            forecast=hashlib.sha256(as_read_back.to_json().encode()).hexdigest(),
            steps=last.step,
            train_source=forecast.train_source,
            domains={
                name: DomainEntry.of(d, last.domains[name], [dose.check.domains[name] for dose in doses])
                for name, d in forecast.domains.items()
            },
            n_parameters=rehearsal.n_parameters if rehearsal else 0,
            multiples=tuple(dose.multiple for dose in doses),
        )


@dataclass(frozen=True)
class Ledger:
    """All that could be read."""

    entries: tuple[Entry, ...] = ()
    """One a run, in the order in which runs first ended."""
    n_unreadable: int = 0
    """Lines that are damaged or of another version."""


@dataclass(frozen=True)
class Skill(Record):
    """How good one number of past forecasts was. NaN where there are too few runs to tell."""

    n_training_sets: int
    n_rows: int
    """Domains of runs of which all its numbers are known."""
    spearman: Estimate
    """Rank correlation with the outcome over the domains of a run, mean over training sets, 95 % interval over these."""
    error: float
    """Root mean square error of the fit on a training set left out; of drift in natural logarithms."""
    error_of_mean: float
    """The same of the plain mean of the outcomes of the others."""
    coverage: float
    """How many outcomes of a training set left out the interval from the others holds; it aims at `LEVEL`."""

    @property
    def is_known(self) -> bool:
        """Whether there were runs enough to try the fit."""
        return math.isfinite(self.error)

    @property
    def is_fit_better(self) -> bool:
        """Whether the forecast's number says more than the mean of past outcomes."""
        return is_gain(self.error, self.error_of_mean)


@dataclass(frozen=True)
class TrackRecord(Record):
    """How good past forecasts were for one model, SAE and hook point. Movement and harm are two questions."""

    identity: Identity
    """Of the newest run."""
    n_runs: int
    n_training_sets: int
    """What counts as independent: runs on the same training and probe texts have the same forecast."""
    movement: Skill
    """By transfer and relative shift; its correlation is that of transfer with relative drift."""
    harm: Skill
    """By the NLL change in context."""


@dataclass(frozen=True)
class Expectations(Record):
    """What past runs make of a forecast: a number with its prediction interval a domain, empty where they are too few."""

    past: TrackRecord
    relative_drift: Mapping[str, Estimate]
    nll_change: Mapping[str, Estimate]


def ledger_file(chosen: str | Path | None = None) -> Path | None:
    """Where the ledger is: what was chosen, else `$STS_LEDGER`; None if neither names a file, and no ledger is kept."""
    name = str(chosen or os.environ.get("STS_LEDGER", ""))
    return Path(name) if name else None


def append(entry: Entry, chosen: str | Path | None = None) -> None:
    """Append a run, if a ledger is kept.

    Args:
        entry: the run.
        chosen: see `ledger_file`.

    Raises:
        OSError: if it cannot be written.

    """
    file = ledger_file(chosen)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        line = entry.to_json().encode() + b"\n"
        if os.fstat(descriptor).st_size:
            os.lseek(descriptor, -1, os.SEEK_END)
            line = (b"" if os.read(descriptor, 1) == b"\n" else b"\n") + line  # a line that was cut off keeps to itself
        if os.write(descriptor, line) < len(line):  # one write: runs that end together must not mix their lines
            raise OSError(f"only a part of the run's line could be written to {file}")
    finally:
        os.close(descriptor)


def read(chosen: str | Path | None = None) -> Ledger:
    """Read the ledger; nothing if there is none. Of a run that ended twice the newest line counts.

    Args:
        chosen: see `ledger_file`.

    Raises:
        OSError: if it is there and may not be read.

    """
    file = ledger_file(chosen)
    if file is None or not file.exists():
        return Ledger()
    entries: dict[str, Entry] = {}
    n_unreadable = 0
    for line in filter(None, file.read_bytes().splitlines()):
        try:
            entry = _entry(line.decode())
        except (ValueError, KeyError, TypeError, AttributeError):
            n_unreadable += 1
        else:
            entries[entry.forecast] = entry
    return Ledger(tuple(entries.values()), n_unreadable)


def _entry(line: str) -> Entry:
    entry = Entry.from_json(line)
    if not all(isinstance(text, str) for text in (entry.forecast, *vars(entry.identity).values())):
        raise ValueError("a name or a fingerprint is no text")
    return entry
