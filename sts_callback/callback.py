"""STSCallback: what the user asks for, and when events of the trainer make it happen. What happens then: `training.session`."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback

from sts_callback.config import PlainBudget, PolicyConfig, ProbeConfig, finite, require, whole
from sts_callback.data.reader import Source, held
from sts_callback.data.starter import choose_domains
from sts_callback.distributed import Ranks
from sts_callback.errors import ConfigError
from sts_callback.model.sae import require_layer, require_saes
from sts_callback.records import TRAIN, Forecast, Verdict
from sts_callback.records.rehearsal import Rehearsal
from sts_callback.training import trainer_log
from sts_callback.training.arguments import (
    Action,
    CheckOn,
    NamedAction,
    OnError,
    OnForecast,
    OnForecastError,
    Rehearse,
    Settings,
    STSArguments,
    require_kept_checkpoint,
    require_one_of,
    require_whole_sequences,
)
from sts_callback.training.rollouts import Rollouts
from sts_callback.training.session import Session

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from sts_callback.model.sae import SaeSource

logger = logging.getLogger(__name__)


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
        protect: Sequence[str] | Mapping[str, PlainBudget] = (),
        *,
        domains: Mapping[str, Source] | None = None,
        train_data: Source | None = None,
        check_on: CheckOn = "save",
        action: Action = "warn",
        on_forecast: OnForecast = "warn",
        on_forecast_error: OnForecastError = "raise",
        on_error: OnError = "warn",
        rehearse: Rehearse = "auto",
        max_overhead: float | None = 0.01,
        ledger: str | Path | None = None,
        layer: int | None = None,
        probes: ProbeConfig | None = None,
        policy: PolicyConfig | None = None,
    ) -> None:
        """Choose what to measure and what to do. Nothing is loaded before training begins.

        Args:
            sae: SAELens `release/sae_id`, a folder of an SAE, a `sae_lens.SAE`, `"auto"`, or `"none"` to read raw activations
                without an SAE; or several, of which each makes a forecast and the first is the one that decides and watches
                drift. Without any argument at all, settings are read from a file, see
                `training.arguments.STSArguments.of_environment`.
            protect: names of domains that training must not harm, or names with budgets: what each one's answers may lose, as a
                number of nats a token (default 0.1), or as a text in another unit: `"0.05 bits/byte"`, which does not depend on
                the tokenizer, or `"2 points"` of token accuracy.
            domains: own domains, name to file, data set or rows, in any format that TRL accepts. A protected name that is not
                among them is one that ships with the package.
            train_data: the training examples with their answers, if the trainer's own data set cannot be read or has none.
            check_on: measure drift at each `"save"`, each `"evaluate"` (whose metrics it then joins), or every so many
                optimizer steps; besides after 1, 2, 5, 10, 20, 50, 100, ... steps and at the end. All of these share the error
                that the test of an alarm may make in a run.
            action: on an alarm, `"warn"`, save a `"checkpoint"`, save one and `"stop"`, or call a function with the verdict, in a
                distributed run in its first process.
            on_forecast: when the forecast says no-go, `"warn"`, or `"refuse"` by raising `NoGo` before the first step.
            on_forecast_error: when there can be no forecast, or after a resume no comparison with step 0, `"raise"` before the
                first step, or `"train unwatched"`, which the last line of the run then says.
            on_error: when a measurement fails in mid-run, `"warn"` and train on, or `"raise"`.
            rehearse: before the first step, take a few at the run's own rate, measure what they move, and put all back to the
                bit; the forecast's verdict is then that of these steps. True and False, or `"auto"`: in runs of ten steps or
                more, where it takes no more than a tenth of the training's time. It needs `attach`.
            max_overhead: the share of training time that checks may take, above 0; a check that is due and would take more is
                skipped until the next one that is due and does not. Those that come by themselves are made if all of the training
                pays for them; the last one, when training ends, always, and those after 1, 2 and 5 steps unless these were
                rehearsed. None checks whenever asked.
            ledger: a file that keeps how forecasts came out, from which later ones learn; by default the one that the environment
                variable `STS_LEDGER` names, if any.
            layer: with `sae="none"`, the layer after which activations are read, from 0; by default the one nearest to two thirds
                of the depth, as `"auto"` has it.
            probes: how texts become probes.
            policy: thresholds of the verdict; its budgets are those of `protect`.

        Raises:
            ConfigError: if a setting has a value that is not allowed.
            DataError, SaeError: if what is given can hold no rows or is no SAE.

        """
        if sae is None and not (protect or domains or train_data):
            STSCallback.__init__(self, **STSArguments.of_environment().options())
            return
        if not (isinstance(check_on, str) and check_on in ("save", "evaluate")):
            check_on = whole(check_on, "check_on", "'save', 'evaluate' or a number of steps from 1", least=1)
        if not callable(action):
            require_one_of("action", action, get_args(NamedAction), "a function of the verdict")
        require_one_of("on_forecast", on_forecast, get_args(OnForecast))
        require_one_of("on_forecast_error", on_forecast_error, get_args(OnForecastError))
        require_one_of("on_error", on_error, get_args(OnError))
        require(rehearse == "auto" or isinstance(rehearse, bool), "rehearse", rehearse, "'auto', True or False")
        if max_overhead is not None:
            allowed = "a share above 0, up to 1, or None for no limit"
            max_overhead = finite(max_overhead, "max_overhead", allowed)
            require(0 < max_overhead <= 1, "max_overhead", max_overhead, allowed)
        saes = require_layer(require_saes(sae), layer)
        chosen, budgets = choose_domains(protect, domains)
        rows = None if train_data is None else held(train_data, "train_data")
        require(ledger is None or isinstance(ledger, (str, Path)), "ledger", ledger, "the name of a file, or None")
        probes, policy = ProbeConfig() if probes is None else probes, PolicyConfig() if policy is None else policy
        require(isinstance(probes, ProbeConfig), "probes", probes, "a ProbeConfig")
        require(isinstance(policy, PolicyConfig), "policy", policy, "a PolicyConfig")
        judged = dataclasses.replace(policy, budgets=budgets)
        require(
            not policy.budgets or policy == judged, "policy.budgets", dict(policy.budgets), "none; give them as protect={...}"
        )
        self._settings = Settings(
            saes=saes,
            domains=chosen,
            train_data=rows,
            check_on=check_on,
            action=action,
            on_forecast=on_forecast,
            on_forecast_error=on_forecast_error,
            on_error=on_error,
            rehearse=rehearse,
            max_overhead=1.0 if max_overhead is None else max_overhead,
            ledger=ledger,
            probes=probes,
            policy=judged,
        )
        self._rollouts = Rollouts()
        self._trainer: weakref.ref[Trainer] | None = None
        self._session: Session | None = None

    def attach(self, trainer: Trainer) -> STSCallback:
        """Let the callback rehearse the run, read the trainer's raw training data and write into its log. Optional.

        Args:
            trainer: the trainer that this callback was given to.

        Returns:
            Itself.

        Raises:
            ConfigError: if it is something else.

        """
        require(isinstance(trainer, Trainer), "trainer", trainer, "a transformers.Trainer")
        self._trainer = weakref.ref(trainer)
        return self

    def _attached(self) -> Trainer | None:
        return None if self._trainer is None else self._trainer()

    def __getstate__(self) -> dict[str, Any]:
        """For launchers that send trainers to other processes: settings alone; what is attached is attached there anew."""
        return vars(self) | {"_trainer": None, "_session": None}

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

    @property
    def forecast(self) -> Forecast | None:
        """The forecast, from train begin on; if made from rollouts, from the first step on."""
        return None if self._session is None else self._session.forecast

    @property
    def rehearsal(self) -> Rehearsal | None:
        """What a rehearsal found, or why there was none, from train begin on."""
        return None if self._session is None else self._session.rehearsal

    @property
    def verdict(self) -> Verdict | None:
        """The newest verdict: the forecast's, the rehearsal's in its place if there is one, then each check's."""
        return None if self._session is None else self._session.verdict

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forecast and take the baseline; after a resume, take up the ones of the run's first session."""
        if STSCallback._last_state() is state:
            raise ConfigError(
                "callbacks: the trainer has two STSCallbacks, which would share one folder and one set of log keys; keep one. "
                "sae=[...] takes several SAEs, domains={...} any number of domains."
            )
        settings, ranks = self._settings, Ranks.of_run()
        if settings.rehearse is True and self._attached() is None:
            raise ConfigError(
                "rehearse: got True, but the callback has no trainer, whose loss and collator a rehearsal needs; call "
                "callback.attach(trainer) before trainer.train(), or take rehearse='auto'."
            )
        if ranks.n > 1:
            require_whole_sequences(getattr(AcceleratorState(), "parallelism_config", None))  # accelerate has it from 1.10 on
        names = (TRAIN, *settings.domains)
        trainer_log.require_metric(
            args.metric_for_best_model, args.greater_is_better, names, settings.policy.budgets, settings.check_on
        )
        require_kept_checkpoint(args, settings)
        if args.push_to_hub and state.is_world_process_zero:
            logger.warning(
                "push_to_hub: the trainer uploads all of output_dir but checkpoints, also the folder sts, whose features.jsonl "
                "and rollouts.jsonl quote your texts. To keep it back, leave push_to_hub out and upload by yourself with "
                "HfApi().upload_folder(..., ignore_patterns=['sts*/*', 'checkpoint-*'])."
            )
        loader = kwargs.get("train_dataloader")
        self._session = Session(settings, self._rollouts, ranks, self._attached, args, state, loader, earlier=self._session)
        self._session.begin(args, state, control, **kwargs)
        STSCallback._last_state = weakref.ref(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Listen to what the step writes."""
        self._rollouts.listen()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the rollouts of step 0, and forecast from them if there are no answers: the weights have not moved yet."""
        self._rollouts.pause()
        if self._session is not None:
            self._session.take_rollouts(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift at a save, if that is when."""
        if self._session is not None:
            if self._settings.check_on == "save":
                self._session.checks.check(state, control, kwargs["model"])
            self._session.checks.saved()  # also what an alarm of this check asks for

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift at an evaluation, if that is when; its numbers join the evaluation's own."""
        if self._settings.check_on == "evaluate":
            wanted, check = args.metric_for_best_model, None
            if self._session is not None:  # else it is an evaluation before training
                self._session.checks.check(state, control, kwargs["model"], always=trainer_log.is_ours(wanted))
                check = self._session.checks.made_at(state.global_step)
            kwargs["metrics"].update(trainer_log.evaluation_metrics(check, self._settings.policy, wanted))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check drift every so many steps, if that is when, and at the planned steps between the user's own checks."""
        every = self._settings.check_on
        if self._session is not None:
            self._session.checks.look(state, control, kwargs["model"])
            if isinstance(every, int) and state.global_step % every == 0:
                self._session.checks.check(state, control, kwargs["model"])
            self._session.checks.ask_for_checkpoint(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask again for the checkpoint of an alarm; where training stops, an epoch ends too."""
        if self._session is not None:
            self._session.checks.ask_for_checkpoint(control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the final weights, if the last check was not of them."""
        if self._session is not None:
            self._session.end(args, state, control, kwargs["model"])
