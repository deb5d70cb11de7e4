"""The directory of a run. It keeps forecasts and checks; a kill loses at most the line being written."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sts_callback.errors import CannotTell, ConfigError
from sts_callback.policy import worst_share
from sts_callback.records import DriftSnapshot, Forecast, TopActivatingExamples, Verdict
from sts_callback.records.rehearsal import Rehearsal, Trials
from sts_callback.records.remedies import Attribution
from sts_callback.records.run import Fault, JudgedCheck, Logged, Looks, Postponed, RunSettings, TimeSpent
from sts_callback.runs.files import write_whole

T = TypeVar("T")

_NOT_OURS = (ValueError, KeyError, TypeError, AttributeError)
"""What reading a record raises where there is none, or one of another version."""
_LAST_IN_CHECKPOINT = "trainer_state.json"  # of what transformers writes there, so that the rest is whole


class RunDirectory:
    """The files of one run, in `<output_dir>/sts/`."""

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        """Name the folder. Nothing is written yet.

        Args:
            folder: where the files are.
            anew: whether existing files belong to another run and must be moved aside before anything is written.

        """
        self.folder = folder
        self.baseline_file = folder / "baseline.safetensors"
        self._settings_file = folder / "settings.json"
        self._forecast_file = folder / "forecast.json"
        self._rehearsal_file = folder / "rehearsal.json"
        self._trials_file = folder / "trials.json"
        self._drift_file = folder / "drift.jsonl"
        self._features_file = folder / "features.jsonl"
        self._blame_file = folder / "blame.json"
        self._rollouts_file = folder / "rollouts.jsonl"
        self._skipped_file = folder / "skipped.jsonl"
        self._faults_file = folder / "faults.jsonl"
        self._report_file = folder / "report.html"
        self._ended_file = folder / "ended.json"
        self._holds_another_run = anew
        self._unwritten_faults: deque[dict[str, Any]] = deque(maxlen=100)

    def require_place(self) -> None:
        """Make the folder, or refuse one that cannot be written, before anything is measured.

        Raises:
            ConfigError: if something else has its name, or it can be neither made nor written to.

        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"output_dir: {self.folder} is a file, where STS keeps a folder; move it away.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir: {self.folder} cannot be made ({error}); give another folder.") from error
        if not os.access(self.folder, os.W_OK):
            raise ConfigError(f"output_dir: {self.folder} cannot be written to; give a folder that can.")

    def start_anew(self) -> None:
        """Make the folder. Files of an earlier run are moved aside to `sts.1`, `sts.2` and so on."""
        if self.folder.exists() and any(self.folder.iterdir()):
            number = 1
            while self.folder.with_name(f"{self.folder.name}.{number}").exists():
                number += 1
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.{number}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._holds_another_run = False

    def take_up(self, step: int) -> int:
        """Continue after a resume. Lines of later checks are dropped, as they will be written again, and lines cut off by a kill.

        Args:
            step: number of optimizer steps done at the checkpoint.

        Returns:
            Number of other damaged lines, which are dropped too.

        """
        n_damaged = 0
        for file in (self._features_file, self._faults_file):
            lines = _whole_lines(file)
            n_damaged += lines.count({})
            _write_lines(file, [row for row in lines if row])
        for file, step_of in ((self._drift_file, _checked_step), (self._skipped_file, _skipped_step)):
            by_step = [(step_of(row), row) for row in _whole_lines(file)]
            n_damaged += sum(at is None for at, _ in by_step)
            kept = {at: row for at, row in by_step if at is not None and at <= step}
            _write_lines(file, [kept[at] for at in sorted(kept)])
        self._ended_file.unlink(missing_ok=True)
        return n_damaged

    def write_settings(self, settings: RunSettings) -> None:
        """Write the settings, whole or not at all. Those of a resumed run replace those of the first session."""
        self._make_ready()
        write_whole(self._settings_file, settings.to_json() + "\n")

    def write_forecast(self, forecast: Forecast, verdict: Verdict, others: Sequence[Forecast] = ()) -> None:
        """Write forecast and verdict, and the forecasts by further SAEs, whole or not at all."""
        content = {
            "forecast": forecast.to_dict(),
            "verdict": verdict.to_dict(),
            "other_saes": [other.to_dict() for other in others],
        }
        self._make_ready()
        write_whole(self._forecast_file, json.dumps(content, indent=1) + "\n")

    def read_forecast(self) -> Forecast:
        """Read the forecast of this run.

        Raises:
            CannotTell: if it is missing or damaged.

        """
        try:
            return Forecast.from_dict(json.loads(self._forecast_file.read_text(encoding="utf-8"))["forecast"])
        except (OSError, *_NOT_OURS) as error:
            raise CannotTell(
                f"forecast: {self._forecast_file} cannot be read ({error!r}); a resumed run needs the one made at its start. "
                "Drift can be measured only from step 0: start the run anew."
            ) from error

    def write_rehearsal(self, rehearsal: Rehearsal, verdict: Verdict | None) -> None:
        """Write what a rehearsal found, or why there was none, whole or not at all.

        Args:
            rehearsal: with doses or without.
            verdict: what follows from its doses; None without.

        """
        content = {"rehearsal": rehearsal.to_dict(), "verdict": verdict.to_dict() if verdict else None}
        self._make_ready()
        write_whole(self._rehearsal_file, json.dumps(content, indent=1) + "\n")

    def read_rehearsal(self) -> Rehearsal | None:
        """Read the rehearsal of this run; None if it is missing, damaged or of another version."""
        try:
            return Rehearsal.from_dict(json.loads(self._rehearsal_file.read_text(encoding="utf-8"))["rehearsal"])
        except (OSError, *_NOT_OURS):
            return None

    def write_trials(self, trials: Trials) -> None:
        """Write what rehearsals of several rates and mixtures found, whole or not at all."""
        self._make_ready()
        write_whole(self._trials_file, trials.to_json() + "\n")

    def write_rollouts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the policy's rollouts of step 0, if there are any, whole or not at all."""
        self._make_ready()
        _write_lines(self._rollouts_file, rows)

    def read_rollouts(self) -> list[dict[str, Any]]:
        """Read the rollouts that `write_rollouts` wrote. Damaged lines are left out."""
        return [row for row in _rows(self._rollouts_file) if row.keys() >= {"prompt", "completion", "sample"}]

    def append_check(self, snapshot: DriftSnapshot, verdict: Verdict, time: TimeSpent | None = None) -> None:
        """Append a drift check with its verdict and the time spent until then."""
        row = {"snapshot": snapshot.to_dict(), "verdict": verdict.to_dict()}
        self._append(self._drift_file, row | ({"time": time.to_dict()} if time else {}))

    def append_top_examples(self, words: Sequence[TopActivatingExamples]) -> None:
        """Append top activating examples of features that are not in the file yet."""
        told = {row.get("feature") for row in _rows(self._features_file)}
        for feature in words:
            if feature.feature not in told:
                self._append(self._features_file, feature.to_dict())

    def write_attribution(self, found: Attribution) -> None:
        """Write the result of `blame`, whole or not at all. The last one counts."""
        self._make_ready()
        write_whole(self._blame_file, found.to_json() + "\n")

    def append_postponed(self, step: int, reason: str) -> None:
        """Append that a check was due and was skipped."""
        self._append(self._skipped_file, {"step": step, "reason": reason})

    def append_fault(self, step: int, what: str, error: str, trace: str) -> None:
        """Append a failure of ours that training survived. If it cannot be written, it waits for the next call."""
        self._unwritten_faults.append({"step": step, "what": what, "error": error, "trace": trace})
        self.write_waiting_faults()

    def write_waiting_faults(self) -> None:
        """Write faults that could not be written when they happened."""
        while self._unwritten_faults:
            self._append(self._faults_file, self._unwritten_faults[0])
            self._unwritten_faults.popleft()

    def write_ended(self, step: int) -> None:
        """Write that training has ended, for those who follow the run from here.

        Args:
            step: optimizer steps done.

        """
        self._make_ready()
        write_whole(self._ended_file, json.dumps({"step": step}) + "\n")

    def written_at(self) -> float:
        """When a file of the run was last written, in seconds since the epoch; 0 if there is none."""
        try:
            return max((file.stat().st_mtime for file in self.folder.iterdir() if file.suffix != ".part"), default=0.0)
        except OSError:  # there is no folder, or a file has just been replaced
            return 0.0

    def read_looks(self) -> Looks | None:
        """The plan of the checks of this run, if there is one that can be read."""
        try:
            return RunSettings.from_dict(json.loads(self._settings_file.read_text(encoding="utf-8"))).looks
        except (OSError, *_NOT_OURS):
            return None

    def best_checkpoint(self, worst_shares: Mapping[int, float]) -> int:
        """The checkpoint to go back to.

        Args:
            worst_shares: by the steps of checks, how much of its budget the domain that was worst off had used up.

        Returns:
            Of the steps whose checkpoint is there and whose share is under 1, that of the least, of equal ones the latest; or 0.

        """
        kept = [
            (share, -step)
            for step, share in worst_shares.items()
            if share < 1 and (self.folder.parent / f"checkpoint-{step}" / _LAST_IN_CHECKPOINT).is_file()
        ]
        return -min(kept)[1] if kept else 0

    def judged_checks(self, step: int) -> list[tuple[DriftSnapshot, Verdict]]:
        """Read checks up to a step with their verdicts, in order. If a step was run twice, the later check counts."""
        by_step = {found[0].step: found for found in map(_check_in, _rows(self._drift_file)) if found is not None}
        return [by_step[s] for s in sorted(by_step) if s <= step]

    def checks_before(self, step: int) -> list[DriftSnapshot]:
        """Read the same checks without verdicts."""
        return [snapshot for snapshot, _ in self.judged_checks(step)]

    def postponed_since(self, last_check: int, step: int) -> bool:
        """Whether a check was skipped after the last check and up to a step."""
        steps = map(_skipped_step, _rows(self._skipped_file))
        return any(at is not None and last_check < at <= step for at in steps)

    def read_all(self) -> Logged:
        """Read all that can be read. Any file may be missing, cut off, damaged or of another version.

        Raises:
            OSError: if a file exists but cannot be opened.

        """
        unreadable: dict[str, str] = {}

        def told(file: Path, record_of: Callable[[Any], T]) -> list[T]:
            found, reasons, rows = [], [], list(_documents(file))
            for row in rows:
                try:
                    found.append(record_of(row))
                except _NOT_OURS as error:
                    reasons.append(f"{error or repr(error)}" if row else "cut off or damaged")
            if reasons:
                which = "" if file.suffix == ".json" else f" in {len(reasons)} of {len(rows)} lines"
                unreadable[file.name] = f"{file.name} cannot be read{which}: {reasons[-1].rstrip('.')}."
            return found

        checks = {check.snapshot.step: check for check in told(self._drift_file, _check_of)}
        settings = next(iter(told(self._settings_file, RunSettings.from_dict)), None)
        return Logged(
            settings=settings,
            forecast=next(iter(told(self._forecast_file, lambda row: Forecast.from_dict(row["forecast"]))), None),
            forecast_verdict=next(iter(told(self._forecast_file, lambda row: Verdict.from_dict(row["verdict"]))), None),
            other_forecasts=next(iter(told(self._forecast_file, _others_of)), ()),
            rehearsal=next(iter(told(self._rehearsal_file, lambda row: Rehearsal.from_dict(row["rehearsal"]))), None),
            rehearsal_verdict=next(iter(told(self._rehearsal_file, _rehearsal_verdict_of)), None),
            trials=next(iter(told(self._trials_file, Trials.from_dict)), None),
            checks=tuple(checks[step] for step in sorted(checks)),
            top_examples=tuple(told(self._features_file, TopActivatingExamples.from_dict)),
            blame=next(iter(told(self._blame_file, Attribution.from_dict)), None),
            postponed=tuple(told(self._skipped_file, lambda row: Postponed(int(row["step"]), str(row["reason"])))),
            faults=tuple(told(self._faults_file, _fault_of)),
            unreadable=tuple(unreadable.values()),
            ended_at=next(iter(told(self._ended_file, lambda row: int(row["step"]))), 0),
            best_checkpoint=self.best_checkpoint(_worst_shares(checks, settings)) if settings else 0,
        )

    def write_report(self, page: str, content: str) -> Path:
        """Write the report of the run as a page and as JSON, each whole or not at all.

        Returns:
            Path of the page.

        """
        self._make_ready()
        write_whole(self._report_file.with_suffix(".json"), content + "\n")
        write_whole(self._report_file, page)
        return self._report_file

    def _make_ready(self) -> None:
        """Make the folder, again if it was deleted. Never write into another run's folder."""
        if self._holds_another_run:
            self.start_anew()
        self.folder.mkdir(parents=True, exist_ok=True)

    def _append(self, file: Path, content: object) -> None:
        self._make_ready()
        torn = file.exists() and _last_byte(file) not in (b"", b"\n")
        with file.open("a", encoding="utf-8") as lines:
            lines.write(("\n" if torn else "") + json.dumps(content) + "\n")
            lines.flush()
            os.fsync(lines.fileno())


