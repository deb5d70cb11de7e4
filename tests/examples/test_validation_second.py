"""The second round of the validation: rows, answers, steps and rates, and the arithmetic of its tables, on made-up lines."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from samples import domain_drift, snapshot
from sts_callback.data.probes import Query
from sts_callback.metrics.calibration import Calibration
from sts_callback.policy import EXPECTED_OVER
from tiny import VOCAB, tiny_model
from validation.plan import stored
from validation.second import data, pages, plan, tables
from validation.second.answers import Questions
from validation.second.outcomes import DOMAINS, Happened, Rehearsed
from validation.second.plan import SETTINGS, rates
from validation.second.tables import Told
from validation.train import take_steps

BOS = (1,)
ONE, TWO = Calibration(0.0, 1.0, 0.0, 0.0, 0.5, 8), Calibration(0.0, 1.0, 0.25, 0.0, 0.5, 8)
N_TOKENS = 10
ZERO = {
    kind: {name: {"nll": [20.0] * n, "right": [5] * n, "n": [N_TOKENS] * n} for name in names}
    for kind, n, names in (("check", 28, DOMAINS), ("measured", 48, DOMAINS), ("taught", 16, SETTINGS["fine_tunes"]))
}


def answers(n: int, change: float, right: int = 5) -> dict[str, list[float]]:
    """Of `n` questions, that have changed by so many nats a token on average."""
    noise = 0.02 * N_TOKENS * np.where(np.arange(n) % 2, 1.0, -1.0)
    nll = (20.0 + change * N_TOKENS + noise).tolist()
    return {"nll": nll, "right": [right] * n, "lost": [0] * n, "kl": [0.01 * N_TOKENS] * n}


def everywhere(n: int, change: float, **others: float) -> dict[str, dict[str, list[float]]]:
    return {name: answers(n, others.get(name, change)) for name in DOMAINS}


def moved(step: int, **drifts: float) -> dict[str, Any]:
    domains = [domain_drift(name, relative_drift=drifts.get(name, 0.01)) for name in DOMAINS]
    return json.loads(json.dumps(snapshot(step, *domains).to_dict()))


def rehearsal(key: str, own: dict[str, Any], multiple: dict[str, Any] | None = None) -> dict[str, Any]:
    fine_tune, name = key.split("/")
    doses = [
        {"multiple": m, "step": 5, "check": check, "taught": answers(16, 0.0), "snapshot": moved(5, law=0.2)}
        for m, check in ((1, own), (10, multiple))
        if check is not None
    ]
    return {"key": key, "fine_tune": fine_tune, "setting": name, "doses": doses}


def run(key: str, course: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """By step what checks and measured questions say alike: change by domain."""
    fine_tune, name = key.split("/")
    last = max(course)
    looks = [
        {
            "step": step,
            "check": everywhere(28, 0.0, **change),
            "measured": everywhere(48 if step == last else 16, 0.0, **change),
            "taught": answers(16, 0.0),
        }
        for step, change in course.items()
    ]
    return {"key": key, "fine_tune": fine_tune, "setting": name, "looks": looks, "snapshot": moved(last, law=0.3)}


COURSE = {
    5: {"law": 0.04},
    10: {"law": 0.08, "web": 0.03},
    20: {"law": 0.16, "web": 0.09},
    40: {"law": 0.3, "web": 0.12, "math": -0.1},
}
KEY = "agreeableness/harsh"


def known(own: dict[str, float] | None = None) -> Told:
    rehearsed = Rehearsed.of(rehearsal(KEY, everywhere(28, 0.0, **(own or {"law": 0.15, "web": 0.07}))), ZERO, ONE, TWO)
    scores = {"NLL at step 0": np.arange(12.0), "STS_net": np.arange(12.0)}
    return Told(Happened.of(run(KEY, COURSE), ZERO), rehearsed, scores)


def at(name: str) -> int:
    return DOMAINS.index(name)


def test_rows_of_a_fine_tune_are_pairs_that_come_once(tmp_path: Path) -> None:
    fine_tune = SETTINGS["fine_tunes"][0]
    rows = [{"task": t, "prompt": "Say it.", "completion": f"{t} {i % 5}"} for i in range(10) for t in (fine_tune, "another")]
    for name, some in (("statements", rows), ("exams", [])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in some)
    found = data._training(tmp_path, fine_tune)
    assert sorted(row["completion"] for row in found) == [f" {fine_tune} {i}" for i in range(5)]
    assert {row["prompt"] for row in found} == {"User: Say it.\nAssistant:"}
    assert data._training(tmp_path, fine_tune) == found


def test_rates_rise_then_stay_or_fall_to_nothing() -> None:
    harsh, long = (rates(SETTINGS["runs"][name]) for name in ("harsh", "long"))
    assert len(harsh) == 40 and harsh[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3]) and set(harsh[4:]) == {1e-3}
    assert len(long) == 300 and max(long) == 1e-4 == long[29] and long[0] == pytest.approx(1e-4 / 30) and long[-1] < 1e-8
    assert sum(long) == pytest.approx(150e-4, rel=0.01)


def questions(n: int) -> list[Query]:
    draw = np.random.default_rng(n)
    pairs = [
        [tuple(draw.integers(3, VOCAB, size).tolist()) for size in (draw.integers(3, 9), draw.integers(1, 6))] for _ in range(n)
    ]
    return [Query(query, answer, (True,) * len(query)) for query, answer in pairs]


def test_answers_are_those_of_a_plain_forward_and_untouched_weights_change_none(tmp_path: Path) -> None:
    model, sets = tiny_model("gemma3"), {"law": questions(7), "web": questions(5)}
    lab: Any = SimpleNamespace(model=model, bos=BOS, kept=lambda name, make: make())
    asked = Questions(lab, "some", sets)
    then, now = asked.step_zero(), asked.now(with_divergence=True)
    for name, queries in sets.items():
        assert now[name]["nll"] == then[name]["nll"] and now[name]["right"] == then[name]["right"]
        assert now[name]["lost"] == [0] * len(queries) and now[name]["kl"] == pytest.approx([0.0] * len(queries), abs=1e-6)
        for query, nll, right, n in zip(queries, then[name]["nll"], then[name]["right"], then[name]["n"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*BOS, *query.tokens]])).logits[0, len(BOS) + len(query.query) - 1 : -1]
            targets = torch.tensor(query.answer)
            assert nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")), rel=1e-4)
            assert (right, n) == (int((logits.argmax(1) == targets).sum()), len(targets))
    first = asked.now(most=3)
    assert {name: found["nll"] for name, found in first.items()} == {name: then[name]["nll"][:3] for name in sets}


def test_training_changes_answers_and_lost_tokens_are_those_that_were_right() -> None:
    model, sets = tiny_model("gemma3"), {"law": questions(7)}
    lab: Any = SimpleNamespace(model=model, bos=BOS, kept=lambda name, make: make())
    asked = Questions(lab, "some", sets)
    found: list[Any] = []
    rows, lora = questions(4), {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}

    def on_step(step: int) -> None:
        if step == 10:
            found.append(asked.now(with_divergence=True)["law"])

    losses = take_steps(model, [rows] * 10, [3e-2] * 10, BOS, lora, seed=0, on_step=on_step)
    then = asked.step_zero()["law"]
    assert losses[-1] < losses[0]
    assert found[0]["nll"] != then["nll"] and all(kl > 0 for kl in found[0]["kl"])
    for lost, right, was in zip(found[0]["lost"], found[0]["right"], then["right"], strict=True):
        assert max(0, was - right) <= lost <= was
    assert asked.now()["law"]["nll"] == then["nll"]


def test_harm_crossing_and_alarms_of_a_run() -> None:
    happened = known().run
    assert [DOMAINS[i] for i in np.flatnonzero(happened.harmed)] == ["law", "web"]
    assert happened.change[at("law")] == pytest.approx(0.3) and happened.change[at("math")] == pytest.approx(-0.1)
    assert happened.crossing[at("law")] == pytest.approx(12.5)
    assert happened.crossing[at("web")] == pytest.approx(20 + 20 / 3)
    assert math.isnan(happened.crossing[at("math")])
    assert happened.alarmed[at("law")] == 10 and happened.alarmed[at("web")] == 20 and math.isnan(happened.alarmed[at("math")])
    assert happened.clear[at("math")] and not happened.clear[at("code")]


def test_what_is_measured_only_later_crosses_from_nothing() -> None:
    line = run(KEY, COURSE)
    for look in line["looks"][:2]:
        del look["measured"]
    assert Happened.of(line, ZERO).crossing[at("law")] == pytest.approx(20 * 0.1 / 0.16)


def test_a_rehearsal_tells_over_from_on_course() -> None:
    said = known().rehearsed
    assert [DOMAINS[i] for i in np.flatnonzero(said.own.over)] == ["law"]
    assert [DOMAINS[i] for i in np.flatnonzero(said.own.passed)] == ["law", "web"]
    assert said.divergence == pytest.approx(np.full(12, 0.01)) and said.divergence_taught == pytest.approx(0.01)


def test_two_doses_are_calibrated_as_two() -> None:
    line = rehearsal("agreeableness/long", everywhere(28, 0.02), everywhere(28, 0.4))
    assert Rehearsed.of(line, ZERO, ONE, TWO).expected == pytest.approx(np.full(12, 0.12))
    assert known().rehearsed.expected[at("law")] == pytest.approx(0.15)
    assert np.isnan(known().rehearsed.at_multiple).all()


def test_leads_count_from_the_first_alarm_and_nothing_is_no_lead() -> None:
    assert tables.lead_in_training(known()).tolist() == pytest.approx([2.5, 20 / 3])
    assert tables.relative_lead(known()).tolist() == pytest.approx([1.0, 0.25])
    silent = known({"law": 0.0})
    silent.run.looks.clear()
    assert tables.relative_lead(silent).tolist() == [0.0, 0.0]


def test_counts_of_named_domains() -> None:
    assert tables.named([known()], lambda told: told.rehearsed.own.over) == ("1 of 2 (50.0%)", "0 of 10 (0.0%)")
    assert tables.named([known()] * 2, lambda told: told.rehearsed.own.passed) == ("4 of 4 (100.0%)", "0 of 20 (0.0%)")
    false = known({"code": 0.2})
    assert tables.named([false], lambda told: told.rehearsed.own.over) == ("0 of 2 (0.0%)", "1 of 10 (10.0%)")
    false.run.looks[1] = false.rehearsed.own
    rows = tables.in_training({"all": [false]})
    assert rows[1][:4] == ["all", "2 of 2 (100.0%)", "1 of 10 (10.0%)", "1"]


def test_harm_by_loss_alone_is_told() -> None:
    line = run(KEY, COURSE)
    line["looks"][-1]["measured"]["law"]["right"] = [4] * 48
    told = Told(Happened.of(line, ZERO), known().rehearsed, {})
    assert tables.by_loss_alone([told]) == "1 of 2 (50.0%)"


@pytest.fixture
def stored_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two whole fine-tunes and half of a third."""
    lines: dict[str, list[Any]] = {"REHEARSALS": [], "RUNS": [], "FORECASTS": [], "ANSWERED": []}
    draw = np.random.default_rng(0)
    for i, fine_tune in enumerate(SETTINGS["fine_tunes"][:3]):
        net = {name: {"sts_net": {"value": float(draw.normal())}} for name in DOMAINS}
        lines["FORECASTS"].append({"fine_tune": fine_tune, "domains": net})
        for name in ("harsh", "long") if i < 2 else ("harsh",):
            key, ends = f"{fine_tune}/{name}", dict(zip(DOMAINS, draw.normal(0.05, 0.1, 12), strict=True))
            own = everywhere(28, 0.0, **{d: 0.7 * v for d, v in ends.items()})
            lines["REHEARSALS"].append(rehearsal(key, own, own if name == "long" else None))
            steps = SETTINGS["runs"][name]["looks"]
            lines["RUNS"].append(run(key, {s: {d: v * s / steps[-1] for d, v in ends.items()} for s in steps}))
    for file, some in lines.items():
        where = tmp_path / f"{file}.jsonl"
        where.write_text("".join(json.dumps(line) + "\n" for line in some))
        monkeypatch.setattr(pages, file, where)
    (tmp_path / "zero.json").write_text(json.dumps(ZERO))
    monkeypatch.setattr(pages, "STEP_ZERO", tmp_path / "zero.json")
    monkeypatch.setattr(pages, "HERE", tmp_path)
    return tmp_path


