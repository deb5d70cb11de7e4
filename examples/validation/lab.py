"""The stages that run the model: forecasts of all fine-tunes in one pass over each domain, then the fine-tunes themselves."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from demo import SAE_FOLDER
from gemma import loaded_gemma
from sts_callback import ProbeConfig, scoring
from sts_callback.baseline import SetBaseline
from sts_callback.identity import encoder_for
from sts_callback.measure import Context, Gauge
from sts_callback.metrics.scores import n_shared
from sts_callback.metrics.sums import token_mean
from sts_callback.model.capture import undisturbed
from sts_callback.model.probes import ProbeSet, Query, bos_tokens, make_completion_set, make_probe_set, neutral_tokens
from sts_callback.readings import BARE, Reading, Reference
from sts_callback.records import TRAIN, DriftSnapshot
from sts_callback.scoring import NEUTRAL, OWN, TAUGHT, ForecastScorer
from validation import measure, mixtures
from validation.data import CATEGORIES, DOMAINS, Row, deal
from validation.plan import CANDIDATES, COSTS, FORECASTS, MIXTURES, RUNS, SETTINGS, STEP_ZERO, SUMS, Run, planned, stored
from validation.train import tune

T = TypeVar("T")


class Lab:
    """Model, SAE and all rows."""

    def __init__(self, data_dir: Path, work_dir: Path) -> None:
        logging.set_verbosity_error()
        self._work_dir = work_dir
        work_dir.mkdir(parents=True, exist_ok=True)
        self._model, self._tokenizer = loaded_gemma()
        self._bos = bos_tokens(self._tokenizer)
        self._config = ProbeConfig(**SETTINGS["probes"], seed=SETTINGS["seed"])
        self._gauge = Gauge(self._model, [encoder_for(SAE_FOLDER, self._model)], self._config)
        (self._lens,) = self._gauge.lenses
        self._rows = deal(data_dir, SETTINGS["n_measured"], SETTINGS["seed"])
        self._fine_tunes: list[str] = [*SETTINGS["fine_tunes"]["development"], *SETTINGS["fine_tunes"]["held_out"]]
        self._taught = {
            name: self._probes(TRAIN, self._rows[name].training, self._config.n_train_demonstrations) for name in self._fine_tunes
        }
        self._asked = {
            name: self._probes(name, self._rows[name].forecast, self._config.n_domain_demonstrations) for name in DOMAINS
        }

    def forecast(self) -> None:
        """Write what is expected of each fine-tune."""
        self._calibrated()
        forecasts, means = [], {}
        readings = {name: self._domain_reading(name) for name in DOMAINS}
        for fine_tune in self._fine_tunes:
            train = self._train_reading(fine_tune)
            scorer = ForecastScorer(train, self._config.n_features)
            own = scorer.domain(self._taught[fine_tune], train)
            found = {name: scorer.domain(self._asked[name], _as_of(readings[name], fine_tune)) for name in DOMAINS}
            line = {"fine_tune": fine_tune, "features": scorer.features, "train": own.to_dict()}
            forecasts.append(line | {"domains": {name: one.to_dict() for name, one in scorer.ranked(found).items()}})
            means |= {f"train/{fine_tune}/{key}": value for key, value in _means(train).items()}
        for name, reading in readings.items():
            means |= {f"{name}/{key}": value for key, value in _means(reading).items()}
        FORECASTS.write_text("".join(json.dumps(line) + "\n" for line in forecasts))
        np.savez_compressed(SUMS, **means)

    def candidates(self) -> None:
        """Two more forms of STS_net, for the development half: by answer tokens, and behind more demonstrations."""
        self._calibrated()
        features = {line["fine_tune"]: list(line["features"]) for line in stored(FORECASTS)}
        fine_tunes = SETTINGS["fine_tunes"]["development"]
        many = {
            name: self._probes(TRAIN, self._rows[name].training, SETTINGS["n_many_demonstrations"]).draws for name in fine_tunes
        }
        few = {name: self._taught[name].draws for name in fine_tunes}
        for kind, draws, read in (("answer tokens", few, _answers_only), ("more demonstrations", many, lambda probes: probes)):
            with undisturbed(self._model):
                contexts = {n: self._contexts(some, with_answers=False) for n, some in draws.items()}
                lengths = [len(draw) for some in draws.values() for draw in some]
                prose = neutral_tokens(self._tokenizer, sum(lengths) // len(lengths))
                contexts[NEUTRAL] = [self._context(prose, with_answers=False)]
                bare = self._context((), with_answers=False)
                for domain in tqdm(DOMAINS, desc=kind, unit="domain"):
                    reading = self._gauge.read(read(self._asked[domain]), bare, contexts)[0]
                    sums = {name: shift.features.double().sum(dim=0) for name, shift in reading.shifts.items()}
                    for name in fine_tunes:
                        taught, neutral = (float(sums[key][features[name]].sum()) for key in (name, NEUTRAL))
                        net = (taught - neutral) / float(sums[name].sum())
                        line = {"kind": kind, "fine_tune": name, "domain": domain, "net": net}
                        with CANDIDATES.open("a") as file:
                            file.write(json.dumps(_rounded(line)) + "\n")

    def costs(self) -> None:
        """Time what each score needs of one domain; contexts that all domains share are read before."""
        self._calibrated()
        fine_tune, asked = self._fine_tunes[0], self._asked[DOMAINS[0]]
        taught = self._taught[fine_tune]
        many = self._probes(TRAIN, self._rows[fine_tune].training, SETTINGS["n_many_demonstrations"])
        seconds: dict[str, list[float]] = {}
        with undisturbed(self._model):
            bare, answered = (self._context((), with_answers=answers) for answers in (False, True))
            behind, eight = (self._contexts(draws, with_answers=False) for draws in (taught.draws, many.draws))
            whole = self._contexts(taught.draws, with_answers=True)
            text = neutral_tokens(self._tokenizer, len(taught.draws[0]))
            prose, prose_whole = ([self._context(text, with_answers=answers)] for answers in (False, True))
            read = self._gauge.read
            ways: dict[str, Callable[[], object]] = {
                "STS_act, cosines of activities": lambda: read(asked, bare, {}),
                "NLL at step 0": lambda: read(asked, answered, {}),
                "raw and relative shift, STS_cross": lambda: read(asked, bare, {TAUGHT: behind}),
                "STS_ICL, STS_rel": lambda: read(asked, bare, {OWN: self._contexts(asked.draws, with_answers=False)}),
                "STS_net": lambda: read(asked, bare, {TAUGHT: behind, NEUTRAL: prose}),
                "STS_net, answer tokens": lambda: read(_answers_only(asked), bare, {TAUGHT: behind, NEUTRAL: prose}),
                "STS_net, more demonstrations": lambda: read(asked, bare, {TAUGHT: eight, NEUTRAL: prose}),
                "NLL change in context": lambda: read(asked, answered, {TAUGHT: whole, NEUTRAL: prose_whole}),
                "gradient alignment": lambda: read(asked, answered, {}, with_gradients=True),
            }
            for _ in range(SETTINGS["n_timings"]):
                for title, way in tqdm(ways.items(), desc="Costs", unit="score"):
                    started = time.monotonic()
                    way()
                    seconds.setdefault(title, []).append(time.monotonic() - started)
        COSTS.write_text(json.dumps(_rounded(seconds), indent=1) + "\n")

    def train(self, part: int, n_parts: int) -> None:
        """Run the fine-tunes that are not stored yet."""
        self._calibrated()
        forecasts = {line["fine_tune"]: tuple(line["features"]) for line in stored(FORECASTS)}
        if not STEP_ZERO.exists():
            STEP_ZERO.write_text(json.dumps({name: self._step_zero(name) for name in DOMAINS}) + "\n")
        for name in DOMAINS:
            self._before(name)
        runs = planned()[part::n_parts]
        for run in tqdm(runs, desc="Fine-tunes", unit="run"):
            if run.name not in {line["run"] for line in stored(RUNS)}:
                line = self._run(run, forecasts[run.fine_tune])
                with RUNS.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def mix(self, part: int, n_parts: int) -> None:
        """Run the mixtures that are not stored yet; only their end is measured."""
        self._calibrated()
        forecasts = {line["fine_tune"]: line for line in stored(FORECASTS)}
        settings = SETTINGS["training"]
        for mixture in tqdm(mixtures.planned(SETTINGS, forecasts)[part::n_parts], desc="Mixtures", unit="run"):
            if mixture.run in {line["run"] for line in stored(MIXTURES)}:
                continue
            for name in DOMAINS:
                self._before(name)
            rows = [row for name, n in mixture.rows.items() for row in self._queries(self._rows[name].training[:n])]
            line: dict[str, Any] = {"run": mixture.run, **dataclasses.asdict(mixture)}

            def on_step(step: int, line: dict[str, Any] = line) -> None:
                if step == settings["steps"]:
                    line["after"] = {name: self._after(name) for name in DOMAINS}

            rate = SETTINGS["learning_rates"][mixture.setting]
            line["loss"] = _rounded(
                tune(self._model, rows, self._bos, settings, learning_rate=rate, seed=mixture.seed, on_step=on_step)
            )
            with MIXTURES.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _run(self, run: Run, forecast: tuple[int, ...]) -> dict[str, Any]:
        started = time.monotonic()
        self._check_baselines(run.fine_tune)  # now: from the first step on the weights are others
        rows = self._queries(self._rows[run.fine_tune].training)
        line: dict[str, Any] = {"run": run.name, **dataclasses.asdict(run), "checks": [], "on_the_way": {}}
        settings = SETTINGS["training"]

        def on_step(step: int) -> None:
            if step in settings["checks"]:
                line["checks"].append(_rounded(self._check(run.fine_tune, step, forecast).to_dict()))
                if step == settings["steps"]:
                    line["after"] = {name: self._after(name) for name in DOMAINS}
                else:
                    line["on_the_way"][step] = {name: self._nll_so_far(name) for name in DOMAINS}

        rate = SETTINGS["learning_rates"][run.setting]
        line["loss"] = _rounded(tune(self._model, rows, self._bos, settings, learning_rate=rate, seed=run.seed, on_step=on_step))
        return {**line, "seconds": round(time.monotonic() - started)}

    def _check(self, fine_tune: str, step: int, forecast: tuple[int, ...]) -> DriftSnapshot:
        """The tool's own check, on the first queries of the forecast's."""
        started, zero, sets = time.monotonic(), self._check_baselines(fine_tune), self._checked_sets(fine_tune)
        with undisturbed(self._model):
            bare = self._context((), with_answers=True)
            readings = {s.name: self._gauge.read_drift(s, bare, [zero[s.name]])[0] for s in sets}
        realised, drifts = scoring.domain_drifts(sets, readings, zero, forecast, self._config.n_features)
        shared, seconds = n_shared(realised, forecast), time.monotonic() - started
        return DriftSnapshot(step, realised, shared, drifts.pop(TRAIN), drifts, seconds)

    def _checked_sets(self, fine_tune: str) -> list[ProbeSet]:
        whole = [self._taught[fine_tune], *self._asked.values()]
        return [ProbeSet(s.name, s.queries[: SETTINGS["n_checked"]], ((),), s.n_cut) for s in whole]

    @functools.cache  # noqa: B019  # one lab a process
    def _check_baselines(self, fine_tune: str) -> dict[str, SetBaseline]:
        zero = {}
        for probes in self._checked_sets(fine_tune):
            is_train = probes.name == TRAIN
            whole = self._train_reading(fine_tune) if is_train else _as_of(self._domain_reading(probes.name), fine_tune)
            key = f"checked-{f'train-{fine_tune}' if is_train else probes.name}"
            bare = self._kept(key, functools.partial(self._bare_reading, probes))
            fields = ("counted", "acts", "sketches", "n_tokens", "energy", "raw_energy")
            zero[probes.name] = dataclasses.replace(
                scoring.set_baseline(whole), **{field: getattr(bare, field) for field in fields}, nll=bare.bare_nll
            )
        return zero

    def _bare_reading(self, probes: ProbeSet) -> Reading:
        require_untuned(self._model)
        with undisturbed(self._model):
            return self._gauge.read(probes, self._context((), with_answers=True), {})[0]

    def _step_zero(self, name: str) -> dict[str, list[float]]:
        """Of the untuned model, what a run's line has of the tuned one."""
        found, _ = self._before(name)
        return _answers(found) | {"n": found.counts(), "n_late": found.counts(SETTINGS["n_first"]), **self._wrong(name)}

    def _before(self, name: str) -> tuple[measure.Losses, Reading]:
        def read() -> tuple[measure.Losses, Reading]:
            require_untuned(self._model)
            return measure.before(self._model, self._lens, self._measured(name), self._bos)

        return self._kept(f"measured-{name}", read)

    def _after(self, name: str) -> dict[str, Any]:
        zero = self._before(name)[1]
        found, drift = measure.after(self._model, self._lens, self._measured(name), self._bos, zero)
        return {
            **_answers(found),
            **self._wrong(name),
            "drift": scoring.relative_drift(drift, zero).to_dict(),
            "raw_drift": scoring.raw_drift(drift, zero),
            "unseen": float(drift.shift.unseen.sum() / drift.shift.raw.sum()),
        }

    def _nll_so_far(self, name: str) -> list[float]:
        queries = self._measured(name)[: SETTINGS["n_on_the_way"]]
        sums: list[float] = _rounded(measure.losses(self._model, self._lens, queries, self._bos).sums())
        return sums

    def _wrong(self, name: str) -> dict[str, list[float]]:
        """NLL per token of wrong options, where there are such."""
        if name not in CATEGORIES:
            return {}
        rows = self._rows[name].measured[: SETTINGS["n_wrong"]]
        queries = self._queries([{"prompt": row["prompt"], "completion": row["wrong"]} for row in rows])
        found = measure.losses(self._model, self._lens, queries, self._bos)
        return {"wrong": _rounded([total / n for total, n in zip(found.sums(), found.counts(), strict=True)])}

    @functools.cache  # noqa: B019
    def _measured(self, name: str) -> list[Query]:
        return self._queries(self._rows[name].measured)

    def _queries(self, rows: Sequence[Row]) -> list[Query]:
        """Tokens of prompts and completions, cut as in the forecast."""
        config = dataclasses.replace(self._config, n_queries=len(rows))
        whole = make_completion_set("rows", rows, self._tokenizer, config, field="rows").queries
        starts = [q.counts.index(True) for q in whole]
        return [Query(q.query[:n], q.query[n:], (True,) * n) for q, n in zip(whole, starts, strict=True)]

    def _train_reading(self, fine_tune: str) -> Reading:
        def read() -> Reading:
            with undisturbed(self._model):
                contexts = {TAUGHT: self._taught_contexts[fine_tune], NEUTRAL: [self._neutral]}
                bare = self._context((), with_answers=True)
                return self._gauge.read(self._taught[fine_tune], bare, contexts, with_gradients=True)[0]

        return self._kept(f"train-{fine_tune}", read)

    def _domain_reading(self, name: str) -> Reading:
        """Behind the demonstrations of all fine-tunes, each under its own name."""

        def read() -> Reading:
            probes = self._asked[name]
            with undisturbed(self._model):
                own = self._contexts(probes.draws, with_answers=False)
                contexts = {**self._taught_contexts, NEUTRAL: [self._neutral], OWN: own}
                bare = self._context((), with_answers=True)
                return self._gauge.read(probes, bare, contexts, with_gradients=True)[0]

        return self._kept(f"forecast-{name}", read)

    @functools.cached_property
    def _taught_contexts(self) -> dict[str, list[Context]]:
        sets = self._taught.items()
        return {name: self._contexts(probes.draws, with_answers=True) for name, probes in sets}

    @functools.cached_property
    def _neutral(self) -> Context:
        lengths = [len(draw) for probes in self._taught.values() for draw in probes.draws]
        return self._context(neutral_tokens(self._tokenizer, sum(lengths) // len(lengths)), with_answers=True)

    def _calibrated(self) -> None:
        def calibrate() -> Reference:
            with undisturbed(self._model):
                self._gauge.calibrate(list(self._asked.values()), self._context((), with_answers=True))
            return self._lens.reference

        self._lens.adopt(self._kept("reference", calibrate))

    def _context(self, tokens: Sequence[int], *, with_answers: bool) -> Context:
        return self._gauge.context((*self._bos, *tokens), with_answers=with_answers)

    def _contexts(self, draws: Sequence[Sequence[int]], *, with_answers: bool) -> list[Context]:
        return [self._context(draw, with_answers=with_answers) for draw in draws]

    def _probes(self, name: str, rows: Sequence[Row], n_demonstrations: int) -> ProbeSet:
        return make_probe_set(name, rows, self._tokenizer, self._config, n_demonstrations=n_demonstrations, field=name)

    def _kept(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, kept in the work folder."""
        file = self._work_dir / f"{name}.pt"
        if not file.exists():
            started, scratch = time.monotonic(), file.with_suffix(f".{time.time_ns()}")
            torch.save(make(), scratch)
            scratch.rename(file)  # whole or not at all
            tqdm.write(f"{name}: {time.monotonic() - started:.0f} s")
        made: T = torch.load(file, weights_only=False)
        return made


def require_untuned(model: nn.Module) -> None:
    """What is kept as step 0 must be."""
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules()), (
        "step 0 was asked for in the middle of a run"
    )


def _answers_only(probes: ProbeSet) -> ProbeSet:
    """The answers read as if they were queries, of whose tokens theirs alone count."""
    queries = [Query(q.tokens, (), (False,) * len(q.query) + (True,) * len(q.answer)) for q in probes.queries]
    return dataclasses.replace(probes, queries=tuple(queries))


def _as_of(reading: Reading, fine_tune: str) -> Reading:
    """A domain's reading as one forecast has it: of the fine-tunes only this one."""
    shifts, nll = reading.shifts, reading.nll
    return dataclasses.replace(
        reading,
        shifts={TAUGHT: shifts[fine_tune], NEUTRAL: shifts[NEUTRAL], OWN: shifts[OWN]},
        nll={BARE: nll[BARE], NEUTRAL: nll[NEUTRAL], TAUGHT: nll[fine_tune]},
    )


def _means(reading: Reading) -> dict[str, np.ndarray]:
    """By feature: activity, gradient and shifts, means over tokens."""
    sums = {"activity": reading.activity, **{name: shift.features for name, shift in reading.shifts.items()}}
    means = {key: token_mean(value, reading.n_tokens) for key, value in sums.items()}
    if reading.gradients is not None:
        means["gradient"] = reading.gradients.double().sum(dim=0) / float(reading.n_answer.sum())
    return {key: value.numpy().astype(np.float32) for key, value in means.items()}


def _answers(found: measure.Losses) -> dict[str, list[float]]:
    return {"nll": _rounded(found.sums()), "late": _rounded(found.sums(SETTINGS["n_first"]))}


def _rounded(value: Any) -> Any:
    """Floats to six digits: lines stay short."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
