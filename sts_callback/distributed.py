"""Meetings of the processes of a run. If one process fails without telling the others, they wait for it forever."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import distributed

from sts_callback.errors import StsError

T = TypeVar("T")


class RankFailed(StsError, RuntimeError):  # noqa: N818  # says who, not what kind
    """Another process of the run failed."""


@dataclass
class Ranks:
    """This process and the others that run the same code. By default it is alone and never waits.

    All processes must come to the same meetings in the same order. A process that fails between two meetings tells the others at
    the next one, wherever they are in the code. All raise there. If a failure that all know of passes through an outer meeting,
    that meeting is not held.
    """

    index: int = 0
    n: int = 1
    _n_held: int = field(default=0, init=False, compare=False)

    @classmethod
    def of_run(cls) -> Ranks:
        """All processes of the run, as torchrun or a similar launcher started them."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    def gathered(self, work: Callable[[], T]) -> list[T]:
        """Run `work` in every process. Each process gets the results of all, by rank, or all raise.

        Args:
            work: the function to run. It may contain meetings. Its result is sent to all processes.

        Raises:
            RankFailed: if other processes failed. A process that failed itself raises its own error.

        """
        if self.n == 1:
            return [work()]
        failure: Exception | None = None
        summary, trace, result = "", "", b""
        try:
            result = pickle.dumps(work())  # here, so that a result that cannot be sent counts as a failure
        except Exception as error:
            if error.__dict__.get(_KNOWN) == self._n_held:
                raise
            failure, summary, trace = error, f"{type(error).__name__}: {error}", traceback.format_exc()
        self._n_held += 1
        told: list[Any] = [None] * self.n
        distributed.all_gather_object(told, (failure is None, summary, trace, result))
        failed = {rank: theirs for rank, (ok, *theirs) in enumerate(told) if not ok}
        if not failed:
            return [pickle.loads(theirs) for *_, theirs in told]
        if failure is None:
            failure = RankFailed("; ".join(f"process {rank} failed with {its}" for rank, (its, *_) in failed.items()))
            failure.__cause__ = StsError("\n".join(trace for _, trace, _ in failed.values()))
        failure.__dict__[_KNOWN] = self._n_held
        try:
            raise failure
        finally:
            del failure  # else its traceback, which contains this call, would keep the objects of `work` in memory

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` in every process. Each keeps its own result, or all raise, as for `gathered`."""
        kept: list[T] = []
        self.gathered(lambda: kept.append(work()))
        return kept[0]

    def from_first(self, work: Callable[[], T]) -> T:
        """Run `work` in the first process only. All get its result, or all raise, as for `gathered`."""
        if self.n == 1:
            return work()
        made = [self.together(lambda: pickle.dumps(work()) if self.index == 0 else b"")]
        distributed.broadcast_object_list(made, src=0)
        result: T = pickle.loads(made[0])
        return result


_KNOWN = "_known_to_all_ranks"
"""Marks an error that all processes know of. It names the meeting, since the same object may be raised again later."""