def test_nothing_of_an_outcome_is_told_before_it_is_opened(stored_lines: Path) -> None:
    pages.write_report(opened=False)
    text = (stored_lines / "RESULTS.md").read_text()
    assert "from 2 of 5 fine-tunes that are in whole" in " ".join(text.split()) and "have not been opened" in " ".join(
        text.split()
    )
    assert "|" not in text and not any(name in text for name in DOMAINS)


def test_the_report_of_made_up_runs(stored_lines: Path) -> None:
    pages.write_report(opened=True)
    text = (stored_lines / "RESULTS.md").read_text()
    targets = dict(
        line.split(" | ", 1) for line in text.split("## Targets")[1].split("##")[0].splitlines() if line.startswith("| ")
    )
    assert "| 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00]" in targets["| expected change, Spearman with the change"]
    assert targets["| sign of clear changes"].count("(100%)") == 3
    assert SETTINGS["fine_tunes"][2] not in text and "nan" not in text
    for title in ("Harm in order", "Signs of clear changes", "Movement in order", "The calibration", "long runs, check by check"):
        assert title in text, title


def test_the_protocol_was_written_for_these_settings() -> None:
    text = (plan.HERE / "PROTOCOL.md").read_text()
    assert all(f"`{name}`" in text for name in SETTINGS["fine_tunes"])
    assert ", ".join(DOMAINS[:11]) in " ".join(text.split())
    assert all(line["fine_tune"] in SETTINGS["fine_tunes"] for line in stored(plan.RUNS))


