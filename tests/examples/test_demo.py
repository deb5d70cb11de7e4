"""The demo's whole path on the real model, with few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import demo

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.mark.gemma
@pytest.mark.timeout(900)  # the first run on a machine de-quantises the model
@pytest.mark.parametrize(
    ("protected", "n_queries"),
    [(("law", "code"), 8), pytest.param(tuple(demo.PROTECTED), 10, marks=pytest.mark.slow)],  # the fewest that can alarm
    ids=["two domains", "all domains"],
)
def test_the_demo_forecasts_watches_and_says_where_its_files_are(
    protected: tuple[str, ...], n_queries: int, tmp_path: Path
) -> None:
    program = f"import sys, demo; demo.PROTECTED = {list(protected)}; demo.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "--steps", "2", "--queries", str(n_queries), "--out", str(tmp_path / "run")]
    run = subprocess.run(command, cwd=DEMO.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.index("STS forecast: ") < run.stdout.index("STS step 1:") < run.stdout.index("STS step 2:")
    assert str(tmp_path / "run" / "sts") in run.stdout

    folder = tmp_path / "run" / "sts"
    forecast = json.loads((folder / "forecast.json").read_text())["forecast"]
    assert set(forecast["domains"]) == set(protected)
    assert forecast["unexplained"] < 0.4, "the SAE does not fit the model it was trained on"
    assert forecast["noise_floor"] < 1e-3, "another batch layout is no drift"
    snapshots = [json.loads(line)["snapshot"] for line in (folder / "drift.jsonl").read_text().splitlines()]
    assert [s["step"] for s in snapshots] == [1, 2]
    first, second = (s["train"]["relative_drift"]["value"] for s in snapshots)
    assert first == 0, "the first step of the warm-up has rate 0: unchanged weights have no drift at all"
    assert second > 0


def test_model_and_sae_go_together() -> None:
    run = subprocess.run([sys.executable, str(DEMO), "--model", "some/model"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "--model and --sae go together" in run.stderr
