"""The run directory: what was forecast and measured, written so that a kill loses at most the line being written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sts_callback.errors import CannotTell
from sts_callback.records import DriftSnapshot, FeatureInWords, Forecast, Verdict


class RunLog:
    """Files of one run, under `<output_dir>/sts/`."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is written yet."""
        self.folder = folder
        self.baseline_file = folder / "baseline.safetensors"
        self._forecast_file = folder / "forecast.json"
        self._drift_file = folder / "drift.jsonl"
        self._features_file = folder / "features.jsonl"
        self._faults_file = folder / "faults.jsonl"

    def start_anew(self) -> None:
        """Make the folder; what an earlier run left in it is moved aside to `sts.1`, `sts.2` and so on."""
        if self.folder.exists() and any(self.folder.iterdir()):
            number = 1
            while self.folder.with_name(f"{self.folder.name}.{number}").exists():
                number += 1
            self.folder.rename(self.folder.with_name(f"{self.folder.name}.{number}"))
        self.folder.mkdir(parents=True, exist_ok=True)

    def write_forecast(self, forecast: Forecast, verdict: Verdict, others: Sequence[Forecast] = ()) -> None:
        """Write forecast and verdict, and the forecasts of further SAEs, whole or not at all."""
        content = {
            "forecast": forecast.to_dict(),
            "verdict": verdict.to_dict(),
            "other_saes": [other.to_dict() for other in others],
        }
        scratch = self._forecast_file.with_suffix(".part")
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, self._forecast_file)

    def read_forecast(self) -> Forecast:
        """Read the forecast of this run.

        Raises:
            CannotTell: if it is missing or damaged.

        """
        try:
            return Forecast.from_dict(json.loads(self._forecast_file.read_text(encoding="utf-8"))["forecast"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CannotTell(
                f"forecast: {self._forecast_file} cannot be read ({error!r}); a resumed run needs the one made at its start. "
                "Drift can be measured only from step 0: start the run anew."
            ) from error

    def append_check(self, snapshot: DriftSnapshot, verdict: Verdict) -> None:
        """Append one drift check with its verdict."""
        self._append(self._drift_file, {"snapshot": snapshot.to_dict(), "verdict": verdict.to_dict()})

    def append_words(self, words: Sequence[FeatureInWords]) -> None:
        """Append features in words, those that were not told before."""
        told = {row["feature"] for row in _whole_rows(self._features_file)}
        for feature in words:
            if feature.feature not in told:
                self._append(self._features_file, feature.to_dict())

    def append_fault(self, step: int, trace: str) -> None:
        """Append a failure of ours that training survived."""
        self._append(self._faults_file, {"step": step, "trace": trace})

    def checks_before(self, step: int) -> list[DriftSnapshot]:
        """Checks up to a step, in order. Of a stretch that was run twice after a resume, the later one counts."""
        by_step: dict[int, DriftSnapshot] = {}
        for row in _whole_rows(self._drift_file):
            snapshot = DriftSnapshot.from_dict(row["snapshot"])
            by_step[snapshot.step] = snapshot
        return [by_step[s] for s in sorted(by_step) if s <= step]

    @staticmethod
    def _append(file: Path, content: object) -> None:
        torn = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")
        with file.open("a", encoding="utf-8") as lines:
            lines.write(("\n" if torn else "") + json.dumps(content) + "\n")
            lines.flush()
            os.fsync(lines.fileno())


def _whole_rows(file: Path) -> list[Any]:
    """What stands in the lines that a kill has not cut off."""
    if not file.exists():
        return []
    whole = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            whole.append(json.loads(line))
    return whole