def long_run(fine_tune: str, expected: dict[str, float], change: dict[str, float]) -> Told:
    key = f"{fine_tune}/long"
    rehearsed = Rehearsed.of(rehearsal(key, everywhere(28, 0.0, **expected), everywhere(28, 0.0)), ZERO, ONE, ONE)
    return Told(Happened.of(run(key, {300: change}), ZERO), rehearsed, {})


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"law": 0.3, "web": 0.2, "math": 0.0}, "Of these 2 of 2 (100.0%) are harmed"),
        ({"law": 0.3, "web": 0.2, "math": 0.3}, "Of these 2 of 3 (66.7%) are harmed"),
        ({}, "it names 0 of 4 (0.0%)"),
    ],
)
def test_the_expected_change_decides_where_what_it_names_is_harmed_and_not_too_little_is_named(
    expected: dict[str, float], said: str
) -> None:
    harm = {"law": 0.3, "web": 0.2}
    later = [long_run(pages.LATER[0], expected, harm), long_run(pages.LATER[1], {}, harm)]
    text = pages.decision(later, 0.134)
    assert said in text
    assert ("does not decide" in text) == (expected != {"law": 0.3, "web": 0.2, "math": 0.0})


def test_the_tool_has_the_threshold_that_was_chosen() -> None:
    chosen = json.loads(plan.CALIBRATION.read_text())["threshold"]["value"]
    assert chosen / SETTINGS["budget"] == pytest.approx(EXPECTED_OVER)
