"""Training in processes of their own: one that kills itself, `kill -9`, at a chosen moment, or two that work together."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaForCausalLM, Trainer
from transformers.trainer_callback import TrainerState

from sts_callback.callback import STSCallback
from test_callback import made_callback, made_trainer

_processes = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """Start the process that sessions are forked from, with all imports done: they take longer than a tiny run."""
    _processes.set_forkserver_preload(["killable"])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):  # preloading knows no other path
        forkserver.ensure_running()


@dataclass(frozen=True)
class Run:
    """What is trained, the same in every session of a run."""

    kind: str = "plain"
    lora: bool = False
    check_on: Any = "save"
    restore: bool = False
    """`restore_callback_states_from_checkpoint`"""
    on_forecast_error: str = "raise"


def together(work: Callable[[int, Path], object], out: Path, *, limit_s: float = 120) -> None:
    """Do work in two processes with the environment that torchrun makes; they must end well, and in time."""
    _start_server()
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    processes = [_processes.Process(target=_ranked, args=(work, rank, port, out)) for rank in (0, 1)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "processes wait for one another"
    assert [process.exitcode for process in processes] == [0, 0]


def _fresh() -> None:
    """One thread; and what was imported before the fork is left where it is, unseen by collections of garbage."""
    torch.set_num_threads(1)
    gc.freeze()


def _ranked(work: Callable[[int, Path], object], rank: int, port: int, out: Path) -> None:
    _fresh()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}
    os.environ |= {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
    work(rank, out)


def session(run: Run, out: Path, *, watched: bool = True, kill_at: int | None = None) -> None:
    """Train from the newest whole checkpoint, or from scratch, until the end or until the moment of the kill."""
    _start_server()
    process = _processes.Process(target=_train, args=(run, out, watched, kill_at))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the session of {out} hangs")
    assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL), process.exitcode


def outcome(out: Path) -> dict[str, Any]:
    """What the last whole session left: its moments in order, the trainer's log, the weights."""
    found: dict[str, Any] = torch.load(out / "outcome.pt")
    return found


def whole_checkpoints(out: Path) -> list[Path]:
    """Those that a kill did not cut off: `trainer_state.json` is written last, and may be cut off itself."""
    whole = []
    for folder in out.glob("checkpoint-*"):
        try:
            whole.append((json.loads((folder / "trainer_state.json").read_text())["global_step"], folder))
        except (OSError, ValueError):
            continue
    return [folder for _, folder in sorted(whole)]


def _train(run: Run, out: Path, watched: bool, kill_at: int | None) -> None:
    _fresh()
    moments: list[str] = []
    _count_moments(moments, kill_at)  # before the trainer takes the model's `forward`
    callback = made_callback(check_on=run.check_on, on_forecast_error=run.on_forecast_error)
    trainer = made_trainer(
        run.kind, out, [callback] * watched, lora=run.lora, restore_callback_states_from_checkpoint=run.restore
    )
    callback.attach(trainer)
    checkpoints = whole_checkpoints(out)
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.save({"moments": moments, "log": trainer.state.log_history, "weights": weights}, out / "outcome.pt")


def _count_moments(moments: list[str], kill_at: int | None) -> None:
    """Note each moment by name when it comes, and end the process at one of them."""

    def watch(owner: Any, name: str, moment: Callable[..., str | None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)  # the trainer reads the signature of `forward`
        def watched(*args: Any, **kwargs: Any) -> Any:
            if (found := moment(*args)) is not None:
                if len(moments) == kill_at:
                    if found.startswith("half of "):
                        os.ftruncate(args[0], os.fstat(args[0]).st_size - 20)
                    os.kill(os.getpid(), signal.SIGKILL)
                moments.append(found)
            return original(*args, **kwargs)

        setattr(owner, name, watched)

    watch(Trainer, "training_step", lambda *args: "training step")
    watch(LlamaForCausalLM, "forward", lambda model, *args: None if model.training else "probe")
    # The report is written when training has ended; a run that is resumed then, transformers trains a step further.
    watch(
        os,
        "fsync",
        lambda descriptor: None if _is_of_the_end(_open_file(descriptor)) else f"half of {_open_file(descriptor).name}",
    )
    watch(os, "fsync", lambda descriptor: None if _is_of_the_end(_open_file(descriptor)) else "written, not synced")
    watch(os, "replace", lambda source, target: None if _is_of_the_end(Path(target)) else "replacing a file")
    watch(Trainer, "_save_optimizer_and_scheduler", lambda *args: "saving")
    watch(TrainerState, "save_to_json", lambda *args: "saving the state")
    watch(STSCallback, "on_save", lambda *args: "saved, not checked")


def _open_file(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _is_of_the_end(file: Path) -> bool:
    """Whether it is written when all else of the run is."""
    return file.stem in ("report", "ended")
