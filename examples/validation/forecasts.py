"""What is expected of each fine-tune, other forms of the score, and what scores cost: all before any training."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from sts_callback.data.probes import ProbeSet, Query, filler_tokens
from sts_callback.measure.accumulators import ZERO_SHOT, ProbeStats
from sts_callback.measure.scoring import DOMAIN_ICL, FILLER, TRAIN_ICL, ForecastScorer
from sts_callback.metrics.sums import token_mean
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import TRAIN
from validation.data import DOMAINS
from validation.lab import Lab
from validation.plan import CANDIDATES, COSTS, FORECASTS, SETTINGS, SUMS, rounded, store, stored


def forecast(lab: Lab) -> None:
    """Write what is expected of each fine-tune."""
    found = readings(lab)
    FORECASTS.write_text("".join(json.dumps(line) + "\n" for line in lines(lab, found)))
    means = {f"{name}/{key}": value for name, reading in found.items() for key, value in _means(reading).items()}
    np.savez_compressed(SUMS, **means)


def readings(lab: Lab) -> dict[str, ProbeStats]:
    """Of the training data, `train/` before their names, and of all domains."""
    taught = {f"train/{name}": lab.train_reading(name) for name in lab.fine_tunes}
    return taught | {name: lab.domain_reading(name) for name in lab.domains}


def lines(lab: Lab, readings: Mapping[str, ProbeStats]) -> list[dict[str, Any]]:
    """What is expected of each fine-tune, by this lab's SAE."""
    found = []
    for fine_tune in lab.fine_tunes:
        train = readings[f"train/{fine_tune}"]
        scorer = ForecastScorer(train, lab.config.n_features)
        own = scorer.domain(lab.taught[fine_tune], train)
        domains = {name: scorer.domain(lab.asked[name], as_of(readings[name], fine_tune)) for name in lab.domains}
        line = {"fine_tune": fine_tune, "features": scorer.features, "train": own.to_dict()}
        found.append(line | {"domains": {name: one.to_dict() for name, one in scorer.ranked(domains).items()}})
    return found


def candidates(lab: Lab) -> None:
    """Two more forms of STS_net, for the development half: by answer tokens, and behind more demonstrations."""
    features = {line["fine_tune"]: list(line["features"]) for line in stored(FORECASTS)}
    fine_tunes = SETTINGS["fine_tunes"]["development"]
    many = {name: lab.probes(TRAIN, lab.rows[name].training, SETTINGS["n_many_demonstrations"]).demo_sets for name in fine_tunes}
    few = {name: lab.taught[name].demo_sets for name in fine_tunes}
    for kind, draws, read in (("answer tokens", few, _answers_only), ("more demonstrations", many, lambda probes: probes)):
        with undisturbed(lab.model):
            contexts = {n: lab.contexts(some, with_answers=False) for n, some in draws.items()}
            lengths = [len(draw) for some in draws.values() for draw in some]
            prose = filler_tokens(lab.tokenizer, sum(lengths) // len(lengths))
            contexts[FILLER] = [lab.context(prose, with_answers=False)]
            zero_shot = lab.context((), with_answers=False)
            for domain in tqdm(DOMAINS, desc=kind, unit="domain"):
                reading = lab.runner.read(read(lab.asked[domain]), zero_shot, contexts)[0]
                sums = {name: shift.features.double().sum(dim=0) for name, shift in reading.shifts.items()}
                for name in fine_tunes:
                    taught, neutral = (float(sums[key][features[name]].sum()) for key in (name, FILLER))
                    net = (taught - neutral) / float(sums[name].sum())
                    line = {"kind": kind, "fine_tune": name, "domain": domain, "net": net}
                    store(CANDIDATES, rounded(line))


def costs(lab: Lab) -> None:
    """Time what each score needs of one domain; contexts that all domains share are read before."""
    fine_tune, asked = lab.fine_tunes[0], lab.asked[DOMAINS[0]]
    taught = lab.taught[fine_tune]
    many = lab.probes(TRAIN, lab.rows[fine_tune].training, SETTINGS["n_many_demonstrations"])
    seconds: dict[str, list[float]] = {}
    with undisturbed(lab.model):
        zero_shot, answered = (lab.context((), with_answers=answers) for answers in (False, True))
        behind, eight = (lab.contexts(draws, with_answers=False) for draws in (taught.demo_sets, many.demo_sets))
        whole = lab.contexts(taught.demo_sets, with_answers=True)
        text = filler_tokens(lab.tokenizer, len(taught.demo_sets[0]))
        prose, prose_whole = ([lab.context(text, with_answers=answers)] for answers in (False, True))
        read = lab.runner.read
        ways: dict[str, Callable[[], object]] = {
            "STS_act, cosines of activities": lambda: read(asked, zero_shot, {}),
            "NLL at step 0": lambda: read(asked, answered, {}),
            "raw and relative shift, STS_cross": lambda: read(asked, zero_shot, {TRAIN_ICL: behind}),
            "STS_ICL, STS_rel": lambda: read(asked, zero_shot, {DOMAIN_ICL: lab.contexts(asked.demo_sets, with_answers=False)}),
            "STS_net": lambda: read(asked, zero_shot, {TRAIN_ICL: behind, FILLER: prose}),
            "STS_net, answer tokens": lambda: read(_answers_only(asked), zero_shot, {TRAIN_ICL: behind, FILLER: prose}),
            "STS_net, more demonstrations": lambda: read(asked, zero_shot, {TRAIN_ICL: eight, FILLER: prose}),
            "NLL change in context": lambda: read(asked, answered, {TRAIN_ICL: whole, FILLER: prose_whole}),
            "gradient alignment": lambda: read(asked, answered, {}, with_gradients=True),
        }
        for _ in range(SETTINGS["n_timings"]):
            for title, way in tqdm(ways.items(), desc="Costs", unit="score"):
                started = time.monotonic()
                way()
                seconds.setdefault(title, []).append(time.monotonic() - started)
    COSTS.write_text(json.dumps(rounded(seconds), indent=1) + "\n")


def _answers_only(probes: ProbeSet) -> ProbeSet:
    """The answers read as if they were queries, of whose tokens theirs alone count."""
    queries = [Query(q.tokens, (), (False,) * len(q.query) + (True,) * len(q.answer)) for q in probes.queries]
    return dataclasses.replace(probes, queries=tuple(queries))


def as_of(reading: ProbeStats, fine_tune: str) -> ProbeStats:
    """A domain's reading as one forecast has it: of the fine-tunes only this one."""
    shifts, nll, right = reading.shifts, reading.nll, reading.right
    return dataclasses.replace(
        reading,
        shifts={TRAIN_ICL: shifts[fine_tune], FILLER: shifts[FILLER], DOMAIN_ICL: shifts[DOMAIN_ICL]},
        nll={ZERO_SHOT: nll[ZERO_SHOT], FILLER: nll[FILLER], TRAIN_ICL: nll[fine_tune]} if nll else {},
        right={ZERO_SHOT: right[ZERO_SHOT], FILLER: right[FILLER], TRAIN_ICL: right[fine_tune]} if right else {},
    )


def _means(reading: ProbeStats) -> dict[str, np.ndarray]:
    """By feature: activity, gradient and shifts, means over tokens."""
    sums = {"activity": reading.activity, **{name: shift.features for name, shift in reading.shifts.items()}}
    means = {key: token_mean(value, reading.n_tokens) for key, value in sums.items()}
    if reading.gradients is not None:
        means["gradient"] = reading.gradients.double().sum(dim=0) / float(reading.n_answer.sum())
    return {key: value.numpy().astype(np.float32) for key, value in means.items()}
