"""Forecasts, rehearsals and runs of the second round; each is stored as it ends, none is made twice."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sts_callback import ProbeConfig
from sts_callback.data.probes import ProbeSet
from sts_callback.measure import scoring
from sts_callback.measure.accumulators import ProbeStats
from sts_callback.measure.step_zero import StepZeroStats
from sts_callback.metrics.scores import n_shared
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import TRAIN, DriftSnapshot
from validation import forecasts
from validation.lab import Lab, require_untuned
from validation.plan import rounded, store, stored
from validation.second.answers import Found, Questions
from validation.second.data import all_rows
from validation.second.plan import ANSWERED, FORECASTS, REHEARSALS, RUNS, SETTINGS, STEP_ZERO, rates
from validation.train import shuffled, take_steps


@dataclass(frozen=True)
class Bench:
    """The lab with all questions."""

    lab: Lab
    check: Questions
    """Of all domains: those that the tool's own checks ask, and the forecast."""
    measured: Questions
    """Others of all domains, which tell what is true."""
    taught: dict[str, Questions]
    """Some training rows of each fine-tune, as the set `train`."""
    work_dir: Path


def make_lab(data_dir: Path, work_dir: Path, *, with_answers: bool) -> Lab:
    """Load the model and all rows."""
    named = {"domains": SETTINGS["domains"], "fine_tunes": SETTINGS["fine_tunes"]}
    config = ProbeConfig(**SETTINGS["probes"], seed=SETTINGS["seed"])
    return Lab(all_rows(data_dir), work_dir, SETTINGS["sae"], config=config, with_answers=with_answers, **named)


def make_bench(lab: Lab, work_dir: Path) -> Bench:
    """Read what the model answers untuned."""
    return Bench(
        lab,
        Questions(lab, "check", {name: lab.asked[name].queries for name in lab.domains}),
        Questions(lab, "measured", {name: lab.queries(lab.rows[name].measured) for name in lab.domains}),
        {name: Questions(lab, f"taught-{name}", {TRAIN: _taught(lab, name).queries}) for name in lab.fine_tunes},
        work_dir,
    )


