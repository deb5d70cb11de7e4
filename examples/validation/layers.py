"""The ablation over the layer: what the SAE of another one expects, and how far its features move in the same fine-tunes."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from sts_callback.data.probes import ProbeSet
from sts_callback.measure import scoring
from sts_callback.measure.accumulators import ProbeStats
from sts_callback.metrics.scores import n_shared
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import TRAIN
from validation import forecasts
from validation.data import DOMAINS
from validation.lab import Lab
from validation.plan import LAYER_FORECASTS, LAYER_RUNS, SETTINGS, Run, planned, rounded, store, stored
from validation.runs import tuned


def ablate(lab: Lab, part: int, n_parts: int) -> None:
    """Make the forecasts, then the fine-tunes of the first seeds again, harsh ones first; what is stored is not made again."""
    if not stored(LAYER_FORECASTS):
        for line in forecasts.lines(lab, forecasts.readings(lab)):
            store(LAYER_FORECASTS, line)
    features = {line["fine_tune"]: tuple(line["features"]) for line in stored(LAYER_FORECASTS)}
    runs = sorted((run for run in planned() if run.seed == 0), key=lambda run: run.setting != "harsh")
    for run in tqdm(runs[part::n_parts], desc="Fine-tunes", unit="run"):
        if run.name not in {line["run"] for line in stored(LAYER_RUNS)}:
            store(LAYER_RUNS, rounded(_run(lab, run, features[run.fine_tune])))


def _run(lab: Lab, run: Run, forecast: tuple[int, ...]) -> dict[str, Any]:
    sets = _sets(lab, run.fine_tune)  # now: from the first step on the weights are others
    line: dict[str, Any] = {"run": run.name}

    def on_step(step: int) -> None:
        if step < SETTINGS["training"]["steps"]:
            return
        with undisturbed(lab.model):
            zero_shot = lab.zero_shot()
            drifts = {probes.name: lab.runner.read_drift(probes, zero_shot, [zero])[0] for probes, zero in sets}
        zeros = {probes.name: zero for probes, zero in sets}
        line["n_shared"] = n_shared(scoring.realised_features(drifts[TRAIN], lab.config.n_features), forecast)
        line["after"] = {name: {"drift": scoring.relative_drift(drifts[name], zeros[name]).to_dict()} for name in DOMAINS}

    rows = lab.queries(lab.rows[run.fine_tune].training)
    line["loss"] = tuned(lab, rows, run.setting, run.seed, on_step)
    return line


def _sets(lab: Lab, fine_tune: str) -> list[tuple[ProbeSet, ProbeStats]]:
    """The fine-tune's own queries and those that are measured of each domain, with what the untuned model makes of them."""
    queries = {f"checked-train-{fine_tune}": (TRAIN, lab.taught[fine_tune].queries)}
    queries |= {f"measured-{name}": (name, tuple(lab.queries(lab.rows[name].measured))) for name in DOMAINS}
    sets = {key: ProbeSet(name, some, ((),), 0) for key, (name, some) in queries.items()}
    return [(probes, lab.bare_reading(key, probes)) for key, probes in sets.items()]
