"""Starts a distributed test under torchrun and never waits longer than it was told to: a hang is a failure like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name("worker.py")
Seen = list[dict[str, Any]]
"""What each rank saw of one case, see `worker.run`."""


class Hang(AssertionError):  # noqa: N818  # what it is, not what kind
    """The processes had to be killed."""


def launch(folder: Path, cases: dict[str, dict[str, Any]], *, seconds: float, n_ranks: int = 2, worker: Path = WORKER) -> None:
    """Run cases one after the other in one set of processes.

    Args:
        folder: where cases and what was seen of them lie.
        cases: by name, see `worker.run`.
        seconds: after which all processes are killed.
        n_ranks: processes.
        worker: what each of them runs.

    Raises:
        Hang: if they took too long.
        AssertionError: if one of them died.

    """
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_ranks)]
    output = folder / "output.txt"
    with output.open("w") as lines:
        process = subprocess.Popen([*torchrun, str(worker), str(folder)], env=environment, stdout=lines, stderr=lines)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Hang(f"killed after {seconds:.0f} s\n{_tail(output)}") from None
        finally:
            _kill(process)
    assert code == 0, _tail(output)


def seen(folder: Path, case: str, n_ranks: int = 2) -> Seen:
    """What each rank saw."""
    return [torch.load(folder / case / f"seen-{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and its workers, each of which torchrun puts into a session of its own."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in family:
            one.kill()
        process.wait()


def _tail(output: Path) -> str:
    return output.read_text()[-6000:]
