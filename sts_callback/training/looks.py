"""Which checks of a run are planned, and what each may spend of the error that the run's test may make.

Each planned check has an equal part. A check spends the parts of all that were planned up to it and that nobody has spent: so
where checks are skipped, as `max_overhead` demands, the next one is the sharper. One that comes besides, such as at an evaluation
by hand, may alarm only in place of skipped ones; the last check of a run that ends early, also in place of those that will not
come. All parts together never come to more than `PolicyConfig.alpha`, whichever checks are made.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sts_callback.config import PolicyConfig
from sts_callback.policy import judge_drift, worst_share
from sts_callback.records import DriftSnapshot, Verdict
from sts_callback.records.run import Looks

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from sts_callback.training.arguments import CheckOn

FIRST = (1, 2, 5)
"""Steps after which a run that was not rehearsed is checked whatever it takes. Our choice: of
the domains that the validation's harsh runs harmed, most were beyond their budgets after 5 of 40 steps."""


def plan(args: TrainingArguments, state: TrainerState, check_on: CheckOn, train_dataloader: Any) -> Looks:
    """Plan the checks of a run that begins.

    Args:
        args: the trainer's.
        state: the trainer's, which knows how long the run is.
        check_on: when the user wants checks.
        train_dataloader: the trainer's, which knows how long an epoch is.

    """
    if isinstance(check_on, int):
        return Looks(state.max_steps, check_on)
    by_evaluation = check_on == "evaluate" or args.save_strategy == "best"
    strategy, steps = (args.eval_strategy, state.eval_steps) if by_evaluation else (args.save_strategy, state.save_steps)
    if strategy == "steps":
        return Looks(state.max_steps, int(steps or 0))
    return Looks(state.max_steps, _steps_of_epoch(args, train_dataloader) if strategy == "epoch" else 0)


def resumed(kept: Looks | None, planned: Looks, step: int) -> Looks:
    """The plan of a run that is taken up.

    Args:
        kept: of the run's first session; None if there was none, as in runs of earlier versions.
        planned: what would be planned now.
        step: optimizer steps done.

    Returns:
        That of the first session. Where the run is to go on beyond what was planned, what is still to come is planned anew, with
        an error of its own.

    """
    if kept is None:
        return planned
    return dataclasses.replace(planned, after=step) if planned.last_step > kept.last_step else kept


def unspent(looks: Looks, n_spent: int, step: int, *, is_last: bool = False) -> int:
    """How many parts of the error of its run a check may spend.

    Args:
        looks: the run's plan, which has as many parts as steps.
        n_spent: parts of this plan that are spent.
        step: of the check.
        is_last: whether training has ended, so that no other will come.

    Returns:
        0 if it may not alarm.

    """
    planned = looks.steps
    return max(0, (len(planned) if is_last else bisect.bisect_right(planned, step)) - n_spent)


class History:
    """The checks of a run as its test counts them."""

    def __init__(self, looks: Looks, policy: PolicyConfig) -> None:
        """Begin with none."""
        self.looks, self._policy = looks, policy
        self._recent: list[DriftSnapshot] = []
        self._levels: list[float] = []
        self._n_spent = 0
        self.worst_shares: dict[int, float] = {}
        """By the steps of all checks, how much of its budget the protected domain that was worst off had used up."""

    @property
    def newest(self) -> DriftSnapshot | None:
        """The last check."""
        return self._recent[-1] if self._recent else None

    def take_up(self, looks: Looks, checks: Sequence[tuple[DriftSnapshot, Verdict]]) -> None:
        """Go on after a resume.

        Args:
            looks: the plan that holds now.
            checks: all that were made, in order.

        """
        self.looks, n_recent = looks, self._policy.patience
        self._recent = [snapshot for snapshot, _ in checks][-n_recent:]
        self._levels = [verdict.level for _, verdict in checks][-n_recent:]
        spent = sum(verdict.level for _, verdict in checks if verdict.step > looks.after)
        self._n_spent = round(spent * len(looks.steps) / self._policy.alpha)
        self.worst_shares = {snapshot.step: worst_share(snapshot, self._policy) for snapshot, _ in checks}

    def add(self, snapshot: DriftSnapshot, *, is_last: bool) -> None:
        """Count a check that was made.

        Args:
            snapshot: the check.
            is_last: whether training has ended.

        """
        n_parts = unspent(self.looks, self._n_spent, snapshot.step, is_last=is_last)
        self._n_spent += n_parts
        self._recent = [*self._recent, snapshot][-self._policy.patience :]
        self._levels = [*self._levels, self._policy.alpha * n_parts / len(self.looks.steps)][-self._policy.patience :]
        self.worst_shares[snapshot.step] = worst_share(snapshot, self._policy)

    def verdict(self) -> Verdict:
        """What follows from the newest check and those before it."""
        return judge_drift(self._recent, self._policy, self._levels)


def _steps_of_epoch(args: TrainingArguments, train_dataloader: Any) -> int:
    """Optimizer steps in an epoch; 0 if the data have no length."""
    try:
        n_batches = len(train_dataloader)
    except TypeError:
        return 0
    return max(1, -(-n_batches // args.gradient_accumulation_steps))
