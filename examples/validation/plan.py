"""What is run, and where its results are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
FORECASTS, CANDIDATES, RUNS, MIXTURES = (HERE / f"{name}.jsonl" for name in ("forecasts", "candidates", "runs", "mixtures"))
STEP_ZERO, COSTS, SUMS = (HERE / name for name in ("step_zero.json", "costs.json", "sums.npz"))
SETTINGS: dict[str, Any] = yaml.safe_load((HERE / "settings.yaml").read_text())


@dataclass(frozen=True)
class Run:
    """One fine-tune."""

    fine_tune: str
    setting: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.fine_tune}/{self.setting}/{self.seed}"


def planned() -> list[Run]:
    """All runs: first seeds first, the development half before the other."""
    fine_tunes = [*SETTINGS["fine_tunes"]["development"], *SETTINGS["fine_tunes"]["held_out"]]
    first = [Run(name, setting, 0) for setting in ("harsh", "gentle") for name in fine_tunes]
    second = [Run(name, setting, 1) for setting in ("harsh", "gentle") for name in SETTINGS["second_seed"]]
    return sorted(first, key=lambda run: run.fine_tune in SETTINGS["fine_tunes"]["held_out"]) + second


def stored(file: Path) -> list[dict[str, Any]]:
    """Lines of results so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
