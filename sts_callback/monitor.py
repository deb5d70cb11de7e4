"""Forecast and drift checks for any training loop: the engine that the callback and the command line stand on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from sts_callback.baseline import Baseline, SetBaseline
from sts_callback.config import ProbeConfig
from sts_callback.domains.reader import Row, Source, read_rows
from sts_callback.errors import ConfigError
from sts_callback.measure import BARE, Context, DriftReading, Gauge, Reading
from sts_callback.metrics import scores
from sts_callback.metrics.likelihood import change_per_token, mean_per_token
from sts_callback.metrics.sums import token_mean
from sts_callback.model.capture import undisturbed
from sts_callback.model.encoder import SaeEncoder, SaeSource, load_encoder
from sts_callback.model.hooks import find_layers, text_config
from sts_callback.model.probes import ProbeSet, check_lengths, make_probe_set, prefix_tokens
from sts_callback.records import DomainDrift, DomainForecast, DriftSnapshot, Forecast, Identity

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TRAIN = "train"
"""Name of the training data's own probe set."""
_OWN, _TRAIN_DEMONSTRATIONS = "own demonstrations", "training demonstrations"
_N_TOP = 10  # drifted features that a record names


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
        self._model, self._progress = model, progress
        if not domains or TRAIN in domains:
            raise ConfigError(f"domains: got {sorted(domains)}; give at least one, and none by the name of {TRAIN!r}.")
        self._bos = prefix_tokens(tokenizer)
        with undisturbed(model):
            encoder = _encoder(sae, model)
            train_rows = read_rows(train_data, "train_data")
            self.train = self._probes(TRAIN, train_rows, tokenizer, self.config.n_train_demonstrations, "train_data")
            self.domains = {
                name: self._probes(name, read_rows(source, field), tokenizer, self.config.n_domain_demonstrations, field)
                for name, source, field in ((n, s, f"domains[{n!r}]") for n, s in domains.items())
            }
            self._gauge = Gauge(model, encoder, self.config)
        sets = [self.train, *self.domains.values()]
        check_lengths(sets, getattr(text_config(model), "max_position_embeddings", None))
        self.identity = _identity(model, encoder, self.config, sets)
        self._fingerprint = hashlib.sha256(
            json.dumps([self.identity.model, self.identity.sae, self.identity.hook_name, self.identity.probes]).encode()
        ).hexdigest()
        self.baseline: Baseline | None = None
        self._forecast: Forecast | None = None

    def forecast(self) -> Forecast:
        """Measure the untuned model: what training on the data is expected to move. Also takes the baseline for drift.

        Raises:
            SaeError: if the SAE does not fit the model's activations.

        """
        started = time.monotonic()
        with undisturbed(self._model), self._bar("Forecast") as bar:
            self._gauge.calibrate([self.train, *self.domains.values()], self._bos)
            bare = Context(self._bos, with_answers=True)
            taught = Context(self._bos + self.train.demonstrations, with_answers=True)
            train = self._gauge.read(self.train, {BARE: bare, _TRAIN_DEMONSTRATIONS: taught}, bar.update)
            mean_shift = token_mean(train.shift[_TRAIN_DEMONSTRATIONS], train.n_tokens)
            features = scores.shifted_features(mean_shift, self.config.n_features)
            found = {TRAIN: _domain_forecast(self.train, train, features)}
            sets = {TRAIN: _set_baseline(train)}
            for name, probes in self.domains.items():
                own = Context(self._bos + probes.demonstrations, with_answers=False)
                reading = self._gauge.read(probes, {BARE: bare, _TRAIN_DEMONSTRATIONS: taught, _OWN: own}, bar.update)
                found[name] = _domain_forecast(probes, reading, features)
                sets[name] = _set_baseline(reading)
        self.baseline = Baseline(self._fingerprint, self._gauge.reference, sets)
        self._forecast = Forecast(
            identity=self.identity,
            features=features,
            features_share=scores.shift_share(mean_shift, features),
            median_norm=self._gauge.reference.median_norm,
            unexplained=self._gauge.reference.unexplained,
            train=found.pop(TRAIN),
            domains=found,
            seconds=time.monotonic() - started,
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

    def check(self, step: int) -> DriftSnapshot:
        """Measure how far the model has moved from step 0. Needs `forecast` or `restore` before.

        Args:
            step: optimizer steps done, for the record.

        """
        assert self.baseline is not None and self._forecast is not None, "forecast() or restore() comes first"
        started = time.monotonic()
        context = Context(self._bos, with_answers=True)
        with undisturbed(self._model), self._bar(f"Drift check at step {step}") as bar:
            readings = {
                s.name: self._gauge.read_drift(
                    s, context, self.baseline.sets[s.name].counted, self.baseline.sets[s.name].acts, bar.update
                )
                for s in (self.train, *self.domains.values())
            }
        train = readings[TRAIN]
        realised = scores.shifted_features(token_mean(train.drift, train.n_tokens), self.config.n_features)
        drifts = {
            s.name: _domain_drift(s, readings[s.name], self.baseline.sets[s.name], self._forecast.features, realised)
            for s in (self.train, *self.domains.values())
        }
        return DriftSnapshot(
            step=step,
            realised_features=realised,
            n_shared=scores.n_shared(realised, self._forecast.features),
            train=drifts.pop(TRAIN),
            domains=drifts,
            seconds=time.monotonic() - started,
        )

    def _probes(
        self, name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, n_demonstrations: int, field: str
    ) -> ProbeSet:
        return make_probe_set(name, rows, tokenizer, self.config, n_demonstrations=n_demonstrations, field=field)

    def _bar(self, title: str) -> tqdm[Any]:
        n_queries = sum(len(s.queries) for s in (self.train, *self.domains.values()))
        return tqdm(total=n_queries, desc=title, unit="query", leave=False, disable=not self._progress)


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


def _domain_forecast(probes: ProbeSet, reading: Reading, features: tuple[int, ...]) -> DomainForecast:
    step_zero = _set_baseline(reading)
    taught = reading.nll.get(_TRAIN_DEMONSTRATIONS)
    change, error = (float("nan"),) * 2 if taught is None else change_per_token(taught, reading.nll[BARE], reading.n_answer)
    return DomainForecast(
        name=probes.name,
        n_queries=len(probes.queries),
        n_tokens=int(reading.n_tokens.sum()),
        n_masked=reading.n_masked,
        n_cut=probes.n_cut,
        n_answer_tokens=int(reading.n_answer.sum()),
        relative_shift=scores.relative_change(step_zero.mean_train_shift, float(token_mean(reading.energy, reading.n_tokens))),
        nll=mean_per_token(step_zero.nll, reading.n_answer),
        nll_change=change,
        nll_change_se=error,
        **_four_scores(step_zero, features),
    )


def _four_scores(step_zero: SetBaseline, features: tuple[int, ...]) -> dict[str, float]:
    return {
        "sts_act": scores.activity_score(step_zero.mean_activity, features),
        "sts_icl": scores.shift_score(step_zero.mean_own_shift, features),
        "sts_rel": scores.shift_share(step_zero.mean_own_shift, features),
        "sts_cross": scores.shift_share(step_zero.mean_train_shift, features),
    }


def _set_baseline(reading: Reading) -> SetBaseline:
    train_shift = token_mean(reading.shift[_TRAIN_DEMONSTRATIONS], reading.n_tokens)
    own = reading.shift.get(_OWN)  # the training data's own demonstrations are the training demonstrations
    return SetBaseline(
        counted=reading.counted,
        acts=reading.acts,
        n_tokens=reading.n_tokens,
        energy=reading.energy,
        nll=reading.nll.get(BARE, torch.full((len(reading.n_tokens),), float("nan"))),
        mean_activity=token_mean(reading.activity, reading.n_tokens),
        mean_own_shift=train_shift.clone() if own is None else token_mean(own, reading.n_tokens),
        mean_train_shift=train_shift,
    )


def _domain_drift(
    probes: ProbeSet,
    reading: DriftReading,
    step_zero: SetBaseline,
    forecast_features: tuple[int, ...],
    realised: tuple[int, ...],
) -> DomainDrift:
    mean_drift = token_mean(reading.drift, reading.n_tokens)
    n_answer = torch.tensor([len(q.answer) for q in probes.queries])
    nan = float("nan")
    nll, change, error = nan, nan, nan
    if reading.nll is not None:
        nll = mean_per_token(reading.nll, n_answer)
        change, error = change_per_token(reading.nll, step_zero.nll, n_answer)
    return DomainDrift(
        name=probes.name,
        n_tokens=int(reading.n_tokens.sum()),
        n_masked=reading.n_masked,
        relative_drift=scores.relative_change(mean_drift, float(token_mean(step_zero.energy, step_zero.n_tokens))),
        share_on_forecast=scores.shift_share(mean_drift, forecast_features),
        top_features=tuple((j, scores.shift_share(mean_drift, (j,))) for j in scores.shifted_features(mean_drift, _N_TOP)),
        nll=nll,
        nll_change=change,
        nll_change_se=error,
        **_four_scores(step_zero, realised),
    )
