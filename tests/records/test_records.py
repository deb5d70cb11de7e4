"""Records: what is written is read back, in strict JSON, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from samples import IDENTITY, domain_drift, domain_forecast, estimate, forecast, rehearsal, score, snapshot
from sts_callback import records
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.records import (
    Check,
    DomainDrift,
    DomainForecast,
    Estimate,
    Forecast,
    Identity,
    Record,
    Score,
    Snippet,
    TokenAccuracy,
    TopActivatingExamples,
    Verdict,
    remedies,
)
from sts_callback.records.record import SCHEMA_VERSION, has_default
from sts_callback.records.rehearsal import Dose, Trial, Trials
from sts_callback.records.remedies import (
    AdapterScales,
    AttributedRow,
    Attribution,
    DomainAttribution,
    Mix,
    MixedDomain,
    MixPoint,
    ScaledDomain,
    ScalePoint,
    SourceAttribution,
    SourceEffect,
)
from sts_callback.records.run import RunSettings

SNIPPET = Snippet("the « ", "court", "\nruled", 2.5)
BLAMED = AttributedRow(17, 0.5, 7, SNIPPET)
CHANGE = estimate(0.5, 0.25, 0.75)
SOURCE = SourceAttribution("notes", 40, CHANGE, 2)
BLAMED_DOMAIN = DomainAttribution("law", 0.75, -0.125, 0.375, 2, (BLAMED,), (SOURCE,))
DIALED = ScaledDomain("law", 32, estimate(0.25, 0.125, 0.375), CHANGE, CHANGE, 0.1, "beyond")
DIALED_IN_POINTS = ScaledDomain("law", 32, estimate(0.25, 0.125, 0.375), CHANGE, estimate(2.5, 2.0, 3.0), "2 points", "beyond")
ACCURACY = TokenAccuracy(0.5, 0.375, estimate(-0.125, -0.25, 0.0), 7, 2, 3, (-5, 0, 0))
DIAL_POINT = ScalePoint(0.5, "beyond", {"law": DIALED})
MIXED = MixedDomain("law", estimate(0.25, 0.125, 0.375), 0.1, "beyond")
MIX_POINT = MixPoint({"train": 0.75, "cases": 0.25}, {"train": 300, "cases": 100}, "beyond", {"law": MIXED})
EFFECT = SourceEffect(400, {"law": estimate(0.25, 0.125, 0.375)}, {"law": 0.5})
REHEARSED = snapshot(5, domain_drift(), output_drift=estimate(0.5))
TRIAL = Trial(1e-3, {"cases": 0.25}, rehearsal(REHEARSED), Verdict("go", (), {"law": "is within."}, 0))
ALL: list[Record] = [
    IDENTITY,
    Check("layer", "refuse", "reads layer 2, but fits layer 1 better", "correct hook_name"),
    estimate(0.5, 0.25, 0.75),
    score(0.5, 0.25, 0.75, random=0.125, own=0.875),
    SNIPPET,
    TopActivatingExamples(7, 0.5, "https://neuronpedia.org/x", {"train": (SNIPPET, SNIPPET), "law": ()}),
    domain_forecast(),
    forecast(domain_forecast("law"), domain_forecast("code", sts_rel=0.75), train_source="own rollouts"),
    domain_drift(accuracy=ACCURACY),
    domain_drift(),
    ACCURACY,
    snapshot(40, domain_drift("law"), domain_drift("code", top_features=()), output_drift=estimate(0.5, -0.25, 0.75)),
    Verdict(
        "no-go",
        ("law", "code"),
        {"law": "is up ± 0.1.", "code": "« déjà »\nline 2"},
        40,
        True,
        {"law": "on course", "code": "over"},
    ),
    rehearsal(),
    rehearsal(REHEARSED, REHEARSED, expected={"law": estimate(0.25, 0.125, 0.375)}),
    BLAMED,
    SOURCE,
    BLAMED_DOMAIN,
    Attribution(IDENTITY, 5000, 2000, 3, {"law": BLAMED_DOMAIN}, (17, 4711), 1.5),
    DIALED,
    DIALED_IN_POINTS,
    DIAL_POINT,
    AdapterScales(IDENTITY, (DIAL_POINT,), 1.5),
    MIXED,
    MIX_POINT,
    EFFECT,
    Mix(IDENTITY, {"train": EFFECT}, (MIX_POINT,), 1.5),
    Dose(1.0, 1e-3, 5, REHEARSED),
    TRIAL,
    Trials(IDENTITY, "LoRA of rank 16", (TRIAL,), {"law": 0.1, "code": "2 points"}, 1.5),
]


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
def test_round_trip_is_exact(record: Record) -> None:
    back = type(record).from_json(record.to_json())
    assert back == record
    assert type(back) is type(record)
    assert back.to_json() == record.to_json()


def test_every_kind_of_record_is_tried() -> None:
    defined = [value for module in (records, records.rehearsal, remedies) for value in vars(module).values()]
    kinds = {k for k in defined if isinstance(k, type) and issubclass(k, Record) and k is not Record}
    assert kinds == {type(record) for record in ALL}


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
def test_written_is_one_line_of_strict_json_with_its_version(record: Record) -> None:
    text = record.to_json()
    assert "\n" not in text
    content = _strict(text)
    assert content.pop("schema_version") == SCHEMA_VERSION
    assert len(content) == len(dataclasses.fields(record))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_could_not_be_had_is_null_and_comes_back_as_nan(number: float) -> None:
    law = domain_forecast("law", nll=estimate(2.5, number, 3.0), p_above_next=number)
    record = forecast(law, fvu=number, train=domain_forecast("train", sts_rel=number))
    content = _strict(record.to_json())
    written = content["domains"]["law"]
    assert (
        content["unexplained"] is content["train"]["sts_rel"]["value"] is written["nll"]["low"] is written["above_next"] is None
    )
    back = Forecast.from_json(record.to_json())
    found = back.domains["law"]
    assert all(math.isnan(x) for x in (back.fvu, back.train.sts_rel.value, found.nll.low, found.p_above_next))
    assert (found.nll.value, found.nll.high, found.sts_net.value) == (2.5, 3.0, 0.125)


def test_nan_within_a_tuple_comes_back_too() -> None:
    back = DomainDrift.from_json(domain_drift(top_features=((7, float("nan")), (3, 0.5))).to_json())
    assert back.top_features[1] == (3, 0.5)
    assert back.top_features[0][0] == 7
    assert math.isnan(back.top_features[0][1])


def test_a_budget_comes_back_as_a_number_of_nats_or_a_text_with_its_unit() -> None:
    policy = PolicyConfig({"law": 1, "code": "0.05bits per byte", "math": "2 points"})
    settings = RunSettings(policy, ProbeConfig(), check_on="save", action="warn", max_overhead=0.01, versions={})
    written = _strict(settings.to_json())["policy"]["budgets"]
    assert written == {"law": 1.0, "code": "0.05 bits/byte", "math": "2 points"}
    back = RunSettings.from_json(settings.to_json().replace('"law": 1.0', '"law": 1')).policy
    assert back == policy
    assert type(back.budgets["law"]) is float


def test_a_drift_of_before_there_was_accuracy_has_none() -> None:
    written = _strict(domain_drift().to_json())
    for key in ("bits_change", "query_answer_bytes", "accuracy"):
        del written[key]
    back = DomainDrift.from_dict(written)
    assert back.accuracy is None
    assert back.harm_in("nats/token") == back.nll_change
    assert [back.query_harm_in(unit) for unit in ("bits/byte", "points")] == [((), ()), ((), ())]
    assert all(math.isnan(x) for unit in ("bits/byte", "points") for x in vars(back.harm_in(unit)).values())


def test_types_come_back_as_annotated() -> None:
    back = Forecast.from_json(forecast(domain_forecast()).to_json().replace('"seconds": 1.5', '"seconds": 2'))
    assert type(back.seconds) is float
    assert type(back.features) is tuple
    assert type(back.identity) is Identity
    law = back.domains["law"]
    assert [type(x) for x in (law.sts_cross, law.nll, law.rank)] == [Score, Estimate, tuple]
    with pytest.raises(TypeError, match="does not support item assignment"):
        back.domains["law"] = back.train  # type: ignore[index]


def _changed(record: Record, **changes: Any) -> str:
    return json.dumps(json.loads(record.to_json()) | changes)


def _without(record: Record, name: str) -> str:
    return json.dumps({key: value for key, value in json.loads(record.to_json()).items() if key != name})


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
def test_unknown_and_missing_keys_are_refused(record: Record) -> None:
    kind = type(record)
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: keys differ: \['colour'\]\.$"):
        kind.from_json(_changed(record, colour="red"))
    content = record.to_dict()
    for key, field in zip(list(content)[1:], dataclasses.fields(record), strict=True):
        fewer = {name: value for name, value in content.items() if name != key}
        if not has_default(field):
            with pytest.raises(ValueError, match=rf"^{kind.__name__}: keys differ: \['{key}'\]\.$"):
                kind.from_dict(fewer)
        else:  # as in files from before the field was there
            found = getattr(kind.from_dict(fewer), field.name)
            assert found is field.default if field.default_factory is dataclasses.MISSING else found == field.default_factory()


@pytest.mark.parametrize(("path", "kind"), [((), "DomainForecast"), (("sts_cross",), "Score"), (("nll",), "Estimate")])
def test_unknown_key_deep_within_is_refused(path: tuple[str, ...], kind: str) -> None:
    content = json.loads(forecast(domain_forecast("law")).to_json())
    part = content["domains"]["law"]
    for name in path:
        part = part[name]
    part["mood"] = 1
    with pytest.raises(ValueError, match=rf"^{kind}: keys differ: \['mood'\]\.$"):
        Forecast.from_json(json.dumps(content))


def test_a_number_where_an_estimate_was_in_an_older_version_is_refused() -> None:
    content = json.loads(domain_forecast("law").to_json()) | {"nll": 2.5}
    with pytest.raises((ValueError, TypeError)):
        DomainForecast.from_json(json.dumps(content))


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, "1", None])
def test_other_schema_versions_are_refused(version: object) -> None:
    with pytest.raises(ValueError, match=rf"^schema_version: got {version!r}; this version reads {SCHEMA_VERSION}\.$"):
        Identity.from_json(_changed(IDENTITY, schema_version=version))


def test_a_missing_schema_version_is_refused() -> None:
    with pytest.raises(ValueError, match="schema_version: got None"):
        Identity.from_json(_without(IDENTITY, "schema_version"))


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="model"):
        IDENTITY.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "place"),
    [(0.25, 0.0), (0.75, 1.0), (0.5, 0.5), (0.0, -0.5), (1.0, 1.5)],
)
def test_a_score_stands_between_its_anchors_or_beyond_them(value: float, place: float) -> None:
    found = score(value, random=0.25, own=0.75)
    assert found.normalise(found.value) == place


@pytest.mark.parametrize(("random", "own"), [(0.5, 0.5), (0.5, 0.25), (float("nan"), 0.5), (0.5, float("nan"))])
def test_a_score_has_no_place_where_the_training_data_is_no_better_than_random(random: float, own: float) -> None:
    assert math.isnan(score(0.5, random=random, own=own).normalise(0.5))


def harm_rank(**changes: tuple[float, float]) -> dict[str, int]:
    domains = (domain_forecast(n, nll_change=nll, gradient_change=gradient) for n, (nll, gradient) in changes.items())
    return dict(forecast(*domains).harm_rank)


def test_who_fares_worst_is_told_by_both_orders_together() -> None:
    assert harm_rank(law=(0.1, -0.3), code=(0.5, -0.1), web=(-0.5, -0.2)) == {"code": 1, "law": 2, "web": 2}
    assert harm_rank(law=(0.1, 0.2), code=(0.2, 0.1)) == {"law": 1, "code": 1}  # they contradict one another
    assert harm_rank(a=(0.4, 0.1), b=(0.3, 0.2), c=(0.2, 0.4), d=(0.1, 0.3)) == {"a": 2, "b": 2, "c": 1, "d": 4}


def test_who_fares_worst_is_told_by_one_order_or_not_at_all_where_the_other_is_unknown() -> None:
    unknown = float("nan")
    assert harm_rank(law=(0.1, 0.3), code=(0.5, unknown)) == {"code": 1, "law": 2}
    assert harm_rank(law=(unknown, 0.3), code=(0.5, 0.1)) == {"law": 1, "code": 2}
    assert harm_rank(law=(unknown, unknown), code=(unknown, unknown)) == {}


def test_an_explanation_names_the_threatened_domains_or_else_all() -> None:
    reasons = {"law": "moves.", "code": "stays."}
    assert Verdict("no-go", ("law",), reasons, 0).explanation == "law: moves."
    assert Verdict("go", (), reasons, 0).explanation == "law: moves. code: stays."
