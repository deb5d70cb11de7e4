"""What is run, and where its results are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
STORED = HERE / "stored"
FORECASTS, CANDIDATES, RUNS, MIXTURES = (STORED / f"{name}.jsonl" for name in ("forecasts", "candidates", "runs", "mixtures"))
STEP_ZERO, COSTS, SUMS = (STORED / name for name in ("step_zero.json", "costs.json", "sums.npz"))
LAYER_FORECASTS, LAYER_RUNS = (STORED / f"other_layer_{name}.jsonl" for name in ("forecasts", "runs"))
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


def sae_folder(name: str) -> Path:
    """Of an SAE by its name in the settings: one that people use, or one that only the validation does."""
    return next(place / name for place in (HERE.parent, STORED) if (place / name).is_dir())


def stored(file: Path) -> list[dict[str, Any]]:
    """Lines of results so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def store(file: Path, line: Mapping[str, Any]) -> None:
    """One more."""
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def rounded(value: Any) -> Any:
    """Floats to six digits: lines stay short."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
