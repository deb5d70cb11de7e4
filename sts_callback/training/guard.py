"""What the callback does about failures of its own: retry with less memory, record, train on or raise."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from sts_callback.distributed import RankFailed, Ranks
from sts_callback.errors import CannotTell, StsError, is_short_of_memory
from sts_callback.runs.directory import RunDirectory

if TYPE_CHECKING:
    from transformers import TrainerState

T = TypeVar("T")
Errors = tuple[type[Exception], ...]

logger = logging.getLogger(__name__)

_UNWATCHED = "STSCallback(on_forecast_error='train unwatched') trains without being watched."
_DIVISORS = (1, 2, 4, 8)  # of the tokens in a batch, in turn, while memory does not suffice
_ELSEWHERE, _SHORT, _FAILED, _RAISED = range(4)  # failures, the graver the higher: another's, out of memory, any, to be raised


@dataclass(frozen=True)
class Sink:
    """One of those who are told of a measurement."""

    name: str
    """As `faults.jsonl` calls it where it fails."""
    write: Callable[[], object]
    first_only: bool = True
    """Whether the first process does it for all."""


class Guard:
    """Runs our own work so that training survives a failure of it, which goes into the run log.

    All processes must call it alike: where one fails, all have failed.
    """

    def __init__(self, log: RunDirectory, ranks: Ranks, *, raises: bool) -> None:
        """Choose where failures are recorded, who must agree on them, and whether they are raised instead."""
        self._log, self._ranks, self._raises = log, ranks, raises

    def run(
        self, state: TrainerState, what: str, work: Callable[[], object], *, reraise: Errors = (), first_only: bool = False
    ) -> bool:
        """Do work that may fail.

        Args:
            state: the trainer's.
            what: the work's name in the run log.
            work: what to do.
            reraise: errors that are no failures of ours and are always raised.
            first_only: whether the first process does it for all.

        Returns:
            Whether it was done, by all.

        """
        is_mine = self._ranks.index == 0 or not first_only
        try:
            self._ranks.together(lambda: work() if is_mine else None)
        except Exception as error:
            if self._agreed(error, reraise) == _RAISED or self._raises:
                self._raise(what, error)
            self._record_error(state, what, error)
            return False
        return True

    def tell(self, state: TrainerState, *sinks: Sink) -> None:
        """Tell several of a measurement, one after the other; where one fails, the others still hear.

        Args:
            state: the trainer's.
            sinks: in this order.

        """
        for sink in sinks:
            self.run(state, sink.name, sink.write, first_only=sink.first_only)

    def measure(
        self,
        state: TrainerState,
        what: str,
        work: Callable[[int], T],
        batch_tokens: int,
        *,
        reraise: Errors = (),
        way_out: str = _UNWATCHED,
    ) -> T | None:
        """Do work that takes memory, in ever smaller batches while memory does not suffice.

        All processes try alike, so that none waits for another and all measure in the same batches. An error that says
        "out of memory" must not leave the callback: `auto_find_batch_size` would take it for training's own.

        Args:
            state: the trainer's.
            what: the work's name in the run log.
            work: what to do, given the number of tokens in a batch.
            batch_tokens: to begin with.
            reraise: see `run`.
            way_out: how the user does without, a sentence.

        Returns:
            What the work gives; None if it failed on this or another process, which is recorded.

        """
        for divisor in _DIVISORS:
            size = max(1, batch_tokens // divisor)
            try:
                return self._ranks.together(functools.partial(work, size))
            except Exception as error:
                failure = self._agreed(error, reraise)
                is_over = failure != _SHORT or divisor == _DIVISORS[-1]
                if failure == _RAISED or (is_over and (self._raises or Exception in reraise)):
                    self._raise(what, error, way_out)
                self._record_error(state, f"{what}, {size} tokens a batch" if failure == _SHORT else what, error)
            # Out here what the failed attempt held in memory is free: its traceback is gone.
            if is_over:
                return None
        raise AssertionError("the last attempt is done or failed")

    def record(self, state: TrainerState, what: str, error: str, trace: str) -> None:
        """Write a failure that training survives into the run log; where that cannot be done, once it can."""
        logger.warning("STS: %s failed at step %d, training goes on: %s", what, state.global_step, error)
        if state.is_world_process_zero:
            try:
                self._log.append_fault(state.global_step, what, error, trace)
            except OSError as write_error:
                logger.warning("STS cannot write this fault to %s yet: %r", self._log.folder, write_error)

    def _raise(self, what: str, error: Exception, way_out: str = _UNWATCHED) -> NoReturn:
        """Let an error out. With `on_error="raise"` as it is; else, at set-up, in words for the user, who is to do something."""
        if self._raises or isinstance(error, StsError):
            raise error
        if is_short_of_memory(error):
            raise CannotTell(
                f"{what}: memory does not suffice, not even for an eighth of the tokens in a batch. Lower "
                f"ProbeConfig(max_tokens=..., n_domain_demonstrations=...), take a smaller SAE, or a larger device. {way_out}"
            ) from None  # the trainer would take its text for its own and begin again with smaller batches
        raise CannotTell(
            f"{what}: it failed before the first step with {error!r}. If data, model and settings are in order, this is a fault "
            f"of ours: please report it with the lines above. {way_out}"
        ) from error

    def _agreed(self, error: Exception, reraise: Errors) -> int:
        """What all take a failure for, which all have been told of: the gravest that any process has had."""
        if isinstance(error, RankFailed):
            mine = _ELSEWHERE
        elif is_short_of_memory(error):
            mine = _SHORT
        else:
            mine = _RAISED if isinstance(error, reraise) else _FAILED
        return max(self._ranks.gathered(lambda: mine))

    def _record_error(self, state: TrainerState, what: str, error: Exception) -> None:
        self.record(state, what, repr(error), traceback.format_exc())
