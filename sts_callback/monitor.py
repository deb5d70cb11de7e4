"""Forecast and drift checks for any training loop: the engine that the callback and the command line stand on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from sts_callback import doctor, scoring
from sts_callback.baseline import Baseline, SetBaseline
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.domains.reader import Row, Source, read_rows
from sts_callback.errors import CannotTell, ConfigError
from sts_callback.measure import Context, Gauge, OnBatch
from sts_callback.metrics import scores
from sts_callback.model.capture import is_sharded, undisturbed
from sts_callback.model.encoder import SaeEncoder, SaeSource, load_encoder
from sts_callback.model.hooks import find_layers, text_config
from sts_callback.model.probes import ProbeSet, bos_tokens, check_lengths, make_probe_set, neutral_tokens
from sts_callback.readings import Fit, Reading
from sts_callback.records import Check, DriftSnapshot, FeatureInWords, Forecast, Identity
from sts_callback.scoring import NEUTRAL, OWN, TAUGHT, ForecastScorer
from sts_callback.words import in_words

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TRAIN = "train"
"""Name of the training data's own probe set."""

_N_WORDS = 10  # features of a forecast that are looked up


class Monitor:
    """Measures one model against itself at step 0.

    Everything it does leaves the model, its mode and all random state as found.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sae: SaeSource,
        train_data: Source,
        domains: Mapping[str, Source],
        config: ProbeConfig | None = None,
        progress: bool = True,
    ) -> None:
        """Load the SAE, draw the probes and check that all fits.

        Args:
            model: a decoder-only transformers model, wrapped or not.
            tokenizer: its tokenizer; not altered.
            sae: see `model.encoder.SaeSource`.
            train_data: answered training examples, see `domains.reader`.
            domains: name to source; at least one.
            config: numbers, limits and seed.
            progress: whether to show progress bars.

        Raises:
            DataError: if training data or a domain cannot be used.
            SaeError: if the SAE is unknown or does not fit.
            ModelError: if the model lacks the hook point.

        """
        self.config = config or ProbeConfig()
        self._model, self._tokenizer, self._progress = model, tokenizer, progress
        if not domains or TRAIN in domains:
            raise ConfigError(f"domains: got {sorted(domains)}; give at least one, and none by the name of {TRAIN!r}.")
        self._bos = bos_tokens(tokenizer)
        with undisturbed(model):
            encoder = _encoder(sae, model)
            train_rows = read_rows(train_data, "train_data")
            self.train = self._probes(TRAIN, train_rows, tokenizer, self.config.n_train_demonstrations, "train_data")
            self.domains = {
                name: self._probes(name, read_rows(source, field), tokenizer, self.config.n_domain_demonstrations, field)
                for name, source, field in ((n, s, f"domains[{n!r}]") for n, s in domains.items())
            }
            self._neutral = neutral_tokens(tokenizer, sum(map(len, self.train.draws)) // len(self.train.draws))
            self._gauge = Gauge(model, encoder, self.config)
        sets = self._sets = [self.train, *self.domains.values()]
        check_lengths(sets, getattr(text_config(model), "max_position_embeddings", None))
        self.identity = _identity(model, encoder, self.config, sets)
        self._fingerprint = hashlib.sha256(
            json.dumps([self.identity.model, self.identity.sae, self.identity.hook_name, self.identity.probes]).encode()
        ).hexdigest()
        self.baseline: Baseline | None = None
        self.fit: Fit
        self._forecast: Forecast | None = None

    def is_of(self, model: nn.Module) -> bool:
        """Whether it measures this very model."""
        return self._model is model

    def examine(self, policy: PolicyConfig) -> tuple[Check, ...]:
        """Whether SAE, model and probes allow an answer: what `sts-callback doctor` shows. No forecast is made.

        Args:
            policy: whose budgets and test the probes must have the power for.

        """
        with undisturbed(self._model), self._bar("Doctor", 2 * self._n_queries) as bar:
            bare = self._context((), with_answers=True)
            checks = self._fit_checks(bare)
            if any(check.status == "refuse" for check in checks):
                return checks
            neutral = {NEUTRAL: (self._context(self._neutral, with_answers=True),)}
            started = time.monotonic()
            readings = {s.name: self._gauge.read(s, bare, neutral, bar.update) for s in self._sets}
            seconds = time.monotonic() - started
            noise = self._noise_floor(readings[TRAIN])
        return (
            *checks,
            *doctor.probe_checks(readings, noise, policy),
            doctor.cost_check(self._gauge.encoder, self._sets, seconds),
            doctor.process_check(is_sharded(self._model)),
        )

    def forecast(self) -> Forecast:
        """Measure the untuned model: what training on the data is expected to move. Also takes the baseline for drift.

        Raises:
            CannotTell: if the SAE does not fit the model's activations.
            SaeError: if it has another width.

        """
        started, clock = time.monotonic(), _Clock()
        n_passes = 4 * len(self.train.queries) + 5 * (self._n_queries - len(self.train.queries))
        with undisturbed(self._model), self._bar("Forecast", n_passes) as bar:
            with clock("fit of the SAE"):
                bare = self._context((), with_answers=True)
                checks = self._fit_checks(bare)
            if refused := [check for check in checks if check.status == "refuse"]:
                raise CannotTell(" ".join(f"{c.name}: {c.found}. {c.remedy}" for c in refused))
            with clock("contexts"):
                shared = {
                    TAUGHT: [self._context(draw, with_answers=True) for draw in self.train.draws],
                    NEUTRAL: [self._context(self._neutral, with_answers=True)],
                }
            found, baselines = {}, {}
            for probes in self._sets:
                own = {}
                if probes is not self.train:  # whose own demonstrations are the training demonstrations
                    with clock("contexts"):
                        own = {OWN: [self._context(draw, with_answers=False) for draw in probes.draws]}
                with clock("readings"):
                    reading = self._gauge.read(probes, bare, shared | own, bar.update)
                with clock("gradients"):
                    gradients = self._gradients(probes, bare, bar.update)
                with clock("scores"):
                    if probes is self.train:
                        scorer = ForecastScorer(reading, gradients, self.config.n_features)
                    found[probes.name] = scorer.domain(probes, reading, gradients)
                    baselines[probes.name] = scoring.set_baseline(reading)
            with clock("noise floor"):
                noise_floor = self._noise_floor(baselines[TRAIN])
        self.baseline = Baseline(self._fingerprint, self._gauge.reference, baselines)
        self._forecast = Forecast(
            identity=self.identity,
            features=scorer.features,
            features_share=scores.shift_share(scorer.mean_shift, scorer.features),
            median_norm=self._gauge.reference.median_norm,
            unexplained=self.fit.unexplained,
            checks=checks,
            noise_floor=noise_floor,
            train=found.pop(TRAIN),
            domains=scorer.ranked(found),
            seconds=time.monotonic() - started,
            seconds_by_part=dict(clock.seconds),
        )
        return self._forecast

    def restore(self, baseline_file: Path, forecast: Forecast) -> None:
        """Take step 0 from an earlier session of the same run.

        Raises:
            CannotTell: if the baseline is missing, damaged, or of another model, SAE or set of probes.

        """
        self.baseline = Baseline.load(baseline_file, self._fingerprint)
        self._gauge.adopt(self.baseline.reference)
        self._forecast = forecast

    def check(self, step: int, *, batch_tokens: int | None = None) -> DriftSnapshot:
        """Measure how far the model has moved from step 0. Needs `forecast` or `restore` before.

        Args:
            step: optimizer steps done, for the record.
            batch_tokens: tokens in one forward, where it cannot be as many as at step 0; unchanged weights then drift by the
                forecast's noise floor instead of not at all.

        """
        assert self.baseline is not None and self._forecast is not None, "forecast() or restore() comes first"
        started, step_zero = time.monotonic(), self.baseline.sets
        with undisturbed(self._model), self._bar(f"Drift check at step {step}", self._n_queries) as bar:
            bare = self._context((), with_answers=True)
            readings = {
                s.name: self._gauge.read_drift(s, bare, step_zero[s.name], bar.update, batch_tokens=batch_tokens)
                for s in self._sets
            }
        realised = scoring.realised_features(readings[TRAIN], self.config.n_features)
        drifts = {
            s.name: scoring.domain_drift(s, readings[s.name], step_zero[s.name], self._forecast.features, realised)
            for s in self._sets
        }
        return DriftSnapshot(
            step=step,
            realised_features=realised,
            n_shared=scores.n_shared(realised, self._forecast.features),
            train=drifts.pop(TRAIN),
            domains=drifts,
            seconds=time.monotonic() - started,
        )

    def words(self, features: Sequence[tuple[int, float]] | None = None) -> tuple[FeatureInWords, ...]:
        """Where in the probes features fire most at step 0. Needs `forecast` or `restore` before; runs nothing.

        Args:
            features: indices with the share of the shift or drift that each holds; by default the forecast's first.

        """
        assert self.baseline is not None and self._forecast is not None, "forecast() or restore() comes first"
        if features is None:
            shift = self.baseline.sets[TRAIN].mean_train_shift
            features = [(j, scores.shift_share(shift, (j,))) for j in self._forecast.features[:_N_WORDS]]
        return in_words(features, self._sets, self.baseline.sets, self._tokenizer, self._gauge.encoder.neuronpedia_id)

    def _probes(
        self, name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, n_demonstrations: int, field: str
    ) -> ProbeSet:
        return make_probe_set(name, rows, tokenizer, self.config, n_demonstrations=n_demonstrations, field=field)

    def _context(self, tokens: Sequence[int], *, with_answers: bool) -> Context:
        return self._gauge.context((*self._bos, *tokens), with_answers=with_answers)

    def _fit_checks(self, bare: Context) -> tuple[Check, ...]:
        self.fit = self._gauge.calibrate(self._sets, bare)
        by_layer = self._gauge.fit_by_layer(self.train, bare)
        return doctor.fit_checks(self._gauge.encoder, self.fit, self._gauge.layer, by_layer, _model_name(self._model))

    def _gradients(self, probes: ProbeSet, bare: Context, on_batch: OnBatch) -> torch.Tensor | None:
        return self._gauge.read_gradients(probes, bare, on_batch) if self._gauge.can_read_gradients else None

    def _noise_floor(self, train: Reading | SetBaseline) -> float:
        """Relative drift of the same weights with the training data's batches laid out otherwise."""
        layout = max(1, self.config.batch_tokens // 4)
        again = self._gauge.read_drift(self.train, self._context((), with_answers=False), train, batch_tokens=layout)
        return float(again.shift.features.sum() / train.energy.sum())

    @property
    def _n_queries(self) -> int:
        return sum(len(s.queries) for s in self._sets)

    def _bar(self, title: str, total: int) -> tqdm[Any]:
        return tqdm(total=total, desc=title, unit="query", leave=False, disable=not self._progress)


def forecast(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sae: SaeSource,
    train_data: Source,
    domains: Mapping[str, Source],
    config: ProbeConfig | None = None,
    progress: bool = True,
) -> Forecast:
    """Forecast what a fine-tune on `train_data` will move, without training. Arguments and errors as for `Monitor`."""
    return Monitor(model, tokenizer, sae=sae, train_data=train_data, domains=domains, config=config, progress=progress).forecast()


class _Clock:
    """Adds up what the parts of a measurement take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started


def _encoder(sae: SaeSource, model: nn.Module) -> SaeEncoder:
    layers = find_layers(model)
    encoder = load_encoder(sae, _model_name(model), len(layers))
    return encoder.to(next(layers.parameters()).device)


def _model_name(model: nn.Module) -> str:
    return str(getattr(text_config(model), "_name_or_path", "") or type(model).__name__)


def _identity(model: nn.Module, encoder: SaeEncoder, config: ProbeConfig, sets: Sequence[ProbeSet]) -> Identity:
    shape = text_config(model).to_dict()  # type: ignore[attr-defined]
    for volatile in ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures"):
        shape.pop(volatile, None)
    return Identity(
        model=_sha256(shape),
        model_name=Path(_model_name(model)).name,
        sae=encoder.fingerprint,
        sae_name=encoder.name,
        hook_name=encoder.hook_name,
        probes=_sha256([[s.fingerprint for s in sets], asdict(config)]),
    )


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
