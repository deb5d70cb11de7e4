"""On a device that is no CPU: the same numbers, nothing in two places, and a host that hardly waits. Planted faults are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

SCRIPT = Path(__file__).with_name("on_pretended.py")
N_SETS, WAITS_OF_A_SET = 2, 5  # to read its sums: five of them

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch has no backends in Python",
    ),
]


@cache
def seen() -> dict[str, Any]:
    """What `on_pretended.py` tells; it names a backend, for good in its process."""
    tests = SCRIPT.parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), str(tests.parent / "examples")])
    made = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT)],  # warnings of libraries, which other tests do not ignore
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "STS_LEDGER": ""},
    )
    assert made.returncode == 0, made.stderr[-3000:]
    found: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
    return found


def most_waits(run: Mapping[str, Any]) -> int:
    """One for each forward, none for a chunk of the SAE, and what reading the sums takes."""
    return int(run["forwards"]) + N_SETS * WAITS_OF_A_SET


def n_waits(run: Mapping[str, Any], *files: str) -> int:
    """Number of waits, all or those in some files."""
    return sum(n for where, n in run["waits"].items() if not files or where.startswith(files))


def n_sent(run: Mapping[str, Any]) -> int:
    return sum(n for where, n in run["copied"].items() if where.endswith("to the device"))


def test_forecast_and_check_are_those_of_the_cpu() -> None:
    """Bit by bit, since the numbers are computed there; `decode` alone goes another way."""
    assert seen()["forecast_off_by"] <= 1e-6
    assert seen()["check_off_by"] <= 1e-6
    assert seen()["same"] == [0.0, 0.0]


def test_a_model_that_moves_after_its_monitor_was_made_is_measured() -> None:
    assert seen()["moved_afterwards_off_by"] <= 1e-6


def test_the_default_device_of_new_tensors_does_not_matter() -> None:
    assert seen()["default_device_off_by"] <= 1e-6


def test_a_check_waits_no_more_than_once_a_forward_and_never_for_a_chunk() -> None:
    check = seen()["check"]
    assert check["forwards"] > 10 and check["chunks"] > 2 * N_SETS
    assert n_waits(check) <= check["forwards"]  # with all that sums take
    assert n_waits(check, "measure/accumulators.py:", "metrics/", "model/sae.py") <= N_SETS * WAITS_OF_A_SET


def test_a_forecast_waits_no_more_than_once_a_forward_nor_twice_a_chunk() -> None:
    """Its sparse activations have a size that only the device knows."""
    forecast = seen()["forecast"]
    assert n_waits(forecast, "model/capture.py", "measure/runner.py", "measure/answers.py") <= forecast["forwards"]
    assert n_waits(forecast, "metrics/sums.py", "measure/accumulators.py", "model/sae.py") <= 2 * forecast["chunks"] + N_SETS * 10


def test_a_check_sends_tokens_and_step_0_and_brings_back_sums() -> None:
    check = seen()["check"]
    assert n_sent(check) <= check["most_bytes"]
    assert sum(check["copied"].values()) - n_sent(check) < 20_000


@pytest.mark.parametrize("fault", ["step 0 on the CPU", "a projection on the CPU"])
def test_tensors_in_two_places_are_found(fault: str) -> None:
    assert "on the CPU and on the device" in seen()["faults"][fault]["raised"]
    assert seen()["faults"]["none"]["raised"] == ""


def test_a_wait_too_many_is_found() -> None:
    faults, check = seen()["faults"], seen()["check"]
    assert faults["none"]["waits"] <= check["forwards"] < faults["a question to the device in every sum"]["waits"]


def test_a_copy_too_many_is_found() -> None:
    faults, check = seen()["faults"], seen()["check"]
    assert faults["none"]["sent"] <= check["most_bytes"] < faults["a projection sent for every chunk"]["sent"]
