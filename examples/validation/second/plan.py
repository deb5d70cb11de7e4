"""What the second round runs, and where its results are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
STORED = HERE / "stored"
FORECASTS, ANSWERED, REHEARSALS, RUNS = (
    STORED / f"{name}.jsonl" for name in ("forecasts", "answered_forecasts", "rehearsals", "runs")
)
STEP_ZERO, CALIBRATION = STORED / "step_zero.json", STORED / "calibration.json"
SETTINGS: dict[str, Any] = yaml.safe_load((HERE / "settings.yaml").read_text())


def rates(run: dict[str, Any]) -> list[float]:
    """The learning rate of each step.

    Args:
        run: of `runs` in settings.yaml; its last look is its last step.

    """
    n_steps, warmup = run["looks"][-1], run["warmup"]

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return {"constant": 1.0, "cosine": (1 + math.cos(math.pi * (step - warmup) / (n_steps - warmup))) / 2}[run["shape"]]

    return [run["rate"] * share(step) for step in range(n_steps)]
