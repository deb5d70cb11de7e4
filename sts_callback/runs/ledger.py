"""The ledger: forecasts and outcomes of finished runs, one line per run, in one file.

It holds numbers, names and fingerprints, but no texts and no paths. This module needs only the standard library;
`runs.track_record` learns from the lines.
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
"""The fewest training sets from which expectations are made."""
LEVEL = 0.8
"""Nominal coverage of prediction intervals: the highest round one for which `FEWEST` training sets give a finite interval, also
when one of them is left out."""


def is_gain(error: float, error_of_mean: float) -> bool:
    """Whether a fit is better than the mean of the outcomes by more than rounding."""
    return error < error_of_mean and not math.isclose(error, error_of_mean)


@dataclass(frozen=True)
class DomainEntry(Record):
    """Forecast and outcome of one domain. The outcome is that of the run's last check."""

    transfer: float
    """STS_net on a scale from plain prose (0) to the training data itself (1)."""
    relative_shift: float
    """Squared shift by training demonstrations divided by squared activity."""
    context_nll_change: float
    """Change of the answers' NLL by training demonstrations, in nats per token."""
    gradient_change: float
    """Change of the answers' NLL while a small step lowers that of the training data by one nat."""
    cosine: float
    """Cosine between the mean raw activations of the domain and of the training data."""
    nll: float
    """NLL of the answers before training, in nats per token."""
    relative_drift: Estimate
    """Outcome: squared feature drift divided by squared activity at step 0."""
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
    """SHA-256 of its forecast. It identifies a run that was resumed and ended twice."""
    steps: int
    """Number of optimizer steps done at its last check."""
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
    """One entry per run, in the order in which runs first ended."""
    n_unreadable: int = 0
    """Number of lines that are damaged or of another version."""


@dataclass(frozen=True)
class Skill(Record):
    """How good one number of past forecasts was. NaN if there are too few runs."""

    n_training_sets: int
    n_rows: int
    """Number of pairs of domain and run for which all numbers are known."""
    spearman: Estimate
    """Rank correlation with the outcome over the domains of a run: mean over training sets, with a 95 % interval."""
    error: float
    """Root mean square error of the fit on a training set that was left out; for drift, in natural logarithms."""
    error_of_mean: float
    """The same for the mean outcome of the other training sets."""
    coverage: float
    """Share of the outcomes of a left-out training set that lie in the interval from the others. The target is `LEVEL`."""

    @property
    def is_known(self) -> bool:
        """Whether there are enough runs to test the fit."""
        return math.isfinite(self.error)

    @property
    def is_fit_better(self) -> bool:
        """Whether the forecast's number predicts better than the mean of past outcomes."""
        return is_gain(self.error, self.error_of_mean)


@dataclass(frozen=True)
class TrackRecord(Record):
    """How good past forecasts were for one model, SAE and hook point, for movement and for harm."""

    identity: Identity
    """Identity of the newest run."""
    n_runs: int
    n_training_sets: int
    """Number of independent observations: runs on the same training and probe texts have the same forecast."""
    movement: Skill
    """Drift predicted from transfer and relative shift. The correlation is between transfer and relative drift."""
    harm: Skill
    """NLL change predicted from the NLL change in context."""


@dataclass(frozen=True)
class Expectations(Record):
    """What past runs predict for a forecast: a number and a prediction interval per domain. Empty if there are too few runs."""

    past: TrackRecord
    relative_drift: Mapping[str, Estimate]
    nll_change: Mapping[str, Estimate]


def ledger_file(chosen: str | Path | None = None) -> Path | None:
    """Path of the ledger: the chosen one, else `$STS_LEDGER`. None if neither names a file; then no ledger is kept."""
    name = str(chosen or os.environ.get("STS_LEDGER", ""))
    return Path(name) if name else None


def append(entry: Entry, chosen: str | Path | None = None) -> None:
    """Append a run, if a ledger is kept.

    Args:
        entry: the run.
        chosen: see `ledger_file`.

    Raises:
        OSError: if the ledger cannot be written.

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
            line = (b"" if os.read(descriptor, 1) == b"\n" else b"\n") + line  # start a new line after one that was cut off
        if os.write(descriptor, line) < len(line):  # one write: runs that end together must not mix their lines
            raise OSError(f"only a part of the run's line could be written to {file}")
    finally:
        os.close(descriptor)


def read(chosen: str | Path | None = None) -> Ledger:
    """Read the ledger. Without one there are no entries. If a run ended twice, its newest line counts.

    Args:
        chosen: see `ledger_file`.

    Raises:
        OSError: if the ledger exists but cannot be read.

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
