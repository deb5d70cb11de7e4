"""STSCallback: when to measure, on which process, what to log and do. All arithmetic is elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from sts_callback import scalars, terminal
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.domains.reader import Source
from sts_callback.domains.starter import choose_domains
from sts_callback.errors import CannotTell, ConfigError, DataError, NoGo
from sts_callback.model.capture import undisturbed
from sts_callback.monitor import TRAIN, Monitor
from sts_callback.policy import fewest_queries, judge_drift, judge_forecast, short_of_queries
from sts_callback.records import DriftSnapshot, Forecast, Verdict
from sts_callback.runlog import RunLog
from sts_callback.scoring import rank_agreement

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from sts_callback.model.encoder import SaeSource

logger = logging.getLogger(__name__)

CheckOn = Literal["save", "evaluate"] | int
Action = Literal["warn", "checkpoint", "stop"] | Callable[[Verdict], object]


class STSCallback(TrainerCallback):
    """Forecasts, before the first step, which domains a fine-tune will move; then watches them and warns.

    Training is bit-identical with and without it. It works with every subclass of `transformers.Trainer`, with full parameters
    and LoRA. What it finds is under `<output_dir>/sts/`, and a few numbers a domain are in the trainer's own log.

    Example:
        >>> callback = STSCallback(sae="gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small", protect=["law", "code"])
        >>> trainer = SFTTrainer(model=model, args=args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    """

    def __init__(
        self,
        sae: SaeSource | Sequence[SaeSource],
        protect: Sequence[str] | Mapping[str, float] = (),
        *,
        domains: Mapping[str, Source] | None = None,
        train_data: Source | None = None,
        check_on: CheckOn = "save",
        action: Action = "warn",
        on_forecast: Literal["warn", "refuse"] = "warn",
        on_error: Literal["warn", "raise"] = "warn",
        probes: ProbeConfig | None = None,
        policy: PolicyConfig | None = None,
    ) -> None:
        """Choose what to measure and what to do. Nothing is loaded before training begins.

        Args:
            sae: SAELens `release/sae_id`, a folder in SAELens format, a `sae_lens.SAE`, or `"auto"`; or several, of which each
                makes a forecast and the first is the one that decides and watches drift.
            protect: names of domains that training must not harm, or names with budgets: the rise of answer NLL that each may
                suffer, in nats per token (default 0.1).
            domains: own domains, name to file, data set or rows, in any format that TRL accepts. A protected name that is not
                among them is one that ships with the package.
            train_data: the training examples with their answers, if the trainer's own data set cannot be read.
            check_on: measure drift at each `"save"`, each `"evaluate"` (whose metrics it then joins), or every so many
                optimizer steps.
            action: on an alarm, `"warn"`, save a `"checkpoint"`, save one and `"stop"`, or call a function with the verdict.
            on_forecast: when the forecast says no-go, `"warn"`, or `"refuse"` by raising `NoGo` before the first step.
            on_error: when a measurement fails in mid-run, `"warn"` and train on, or `"raise"`.
            probes: how texts become probes.
            policy: thresholds of the verdict; its budgets are those of `protect`.

        Raises:
            ConfigError: if a setting has a value that is not allowed.

        """
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
        self._saes = list(sae) if isinstance(sae, (list, tuple)) else [sae]
        if not self._saes:
            raise ConfigError("sae: got none; allowed is one SAE or a list of at least one.")
        self._train_data = train_data
        self._domains, budgets = choose_domains(protect, domains)
        self._policy = dataclasses.replace(policy or PolicyConfig(), budgets=budgets)
        self._probes = probes or ProbeConfig()
        self._check_on, self._action = check_on, action
        self._on_forecast, self._on_error = on_forecast, on_error
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._monitor: Monitor | None = None
        self._log: RunLog
        self._history: list[DriftSnapshot] = []
        self._alarmed: tuple[str, ...] = ()
        self.forecast: Forecast | None = None
        """The forecast, from train begin on."""
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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forecast and take the baseline; after a resume, take up the ones of the run's first session."""
        names = (TRAIN, *self._domains)
        scalars.require_metric(args.metric_for_best_model, args.greater_is_better, names, self._check_on)
        if self._begins_again(args, state, kwargs["model"]):
            self._history, self._alarmed = [], ()
            return
        self._monitor = None
        self._log = RunLog(Path(args.output_dir or ".") / "sts")
        with undisturbed(kwargs["model"]):  # loading, tokenising and drawing must not touch the run either
            monitor = self._made_monitor(self._saes[0], state, **kwargs)
            if state.global_step == 0:
                others = [self._made_monitor(sae, state, **kwargs) for sae in self._saes[1:]]
                self._begin(monitor, others, state)
            else:
                self._guarded(state, lambda: self._resume(monitor, state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift at a save, if that is when."""
        if self._check_on == "save":
            self._check(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift at an evaluation, if that is when; its numbers join the evaluation's own."""
        if self._check_on == "evaluate":
            self._check(state, control)
            is_now = self._monitor is not None and self._history and self._history[-1].step == state.global_step
            snapshot = self._history[-1] if is_now else None
            kwargs["metrics"].update(scalars.evaluation_metrics(snapshot, args.metric_for_best_model))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift every so many steps, if that is when."""
        if isinstance(self._check_on, int) and state.global_step % self._check_on == 0:
            self._check(state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the final weights, if the last check was not of them."""
        if not args.load_best_model_at_end:  # else the weights are no longer those of this step
            self._check(state, control)
        if self._monitor is not None and state.is_world_process_zero:
            tqdm.write(f"STS files of this run: {self._log.folder}")
        self._monitor = None  # an evaluation after training is of the user's, perhaps of other weights

    def _begins_again(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> bool:
        """Whether the trainer starts anew with smaller batches: its weights may have moved by now, so the first step 0 stands."""
        unfinished = self._monitor is not None and self._monitor.is_of(model)
        return args.auto_find_batch_size and state.global_step == 0 and unfinished

    def _made_monitor(self, sae: SaeSource, state: TrainerState, **kwargs: Any) -> Monitor:
        tokenizer = kwargs.get("processing_class")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        if tokenizer is None:
            raise ConfigError("processing_class: the trainer has none; give it the model's tokenizer, which the probes need.")
        return Monitor(
            kwargs["model"],
            tokenizer,
            sae=sae,
            train_data=self._found_train_data(kwargs.get("train_dataloader")),
            domains=self._domains,
            config=self._probes,
            progress=state.is_world_process_zero,
        )

    def _found_train_data(self, dataloader: Any) -> Source:
        """The user's own word first, then the trainer's raw columns, then its tokenised ones."""
        trainer = self._trainer()
        for found in (self._train_data, getattr(trainer, "train_dataset", None), getattr(dataloader, "dataset", None)):
            if found is not None:
                if hasattr(found, "__getitem__") or isinstance(found, (str, Path)):
                    return found
                raise DataError(
                    "train_data: the trainer's data set is a stream; give a sample of it as STSCallback(train_data=...)."
                )
        raise DataError("train_data: the trainer has no training data set; give examples as STSCallback(train_data=...).")

    def _begin(self, monitor: Monitor, others: Sequence[Monitor], state: TrainerState) -> None:
        self._require_power(monitor)
        self.forecast = monitor.forecast()
        other_forecasts = [other.forecast() for other in others]
        self.verdict = judge_forecast(self.forecast, self._policy)
        self._history, self._alarmed, self._monitor = [], (), monitor
        if state.is_world_process_zero:
            self._log.start_anew()
            self._log.write_forecast(self.forecast, self.verdict, other_forecasts)
            assert monitor.baseline is not None
            monitor.baseline.save(self._log.baseline_file)
            self._log.append_words(monitor.words())
            tqdm.write(terminal.forecast_table(self.forecast, self.verdict))
            if other_forecasts:
                forecasts = [self.forecast, *other_forecasts]
                tqdm.write(terminal.layers_table(forecasts, [rank_agreement(self.forecast, f) for f in forecasts]))
        if self.verdict.decision == "no-go" and self._on_forecast == "refuse":
            raise NoGo(
                f"on_forecast='refuse': the forecast threatens {', '.join(self.verdict.threatened)}. "
                f"{self.verdict.explanation} Change the data, raise the budget, or take on_forecast='warn'."
            )

    def _require_power(self, monitor: Monitor) -> None:
        """Refuse probes that could never raise an alarm, however bad the harm."""
        if short := short_of_queries({name: len(s.queries) for name, s in monitor.domains.items()}, self._policy):
            raise CannotTell(
                f"n_queries: {', '.join(f'{name} has {n}' for name, n in short.items())}; an alarm for one of "
                f"{len(self._policy.budgets)} protected domains at alpha {self._policy.alpha} takes "
                f"{fewest_queries(self._policy)}. Give more rows, raise ProbeConfig(n_queries=...), or protect fewer domains."
            )

    def _resume(self, monitor: Monitor, state: TrainerState) -> None:
        self.forecast = self._log.read_forecast()
        monitor.restore(self._log.baseline_file, self.forecast)
        self._history = self._log.checks_before(state.global_step)
        self._monitor = monitor

    def _check(self, state: TrainerState, control: TrainerControl) -> None:
        if self._monitor is None or (self._history and self._history[-1].step == state.global_step):
            return
        self._guarded(state, lambda: self._checked(state, control))

    def _checked(self, state: TrainerState, control: TrainerControl) -> None:
        assert self._monitor is not None
        snapshot = self._monitor.check(state.global_step)
        self._history.append(snapshot)
        self.verdict = verdict = judge_drift(self._history, self._policy)
        if state.is_world_process_zero:
            self._log.append_check(snapshot, verdict)
            self._log.append_words(self._monitor.words(snapshot.train.top_features))
            tqdm.write(terminal.check_lines(snapshot, verdict, self._probes.n_features))
        self._log_scalars(state, control, snapshot)
        alarmed = verdict.threatened if verdict.decision == "no-go" else ()
        if set(alarmed) - set(self._alarmed):
            self._act(verdict, control)
        self._alarmed = alarmed

    def _act(self, verdict: Verdict, control: TrainerControl) -> None:
        if callable(self._action):
            self._action(verdict)
            return
        logger.warning("STS alarm at step %d: %s", verdict.step, verdict.explanation)
        control.should_save = control.should_save or self._action in ("checkpoint", "stop")
        control.should_training_stop = control.should_training_stop or self._action == "stop"

    def _log_scalars(self, state: TrainerState, control: TrainerControl, snapshot: DriftSnapshot) -> None:
        """A row of its own in the trainer's log."""
        row = scalars.log_row(snapshot)
        trainer = self._trainer()
        if trainer is None:
            state.log_history.append({"step": state.global_step, "epoch": state.epoch, **row})
            return
        should_log = control.should_log
        Trainer.log(trainer, row)  # the base method: TRL's own would flush its running means early
        control.should_log = should_log  # logging clears it, and the step's loss row would vanish

    def _guarded(self, state: TrainerState, work: Callable[[], None]) -> None:
        """Run our own work; a failure of it is recorded and, unless the user wants it raised, survived."""
        try:
            work()
        except Exception as error:
            if self._on_error == "raise":
                raise
            logger.warning("STS could not measure at step %d and trains on: %r", state.global_step, error)
            if state.is_world_process_zero:
                try:
                    self._log.append_fault(state.global_step, traceback.format_exc())
                except OSError as write_error:
                    logger.warning("STS could not record that either: %r", write_error)


def _one_of(field: str, value: object, names: tuple[str, ...], or_else: str = "", otherwise: bool = False) -> None:
    if not (otherwise or (isinstance(value, str) and value in names)):
        allowed = ", ".join(map(repr, names)) + (f" or {or_else}" if or_else else "")
        raise ConfigError(f"{field}: got {value!r}; allowed is {allowed}.")
