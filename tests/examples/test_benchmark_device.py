"""`make bench ARGS="--device ..."`: it runs on a CPU and on the pretended device, and its page says what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

import sts_callback
from benchmark_device import CELLS, COLUMNS, QUICK, or_failure
from benchmark_device_pages import data_sheet, n_bytes, n_waits
from benchmark_device_pages import page as made_page
from pages import ROOT, page
from watched import FROM, TO, WatchedGPU

RESULTS = json.loads(page("examples/benchmark_device.json"))
CARD = "NVIDIA H100 80GB HBM3"
COUNTED = {"forwards": 10, "waits": {"a.py:1": 5}, "copied": {f"a.py:1 {TO}": 1000, f"a.py:2 {TO}": 24, f"a.py:1 {FROM}": 8}}


def on_a_card(**changes: Any) -> dict[str, Any]:
    """Made-up results: a check of 2 s at half the speed of a large product, a quarter of the data sheet's."""
    measured = {**COUNTED, "seconds": 2.0, "flop": 2 * 989e12 / 4, "peak_mib": 300.0}
    row = {
        **dict(zip(COLUMNS, ("8B", 16384, 15, 32, 150), strict=True)),
        "gemm_tflops": 989 / 2,
        "forecast": measured,
        "check": measured,
        "step": {"seconds": 0.1},
    }
    identity = {"steps": 6, "checks": 6, "moved": True, "without_twice": True, "with_and_without": True}
    return {CARD: {"device": "cuda", "cells": [{**row, **changes}], "identity": identity}}


def words(results: dict[str, Any]) -> str:
    return " ".join(made_page(results).split())


def run(*arguments: str) -> None:
    made = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "examples" / "benchmark.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert made.returncode == 0, made.stderr[-3000:]


