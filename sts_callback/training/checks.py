"""The drift checks of a watched run: which are made, what follows from them, and who is told."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sts_callback.distributed import Ranks
from sts_callback.errors import CannotTell
from sts_callback.measure.monitor import Monitor
from sts_callback.records import DriftSnapshot, Verdict
from sts_callback.records.rehearsal import Rehearsal
from sts_callback.records.run import Looks, TimeSpent
from sts_callback.report.headline import alarms_since
from sts_callback.runs.directory import RunDirectory
from sts_callback.training import looks, trainer_log
from sts_callback.training.arguments import Settings
from sts_callback.training.guard import Guard, Sink
from sts_callback.training.overhead import Overhead
from sts_callback.training.recorder import RunRecorder
from sts_callback.training.rollouts import Rollouts, samples

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerControl, TrainerState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What all parts of a run's watch share."""

    settings: Settings
    """The user's."""
    rollouts: Rollouts
    """What the tapped reward functions overhear."""
    ranks: Ranks
    """The processes of the run."""
    trainer: Callable[[], Trainer | None]
    """Gives the one that the callback is attached to, if any."""
    directory: RunDirectory
    recorder: RunRecorder
    guard: Guard


class Checks:
    """From step zero to the end of a run; none is made before `start` and after `stop`."""

    def __init__(self, run: Run, planned: Looks) -> None:
        """Begin with none.

        Args:
            run: what they share with its set-up.
            planned: the steps that are to be checked.

        """
        self._run = run
        self.history = looks.History(planned, run.settings.policy)
        self.verdict: Verdict | None = None
        """The newest check's."""
        self.failed: list[int] = []
        """Steps of checks that could not be made."""
        self._monitor: Monitor | None = None
        self._overhead: Overhead
        self._write_step_zero: Callable[[], object]
        self._first_step = self._batch_tokens = 0
        self._rehearsal: Rehearsal | None = None
        self._always: tuple[int, ...] = ()
        self._last_check = self._last_try = 0
        self._is_postponed = self._owes_checkpoint = False
        self._alarms: dict[str, int] = {}
        """Those that stand, with the step of the check that began each."""

    @property
    def is_watching(self) -> bool:
        """Whether checks can be made."""
        return self._monitor is not None

    def take_up(self, state: TrainerState, planned: Looks, made: Sequence[tuple[DriftSnapshot, Verdict]]) -> None:
        """Go on after a resume.

        Args:
            state: the trainer's.
            planned: the plan that holds now.
            made: all checks before, in order.

        """
        self.history.take_up(planned, made)
        if not made:
            return
        last, self.verdict = made[-1]
        self._last_check = self._last_try = last.step
        self._alarms = alarms_since(verdict for _, verdict in made)
        if self._last_check == state.global_step and not any(
            row.get("step") == state.global_step and trainer_log.N_SHARED in row for row in state.log_history
        ):  # the check came after the save, so its row is not in the checkpoint
            row = trainer_log.row(last, self._run.settings.policy, self.verdict)
            state.log_history.append({"step": state.global_step, "epoch": state.epoch or 0.0, **row})

    def start(
        self,
        monitor: Monitor,
        state: TrainerState,
        expected_s: float,
        *,
        batch_tokens: int,
        rehearsal: Rehearsal | None,
        write_step_zero: Callable[[], object],
    ) -> None:
        """Begin to watch; from now on time is counted.

        Args:
            monitor: has its step zero.
            state: the trainer's.
            expected_s: what a check is expected to take, in seconds, until one was made.
            batch_tokens: tokens in a batch, as of step zero.
            rehearsal: of the run, if any. With doses it has told what the first steps do.
            write_step_zero: writes what checks are compared with, where it is no longer in the run's folder.

        """
        self._monitor, self._batch_tokens, self._write_step_zero = monitor, batch_tokens, write_step_zero
        self._overhead, self._first_step = Overhead(self._run.settings.max_overhead, expected_s), state.global_step
        self._rehearsal = rehearsal
        self._always = (state.max_steps,) if rehearsal and rehearsal.doses else (*looks.FIRST, state.max_steps)

    def stop(self) -> None:
        """Let the model go: what comes now, such as an evaluation of other weights, is none of this run's."""
        self._monitor = None

    def check(
        self, state: TrainerState, control: TrainerControl, model: nn.Module, *, always: bool = False, is_last: bool = False
    ) -> None:
        """Measure drift, if it is affordable or is to be made always, and write and do what comes of it. Once a step at most.

        Args:
            state: the trainer's.
            control: the trainer's.
            model: as it is now.
            always: whatever it takes.
            is_last: whether training has ended.

        """
        if self._monitor is None or state.global_step in (0, self._last_try):
            return
        with self._overhead.counted():
            if always or self._run.ranks.from_first(lambda: self._overhead.affords_check):  # by one clock
                monitor = self._monitor
                self._run.guard.run(state, "drift check", lambda: self._checked(monitor, state, control, model, is_last))
            elif not self._is_postponed:  # said once, until a check is made
                self._is_postponed = True
                self._postpone(state)

    def look(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        """Measure drift at a planned step between the user's checks, if the whole training pays for it.

        The last one is always made; so are the first, where no rehearsal has told what the first steps do.
        """
        step, end = state.global_step, state.max_steps
        if self._monitor is None or step not in (*self.history.looks.between, end):
            return
        share_done = (step - self._first_step) / (end - self._first_step)  # it is the whole training that pays
        if step in self._always or self._run.ranks.from_first(lambda: self._overhead.affords_check_by_the_end(share_done)):
            self.check(state, control, model, always=True)

    def catch_up(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        """Make the check that a kill may have prevented after the save that is resumed from."""
        postponed_since = self._run.directory.postponed_since
        if not self._run.ranks.from_first(lambda: postponed_since(self._last_check, state.global_step)):
            self.check(state, control, model, always=True)
            self.saved()  # there is a checkpoint of these weights: the run is resumed from it

    def ask_for_checkpoint(self, control: TrainerControl) -> None:
        """Ask for an alarm's until it is made: with `save_strategy="best"` the trainer drops the wish at an evaluation."""
        control.should_save = control.should_save or self._owes_checkpoint

    def saved(self) -> None:
        """Take note that the trainer has made a checkpoint."""
        self._owes_checkpoint = False

    def made_at(self, step: int) -> DriftSnapshot | None:
        """The check of a step, if it is the newest; nothing is any of this run's once it has ended."""
        return self.history.newest if self._monitor is not None and self._last_check == step else None

    def _postpone(self, state: TrainerState) -> None:
        overhead, limit = self._overhead, self._run.settings.max_overhead
        reason = (
            f"a check takes about {overhead.check_s:.1f} s and {overhead.spent_s:.1f} s went into checks so far, more than "
            f"max_overhead={limit:g} allows after {overhead.training_s:.1f} s of training; it is made when one is "
            "due and affordable, at the latest when training ends. max_overhead=None checks whenever asked."
        )
        logger.warning("STS check at step %d is skipped: %s", state.global_step, reason)
        append = self._run.directory.append_postponed
        self._run.guard.tell(state, Sink("run log", lambda: append(state.global_step, reason)))

    def _checked(self, monitor: Monitor, state: TrainerState, control: TrainerControl, model: nn.Module, is_last: bool) -> None:
        run, overhead = self._run, self._overhead
        self._last_try = step = state.global_step
        before_s = overhead.spent_s
        written = samples(run.rollouts.first), samples(run.rollouts.rows(run.ranks))

        def measured(batch_tokens: int) -> DriftSnapshot:
            if not monitor.watches(model):
                raise CannotTell("model: the trainer has another one now than at step 0; train() anew to have it watched.")
            self._batch_tokens = batch_tokens  # where memory did not suffice once, later checks need not try again
            check = functools.partial(monitor.check, step, batch_tokens=batch_tokens, rollouts=written)
            # The first process's own for all: on other hardware the last bits may differ, and a decision with them.
            return run.ranks.gathered(check)[0]

        snapshot = run.guard.measure(state, "drift check", measured, self._batch_tokens)
        if snapshot is None:
            self.failed.append(step)
            return
        self.history.add(snapshot, is_last=is_last)
        self._last_check, self._is_postponed = step, False
        self.verdict = verdict = run.ranks.from_first(self._judged)
        if snapshot.diverged:
            run.guard.record(state, "model", f"it gives NaN or infinite numbers on {', '.join(snapshot.diverged)}", "")
        is_new, self._alarms = set(verdict.alarmed) - set(self._alarms), alarms_since([verdict], self._alarms)
        overhead.learn(overhead.spent_s - before_s)
        numbers = trainer_log.row(snapshot, run.settings.policy, verdict) | {
            "sts/overhead_s": overhead.spent_s,
            "sts/overhead_share": overhead.share,
        }
        sinks = [
            Sink("run log", lambda: self._write(monitor, snapshot, verdict)),
            Sink("screen", lambda: self._show(snapshot, verdict)),
            Sink("trainer's log", lambda: trainer_log.write(numbers, run.trainer(), state, control), first_only=False),
        ]
        if is_new:
            sinks.append(Sink("action", lambda: self._act(verdict, control), first_only=callable(run.settings.action)))
        run.guard.tell(state, *sinks)

    def _judged(self) -> Verdict:
        # Of this step there may be half a checkpoint, from before a kill.
        earlier = {step: share for step, share in self.history.worst_shares.items() if step < self._last_check}
        return dataclasses.replace(self.history.verdict(), best_checkpoint=self._run.directory.best_checkpoint(earlier))

    def _write(self, monitor: Monitor, snapshot: DriftSnapshot, verdict: Verdict) -> None:
        if not self._run.directory.baseline_file.exists():  # deleted, or the disk was full
            self._write_step_zero()
        time = TimeSpent(self._overhead.spent_s, self._overhead.training_s)
        self._run.recorder.write_check(monitor, snapshot, verdict, time)

    def _show(self, snapshot: DriftSnapshot, verdict: Verdict) -> None:
        next_step, is_first = self.history.looks.next_after(snapshot.step), len(self.history.worst_shares) == 1
        show = self._run.recorder.show_check
        show(snapshot, verdict, self._rehearsal, self._alarms, next_step, is_first=is_first)

    def _act(self, verdict: Verdict, control: TrainerControl) -> None:
        action = self._run.settings.action
        if callable(action):
            action(verdict)
            return
        logger.info("STS alarm at step %d: %s", verdict.step, verdict.explanation)  # the screen has it already
        self._owes_checkpoint = action in ("checkpoint", "stop")
        self.ask_for_checkpoint(control)
        control.should_training_stop = control.should_training_stop or action == "stop"
