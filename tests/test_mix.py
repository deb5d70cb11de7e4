"""Mixtures: searched as budgets and caps ask, told with what they stand on, and measured where the answer is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, interleave_datasets

from planted import lettered_model, lettered_sae, row_of
from samples import domain_forecast, estimate, forecast
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.errors import ConfigError
from sts_callback.mix import Caps, _apart, mix, plan, search
from sts_callback.monitor import Monitor
from sts_callback.records import Forecast
from sts_callback.remedies import Mix
from tiny import rotated_sae, rows, tiny_model, tiny_tokenizer

POLICY = PolicyConfig(budgets={"law": 0.1, "code": 0.1})
NAN = float("nan")
FREE = {"train": 1.0, "cases": 1.0, "scripts": 1.0}


def source(law: Any, code: Any, **law_only: Any) -> Forecast:
    """What one source does to two domains."""
    return forecast(
        domain_forecast("law", **{"nll_change": law, **law_only}),
        domain_forecast("code", nll_change=code),
    )


def sources(train: Forecast | None = None) -> dict[str, Forecast]:
    return {"train": train or source(0.32, 0.0), "cases": source(-0.5, 0.1), "scripts": source(0.3, -0.4)}


def test_replay_grows_from_none_and_the_least_that_keeps_every_budget_is_recommended() -> None:
    points = search(sources(), POLICY, 1000, 0.5, FREE)
    assert [round(point.weights["train"], 2) for point in points] == [round(1 - 0.05 * i, 2) for i in range(11)]
    assert all(sum(point.weights.values()) == pytest.approx(1) for point in points)
    assert all(sum(point.rows.values()) == 1000 for point in points)
    best = Mix(sources(), dict.fromkeys(FREE, 1000), points, 1.0).recommended
    assert best is not None
    # law: 0.32 (1 - w) - 0.5 w < 0.1 from w = 0.27 on
    assert best.weights == pytest.approx({"train": 0.7, "cases": 0.3, "scripts": 0.0})
    assert best.rows == {"train": 700, "cases": 300, "scripts": 0}
    assert best.domains["law"].nll_change.value == pytest.approx(0.7 * 0.32 - 0.3 * 0.5)
    assert best.domains["code"].nll_change.value == pytest.approx(0.3 * 0.1)
    assert [point.finding for point in points[:6]] == ["beyond"] * 6 and points[6].finding == "within"


def test_the_domain_that_is_worse_off_gets_the_replay() -> None:
    points = search(sources(source(0.3, 0.6)), POLICY, 1000, 0.5, FREE)
    assert points[-1].weights["scripts"] > points[-1].weights["cases"] > 0
    both = [point.domains[name].nll_change.value for point in points[-1:] for name in ("law", "code")]
    assert both[0] == pytest.approx(both[1])  # neither could be helped further but at the other's cost


def test_shares_are_capped() -> None:
    points = search(sources(), POLICY, 1000, 0.5, {"train": 1.0, "cases": 0.1, "scripts": 0.05})
    assert [point.weights["train"] for point in points] == pytest.approx([1, 0.95, 0.9, 0.85])
    assert all(point.weights["cases"] <= 0.1 and point.weights["scripts"] <= 0.05 for point in points)
    assert len(search(sources(), POLICY, 1000, 0.2, FREE)) == 5


def test_intervals_add_up_to_the_widest_that_they_can() -> None:
    made = sources(source(estimate(0.3, 0.2, 0.5), 0.0)) | {"cases": source(estimate(-0.5, -0.9, -0.3), 0.1)}
    point = search(made, POLICY, 100, 0.5, FREE)[4]
    assert point.weights == pytest.approx({"train": 0.8, "cases": 0.2, "scripts": 0})
    found = point.domains["law"].nll_change
    assert (found.value, found.low, found.high) == pytest.approx((0.14, 0.16 - 0.18, 0.4 - 0.06))
    assert point.domains["law"].finding == "cannot tell"


def test_where_no_domain_can_be_read_there_is_nothing_to_search() -> None:
    points = search(dict.fromkeys(FREE, source(NAN, NAN)), POLICY, 100, 0.5, FREE)
    assert len(points) == 1 and points[0].finding == "cannot tell"


@pytest.mark.parametrize(
    "doubt", [{"n_masked": 100}, {"unseen": 0.9}, {"nll_change": NAN}], ids=["sinks", "not covered", "no head"]
)
def test_what_cannot_be_read_is_not_called_kept(doubt: dict[str, Any]) -> None:
    point = search({"train": source(0.0, 0.0, **doubt), "cases": source(0.0, 0.0)}, POLICY, 10, 0.5, FREE)[0]
    assert point.domains["law"].finding == "cannot tell"
    assert point.domains["code"].finding == "within"
    assert point.finding == "cannot tell"


def test_a_harm_is_told_whatever_else_cannot_be() -> None:
    point = search({"train": source(0.3, 0.0, unseen=0.9)}, POLICY, 10, 0.5, FREE)[0]
    assert point.finding == "beyond"
    assert point.worst.name == "law"


# The plan


def test_the_plan_is_what_interleave_datasets_takes(tmp_path: Path) -> None:
    files = {}
    for name, n in (("train", 700), ("cases", 60), ("scripts", 400)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps({"from": name, "i": i}) + "\n" for i in range(n)))
    points = search(sources(source(0.3, 0.6)), POLICY, 500, 0.5, FREE)
    found = Mix(sources(source(0.3, 0.6)), dict.fromkeys(FREE, 500), points, 1.0)
    made = json.loads(plan(found, points[-1], files, seed=3))
    assert made["rows_by_source"] == {name: n for name, n in points[-1].rows.items() if n}
    assert made["files"] == [files[name] for name in made["rows_by_source"]]
    mixed = interleave_datasets([Dataset.from_json(file) for file in made["files"]], **made["interleave_datasets"])
    mixed = mixed.select(range(made["rows"]))
    counts = {name: mixed["from"].count(name) for name in made["rows_by_source"]}
    assert counts == pytest.approx(made["rows_by_source"], abs=45)  # four standard deviations of draws by chance
    assert made["extrapolated"]["law"]["nll_change"]["value"] == pytest.approx(points[-1].domains["law"].nll_change.value)
    assert made["measured"]["train"]["code"]["value"] == 0.6


def test_a_mix_is_read_back() -> None:
    found = Mix(sources(), dict.fromkeys(FREE, 500), search(sources(), POLICY, 500, 0.5, FREE), 1.0)
    assert Mix.from_json(found.to_json()) == found


# Measured

CONFIG = ProbeConfig(n_queries=8, n_features=8, n_domain_demonstrations=2, max_tokens=64)


def made_mix(**changes: Any) -> Mix:
    options: dict[str, Any] = {
        "sae": rotated_sae(),
        "train_data": rows(30, "sums"),
        "replay": {"verse": rows(30, "far away poems", seed=40)},
        "domains": {"poems": rows(20, "poems"), "other": rows(20, "others")},
        "policy": PolicyConfig(budgets={"poems": 0.1}),
        "config": CONFIG,
        "progress": False,
    }
    return mix(tiny_model(), tiny_tokenizer(), **(options | changes))


def test_each_source_is_forecast_as_if_it_were_alone() -> None:
    found = made_mix()
    assert list(found.forecasts) == ["train", "verse"]
    alone = Monitor(
        tiny_model(),
        tiny_tokenizer(),
        sae=rotated_sae(),
        train_data=rows(30, "far away poems", seed=40),
        domains={"poems": rows(20, "poems")},
        config=CONFIG,
        progress=False,
    ).forecast()
    assert found.forecasts["verse"].domains == alone.domains
    assert found.points[0].weights == {"train": 1.0, "verse": 0.0}
    assert sum(found.points[-1].rows.values()) == 30


def test_the_search_goes_by_what_was_measured() -> None:
    draw = random.Random(0)
    law, sums, chat = ([row_of(draw, kinds) for _ in range(60)] for kinds in ((5, 6), (4,), (0, 1)))
    found = mix(
        lettered_model(),
        tiny_tokenizer(),
        sae=lettered_sae(),
        train_data=sums,
        replay={"law's own": law, "chat": chat},
        domains={"law": law},  # the same file is taught and asked
        policy=PolicyConfig(budgets={"law": 0.01}),
        config=CONFIG,
        progress=False,
    )
    changes = {name: one.domains["law"].nll_change.value for name, one in found.forecasts.items()}
    better = min(("law's own", "chat"), key=lambda name: changes[name])
    assert found.points[-1].weights[better] == pytest.approx(0.5)
    mean = (changes["train"] + changes[better]) / 2
    assert found.points[-1].domains["law"].nll_change.value == pytest.approx(mean)
    assert found.n_rows["law's own"] == 60


def test_rows_of_a_source_are_not_asked_as_well() -> None:
    law, other = rows(20, "law"), rows(20, "others")
    teaching, asking = _apart({"train": other, "cases": [*law, *other[:5]]}, {"law": law, "others": other[:4]})
    taught = [row["prompt"] for own in teaching.values() for row in own]
    asked = [row["prompt"] for own in asking.values() for row in own]
    assert not set(taught) & set(asked)
    assert len(asking["law"]) == 10 and len(asking["others"]) == 2
    assert len(teaching["train"]) == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": PolicyConfig()}, "protect: got none"),
        ({"replay": {}}, r"replay: got \[\]; give at least one"),
        ({"replay": {"train": rows(30)}}, "none by the name of 'train'"),
        ({"caps": Caps(max_share={"prose": 0.5})}, r"max_share: got \['prose'\]; allowed are \['verse'\]"),
        ({"caps": Caps(rows=121)}, "rows: got 121; allowed are up to 120"),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made_mix(**changes)


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({"max_replay": 0.0}, "max_replay: got 0"),
        ({"max_replay": 1.5}, "max_replay: got 1.5"),
        ({"max_repeats": 0.5}, "max_repeats: got 0.5"),
        ({"rows": 0}, "rows: got 0"),
        ({"max_share": {"verse": 2.0}}, "max_share verse: got 2.0"),
    ],
)
def test_caps_that_allow_nothing_are_refused(caps: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Caps(**caps)
