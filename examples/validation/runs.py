"""The fine-tunes: what each did to every domain, at checks on the way and at the end."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from sts_callback.data.probes import ProbeSet, Query
from sts_callback.measure import scoring
from sts_callback.measure.accumulators import ZERO_SHOT, ProbeStats
from sts_callback.measure.step_zero import StepZeroStats
from sts_callback.metrics.scores import n_shared
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import TRAIN, DriftSnapshot
from validation import measure, mixtures
from validation.data import CATEGORIES, DOMAINS
from validation.forecasts import as_of
from validation.lab import Lab, require_untuned
from validation.plan import FORECASTS, MIXTURES, RUNS, SETTINGS, STEP_ZERO, Run, planned, rounded, store, stored
from validation.train import tune


def train(lab: Lab, part: int, n_parts: int) -> None:
    """Run the fine-tunes that are not stored yet."""
    forecasts = {line["fine_tune"]: tuple(line["features"]) for line in stored(FORECASTS)}
    if not STEP_ZERO.exists():
        STEP_ZERO.write_text(json.dumps({name: _step_zero(lab, name) for name in DOMAINS}) + "\n")
    for name in DOMAINS:
        _before(lab, name)
    runs = planned()[part::n_parts]
    for run in tqdm(runs, desc="Fine-tunes", unit="run"):
        if run.name not in {line["run"] for line in stored(RUNS)}:
            line = _run(lab, run, forecasts[run.fine_tune])
            store(RUNS, line)


def mix(lab: Lab, part: int, n_parts: int) -> None:
    """Run the mixtures that are not stored yet; only their end is measured."""
    forecasts = {line["fine_tune"]: line for line in stored(FORECASTS)}
    settings = SETTINGS["training"]
    for mixture in tqdm(mixtures.planned(SETTINGS, forecasts)[part::n_parts], desc="Mixtures", unit="run"):
        if mixture.run in {line["run"] for line in stored(MIXTURES)}:
            continue
        for name in DOMAINS:
            _before(lab, name)
        rows = [row for name, n in mixture.rows.items() for row in lab.queries(lab.rows[name].training[:n])]
        line: dict[str, Any] = {"run": mixture.run, **dataclasses.asdict(mixture)}

        def on_step(step: int, line: dict[str, Any] = line) -> None:
            if step == settings["steps"]:
                line["after"] = {name: _after(lab, name) for name in DOMAINS}

        line["loss"] = rounded(tuned(lab, rows, mixture.setting, mixture.seed, on_step))
        store(MIXTURES, line)


def tuned(lab: Lab, rows: Sequence[Query], setting: str, seed: int, on_step: Callable[[int], None]) -> list[float]:
    """Fine-tune as the settings have it; see `train.tune`."""
    rate = SETTINGS["learning_rates"][setting]
    return tune(lab.model, rows, lab.bos, SETTINGS["training"], learning_rate=rate, seed=seed, on_step=on_step)


def _run(lab: Lab, run: Run, forecast: tuple[int, ...]) -> dict[str, Any]:
    started = time.monotonic()
    _check_baselines(lab, run.fine_tune)  # now: from the first step on the weights are others
    rows = lab.queries(lab.rows[run.fine_tune].training)
    line: dict[str, Any] = {"run": run.name, **dataclasses.asdict(run), "checks": [], "on_the_way": {}}
    settings = SETTINGS["training"]

    def on_step(step: int) -> None:
        if step in settings["checks"]:
            line["checks"].append(rounded(_check(lab, run.fine_tune, step, forecast).to_dict()))
            if step == settings["steps"]:
                line["after"] = {name: _after(lab, name) for name in DOMAINS}
            else:
                line["on_the_way"][step] = {name: _nll_so_far(lab, name) for name in DOMAINS}

    line["loss"] = rounded(tuned(lab, rows, run.setting, run.seed, on_step))
    return {**line, "seconds": round(time.monotonic() - started)}


def _check(lab: Lab, fine_tune: str, step: int, forecast: tuple[int, ...]) -> DriftSnapshot:
    """The tool's own check, on the first queries of the forecast's."""
    started, zero, sets = time.monotonic(), _check_baselines(lab, fine_tune), _checked_sets(lab, fine_tune)
    with undisturbed(lab.model):
        zero_shot = lab.zero_shot()
        readings = {s.name: lab.runner.read_drift(s, zero_shot, [zero[s.name]])[0] for s in sets}
    realised, drifts = scoring.domain_drifts(sets, readings, zero, forecast, lab.config.n_features)
    shared, seconds = n_shared(realised, forecast), time.monotonic() - started
    return DriftSnapshot(step, realised, shared, drifts.pop(TRAIN), drifts, seconds)


def _checked_sets(lab: Lab, fine_tune: str) -> list[ProbeSet]:
    whole = [lab.taught[fine_tune], *lab.asked.values()]
    return [ProbeSet(s.name, s.queries[: SETTINGS["n_checked"]], ((),), s.n_cut) for s in whole]


@functools.cache
def _check_baselines(lab: Lab, fine_tune: str) -> dict[str, StepZeroStats]:
    zero = {}
    for probes in _checked_sets(lab, fine_tune):
        is_train = probes.name == TRAIN
        whole = lab.train_reading(fine_tune) if is_train else as_of(lab.domain_reading(probes.name), fine_tune)
        key = f"checked-{f'train-{fine_tune}' if is_train else probes.name}"
        zero_shot = lab.bare_reading(key, probes)
        fields = ("counted", "acts", "sketches", "n_tokens", "energy", "raw_energy")
        zero[probes.name] = dataclasses.replace(
            scoring.step_zero_stats(whole),
            **{field: getattr(zero_shot, field) for field in fields},
            nll=zero_shot.zero_shot_nll,
            right=zero_shot.right[ZERO_SHOT],
        )
    return zero


def _step_zero(lab: Lab, name: str) -> dict[str, list[float]]:
    """Of the untuned model, what a run's line has of the tuned one."""
    found, _ = _before(lab, name)
    return _answers(found) | {"n": found.counts(), "n_late": found.counts(SETTINGS["n_first"]), **_wrong(lab, name)}


