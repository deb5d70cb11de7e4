"""One training run: its forecast, rehearsal, step zero and end. Each event is measured, judged, then told to all who listen."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sts_callback.config import ProbeConfig
from sts_callback.data.reader import Source, are_prompts_only
from sts_callback.distributed import Ranks
from sts_callback.errors import CannotTell, ConfigError, NoGo
from sts_callback.measure.monitor import Monitor
from sts_callback.model.undisturbed import undisturbed
from sts_callback.policy import judge_forecast, judge_rehearsal
from sts_callback.power import little_power, require_power
from sts_callback.records import DriftSnapshot, Forecast, TrainSource, Verdict
from sts_callback.records.rehearsal import Rehearsal
from sts_callback.report.html.page import write_report
from sts_callback.runs.directory import RunDirectory
from sts_callback.training import looks
from sts_callback.training.arguments import Settings
from sts_callback.training.checks import Checks, Run
from sts_callback.training.given import given_to
from sts_callback.training.guard import Errors, Guard, Sink
from sts_callback.training.overhead import first_guess
from sts_callback.training.recorder import RunRecorder
from sts_callback.training.rehearsal import AUTO_SHARE, rehearsal_of
from sts_callback.training.rollouts import Rollouts, require_enough, require_possible
from sts_callback.training.train_data import find_train_data

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from sts_callback.model.sae import SaeSource

logger = logging.getLogger(__name__)

_STATE_KEY = "sts_callback"


class Session:
    """What is known of one run of a trainer, from `begin` to `end`."""

    def __init__(
        self,
        settings: Settings,
        rollouts: Rollouts,
        ranks: Ranks,
        trainer: Callable[[], Trainer | None],
        args: TrainingArguments,
        state: TrainerState,
        train_dataloader: Any,
        *,
        earlier: Session | None,
    ) -> None:
        """Find out whether it begins, is resumed or begun again. Nothing is measured or written yet.

        Args:
            settings: the user's.
            rollouts: what the tapped reward functions overhear.
            ranks: the processes of the run.
            trainer: gives the one that the callback is attached to, if any.
            args: the trainer's.
            state: the trainer's.
            train_dataloader: the trainer's.
            earlier: the callback's run before this one. What it has found stands until this one has found its own.

        """
        self._settings, self._rollouts, self._ranks, self._trainer = settings, rollouts, ranks, trainer
        self._is_restart = earlier is not None and earlier._is_begun_again(args, state)
        self._is_new = state.global_step == 0 and not self._is_restart
        self._directory = RunDirectory(Path(args.output_dir or ".") / "sts", anew=self._is_new)
        self._recorder = RunRecorder(settings, self._directory)
        self._guard = Guard(self._directory, ranks, raises=settings.on_error == "raise")
        # Nobody is to pay for an hour of training that he believes to be watched.
        raises = settings.on_forecast_error == "raise" and not self._is_restart
        self._refusals: Errors = (Exception,) if raises else (NoGo,)
        self._bars = state.is_world_process_zero and not args.disable_tqdm
        self._train_batch_size = state.train_batch_size
        self.checks = Checks(
            Run(settings, rollouts, ranks, trainer, self._directory, self._recorder, self._guard),
            looks.plan(args, state, settings.check_on, train_dataloader),
        )

        self._forecasts: tuple[Forecast, ...] = earlier._forecasts if earlier else ()
        self.rehearsal: Rehearsal | None = earlier.rehearsal if earlier else None
        self._verdict: Verdict | None = earlier.verdict if earlier else None
        self._step_zero: dict[str, Any] = (
            earlier._step_zero if earlier and self._is_restart else dict(_kept_with_checkpoints(state).get(_STATE_KEY, {}))
        )
        # Step 0 can only be compared with in the batches that it was read in.
        kept = {} if self._is_new else self._step_zero
        self._batch_tokens: int = kept.get("batch_tokens", settings.probes.batch_tokens)
        self._forecasts_from_rollouts, self._awaits_rollouts = False, self._is_new and rollouts.is_tapped

    @property
    def forecast(self) -> Forecast | None:
        """The one that decides."""
        return self._forecasts[0] if self._forecasts else None

    @property
    def verdict(self) -> Verdict | None:
        """The newest: of the forecast, of the rehearsal in its place if there is one, then of each check."""
        return self.checks.verdict or self._verdict

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forecast and take the baseline, unless the rollouts of step 0 must come first; after a resume, take up what is kept."""
        if not self._is_restart:
            self._rollouts.forget()
        self._guard.run(state, "run log", self._directory.require_place, reraise=self._refusals, first_only=True)
        if not (self._is_new or self._is_restart):
            self._guard.run(state, "resume", self._read_rollouts)
        if self._awaits_rollouts:
            self._guard.run(state, "forecast", lambda: self._choose_train_data(args, **kwargs), reraise=self._refusals)
        if not self._forecasts_from_rollouts:
            self._set_up(args, state, control, **kwargs)

    def take_rollouts(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take those of step 0, once, and forecast from them if there are no answers: the weights have not moved yet."""
        if not self._awaits_rollouts:
            return
        self._awaits_rollouts = False
        if not self._guard.run(state, "rollouts", lambda: self._take_rollouts(args), reraise=self._refusals):
            return
        if self._forecasts_from_rollouts:
            self._set_up(args, state, control, **kwargs)
        elif self.checks.is_watching:
            self._guard.tell(state, Sink("run log", lambda: self._directory.write_rollouts(self._rollouts.first)))

    def end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        """Check the final weights, if training has ended early and the last check was not of them."""
        if not args.load_best_model_at_end:  # else the weights are no longer those of this step
            self.checks.check(state, control, model, always=True, is_last=True)
        sinks = [
            Sink("run log", self._directory.write_waiting_faults),
            Sink("run log", lambda: self._directory.write_ended(state.global_step)),
        ]
        if self.checks.is_watching:
            forecast, last = self.forecast, self.checks.history.newest
            if forecast is not None and last is not None:
                sinks.append(Sink("ledger", lambda: self._recorder.enter_outcome(forecast, last, self.rehearsal)))
            sinks.append(Sink("report", lambda: write_report(self._directory)))
        words = self._recorder.last_words(is_watched=self.checks.is_watching, failed_checks=self.checks.failed)
        self._guard.tell(state, *sinks, Sink("screen", lambda: tqdm.write(words)))
        self.checks.stop()

    def _is_begun_again(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether `auto_find_batch_size` begins again in the same call, with weights that have been trained already."""
        return (
            args.auto_find_batch_size
            and self.checks.is_watching  # until training ends
            and state.global_step == 0
            and (state.train_batch_size or 0) < (self._train_batch_size or 0)
        )

    def _set_up(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forecast and take the baseline, or take up what was kept of them."""
        settings, model = self._settings, kwargs["model"]
        learn = self._recorder.learn_given
        self._guard.run(state, "settings", lambda: learn(given_to(settings, model, args, state, kwargs.get("optimizer"))))

        def prepared(batch_tokens: int) -> Monitor:
            probes = dataclasses.replace(settings.probes, batch_tokens=batch_tokens)
            self._batch_tokens = batch_tokens
            if self._forecasts_from_rollouts:
                require_enough(self._rollouts.first, probes.n_train_demonstrations)
            with undisturbed(model):  # loading, tokenising and drawing must not touch the run either
                monitor = self._made_monitor(settings.saes if self._is_new else settings.saes[:1], probes, **kwargs)
                if self._is_new:
                    source: TrainSource = "own rollouts" if self._forecasts_from_rollouts else "reference answers"
                    # The first process's own for all: on other hardware the last bits may differ, and a decision with them.
                    n_looks = len(self.checks.history.looks.steps)
                    made = self._ranks.gathered(lambda: monitor.forecasts(settings.policy, n_looks))[0]
                    self._forecasts = tuple(dataclasses.replace(one, train_source=source) for one in made)
            return monitor

        what, take_up = ("forecast", self._begin) if self._is_new else ("resume", self._resume)
        monitor = None
        if self._is_new or self._step_zero:
            monitor = self._guard.measure(state, what, prepared, self._batch_tokens, reraise=self._refusals)
        else:
            self._guard.run(state, what, _refuse_unwatched, reraise=self._refusals)
        if monitor is None or not self._guard.run(state, what, lambda: take_up(monitor, state), reraise=self._refusals):
            return  # all processes watch, or none
        expected_s = 0.0
        if self.checks.history.newest is not None:
            expected_s = self.checks.history.newest.seconds
        elif self.forecast is not None:
            expected_s = first_guess(self.forecast.seconds_by_part.get("readings", self.forecast.seconds))
        if self._is_new:
            self._rehearse(monitor, expected_s, args, state, **kwargs)
            self._guard.run(state, "forecast", self._refuse_no_go, reraise=self._refusals)
        self.checks.start(
            monitor,
            state,
            expected_s,
            batch_tokens=self._batch_tokens,
            rehearsal=self.rehearsal,
            write_step_zero=lambda: self._write_step_zero(monitor),
        )
        if settings.check_on == "save" and not self._is_new:
            self._guard.run(state, "resume", lambda: self.checks.catch_up(state, control, model))

    def _made_monitor(
        self, saes: Sequence[SaeSource], probes: ProbeConfig, stand_in: Source | None = None, **kwargs: Any
    ) -> Monitor:
        tokenizer = kwargs.get("processing_class")
        if tokenizer is None:
            raise ConfigError("processing_class: the trainer has none; give it the model's tokenizer, which the probes need.")
        monitor = Monitor(
            kwargs["model"],
            tokenizer,
            sae=saes,
            train_data=self._train_data(**kwargs) if stand_in is None else stand_in,
            domains=self._settings.domains,
            config=probes,
            progress=self._bars,
            ranks=self._ranks,
        )
        if self._is_new:
            policy, n_queries = self._settings.policy, {name: len(s.queries) for name, s in monitor.domains.items()}
            require_power(n_queries, policy, len(self.checks.history.looks.steps))
            for told in little_power(n_queries, policy, probes):
                logger.warning("%s", told)
        return monitor

    def _train_data(self, train_dataloader: Any = None, **kwargs: Any) -> Source:
        datasets = getattr(self._trainer(), "train_dataset", None), getattr(train_dataloader, "dataset", None)
        return find_train_data(self._settings.train_data, datasets, self._rollouts.first)

    def _choose_train_data(self, args: TrainingArguments, **kwargs: Any) -> None:
        """Decide whether the forecast waits for rollouts, and refuse by now what could not be measured then."""
        settings = self._settings
        if settings.train_data is not None:
            return
        found, model = self._train_data(**kwargs), kwargs["model"]
        self._forecasts_from_rollouts = self._ranks.from_first(lambda: are_prompts_only(found))
        if self._forecasts_from_rollouts:
            require_possible(args, model, settings.probes.n_train_demonstrations)
            with undisturbed(model):  # a domain stands in for what is not written yet, to see whether all else is in order
                stand_in = next(iter(settings.domains.values()))
                self._made_monitor(settings.saes, settings.probes, stand_in, **kwargs)

    def _take_rollouts(self, args: TrainingArguments) -> None:
        self._rollouts.first = self._rollouts.rows(self._ranks, getattr(args, "reward_weights", None))

    def _read_rollouts(self) -> None:
        self._rollouts.first = self._ranks.from_first(self._directory.read_rollouts)

    def _begin(self, monitor: Monitor, state: TrainerState) -> None:
        assert monitor.step_zero is not None
        forecasts, self.rehearsal = self._forecasts, None  # no longer that of a run before
        self._verdict = self._ranks.from_first(lambda: judge_forecast(forecasts[0], self._settings.policy))
        self._step_zero = {"baseline": monitor.step_zero.digest, "batch_tokens": self._batch_tokens}
        # Into `trainer_state.json`: a checkpoint then tells whose baseline it goes with. Not a class name, see `ExportableState`.
        _kept_with_checkpoints(state)[_STATE_KEY] = dict(self._step_zero)
        self._guard.tell(
            state,
            Sink("run log", lambda: self._write_step_zero(monitor)),
            Sink("ledger", lambda: self._recorder.learn_expectations(forecasts[0])),
        )

    def _rehearse(
        self,
        monitor: Monitor,
        check_s: float,
        args: TrainingArguments,
        state: TrainerState,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take a few steps of the run before its first, unless that is not wanted, cannot be or does not pay."""
        settings, trainer = self._settings, self._trainer()
        if settings.rehearse is False:
            self._show_before(monitor, state)
            return
        whole = self._batch_tokens
        share = max(settings.max_overhead, AUTO_SHARE) if settings.max_overhead < 1 else math.inf

        def measured(batch_tokens: int) -> Rehearsal:
            self._batch_tokens = batch_tokens

            def checked(step: int) -> DriftSnapshot:
                check = functools.partial(monitor.check, step, batch_tokens=batch_tokens, title="Rehearsed step")
                return self._ranks.gathered(check)[0]

            def begun(n_steps: int) -> None:
                if batch_tokens == whole:  # not again where memory asks for smaller ones
                    forecast = self._forecasts[0]
                    self._guard.tell(state, Sink("screen", lambda: self._recorder.show_rehearsing(forecast, n_steps)))

            found = rehearsal_of(
                trainer,
                train_dataloader,
                checked,
                share=None if settings.rehearse is True else share,
                check_s=check_s,
                ranks=self._ranks,
                progress=self._bars,
                begun=begun,
            )
            return self._ranks.from_first(lambda: self._recorder.with_expected(found))

        reraise = () if args.auto_find_batch_size else self._refusals  # the batch may be too large, and training finds another
        way_out = "STSCallback(rehearse=False) trains without a rehearsal."
        try:
            made = self._guard.measure(state, "rehearsal", measured, whole, reraise=reraise, way_out=way_out)
        except Exception:  # of all processes: the forecast, which waited for it, is known all the same
            self._show_before(monitor, state)
            raise
        if made is None:
            made = Rehearsal((), state.max_steps, math.nan, 0.0, skipped="it failed; faults.jsonl has the reason.")
        self.rehearsal = made
        verdict = self._ranks.from_first(self._judged_rehearsal)
        self._verdict = verdict or self._verdict
        self._guard.tell(state, Sink("run log", lambda: self._directory.write_rehearsal(made, verdict)))
        self._show_before(monitor, state, made, verdict)

    def _show_before(
        self, monitor: Monitor, state: TrainerState, rehearsal: Rehearsal | None = None, verdict: Verdict | None = None
    ) -> None:
        show = functools.partial(self._recorder.show_before, monitor, self._forecasts, rehearsal, verdict)
        self._guard.tell(state, Sink("screen", show))

    def _judged_rehearsal(self) -> Verdict | None:
        """What follows from a rehearsal; None where there was none."""
        made = self.rehearsal
        return judge_rehearsal(made, self._settings.policy) if made is not None and made.doses else None

    def _refuse_no_go(self) -> None:
        verdict = self._verdict
        if verdict is not None and verdict.decision == "no-go" and self._settings.on_forecast == "refuse":
            raise NoGo(
                f"on_forecast='refuse': the forecast threatens {', '.join(verdict.threatened)}. "
                f"{verdict.explanation} Change the data, raise the budget, or take on_forecast='warn'."
            )

    def _resume(self, monitor: Monitor, state: TrainerState) -> None:
        forecast = self._ranks.from_first(self._directory.read_forecast)
        monitor.restore(self._directory.baseline_file, forecast)
        assert monitor.step_zero is not None
        if monitor.step_zero.digest != self._step_zero["baseline"]:
            raise CannotTell(
                f"baseline: {self._directory.baseline_file} was made at step 0 of another run than this checkpoint's; put back "
                "the folder sts of this run, start the run anew, or take STSCallback(on_forecast_error='train unwatched')."
            )
        if n_damaged := self._ranks.from_first(lambda: self._directory.take_up(state.global_step)):
            self._guard.record(state, "run log", f"{n_damaged} damaged lines were left out of the log", "")
        kept = None if self._is_restart else self._ranks.from_first(self._directory.read_looks)
        planned = looks.resumed(kept, self.checks.history.looks, state.global_step)
        self._guard.tell(state, Sink("run log", lambda: self._recorder.write_settings(planned)))
        self.checks.take_up(state, planned, self._ranks.from_first(lambda: self._directory.judged_checks(state.global_step)))
        self._forecasts = (forecast,)
        self.rehearsal = self._ranks.from_first(self._directory.read_rehearsal)
        self._verdict = self._judged_rehearsal() or judge_forecast(forecast, self._settings.policy)
        _kept_with_checkpoints(state)[_STATE_KEY] = dict(self._step_zero)

    def _write_step_zero(self, monitor: Monitor) -> None:
        """Write what the checks are compared with, and what was found before them."""
        self._recorder.write_step_zero(monitor, self._forecasts, self._rollouts.first, self.checks.history.looks)
        if self.rehearsal is not None:
            self._directory.write_rehearsal(self.rehearsal, self._judged_rehearsal())


def _refuse_unwatched() -> None:
    raise CannotTell(
        "baseline: the run was begun without this callback, and drift can be measured only from step 0. Start the run anew to "
        "have it watched, or take STSCallback(on_forecast_error='train unwatched')."
    )


def _kept_with_checkpoints(state: TrainerState) -> dict[str, Any]:
    kept: Any = state.stateful_callbacks  # annotated as what it is made from
    assert isinstance(kept, dict)
    return kept
