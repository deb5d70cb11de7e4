"""What the callback does about failures of its own: retry with less memory, record, train on or raise."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from accelerate.utils.memory import should_reduce_batch_size

from sts_callback import ranks
from sts_callback.runlog import RunLog

if TYPE_CHECKING:
    from transformers import TrainerState

T = TypeVar("T")
Errors = tuple[type[Exception], ...]

logger = logging.getLogger(__name__)

_DIVISORS = (1, 2, 4, 8)  # of the tokens in a batch, in turn, while memory does not suffice
_DONE, _SHORT, _FAILED = range(3)  # outcomes of an attempt, the worse the higher: done, out of memory, failed


class Guard:
    """Runs our own work so that training survives a failure of it, which goes into the run log."""

    def __init__(self, log: RunLog, *, raises: bool) -> None:
        """Choose where failures are recorded, and whether they are raised instead."""
        self._log, self._raises = log, raises

    def run(self, state: TrainerState, what: str, work: Callable[[], object], *, passes: Errors = ()) -> None:
        """Do work that may fail.

        Args:
            state: the trainer's.
            what: the work's name in the run log.
            work: what to do.
            passes: errors that are no failures of ours and are always raised.

        """
        try:
            work()
        except passes:
            raise
        except Exception as error:
            if self._raises:
                raise
            self._record_error(state, what, error)

    def measure(
        self, state: TrainerState, what: str, work: Callable[[int], T], batch_tokens: int, *, passes: Errors = ()
    ) -> T | None:
        """Do work that takes memory, in ever smaller batches while memory does not suffice.

        All processes try alike, so that none waits for another and all measure in the same batches. An error that says
        "out of memory" must not leave the callback: `auto_find_batch_size` would take it for training's own.

        Args:
            state: the trainer's.
            what: the work's name in the run log.
            work: what to do, given the number of tokens in a batch.
            batch_tokens: to begin with.
            passes: see `run`.

        Returns:
            What the work gives; None if it failed on this or another process, which is recorded.

        """
        for divisor in _DIVISORS:
            size, outcome, result = max(1, batch_tokens // divisor), _DONE, None
            try:
                result = work(size)
            except passes:
                raise
            except Exception as error:
                is_short = isinstance(error, MemoryError) or should_reduce_batch_size(error)
                outcome = _SHORT if is_short and divisor < _DIVISORS[-1] else _FAILED
                if outcome == _FAILED and self._raises:
                    raise
                self._record_error(state, f"{what}, {size} tokens a batch" if is_short else what, error)
            # Out here what the failed attempt held in memory is free: its traceback is gone.
            worst = ranks.worst(outcome)
            if outcome == _DONE and worst != _DONE:
                self.record(state, what, "it failed on another process, whose output says why", "")
            if worst != _SHORT:
                return result if worst == _DONE else None
        raise AssertionError("the last attempt is done or failed")

    def record(self, state: TrainerState, what: str, error: str, trace: str) -> None:
        """Write a failure that training survives into the run log; where that cannot be done, once it can."""
        logger.warning("STS: %s failed at step %d, training goes on: %s", what, state.global_step, error)
        if state.is_world_process_zero:
            try:
                self._log.append_fault(state.global_step, what, error, trace)
            except OSError as write_error:
                logger.warning("STS cannot write this fault to %s yet: %r", self._log.folder, write_error)

    def _record_error(self, state: TrainerState, what: str, error: Exception) -> None:
        self.record(state, what, repr(error), traceback.format_exc())
