"""Forecast and drift checks for any training loop. The callback and the command line use this engine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from sts_callback.config import N_LOOKS, NO_SAE, PolicyConfig, ProbeConfig, require
from sts_callback.data.chat import text_tokenizer
from sts_callback.data.counts import RowsRead
from sts_callback.data.pairs import Row
from sts_callback.data.probes import (
    ProbeSet,
    check_lengths,
    check_tokens,
    filler_tokens,
    make_completion_set,
    make_probe_set,
    make_row_set,
    uses_chat_template,
)
from sts_callback.data.reader import Source, read_rows
from sts_callback.data.starter import require_domains
from sts_callback.data.tokens import bos_tokens
from sts_callback.distributed import Ranks
from sts_callback.errors import NEEDS_SAE, CannotTell, ConfigError
from sts_callback.measure import diagnostics, scoring
from sts_callback.measure.accumulators import MaxActivations, ProbeStats
from sts_callback.measure.identity import identity_of
from sts_callback.measure.runner import Context, ProbeRunner
from sts_callback.measure.sae_reader import Fit
from sts_callback.measure.scoring import DOMAIN_ICL, FILLER, TRAIN_ICL, ForecastScorer
from sts_callback.measure.step_zero import StepZeroReference, StepZeroStats
from sts_callback.measure.top_examples import top_activating_examples
from sts_callback.metrics import scores
from sts_callback.model.encoder import encoder_for
from sts_callback.model.fingerprint import Weights, weights_of
from sts_callback.model.hooks import find_layers, max_positions, model_name, vocab_size
from sts_callback.model.sae import SaeSource, require_saes
from sts_callback.model.sharding import is_sharded
from sts_callback.model.undisturbed import undisturbed
from sts_callback.progress import progress_bar
from sts_callback.records import TRAIN, UNKNOWN, Check, DomainForecast, DriftSnapshot, Estimate, Forecast, TopActivatingExamples

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_N_WORDS = 10  # number of a forecast's features to find examples of


class Monitor:
    """Compares one model with itself at step 0.

    It leaves the model, its mode and all random states as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sae: SaeSource | Sequence[SaeSource],
        train_data: Source,
        domains: Mapping[str, Source],
        config: ProbeConfig | None = None,
        progress: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        """Load the SAEs, draw the probes and test the model.

        Args:
            model: a decoder-only transformers model, wrapped or not.
            tokenizer: its tokenizer or processor; not altered.
            sae: see `model.sae.SaeSource`. If there are several, each makes a forecast and the first one watches drift.
            train_data: answered training examples, see `data.reader`.
            domains: sources by name, at least one.
            config: numbers, limits and seed.
            progress: whether to show progress bars.
            ranks: the processes that share the work and all make the same calls, `Ranks.of_run()` in a distributed run. By
                default only this one.

        Raises:
            DataError: if training data or a domain cannot be used.
            SaeError: if the SAE is unknown or does not fit.
            ModelError: if the model lacks the hook point or cannot be measured.

        """
        saes = require_saes(sae)
        require_domains(domains)
        require(len(domains) > 0, "domains", domains, "at least one, as name to source")
        self.config = ProbeConfig() if config is None else config
        require(isinstance(self.config, ProbeConfig), "config", config, "a ProbeConfig")
        find_layers(model)
        tokenizer = text_tokenizer(tokenizer)
        is_tokenizer = callable(tokenizer) and hasattr(tokenizer, "all_special_ids")
        require(is_tokenizer, "tokenizer", tokenizer, "the model's, such as AutoTokenizer.from_pretrained(...)")
        self._model, self.tokenizer, self._progress = model, tokenizer, progress
        self._ranks = ranks or Ranks()
        self._bos = bos_tokens(tokenizer)
        with undisturbed(model):
            encoders = [encoder_for(one, model) for one in saes]
            as_chat = self.config.chat_template == "always"
            if as_chat and not getattr(tokenizer, "chat_template", None):
                raise ConfigError("chat_template: got 'always', but the tokenizer has none; set it, or take 'auto'.")
            self.train = self._probes(TRAIN, train_data, self.config.n_train_demonstrations, "train_data", as_chat=as_chat)
            as_chat |= self.config.chat_template == "auto" and uses_chat_template(self.train, tokenizer)
            logger.info("Plain rows of domains are asked %s the chat template.", "in" if as_chat else "without")
            self.domains = {
                name: self._probes(name, source, self.config.n_domain_demonstrations, f"domains[{name!r}]", as_chat=as_chat)
                for name, source in domains.items()
            }
            self._filler = filler_tokens(tokenizer, sum(map(len, self.train.demo_sets)) // len(self.train.demo_sets))
            self._runner = ProbeRunner(model, encoders, self.config, self._ranks)
        sets = self._sets = [self.train, *self.domains.values()]
        check_lengths(sets, max_positions(model), len(self._bos))
        check_tokens(sets, vocab_size(model))
        with undisturbed(model):
            contexts = [self._filler, *(draw for s in sets for draw in s.demo_sets)]
            self._runner.self_test(sets, [(*self._bos, *tokens) for tokens in contexts])
        precision = self._runner.findings.precision
        self._identities = [identity_of(model, encoder, self.config, sets, precision) for encoder in encoders]
        self.identity = self._identities[0]
        self._fingerprint = hashlib.sha256(
            json.dumps([self.identity.model, self.identity.sae, self.identity.hook_name, self.identity.probes]).encode()
        ).hexdigest()
        self.step_zero: StepZeroReference | None = None
        self.fits: list[Fit]
        """How each SAE fits. Set by `examine` and `forecast`."""
        self._forecast: Forecast | None = None

    @property
    def reads(self) -> tuple[RowsRead, ...]:
        """What happened to the rows of the training data and of each domain."""
        return tuple(s.read for s in self._sets if s.read is not None)

    def watches(self, model: nn.Module) -> bool:
        """Whether this is the measured model.

        Args:
            model: any.

        """
        return model is self._model

    def weights(self) -> Weights:
        """Compute the fingerprint of the model's current weights. The model must be whole on this process."""
        return weights_of(self._model)

    def examine(self, policy: PolicyConfig) -> tuple[Check, ...]:
        """Check whether SAE, model and probes allow an answer, as `sts-callback doctor` shows. No forecast is made.

        Args:
            policy: budgets and test for which the probes need enough power.

        """
        with undisturbed(self._model), self._bar("Doctor", 2 * self._n_queries) as bar:
            zero_shot = self._context((), with_answers=True)
            checks = self._fit_checks(zero_shot)[0]
            if any(check.status == "refuse" for check in checks):
                return checks
            filler = {FILLER: (self._context(self._filler, with_answers=True),)}
            started = time.monotonic()
            readings = {s.name: self._runner.read(s, zero_shot, filler, bar.update)[0] for s in self._sets}
            seconds = time.monotonic() - started
            noise = self._noise_floors([readings[TRAIN]])[0]
        return (
            *checks,
            *diagnostics.probe_checks(readings, self._sets, noise, policy, self.config.n_domain_demonstrations),
            diagnostics.cost_check(self._runner.sae_readers[0].encoder, self._sets, seconds),
            diagnostics.process_check(self._ranks.n, is_sharded(self._model)),
        )

    def forecast(self) -> Forecast:
        """Make the forecast of the first SAE, see `forecasts`."""
        return self.forecasts()[0]

    def forecasts(self, policy: PolicyConfig | None = None, n_looks: int = N_LOOKS) -> tuple[Forecast, ...]:
        """Measure the untuned model and forecast what training will move. This also takes the baseline for drift.

        Args:
            policy: where given, whether the queries suffice for its budgets is among the forecast's checks.
            n_looks: checks of the run, which share the error of its test.

        Returns:
            One forecast for each SAE. They share all passes through the model, so each has the seconds of all.

        Raises:
            CannotTell: if an SAE does not fit the model's activations.
            ModelError: if the model gives NaN or infinite numbers.
            SaeError: if an SAE has another width than the model.

        """
        started, clock = time.monotonic(), _Clock()
        n_passes = 3 * len(self.train.queries) + 4 * (self._n_queries - len(self.train.queries))
        with undisturbed(self._model), self._bar("Forecast", n_passes) as bar:
            with clock("fit of the SAE"):
                zero_shot = self._context((), with_answers=True)
                checks = self._fit_checks(zero_shot)
            diagnostics.require_fit(checks)
            with clock("contexts"):
                shared = {
                    TRAIN_ICL: [self._context(draw, with_answers=True) for draw in self.train.demo_sets],
                    FILLER: [self._context(self._filler, with_answers=True)],
                }
            scorers: list[ForecastScorer] = []
            found: dict[str, list[DomainForecast]] = {}
            baselines: dict[str, list[StepZeroStats]] = {}
            errors: dict[str, float | None] = {}
            for probes in self._sets:
                own = {}
                if probes is not self.train:  # its own demonstrations are the training demonstrations
                    with clock("contexts"):
                        own = {DOMAIN_ICL: [self._context(draw, with_answers=False) for draw in probes.demo_sets]}
                with clock("readings"):
                    readings = self._runner.read(probes, zero_shot, shared | own, bar.update, with_gradients=True)
                diagnostics.require_finite(probes.name, readings[0])
                with clock("scores"):
                    if policy is not None:
                        errors[probes.name] = diagnostics.neutral_error(readings[0], probes, policy)
                    scorers = scorers or [ForecastScorer(reading, self.config.n_features) for reading in readings]
                    pairs = list(zip(scorers, readings, strict=True))
                    found[probes.name] = [scorer.domain(probes, reading) for scorer, reading in pairs]
                    baselines[probes.name] = [scoring.step_zero_stats(reading) for reading in readings]
            power: tuple[Check, ...] = ()
            if policy is not None and any(error is not None for error in errors.values()):
                power = (diagnostics.power_check(errors, self._sets, policy, self.config.n_domain_demonstrations, n_looks),)
            can_move = self._runner.can_move(self.train)
            with clock("noise floor"):
                noise_floors = self._noise_floors(baselines[TRAIN])
            first = {name: of_each[0] for name, of_each in baselines.items()}
            self.step_zero = StepZeroReference(
                self._fingerprint, self._runner.sae_readers[0].reference, first, {probes.name: probes for probes in self._sets}
            )
            seconds = time.monotonic() - started
            forecasts = []
            for i, (scorer, sae_reader) in enumerate(zip(scorers, self._runner.sae_readers, strict=True)):
                domains = {name: of_each[i] for name, of_each in found.items()}
                forecasts.append(
                    Forecast(
                        identity=self._identities[i],
                        features=scorer.features,
                        features_share=scores.shift_share(scorer.mean_shift, scorer.features),
                        median_norm=sae_reader.reference.median_norm,
                        fvu=self.fits[i].fvu,
                        checks=(*checks[i], *power),
                        noise_floor=noise_floors[i],
                        train=domains.pop(TRAIN),
                        domains=scorer.ranked(domains),
                        seconds=seconds,
                        seconds_by_part=dict(clock.seconds),
                        can_move=can_move,
                    )
                )
        self._forecast = forecasts[0]
        return tuple(forecasts)

    def restore(self, baseline_file: Path, forecast: Forecast) -> None:
        """Load step 0 from an earlier session of the same run.

        Args:
            baseline_file: written by `step_zero.save` in that session.
            forecast: of that session.

        Raises:
            CannotTell: if the baseline is missing or damaged, or has another model, precision, SAE or probes.

        """
        made, ours = forecast.identity, self.identity
        if NO_SAE in (made.sae, ours.sae) and (made.sae, made.hook_name) != (ours.sae, ours.hook_name):
            raise CannotTell(
                f"baseline: it was made with {made.sae_name} at {made.hook_name}, not with {ours.sae_name} at {ours.hook_name}; "
                "resume the run with the sae= that it began with, or start it anew."
            )
        if made.precision and ours.precision != made.precision:  # earlier records do not say
            raise CannotTell(
                f"baseline: it was made in {made.precision}, and the model now computes in {ours.precision}; resume the run with "
                "the precision that it began with (dtype, bf16, torch.set_float32_matmul_precision), or start it anew."
            )
        self.step_zero = self._ranks.from_first(lambda: StepZeroReference.load(baseline_file, self._fingerprint))
        # A template may render the same rows differently today: only the tokens of step 0 can be compared.
        self.train = self.step_zero.probes[TRAIN]
        self.domains = {name: self.step_zero.probes[name] for name in self.domains}
        self._sets = [self.train, *self.domains.values()]
        self._runner.sae_readers[0].adopt(self.step_zero.reference)
        self._forecast = forecast

    def check(
        self,
        step: int,
        *,
        batch_tokens: int | None = None,
        rollouts: tuple[Sequence[Row], Sequence[Row]] = ((), ()),
        title: str = "Drift check at step",
    ) -> DriftSnapshot:
        """Measure how far the model has moved since step 0. Call `forecast` or `restore` first.

        Args:
            step: optimizer steps done, for the record.
            batch_tokens: tokens in one forward, where it cannot be as many as at step 0; unchanged weights then drift by the
                forecast's noise floor instead of not at all.
            rollouts: prompts with completions that the model wrote at step 0, and such that it writes now.
            title: of the progress bar, before the number of the step.

        Raises:
            CannotTell: if there is no step 0 to compare with.

        """
        step_zero, forecast = self._at_step_zero()
        started = time.monotonic()
        with undisturbed(self._model), self._bar(f"{title} {step}", self._n_queries) as bar:
            zero_shot = self._context((), with_answers=True)
            readings = {
                s.name: self._runner.read_drift(s, zero_shot, [step_zero[s.name]], bar.update, batch_tokens=batch_tokens)[0]
                for s in self._sets
            }
            output_drift = self._output_drift(*rollouts, batch_tokens)
            can_move = self._runner.can_move(self.train)
            features, n_features = forecast.features, self.config.n_features
            realised, drifts = scoring.domain_drifts(self._sets, readings, step_zero, features, n_features)
        return DriftSnapshot(
            step=step,
            realised_features=realised,
            n_shared=scores.n_shared(realised, features),
            train=drifts.pop(TRAIN),
            domains=drifts,
            seconds=time.monotonic() - started,
            output_drift=output_drift,
            can_move=can_move,
            has_sae=self.identity.has_sae,
        )

    def _output_drift(self, then: Sequence[Row], now: Sequence[Row], batch_tokens: int | None) -> Estimate:
        """Drift of what the model writes. The current weights read both texts."""
        then_set, now_set = (
            make_completion_set("rollouts", rows, self.tokenizer, self.config, field="rollouts") for rows in (then, now)
        )
        if min(len(then_set.queries), len(now_set.queries)) < 2 or then_set == now_set:  # nothing was written since
            return UNKNOWN
        zero_shot = self._context((), with_answers=False)
        now_acts, then_acts = (self._runner.read_activity(s, zero_shot, batch_tokens=batch_tokens) for s in (now_set, then_set))
        return scoring.output_drift(now_acts, then_acts)

    def read_domains(self, names: Sequence[str]) -> dict[str, MaxActivations]:
        """Measure how strongly domains activate each feature of the first SAE. No forecast is made.

        Args:
            names: names of the domains.

        Raises:
            CannotTell: if the SAE does not fit the model's activations.
            ConfigError: if there is none.

        """
        if not self.identity.has_sae:
            raise ConfigError(f"sae: got {NO_SAE!r}. {NEEDS_SAE}")
        chosen, features = [self.domains[name] for name in names], range(self._runner.sae_readers[0].encoder.d_sae)
        with undisturbed(self._model), self._bar("Domains", sum(len(s.queries) for s in chosen)) as bar:
            zero_shot = self._context((), with_answers=True)
            diagnostics.require_fit(self._fit_checks(zero_shot))
            return {s.name: self._runner.read_max_activations(s, zero_shot, features, bar.update) for s in chosen}

    def read_rows(self, rows: Sequence[Row], features: Sequence[int]) -> tuple[ProbeSet, tuple[int, ...], MaxActivations]:
        """Measure how strongly whole rows, prompt and answer, activate features of the first SAE.

        Call `read_domains`, `forecast` or `restore` first.

        Args:
            rows: training examples, see `data.reader`.
            features: feature indices.

        Returns:
            The rows' tokens, the indices of these rows (rows without text are left out), and their maximal activations.

        """
        texts, numbers = make_row_set("rows", rows, self.tokenizer, self.config, field="train_data")
        check_lengths([texts], max_positions(self._model), len(self._bos))
        check_tokens([texts], vocab_size(self._model))
        with undisturbed(self._model), self._bar("Training rows", len(numbers)) as bar:
            return (
                texts,
                numbers,
                self._runner.read_max_activations(texts, self._context((), with_answers=False), features, bar.update),
            )

    def top_activating_examples(self, features: Sequence[tuple[int, float]] | None = None) -> tuple[TopActivatingExamples, ...]:
        """Find where features are most active in the probes at step 0. Call `forecast` or `restore` first. No forward is run.

        Args:
            features: feature indices, each with its share of the shift or drift; by default the forecast's first features.

        Raises:
            CannotTell: if there is no step 0.

        """
        step_zero, forecast = self._at_step_zero()
        if features is None:
            shift = step_zero[TRAIN].mean_train_shift
            features = [(j, scores.shift_share(shift, (j,))) for j in forecast.features[:_N_WORDS]]
        encoder = self._runner.sae_readers[0].encoder
        return top_activating_examples(features, self._sets, step_zero, self.tokenizer, encoder.neuronpedia_id)

    def _at_step_zero(self) -> tuple[Mapping[str, StepZeroStats], Forecast]:
        if self.step_zero is None or self._forecast is None:
            raise CannotTell("step 0: there is none to compare with; call forecast() or restore() on the untuned model first.")
        return self.step_zero.sets, self._forecast

    def _probes(self, name: str, source: Source, n_demonstrations: int, field: str, *, as_chat: bool) -> ProbeSet:
        return make_probe_set(
            name,
            read_rows(source, field),
            self.tokenizer,
            self.config,
            n_demonstrations=n_demonstrations,
            field=field,
            as_chat=as_chat,
        )

    def _context(self, tokens: Sequence[int], *, with_answers: bool) -> Context:
        return self._runner.context((*self._bos, *tokens), with_answers=with_answers)

    def _fit_checks(self, zero_shot: Context) -> list[tuple[Check, ...]]:
        self.fits, checks = diagnostics.examined_fits(self._runner, self._sets, zero_shot, model_name(self._model))
        return checks

    def _noise_floors(self, train: Sequence[ProbeStats | StepZeroStats]) -> list[float]:
        """For each SAE, the relative drift of unchanged weights when the training data form other batches."""
        layout = max(1, self.config.batch_tokens // 4)
        again = self._runner.read_drift(self.train, self._context((), with_answers=False), train, batch_tokens=layout)
        return [float(a.shift.total.sum() / one.sq_norm.sum()) for a, one in zip(again, train, strict=True)]

    @property
    def _n_queries(self) -> int:
        return sum(len(s.queries) for s in self._sets)

    def _bar(self, title: str, total: int) -> tqdm[Any]:
        return progress_bar(title, total, "query pass", is_shown=self._progress)


class _Clock:
    """Adds up the seconds of each part of a measurement."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