def of_tiny(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was found on a device, and its only cell."""
    found = json.loads((folder / "benchmark_device.json").read_text())[name]
    (row,) = found["cells"]
    assert tuple(row[key] for key in COLUMNS) == QUICK
    return found, row


def test_the_page_is_that_of_the_results() -> None:
    assert made_page(RESULTS) == page("examples/BENCHMARK_DEVICE.md")


def test_without_a_gpu_the_page_says_so() -> None:
    assert "**No GPU has been seen yet.**" in words({"pretended": {"device": "pretended", "cells": []}})
    failed = {**dict(zip(COLUMNS, QUICK, strict=True)), "failed": "AssertionError: no card"}
    told = words({"cuda": {"device": "cuda", "cells": [failed]}})
    assert "**No GPU has been seen yet.**" in told
    assert told.count("failed: AssertionError: no card") == 5  # forecast, check and step; their counts


def test_a_card_is_told_by_its_speed() -> None:
    told = words(on_a_card())
    assert "No GPU" not in told
    assert f"## {CARD}" in told
    assert "| 2 s | 494 TFLOP | 50.0%, 25.0% | 300 MiB | 0.1 s | 4.00% |" in told
    assert "the weights are the same, bit for bit" in told
    assert "| check | 10 | 5 | 0.50 | 1,024 | 8 |" in told


def test_what_failed_says_so_and_leaves_the_rest() -> None:
    told = words(on_a_card(check=or_failure(lambda: {}["no"]), step={"failed": "OutOfMemoryError: CUDA out of memory."}))
    assert "| failed: KeyError: 'no' |" in told
    assert "| failed: OutOfMemoryError: CUDA out of memory. |" in told
    assert "| 2 s | 494 TFLOP |" in told


def test_weights_that_differ_are_no_small_print() -> None:
    results = on_a_card()
    results[CARD]["identity"]["with_and_without"] = False
    assert "**the weights differ**. Without the callback, training repeats itself." in words(results)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA L4", None),
    ],
)
def test_the_data_sheet_of_another_card_is_not_taken(name: str, tflops: float | None) -> None:
    assert data_sheet(name) == tflops


def test_what_torch_warns_of_is_counted_by_the_line_of_the_package() -> None:
    """By a function that says that it stands in the package, and with `meta` in the place of a GPU."""
    source = "def wait(warn):\n    warn('called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)')\n"
    inside: dict[str, Any] = {}
    exec(compile(source, str(Path(sts_callback.__file__).parent / "measure" / "somewhere.py"), "exec"), inside)
    with pytest.warns(UserWarning, match="another"), WatchedGPU() as seen:
        for _ in range(3):
            inside["wait"](warnings.warn)
        warnings.warn("another", stacklevel=1)
        torch.ones(4, 3).to("meta")
        torch.ones(4, 5) @ torch.ones(5, 6)
    assert seen.waits == {"measure/somewhere.py:2": 3}
    assert seen.copied == {f"elsewhere {TO}": 48}
    assert seen.flop == 2 * 4 * 5 * 6


def test_committed_counts_are_whole() -> None:
    assert [tuple(row[key] for key in COLUMNS) for row in RESULTS["pretended"]["cells"]] == CELLS["pretended"]
    for row in RESULTS["pretended"]["cells"]:
        for part in ("forecast", "check"):
            assert n_waits(row[part]) > 0, part
            assert n_bytes(row[part], TO) > 0 < n_bytes(row[part], FROM)


def test_docs_tell_these_counts() -> None:
    told = " ".join(page("docs/how-it-was-validated.md").split())
    row, without_bos = RESULTS["pretended"]["cells"]
    check, forecast = row["check"], row["forecast"]
    each = [f"{n_waits(part) / part['forwards']:.1f}" for part in (check, forecast)]
    assert f"A check waits {each[0]} times a forward and a forecast {each[1]} times" in told
    sent, back = n_bytes(check, TO), n_bytes(check, FROM)
    assert f"copies {sent / 1e6:.1f} MB to the device, {sent / row['check_tokens']:.0f} bytes for each token it reads" in told
    assert f"It copies {back / 1e6:.1f} MB back" in told
    waits = without_bos["check"]["waits"]
    assert f"a check waits {sum(waits.values()) / without_bos['check']['forwards']:.1f} times a forward" in told
    assert sum(n for place, n in waits.items() if "masking_utils" in place) > sum(waits.values()) / 2
    of_step_0 = sum(n for place, n in check["copied"].items() if place.startswith(("measure/accumulators", "metrics/sums")))
    assert of_step_0 - back > sent / 2  # that is most


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    run("--device", "cpu", "--quick", "--out", str(tmp_path))
    found, row = of_tiny(tmp_path, "cpu")
    for part in ("forecast", "check"):
        assert row[part]["seconds"] > 0 < row[part]["flop"]
        assert row[part]["waits"] == row[part]["copied"] == {}
    assert row["forecast"]["flop"] > row["check"]["flop"]
    assert row["step"]["seconds"] > 0 < row["gemm_tflops"]
    assert found["identity"] == {"steps": 6, "checks": 6, "moved": True, "without_twice": True, "with_and_without": True}
    made = (tmp_path / "BENCHMARK_DEVICE.md").read_text()
    (tmp_path / "BENCHMARK_DEVICE.md").unlink()
    run("--device", "cpu", "--pages", "--out", str(tmp_path))
    assert (tmp_path / "BENCHMARK_DEVICE.md").read_text() == made == made_page({"cpu": found})


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch has no backends in Python"
)
def test_it_runs_on_the_pretended_device(tmp_path: Path) -> None:
    run("--device", "pretended", "--quick", "--out", str(tmp_path))
    found, row = of_tiny(tmp_path, "pretended")
    assert "identity" not in found
    for part in ("forecast", "check"):
        assert n_waits(row[part]) > 0
        assert "seconds" not in row[part]
        assert n_bytes(row[part], TO) > 64 * row["check_tokens"]
    assert "No GPU has been seen yet" in (tmp_path / "BENCHMARK_DEVICE.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_cell_that_says_so(tmp_path: Path) -> None:
    run("--device", "cuda", "--quick", "--out", str(tmp_path))
    found, row = of_tiny(tmp_path, "cuda")
    assert row["failed"]
    assert found["identity"]["failed"]