def run_directory_in(folder: Path) -> RunDirectory:
    """Get the directory of a run.

    Args:
        folder: the trainer's `output_dir`, or the folder `sts` in it.

    """
    return RunDirectory(folder / "sts" if (folder / "sts").is_dir() else folder)


def _worst_shares(checks: Mapping[int, JudgedCheck], settings: RunSettings) -> dict[int, float]:
    """Of the checks that measured all that is protected."""
    budgets = settings.policy.budgets
    return {
        step: worst_share(check.snapshot, settings.policy)
        for step, check in checks.items()
        if budgets.keys() <= check.snapshot.domains.keys()
    }


def _last_byte(file: Path) -> bytes:
    with file.open("rb") as content:
        content.seek(max(0, content.seek(0, os.SEEK_END) - 1))
        return content.read(1)


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """Like `_rows`, without a last line that a kill has cut off."""
    lines = list(_rows(file))
    return lines[:-1] if lines and not lines[-1] and _last_byte(file) != b"\n" else lines


def _write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows or file.exists():
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the object of each line. It is empty for a line that cannot be read."""
    if not file.exists():
        return
    for line in file.read_bytes().splitlines():
        yield _object(line)


def _object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:  # not JSON, or not UTF-8
        return {}
    return content if isinstance(content, dict) else {}


def _check_in(row: dict[str, Any]) -> tuple[DriftSnapshot, Verdict] | None:
    """Read the check in a line of `drift.jsonl`. None if this version cannot read it."""
    try:
        return DriftSnapshot.from_dict(row["snapshot"]), Verdict.from_dict(row["verdict"])
    except _NOT_OURS:
        return None


def _documents(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the object of a JSON file, or of each line of a JSON-lines file."""
    if file.suffix != ".json":
        yield from _rows(file)
    elif file.exists():
        yield _object(file.read_bytes())


def _check_of(row: dict[str, Any]) -> JudgedCheck:
    time = row.get("time")
    return JudgedCheck(
        DriftSnapshot.from_dict(row["snapshot"]),
        Verdict.from_dict(row["verdict"]),
        TimeSpent.from_dict(time) if time else None,
    )


def _others_of(row: dict[str, Any]) -> tuple[Forecast, ...]:
    return tuple(Forecast.from_dict(other) for other in row.get("other_saes", ()))


def _rehearsal_verdict_of(row: dict[str, Any]) -> Verdict | None:
    return Verdict.from_dict(row["verdict"]) if row["verdict"] else None


def _fault_of(row: dict[str, Any]) -> Fault:
    return Fault(int(row["step"]), *(str(row[name]) for name in ("what", "error", "trace")))


def _checked_step(row: dict[str, Any]) -> int | None:
    found = _check_in(row)
    return None if found is None else found[0].step


def _skipped_step(row: dict[str, Any]) -> int | None:
    step = row.get("step")
    return step if isinstance(step, int) else None