def _before(lab: Lab, name: str) -> tuple[measure.Losses, ProbeStats]:
    def read() -> tuple[measure.Losses, ProbeStats]:
        require_untuned(lab.model)
        return measure.before(lab.model, lab.sae_reader, _measured(lab, name), lab.bos)

    return lab.kept(f"measured-{name}", read)


def _after(lab: Lab, name: str) -> dict[str, Any]:
    zero = _before(lab, name)[1]
    found, drift = measure.after(lab.model, lab.sae_reader, _measured(lab, name), lab.bos, zero)
    return {
        **_answers(found),
        **_wrong(lab, name),
        "drift": scoring.relative_drift(drift, zero).to_dict(),
        "raw_drift": scoring.raw_drift(drift, zero),
        "unseen": float(drift.shift.sae_error.sum() / drift.shift.raw.sum()),
    }


def _nll_so_far(lab: Lab, name: str) -> list[float]:
    queries = _measured(lab, name)[: SETTINGS["n_on_the_way"]]
    sums: list[float] = rounded(measure.losses(lab.model, lab.sae_reader, queries, lab.bos).sums())
    return sums


def _wrong(lab: Lab, name: str) -> dict[str, list[float]]:
    """NLL per token of wrong options, where there are such."""
    if name not in CATEGORIES:
        return {}
    rows = lab.rows[name].measured[: SETTINGS["n_wrong"]]
    queries = lab.queries([{"prompt": row["prompt"], "completion": row["wrong"]} for row in rows])
    found = measure.losses(lab.model, lab.sae_reader, queries, lab.bos)
    return {"wrong": rounded([total / n for total, n in zip(found.sums(), found.counts(), strict=True)])}


@functools.cache
def _measured(lab: Lab, name: str) -> list[Query]:
    return lab.queries(lab.rows[name].measured)


def _answers(found: measure.Losses) -> dict[str, list[float]]:
    return {"nll": rounded(found.sums()), "late": rounded(found.sums(SETTINGS["n_first"]))}
