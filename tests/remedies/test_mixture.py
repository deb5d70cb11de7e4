"""Mixtures: searched as budgets and caps ask, told with what they stand on, from pilot runs that can be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, interleave_datasets

from logs import whole_run, written
from samples import GO, IDENTITY, domain_drift, domain_forecast, estimate, forecast, snapshot
from sts_callback.config import PolicyConfig
from sts_callback.errors import ConfigError
from sts_callback.records import Estimate
from sts_callback.records.remedies import Mix, SourceEffect
from sts_callback.records.run import JudgedCheck
from sts_callback.remedies.mixture import MixtureConstraints, pilot_effects, plan, require_sources, search
from sts_callback.runs.directory import RunDirectory

POLICY = PolicyConfig(budgets={"law": 0.1, "code": 0.1})
NAN = float("nan")


def source(law: Any, code: Any, n_rows: int = 1000, **law_only: Any) -> SourceEffect:
    """What one source does to two domains."""
    changes = {name: x if isinstance(x, Estimate) else estimate(x) for name, x in (("law", law), ("code", code))}
    return SourceEffect(n_rows, changes, {"law": 0.25, "code": 0.25, **law_only.get("sae_error_share", {})})


def sources(train: SourceEffect | None = None) -> dict[str, SourceEffect]:
    return {"train": train or source(0.32, 0.0), "cases": source(-0.5, 0.1), "scripts": source(0.3, -0.4)}


def found(effects: dict[str, SourceEffect], caps: MixtureConstraints | None = None) -> Mix:
    return Mix(IDENTITY, effects, search(effects, POLICY, caps or MixtureConstraints()), 1.0)


def test_replay_grows_from_none_and_the_least_that_keeps_every_budget_is_recommended() -> None:
    made = found(sources())
    points, best = made.points, made.recommended
    assert [round(point.weights["train"], 2) for point in points] == [round(1 - 0.05 * i, 2) for i in range(11)]
    assert all(sum(point.weights.values()) == pytest.approx(1) for point in points)
    assert all(sum(point.rows.values()) == 1000 for point in points)
    assert best is not None
    # law: 0.32 (1 - w) - 0.5 w < 0.1 from w = 0.27 on
    assert best.weights == pytest.approx({"train": 0.7, "cases": 0.3, "scripts": 0.0})
    assert best.rows == {"train": 700, "cases": 300, "scripts": 0}
    assert best.domains["law"].nll_change.value == pytest.approx(0.7 * 0.32 - 0.3 * 0.5)
    assert best.domains["code"].nll_change.value == pytest.approx(0.3 * 0.1)
    assert [point.finding for point in points[:6]] == ["beyond"] * 6 and points[6].finding == "within"


def test_the_domain_that_is_worse_off_gets_the_replay() -> None:
    points = search(sources(source(0.3, 0.6)), POLICY, MixtureConstraints())
    assert points[-1].weights["scripts"] > points[-1].weights["cases"] > 0
    both = [point.domains[name].nll_change.value for point in points[-1:] for name in ("law", "code")]
    assert both[0] == pytest.approx(both[1])  # neither could be helped further but at the other's cost


def test_shares_are_capped() -> None:
    points = search(sources(), POLICY, MixtureConstraints(max_share={"cases": 0.1, "scripts": 0.05}))
    assert [point.weights["train"] for point in points] == pytest.approx([1, 0.95, 0.9, 0.85])
    assert all(point.weights["cases"] <= 0.1 and point.weights["scripts"] <= 0.05 for point in points)
    assert len(search(sources(), POLICY, MixtureConstraints(max_replay=0.2))) == 5


def test_intervals_add_up_to_the_widest_that_they_can() -> None:
    made = sources(source(estimate(0.3, 0.2, 0.5), 0.0)) | {"cases": source(estimate(-0.5, -0.9, -0.3), 0.1)}
    point = search(made, POLICY, MixtureConstraints())[4]
    assert point.weights == pytest.approx({"train": 0.8, "cases": 0.2, "scripts": 0})
    found = point.domains["law"].nll_change
    assert (found.value, found.low, found.high) == pytest.approx((0.14, 0.16 - 0.18, 0.4 - 0.06))
    assert point.domains["law"].finding == "cannot tell"


def test_where_no_domain_can_be_read_there_is_nothing_to_search() -> None:
    points = search({"train": source(NAN, NAN), "cases": source(0.0, 0.0)}, POLICY, MixtureConstraints())
    assert len(points) == 1 and points[0].finding == "cannot tell"


@pytest.mark.parametrize(
    "train",
    [source(0.0, 0.0, sae_error_share={"law": 0.9}), source(NAN, 0.0)],
    ids=["not covered", "no head"],
)
def test_what_cannot_be_told_is_not_called_kept(train: SourceEffect) -> None:
    point = search({"train": train, "cases": source(0.0, 0.0)}, POLICY, MixtureConstraints())[0]
    assert point.domains["law"].finding == "cannot tell"
    assert point.domains["code"].finding == "within"
    assert point.finding == "cannot tell"


def test_a_harm_is_told_whatever_else_cannot_be() -> None:
    point = search({"train": source(0.3, 0.0, sae_error_share={"law": 0.9})}, POLICY, MixtureConstraints())[0]
    assert point.finding == "beyond"
    assert point.worst.name == "law"


def test_rows_may_come_only_so_often() -> None:
    few = sources() | {"cases": source(-0.5, 0.1, n_rows=50)}
    assert max(point.weights["cases"] for point in search(few, POLICY, MixtureConstraints(max_repeats=2))) == pytest.approx(0.1)


# The plan


def test_the_plan_is_what_interleave_datasets_takes(tmp_path: Path) -> None:
    files = {}
    for name, n in (("train", 700), ("cases", 60), ("scripts", 400)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps({"from": name, "i": i}) + "\n" for i in range(n)))
    effects = sources(source(0.3, 0.6))
    mix = found(effects, MixtureConstraints(rows=500))
    made = json.loads(plan(mix, mix.points[-1], files, seed=3))
    assert made["rows_by_source"] == {name: n for name, n in mix.points[-1].rows.items() if n}
    assert made["files"] == [files[name] for name in made["rows_by_source"]]
    mixed = interleave_datasets([Dataset.from_json(file) for file in made["files"]], **made["interleave_datasets"])
    mixed = mixed.select(range(made["rows"]))
    counts = {name: mixed["from"].count(name) for name in made["rows_by_source"]}
    assert counts == pytest.approx(made["rows_by_source"], abs=45)  # four standard deviations of draws by chance
    assert made["extrapolated"]["law"]["nll_change"]["value"] == pytest.approx(mix.points[-1].domains["law"].nll_change.value)
    assert made["measured"]["train"]["nll_change"]["code"]["value"] == 0.6


def test_it_says_what_is_measured_and_what_is_not() -> None:
    made = found(sources())
    assert "Measured" in made.meaning and "Extrapolated" in made.meaning


# Pilots


def pilot(folder: Path, law: float, *, step: int = 20, **changes: Any) -> Path:
    """A run on one source with one check."""
    drift = [domain_drift("law", nll_change=estimate(law, law - 0.01, law + 0.01), sae_error_share=0.4), domain_drift("code")]
    made = whole_run(
        forecast=forecast(domain_forecast("law"), **changes), checks=(JudgedCheck(snapshot(step, *drift), GO, None),)
    )
    written(RunDirectory(folder / "sts"), made)
    return folder


def test_pilots_are_read_by_their_last_checks(tmp_path: Path) -> None:
    pilots = {"train": pilot(tmp_path / "a", 0.3), "cases": pilot(tmp_path / "b", -0.2)}
    identity, effects = pilot_effects(pilots, {"train": 800, "cases": 90}, POLICY)
    assert identity == forecast().identity
    assert effects["train"] == SourceEffect(
        800, {"law": estimate(0.3, 0.29, 0.31), "code": estimate(0.0)}, {"law": 0.4, "code": 0.25}
    )
    assert effects["cases"].nll_change["law"].value == -0.2
    assert found(effects).recommended.weights["cases"] == pytest.approx(0.45)  # type: ignore[union-attr]


def test_pilots_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    train, rows = pilot(tmp_path / "a", 0.3), {"train": 800, "cases": 90}
    other = replace(IDENTITY, sae="t" * 64)
    for pilots, policy, message in (
        ({"train": train}, POLICY, r"pilot: got \['train'\]; give one for each source, \['cases', 'train'\]"),
        ({"train": train, "cases": tmp_path}, POLICY, "pilot cases: .* holds no drift check"),
        ({"train": train, "cases": train}, PolicyConfig({"health": 0.1}), r"did not watch \['health'\]; it watched"),
        ({"train": train, "cases": pilot(tmp_path / "b", 0.1, step=40)}, POLICY, "must be of the same step"),
        (
            {"train": train, "cases": pilot(tmp_path / "c", 0.1, identity=other)},
            POLICY,
            "its model, SAE or layer is not that of train",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            pilot_effects(pilots, rows, policy)


@pytest.mark.parametrize(
    ("replay", "policy", "message"),
    [
        ({"verse": "f"}, PolicyConfig(), "protect: got none"),
        ({}, POLICY, r"replay: got \[\]; give at least one"),
        ({"train": "f"}, POLICY, "none by the name of 'train'"),
    ],
)
def test_what_leaves_nothing_to_search_is_refused(replay: dict[str, str], policy: PolicyConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_sources(replay, policy)


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({"max_replay": 0.0}, "max_replay: got 0"),
        ({"max_replay": 1.5}, "max_replay: got 1.5"),
        ({"max_repeats": 0.5}, "max_repeats: got 0.5"),
        ({"rows": 0}, "rows: got 0"),
        ({"rows": 4001}, "rows: got 4001; allowed are up to 4000"),
        ({"max_share": {"verse": 2.0}}, "max_share verse: got 2.0"),
        ({"max_share": {"prose": 0.5}}, r"max_share: got \['prose'\]; allowed are \['cases', 'scripts'\]"),
    ],
)
def test_caps_that_allow_nothing_are_refused(caps: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(sources(), POLICY, MixtureConstraints(**caps))