def work(data_dir: Path, work_dir: Path) -> None:
    """Do what is not stored and what no other process is at: forecasts of movement, rehearsals and runs, forecasts of harm."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with _alone(work_dir / "start"):
        bench = make_bench(make_lab(data_dir, work_dir, with_answers=False), work_dir)
        if not STEP_ZERO.exists():
            found = {"check": bench.check.step_zero(), "measured": bench.measured.step_zero()}
            found |= {"taught": {name: asked.step_zero()[TRAIN] for name, asked in bench.taught.items()}}
            STEP_ZERO.write_text(json.dumps(found) + "\n")
    _forecast(bench.lab, FORECASTS, work_dir)
    _fine_tune(bench)
    del bench
    (work_dir / "answered").mkdir(exist_ok=True)
    _forecast(make_lab(data_dir, work_dir / "answered", with_answers=True), ANSWERED, work_dir / "answered")


def _fine_tune(bench: Bench) -> None:
    jobs = [
        (file, fine_tune, name, make)
        for fine_tune in bench.lab.fine_tunes
        for file, kind, make in ((REHEARSALS, "rehearsals", _rehearse), (RUNS, "runs", _run))
        for name in SETTINGS[kind]
    ]
    for file, fine_tune, name, make in jobs:
        key = f"{fine_tune}/{name}"
        with _claimed(bench.work_dir / f"{file.stem} {key.replace('/', ' ')}") as ours:
            if ours and key not in {line["key"] for line in stored(file)}:
                started = time.monotonic()
                line = {"key": key, "fine_tune": fine_tune, "setting": name, **make(bench, fine_tune, name)}
                with _alone(bench.work_dir / "store"):
                    store(file, line | {"seconds": round(time.monotonic() - started)})
                _tell(f"{file.stem} {key}")


def _forecast(lab: Lab, file: Path, work_dir: Path) -> None:
    """What is expected of each fine-tune; processes share the readings."""
    if stored(file):
        return
    readings: dict[str, Callable[[], object]] = {f"train-{n}": functools.partial(lab.train_reading, n) for n in lab.fine_tunes}
    readings |= {f"domain-{n}": functools.partial(lab.domain_reading, n) for n in lab.domains}
    for name, read in readings.items():
        with _claimed(work_dir / f"reading {name}") as ours:
            if ours:
                read()
    with _alone(work_dir / "forecast"):
        if not stored(file):
            for name, read in readings.items():
                with _alone(work_dir / f"reading {name}"):
                    read()
            for line in forecasts.lines(lab, forecasts.readings(lab)):
                store(file, rounded(line))
            _tell(file.stem)


def _tell(what: str) -> None:
    """That it is stored; nothing of what it says."""
    tqdm.write(f"{time.strftime('%Y-%m-%d %H:%M')} stored: {what}")


def _rehearse(bench: Bench, fine_tune: str, name: str) -> dict[str, Any]:
    settings, lab = SETTINGS["rehearsals"][name], bench.lab
    n_steps, multiples = settings["n_steps"], settings["multiples"]
    steps = [settings["rate"] * multiple for multiple in multiples for _ in range(n_steps)]
    doses = []

    def on_step(step: int) -> None:
        if step % n_steps == 0:
            check, taught = bench.check.now(with_divergence=True), bench.taught[fine_tune].now(with_divergence=True)
            dose = {"multiple": multiples[step // n_steps - 1], "step": step, "check": check, "taught": taught[TRAIN]}
            doses.append(dose | {"snapshot": _snapshot(bench, fine_tune, step, check | taught)})

    _baselines(lab, fine_tune)  # now: from the first step on the weights are others
    losses = _tuned(lab, fine_tune, steps, settings["rows_seed"], on_step)
    return {"doses": doses, "loss": losses}


def _run(bench: Bench, fine_tune: str, name: str) -> dict[str, Any]:
    settings, lab = SETTINGS["runs"][name], bench.lab
    looks: list[dict[str, Any]] = []
    end: dict[str, Any] = {}

    def on_step(step: int) -> None:
        if step not in settings["looks"]:
            return
        is_end = step == settings["looks"][-1]
        check, taught = bench.check.now(), bench.taught[fine_tune].now(with_divergence=True)
        looks.append({"step": step, "check": check, "taught": taught[TRAIN]})
        if step in settings["measured"]:
            looks[-1]["measured"] = bench.measured.now(most=None if is_end else SETTINGS["n_on_the_way"])
        if is_end:
            end["snapshot"] = _snapshot(bench, fine_tune, step, check | taught)

    _baselines(lab, fine_tune)
    losses = _tuned(lab, fine_tune, rates(settings), settings["rows_seed"], on_step)
    return {"looks": looks, **end, "loss": losses}


def _tuned(lab: Lab, fine_tune: str, steps: list[float], rows_seed: int, on_step: Callable[[int], None]) -> list[float]:
    rows, size = lab.queries(lab.rows[fine_tune].training), SETTINGS["n_rows"]
    order = shuffled(len(rows), len(steps) * size, random.Random(rows_seed))
    batches = [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    seed, lora = SETTINGS["adapter_seed"], SETTINGS["lora"]
    losses: list[float] = rounded(take_steps(lab.model, batches, steps, lab.bos, lora, seed=seed, on_step=on_step))
    return losses


def _taught(lab: Lab, fine_tune: str) -> ProbeSet:
    whole = lab.taught[fine_tune]
    return ProbeSet(TRAIN, whole.queries[: SETTINGS["n_taught"]], ((),), 0)


def _snapshot(bench: Bench, fine_tune: str, step: int, answers: Found) -> dict[str, Any]:
    """The tool's own check on the same questions; the answers are not read again for it."""
    started, lab, zero = time.monotonic(), bench.lab, _baselines(bench.lab, fine_tune)
    (forecast,) = (tuple(line["features"]) for line in stored(FORECASTS) if line["fine_tune"] == fine_tune)
    then = bench.check.step_zero() | bench.taught[fine_tune].step_zero()
    zero = {name: dataclasses.replace(stats, nll=torch.tensor(then[name]["nll"])) for name, stats in zero.items()}
    sets = [_taught(lab, fine_tune), *(_bare(lab, name) for name in lab.domains)]
    with undisturbed(lab.model):
        zero_shot = lab.context((), with_answers=False)
        drifts = {s.name: lab.runner.read_drift(s, zero_shot, [zero[s.name]])[0] for s in sets}
    readings = {name: dataclasses.replace(found, nll=torch.tensor(answers[name]["nll"])) for name, found in drifts.items()}
    realised, scored = scoring.domain_drifts(sets, readings, zero, forecast, lab.config.n_features)
    shared, seconds = n_shared(realised, forecast), time.monotonic() - started
    snapshot: dict[str, Any] = rounded(DriftSnapshot(step, realised, shared, scored.pop(TRAIN), scored, seconds).to_dict())
    return snapshot


def _bare(lab: Lab, name: str) -> ProbeSet:
    return ProbeSet(name, lab.asked[name].queries, ((),), 0)


@functools.cache
def _baselines(lab: Lab, fine_tune: str) -> dict[str, StepZeroStats]:
    """What the tool's own check compares with, but for the answers."""
    found = {}
    for probes in (_taught(lab, fine_tune), *(_bare(lab, name) for name in lab.domains)):
        is_train = probes.name == TRAIN
        whole = lab.train_reading(fine_tune) if is_train else forecasts.as_of(lab.domain_reading(probes.name), fine_tune)
        bare = lab.kept(f"bare-{fine_tune if is_train else probes.name}", functools.partial(_read_bare, lab, probes))
        fields = ("counted", "acts", "sketches", "n_tokens", "sq_norm", "raw_sq_norm")
        found[probes.name] = dataclasses.replace(scoring.step_zero_stats(whole), **{f: getattr(bare, f) for f in fields})
    return found


def _read_bare(lab: Lab, probes: ProbeSet) -> ProbeStats:
    require_untuned(lab.model)
    with undisturbed(lab.model):
        return lab.runner.read(probes, lab.context((), with_answers=False), {})[0]


@contextlib.contextmanager
def _claimed(file: Path) -> Iterator[bool]:
    """Whether nobody else has a claim; it ends with the process."""
    with file.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until nobody else has a claim."""
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
