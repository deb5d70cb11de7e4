"""STSCallback: when to measure, on which process, what to log and do. All arithmetic is elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from accelerate.state import AcceleratorState
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from sts_callback import rollouts, scalars, terminal
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.distributed import Ranks
from sts_callback.domains.reader import Source, are_prompts_only
from sts_callback.domains.starter import choose_domains
from sts_callback.errors import CannotTell, ConfigError, DataError, ModelError, NoGo, SaeError, StsError
from sts_callback.guard import Errors, Guard
from sts_callback.model.capture import undisturbed
from sts_callback.monitor import TRAIN, Monitor
from sts_callback.overhead import Overhead, first_guess
from sts_callback.policy import fewest_queries, judge_drift, judge_forecast, short_of_queries
from sts_callback.records import DriftSnapshot, Forecast, TrainSource, Verdict
from sts_callback.runlog import RunLog
from sts_callback.scoring import rank_agreement
from sts_callback.settings import STSArguments

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from sts_callback.model.encoder import SaeSource

logger = logging.getLogger(__name__)

CheckOn = Literal["save", "evaluate"] | int
Action = Literal["warn", "checkpoint", "stop"] | Callable[[Verdict], object]

_STATE_KEY = "sts_callback"


class STSCallback(TrainerCallback):
    """Forecasts, before the first step, which domains a fine-tune will move; then watches them and warns.

    Training is bit-identical with and without it. It works with every subclass of `transformers.Trainer`, with full parameters
    and LoRA. What it finds is under `<output_dir>/sts/`, and a few numbers a domain are in the trainer's own log.

    Example:
        >>> callback = STSCallback(sae="gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small", protect=["law", "code"])
        >>> trainer = SFTTrainer(model=model, args=args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    """

    _last_state: ClassVar[Callable[[], TrainerState | None]] = lambda: None
    """The state of the trainer that last began, by which two callbacks in one trainer know each other."""

    def __init__(
        self,
        sae: SaeSource | Sequence[SaeSource] | None = None,
        protect: Sequence[str] | Mapping[str, float] = (),
        *,
        domains: Mapping[str, Source] | None = None,
        train_data: Source | None = None,
        check_on: CheckOn = "save",
        action: Action = "warn",
        on_forecast: Literal["warn", "refuse"] = "warn",
        on_error: Literal["warn", "raise"] = "warn",
        max_overhead: float | None = 0.01,
        probes: ProbeConfig | None = None,
        policy: PolicyConfig | None = None,
    ) -> None:
        """Choose what to measure and what to do. Nothing is loaded before training begins.

        Args:
            sae: SAELens `release/sae_id`, a folder in SAELens format, a `sae_lens.SAE`, or `"auto"`; or several, of which each
                makes a forecast and the first is the one that decides and watches drift. Without any argument at all, settings
                are read from a file, see `settings.STSArguments.of_environment`.
            protect: names of domains that training must not harm, or names with budgets: the rise of answer NLL that each may
                suffer, in nats per token (default 0.1).
            domains: own domains, name to file, data set or rows, in any format that TRL accepts. A protected name that is not
                among them is one that ships with the package.
            train_data: the training examples with their answers, if the trainer's own data set cannot be read or has none.
            check_on: measure drift at each `"save"`, each `"evaluate"` (whose metrics it then joins), or every so many
                optimizer steps.
            action: on an alarm, `"warn"`, save a `"checkpoint"`, save one and `"stop"`, or call a function with the verdict, in a
                distributed run in its first process.
            on_forecast: when the forecast says no-go, `"warn"`, or `"refuse"` by raising `NoGo` before the first step.
            on_error: when a measurement fails in mid-run, `"warn"` and train on, or `"raise"`.
            max_overhead: the share of training time that checks may take, above 0; a check that is due and would take more is
                put off until the next one that is due and does not. The last one, when training ends, is always made. None
                checks whenever asked.
            probes: how texts become probes.
            policy: thresholds of the verdict; its budgets are those of `protect`.

        Raises:
            ConfigError: if a setting has a value that is not allowed.

        """
        if sae is None and not (protect or domains or train_data):
            STSCallback.__init__(self, **STSArguments.of_environment().options())
            return
        _one_of(
            "check_on",
            check_on,
            ("save", "evaluate"),
            "a number of steps from 1",
            isinstance(check_on, int) and check_on >= 1,
        )
        _one_of("action", action, ("warn", "checkpoint", "stop"), "a function of the verdict", callable(action))
        _one_of("on_forecast", on_forecast, ("warn", "refuse"))
        _one_of("on_error", on_error, ("warn", "raise"))
        if max_overhead is not None and not max_overhead > 0:
            raise ConfigError(f"max_overhead: got {max_overhead!r}; allowed is a share above 0, or None for no limit.")
        self._saes = list(sae) if isinstance(sae, (list, tuple)) else [sae]
        if not self._saes or None in self._saes:
            raise ConfigError("sae: got none; allowed is one SAE or a list of at least one.")
        self._train_data = train_data
        self._domains, budgets = choose_domains(protect, domains)
        self._policy = dataclasses.replace(policy or PolicyConfig(), budgets=budgets)
        self._probes = probes or ProbeConfig()
        self._check_on, self._action = check_on, action
        self._on_forecast, self._on_error = on_forecast, on_error
        self._max_overhead = 1.0 if max_overhead is None else max_overhead
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._rollouts = rollouts.Rollouts()
        self._awaits_rollouts = self._forecasts_from_rollouts = False
        self._monitor: Monitor | None = None
        self._log: RunLog
        self._ranks: Ranks
        self._guard: Guard
        self._overhead: Overhead
        self._recent: list[DriftSnapshot] = []
        self._last_check = self._last_try = 0
        self._is_postponed = False
        self._alarmed: tuple[str, ...] = ()
        self._others: list[Forecast] = []
        self._step_zero: dict[str, Any] = {}
        self._train_batch_size: int | None = None
        self._batch_tokens = self._probes.batch_tokens
        self._bars = True
        self.forecast: Forecast | None = None
        """The forecast, from train begin on; if made from rollouts, from the first step on."""
        self.verdict: Verdict | None = None
        """The newest verdict: the forecast's, then each check's."""

    def attach(self, trainer: Trainer) -> STSCallback:
        """Let the callback read the trainer's raw training data and write into its log. Optional.

        Args:
            trainer: the trainer that this callback was given to.

        Returns:
            Itself.

        """
        self._trainer = weakref.ref(trainer)
        return self

    def tap(self, reward_funcs: Any) -> Any:
        """Wrap what GRPO and RLOO take as `reward_funcs`, so that the callback knows what the policy writes.

        If the training data are prompts without answers, the forecast is made from the policy's own best-rewarded rollouts of
        the first step, just before its weights move. Each check then also tells how far what it writes has moved.

        Args:
            reward_funcs: one function or a list; reward models in it stay as they are.

        Returns:
            The same, for the trainer: each function keeps its name and its rewards.

        Raises:
            ConfigError: if there is no function among them.

        """
        return self._rollouts.tap(reward_funcs)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forecast and take the baseline; after a resume, take up the ones of the run's first session."""
        if STSCallback._last_state() is state:
            raise ConfigError(
                "callbacks: the trainer has two STSCallbacks, which would share one folder and one set of log keys; keep one. "
                "sae=[...] takes several SAEs, domains={...} any number of domains."
            )
        self._ranks = Ranks.of_run()
        if self._ranks.n > 1:
            _require_whole_sequences(AcceleratorState().parallelism_config)
        names = (TRAIN, *self._domains)
        scalars.require_metric(args.metric_for_best_model, args.greater_is_better, names, self._check_on)
        restarts = self._restarts(args, state)
        begins = state.global_step == 0 and not restarts
        found = self._step_zero if restarts else dict(_kept_with_checkpoints(state).get(_STATE_KEY, {}))
        self._monitor, self._recent, self._alarmed, self._is_postponed = None, [], (), False
        self._last_check = self._last_try = 0
        self._train_batch_size = state.train_batch_size
        self._log = RunLog(Path(args.output_dir or ".") / "sts", anew=begins)
        self._guard = Guard(self._log, self._ranks, raises=self._on_error == "raise")
        self._bars = state.is_world_process_zero and not args.disable_tqdm

        # Step 0 can only be compared with in the batches that it was read in.
        self._batch_tokens = self._probes.batch_tokens if begins else found.get("batch_tokens", self._probes.batch_tokens)
        self._forecasts_from_rollouts, self._awaits_rollouts = False, begins and self._rollouts.is_tapped
        if not restarts:
            self._rollouts.forget()
        if not (begins or restarts):
            self._guard.run(state, "resume", self._read_rollouts)
        if self._awaits_rollouts:
            self._guard.run(state, "forecast", lambda: self._choose_train_data(args, **kwargs), passes=(StsError,))
        if not self._forecasts_from_rollouts:
            self._set_up(begins, found, state, control, **kwargs)
        STSCallback._last_state = weakref.ref(state)

    def _set_up(self, begins: bool, found: dict[str, Any], state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forecast and take the baseline, or take up what was `found` of them."""
        model = kwargs["model"]
        refusals: Errors = (StsError,)
        if self._forecasts_from_rollouts:  # what they are like is nothing that the user asked for
            refusals = (CannotTell, ConfigError, ModelError, NoGo, SaeError)

        def prepared(batch_tokens: int) -> Monitor:
            probes = dataclasses.replace(self._probes, batch_tokens=batch_tokens)
            self._batch_tokens = batch_tokens
            if self._forecasts_from_rollouts:
                rollouts.require_enough(self._rollouts.first, probes.n_train_demonstrations)
            with undisturbed(model):  # loading, tokenising and drawing must not touch the run either
                monitor = self._made_monitor(self._saes if begins else self._saes[:1], probes, **kwargs)
                if begins:
                    self._require_power(monitor)
                    source: TrainSource = "own rollouts" if self._forecasts_from_rollouts else "reference answers"
                    # The first process's own for all: on other hardware the last bits may differ, and a decision with them.
                    made = self._ranks.gathered(monitor.forecasts)[0]
                    self.forecast, *self._others = (dataclasses.replace(one, train_source=source) for one in made)
            return monitor

        monitor = None
        if begins or found:
            monitor = self._guard.measure(
                state, "forecast" if begins else "resume", prepared, self._batch_tokens, passes=refusals
            )
        else:
            self._guard.run(state, "resume", _refuse_unwatched)
        if monitor is not None and not (
            self._guard.run(state, "forecast", lambda: self._begin(monitor, state), passes=refusals)
            if begins
            else self._guard.run(state, "resume", lambda: self._resume(monitor, found, state))
        ):
            self._monitor = None  # all processes watch, or none
        expected_s = self._recent[-1].seconds if self._recent else self._first_guess()
        self._overhead = Overhead(self._max_overhead, expected_s)
        if self._check_on == "save" and not begins and self._monitor is not None:
            self._guard.run(state, "resume", lambda: self._catch_up(state, control, model))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Listen to what the step writes."""
        self._rollouts.listen()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the rollouts of step 0, and forecast from them if there are no answers: the weights have not moved yet."""
        self._rollouts.pause()
        if not self._awaits_rollouts:
            return
        self._awaits_rollouts = False
        if not self._guard.run(state, "rollouts", lambda: self._take_rollouts(args)):
            return
        if self._forecasts_from_rollouts:
            self._set_up(True, {}, state, control, **kwargs)
        elif self._monitor is not None:
            self._guard.run(state, "run log", lambda: self._log.write_rollouts(self._rollouts.first), first_only=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift at a save, if that is when."""
        if self._check_on == "save":
            self._check(state, control, kwargs["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift at an evaluation, if that is when; its numbers join the evaluation's own."""
        if self._check_on == "evaluate":
            wanted = args.metric_for_best_model
            self._check(state, control, kwargs["model"], always=scalars.is_ours(wanted))
            is_now = self._monitor is not None and self._recent and self._last_check == state.global_step
            kwargs["metrics"].update(scalars.evaluation_metrics(self._recent[-1] if is_now else None, wanted))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift every so many steps, if that is when."""
        if isinstance(self._check_on, int) and state.global_step % self._check_on == 0:
            self._check(state, control, kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the final weights, if the last check was not of them."""
        if not args.load_best_model_at_end:  # else the weights are no longer those of this step
            self._check(state, control, kwargs["model"], always=True)
        self._guard.run(state, "run log", self._log.write_waiting_faults, first_only=True)
        if self._monitor is not None:
            self._guard.run(state, "screen", lambda: tqdm.write(f"STS files of this run: {self._log.folder}"), first_only=True)
        self._monitor = None  # what comes now, such as an evaluation of other weights, is none of this run's

    def _restarts(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether `auto_find_batch_size` begins again in the same call, with weights that have been trained already."""
        return (
            args.auto_find_batch_size
            and self._monitor is not None  # it is let go when training ends
            and state.global_step == 0
            and (state.train_batch_size or 0) < (self._train_batch_size or 0)
        )

    def _made_monitor(
        self, saes: Sequence[SaeSource], probes: ProbeConfig, stand_in: Source | None = None, **kwargs: Any
    ) -> Monitor:
        tokenizer = kwargs.get("processing_class")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        if tokenizer is None:
            raise ConfigError("processing_class: the trainer has none; give it the model's tokenizer, which the probes need.")
        return Monitor(
            kwargs["model"],
            tokenizer,
            sae=saes,
            train_data=self._found_train_data(kwargs.get("train_dataloader")) if stand_in is None else stand_in,
            domains=self._domains,
            config=probes,
            progress=self._bars,
            ranks=self._ranks,
        )

    def _found_train_data(self, dataloader: Any) -> Source:
        """The user's own word first, then the trainer's raw columns, then its tokenised ones."""
        trainer = self._trainer()
        for found in (self._train_data, getattr(trainer, "train_dataset", None), getattr(dataloader, "dataset", None)):
            if found is not None:
                if found is self._train_data and isinstance(found, (str, Path)):
                    return found
                if hasattr(found, "__getitem__") and hasattr(found, "__len__"):
                    is_theirs = found is self._train_data or not (self._rollouts.first and are_prompts_only(found))
                    return found if is_theirs else self._rollouts.first
                raise DataError(
                    "train_data: the trainer's data set is a stream; give a sample of it as STSCallback(train_data=...)."
                )
        raise DataError("train_data: the trainer has no training data set; give examples as STSCallback(train_data=...).")

    def _choose_train_data(self, args: TrainingArguments, **kwargs: Any) -> None:
        """Decide whether the forecast waits for rollouts, and refuse by now what could not be measured then."""
        if self._train_data is not None:
            return
        found, model = self._found_train_data(kwargs.get("train_dataloader")), kwargs["model"]
        self._forecasts_from_rollouts = self._ranks.from_first(lambda: are_prompts_only(found))
        if self._forecasts_from_rollouts:
            rollouts.require_possible(args, model, self._probes.n_train_demonstrations)
            with undisturbed(model):  # a domain stands in for what is not written yet, to see whether all else is in order
                self._require_power(self._made_monitor(self._saes, self._probes, next(iter(self._domains.values())), **kwargs))

    def _take_rollouts(self, args: TrainingArguments) -> None:
        self._rollouts.first = self._rollouts.rows(self._ranks, getattr(args, "reward_weights", None))

    def _read_rollouts(self) -> None:
        self._rollouts.first = self._ranks.from_first(self._log.read_rollouts)

    def _begin(self, monitor: Monitor, state: TrainerState) -> None:
        assert self.forecast is not None and monitor.baseline is not None
        forecast = self.forecast
        self.verdict = self._ranks.from_first(lambda: judge_forecast(forecast, self._policy))
        self._monitor = monitor
        self._step_zero = {"baseline": monitor.baseline.digest, "batch_tokens": self._batch_tokens}
        # Into `trainer_state.json`: a checkpoint then tells whose baseline it goes with. Not a class name, see `ExportableState`.
        _kept_with_checkpoints(state)[_STATE_KEY] = dict(self._step_zero)
        self._guard.run(state, "run log", self._write_step_zero, first_only=True)
        self._guard.run(state, "screen", self._show_forecast, first_only=True)
        if self.verdict.decision == "no-go" and self._on_forecast == "refuse":
            raise NoGo(
                f"on_forecast='refuse': the forecast threatens {', '.join(self.verdict.threatened)}. "
                f"{self.verdict.explanation} Change the data, raise the budget, or take on_forecast='warn'."
            )

    def _write_step_zero(self) -> None:
        assert self._monitor is not None and self._monitor.baseline is not None and self.forecast is not None
        self._log.write_forecast(self.forecast, judge_forecast(self.forecast, self._policy), self._others)
        self._log.write_rollouts(self._rollouts.first)
        self._log.append_words(self._monitor.words())
        self._monitor.baseline.save(self._log.baseline_file)

    def _show_forecast(self) -> None:
        assert self.forecast is not None and self.verdict is not None
        tqdm.write(terminal.forecast_table(self.forecast, self.verdict))
        if self._others:
            forecasts = [self.forecast, *self._others]
            tqdm.write(terminal.layers_table(forecasts, [rank_agreement(self.forecast, f) for f in forecasts]))

    def _require_power(self, monitor: Monitor) -> None:
        """Refuse probes that could never raise an alarm, however bad the harm."""
        if short := short_of_queries({name: len(s.queries) for name, s in monitor.domains.items()}, self._policy):
            raise CannotTell(
                f"n_queries: {', '.join(f'{name} has {n}' for name, n in short.items())}; an alarm for one of "
                f"{len(self._policy.budgets)} protected domains at alpha {self._policy.alpha} takes "
                f"{fewest_queries(self._policy)}. Give more rows, raise ProbeConfig(n_queries=...), or protect fewer domains."
            )

    def _resume(self, monitor: Monitor, step_zero: dict[str, Any], state: TrainerState) -> None:
        forecast = self._ranks.from_first(self._log.read_forecast)
        monitor.restore(self._log.baseline_file, forecast)
        assert monitor.baseline is not None
        if monitor.baseline.digest != step_zero["baseline"]:
            raise CannotTell(
                f"baseline: {self._log.baseline_file} was made at step 0 of another run than this checkpoint's; put back the "
                "folder sts of this run, or start the run anew."
            )
        if n_damaged := self._ranks.from_first(lambda: self._log.take_up(state.global_step)):
            self._guard.record(state, "run log", f"{n_damaged} damaged lines were left out of the log", "")
        checks = self._ranks.from_first(lambda: self._log.judged_checks(state.global_step))
        self.forecast, self.verdict = forecast, judge_forecast(forecast, self._policy)
        if checks:
            self._recent = [snapshot for snapshot, _ in checks][-self._policy.patience :]
            self._last_check = self._last_try = self._recent[-1].step
            self.verdict = checks[-1][1]
            self._alarmed = self.verdict.threatened if self.verdict.decision == "no-go" else ()
            if self._last_check == state.global_step and not any(
                row.get("step") == state.global_step and scalars.N_SHARED in row for row in state.log_history
            ):  # the check came after the save, so its row is not in the checkpoint
                state.log_history.append(
                    {"step": state.global_step, "epoch": state.epoch or 0.0, **scalars.log_row(self._recent[-1])}
                )
        self._step_zero, self._monitor = step_zero, monitor
        _kept_with_checkpoints(state)[_STATE_KEY] = dict(step_zero)

    def _catch_up(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        """Make the check that a kill may have prevented after the save that is resumed from."""
        if not self._ranks.from_first(lambda: self._log.postponed_since(self._last_check, state.global_step)):
            self._check(state, control, model, always=True)

    def _first_guess(self) -> float:
        if self.forecast is None:
            return 0.0
        return first_guess(self.forecast.seconds_by_part.get("readings", self.forecast.seconds))

    def _check(self, state: TrainerState, control: TrainerControl, model: nn.Module, *, always: bool = False) -> None:
        if self._monitor is None or state.global_step in (0, self._last_try):
            return
        with self._overhead.counted():
            if always or self._ranks.from_first(lambda: self._overhead.affords_check):  # by one clock
                monitor = self._monitor
                self._guard.run(state, "drift check", lambda: self._checked(monitor, state, control, model))
            elif not self._is_postponed:  # said once, until a check is made
                self._is_postponed = True
                self._postpone(state)

    def _postpone(self, state: TrainerState) -> None:
        overhead = self._overhead
        reason = (
            f"a check takes about {overhead.check_s:.1f} s and {overhead.spent_s:.1f} s went into checks so far, more than "
            f"max_overhead={self._max_overhead:g} allows after {overhead.training_s:.1f} s of training; it is made when one is "
            "due and affordable, at the latest when training ends. max_overhead=None checks whenever asked."
        )
        logger.warning("STS check at step %d is postponed: %s", state.global_step, reason)
        self._guard.run(state, "run log", lambda: self._log.append_postponed(state.global_step, reason), first_only=True)

    def _checked(self, monitor: Monitor, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        self._last_try = step = state.global_step
        before_s = self._overhead.spent_s
        written = rollouts.samples(self._rollouts.first), rollouts.samples(self._rollouts.rows(self._ranks))

        def measured(batch_tokens: int) -> DriftSnapshot:
            if not monitor.watches(model):
                raise CannotTell("model: the trainer has another one now than at step 0; train() anew to have it watched.")
            self._batch_tokens = batch_tokens  # where memory did not suffice once, later checks need not try again
            check = functools.partial(monitor.check, step, batch_tokens=batch_tokens, rollouts=written)
            return self._ranks.gathered(check)[0]  # as for the forecast

        snapshot = self._guard.measure(state, "drift check", measured, self._batch_tokens)
        if snapshot is None:
            return
        self._recent = [*self._recent, snapshot][-self._policy.patience :]
        self._last_check, self._is_postponed = step, False
        self.verdict = verdict = self._ranks.from_first(lambda: judge_drift(self._recent, self._policy))
        alarmed = verdict.threatened if verdict.decision == "no-go" else ()
        is_new, self._alarmed = set(alarmed) - set(self._alarmed), alarmed
        self._guard.run(state, "run log", lambda: self._write_check(monitor, snapshot, verdict), first_only=True)
        self._guard.run(state, "screen", lambda: self._show_check(snapshot, verdict), first_only=True)
        self._overhead.learn(self._overhead.spent_s - before_s)
        self._guard.run(state, "trainer's log", lambda: self._log_scalars(state, control, snapshot))
        if is_new:
            self._guard.run(state, "action", lambda: self._act(verdict, control), first_only=callable(self._action))

    def _write_check(self, monitor: Monitor, snapshot: DriftSnapshot, verdict: Verdict) -> None:
        """The line of the check comes last: where it stands, all of the check has been written."""
        if not self._log.baseline_file.exists():  # deleted, or the disk was full
            self._write_step_zero()
        self._log.append_words(monitor.words(snapshot.train.top_features))
        self._log.append_check(snapshot, verdict)

    def _show_check(self, snapshot: DriftSnapshot, verdict: Verdict) -> None:
        tqdm.write(terminal.check_lines(snapshot, verdict, self._probes.n_features))

    def _act(self, verdict: Verdict, control: TrainerControl) -> None:
        if callable(self._action):
            self._action(verdict)
            return
        logger.warning("STS alarm at step %d: %s", verdict.step, verdict.explanation)
        control.should_save = control.should_save or self._action in ("checkpoint", "stop")
        control.should_training_stop = control.should_training_stop or self._action == "stop"

    def _log_scalars(self, state: TrainerState, control: TrainerControl, snapshot: DriftSnapshot) -> None:
        """A row of its own in the trainer's log: drift and NLL change a domain, in Python floats."""
        row = scalars.log_row(snapshot) | {
            "sts/overhead_s": self._overhead.spent_s,
            "sts/overhead_share": self._overhead.share,
        }
        trainer = self._trainer()
        if trainer is None:
            state.log_history.append({"step": state.global_step, "epoch": state.epoch or 0.0, **row})
            return
        should_log = control.should_log
        try:
            Trainer.log(trainer, row)  # the base method: TRL's own would flush its running means early
        finally:
            control.should_log = should_log  # logging clears it, and the step's loss row would vanish


def _require_whole_sequences(parallelism: Any) -> None:
    """Refuse to measure where each process sees only a part of every text."""
    if parallelism is not None and parallelism.cp_size * parallelism.sp_size > 1:
        raise ConfigError(
            f"parallelism_config: got cp_size={parallelism.cp_size}, sp_size={parallelism.sp_size}; allowed is 1 for both, since "
            "attention is then over parts of texts and what it gives on probes is not what the model does. Forecast on one "
            "process with `sts-callback forecast` and train without the callback, or train without context and sequence "
            "parallelism."
        )


def _refuse_unwatched() -> None:
    raise CannotTell(
        "baseline: the run was begun without this callback, and drift can be measured only from step 0. Training goes on "
        "unwatched; to have it watched, start the run anew."
    )


def _kept_with_checkpoints(state: TrainerState) -> dict[str, Any]:
    kept: Any = state.stateful_callbacks  # annotated as what it is made from
    assert isinstance(kept, dict)
    return kept


def _one_of(field: str, value: object, names: tuple[str, ...], or_else: str = "", otherwise: bool = False) -> None:
    if not (otherwise or (isinstance(value, str) and value in names)):
        allowed = ", ".join(map(repr, names)) + (f" or {or_else}" if or_else else "")
        raise ConfigError(f"{field}: got {value!r}; allowed is {allowed}.")
