"""How much of a run's time our checks take, and whether one more is affordable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

_FEWEST_PASSES = 3  # over the probes, in a forecast's readings; a check is one


def now() -> float:
    """Seconds on a clock that only goes forward, once all that is queued on an accelerator is done.

    A GPU works off what training has queued while Python is already elsewhere: without the wait, that would be billed to a check.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.monotonic()


class Overhead:
    """Time spent on checks against time spent on training, from when it is made. Set-up is over by then and does not count."""

    def __init__(self, limit: float, expected_s: float) -> None:
        """Start the clock.

        Args:
            limit: the share of training time that checks may take; from 1 on there is no limit.
            expected_s: what a check is expected to take until one was made.

        """
        self._limit, self._check_s = limit, expected_s
        self._began, self._spent_s = time.monotonic(), 0.0
        self._check_began: float | None = None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, time is ours and not training's."""
        self._check_began = now()
        try:
            yield
        finally:
            self._spent_s, self._check_began = self.spent_s, None

    @property
    def spent_s(self) -> float:
        """Seconds spent on checks, up to this moment."""
        running = 0.0 if self._check_began is None else time.monotonic() - self._check_began
        return self._spent_s + running

    @property
    def training_s(self) -> float:
        """Seconds spent on training itself."""
        return time.monotonic() - self._began - self.spent_s

    @property
    def share(self) -> float:
        """Time of checks as a share of the training's."""
        return self.spent_s / max(self.training_s, 1e-9)

    @property
    def check_s(self) -> float:
        """Seconds that a check is expected to take: as many as the last one."""
        return self._check_s

    def learn(self, check_s: float) -> None:
        """Take what a check has taken as what the next one will."""
        self._check_s = check_s

    @property
    def affords_check(self) -> bool:
        """Whether one more check keeps within the limit."""
        return self.affords_check_by_the_end(1.0)

    def affords_check_by_the_end(self, share_done: float) -> bool:
        """Whether one more check keeps within the limit once training has come to its end.

        Args:
            share_done: how much of the training, since the clock was started, is over by now; above 0, up to 1.

        """
        return self._limit >= 1 or self.spent_s + self._check_s <= self._limit * self.training_s / share_done


def first_guess(readings_s: float) -> float:
    """What a check may take before any was made: never less, by what the forecast took for its passes over the same probes."""
    return readings_s / _FEWEST_PASSES
