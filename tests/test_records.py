"""Records: what is written is read back, in strict JSON, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from samples import IDENTITY, domain_drift, domain_forecast, forecast, snapshot
from sts_callback import records
from sts_callback.records import SCHEMA_VERSION, DomainDrift, Forecast, Identity, Record, Verdict

ALL: list[Record] = [
    IDENTITY,
    domain_forecast(),
    forecast(domain_forecast("law"), domain_forecast("code", sts_rel=0.75)),
    domain_drift(),
    snapshot(40, domain_drift("law"), domain_drift("code", top_features=())),
    Verdict("no-go", ("law", "code"), {"law": "has moved ± 0.1.", "code": "« déjà »\nline 2"}, 40),
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
    kinds = {k for k in vars(records).values() if isinstance(k, type) and issubclass(k, Record) and k is not Record}
    assert kinds == {type(record) for record in ALL}


@pytest.mark.parametrize("record", ALL, ids=lambda r: type(r).__name__)
def test_written_is_one_line_of_strict_json_with_its_version(record: Record) -> None:
    text = record.to_json()
    assert "\n" not in text
    content = _strict(text)
    assert content.pop("schema_version") == SCHEMA_VERSION
    assert set(content) == {f.name for f in dataclasses.fields(record)}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_could_not_be_had_is_null_and_comes_back_as_nan(number: float) -> None:
    record = forecast(domain_forecast("law", nll=number), unexplained=number, train=domain_forecast("train", sts_rel=number))
    content = _strict(record.to_json())
    assert content["unexplained"] is content["train"]["sts_rel"] is content["domains"]["law"]["nll"] is None
    back = Forecast.from_json(record.to_json())
    assert all(math.isnan(x) for x in (back.unexplained, back.train.sts_rel, back.domains["law"].nll))
    assert back.domains["law"].sts_cross == 0.125


def test_nan_within_a_tuple_comes_back_too() -> None:
    back = DomainDrift.from_json(domain_drift(top_features=((7, float("nan")), (3, 0.5))).to_json())
    assert back.top_features[1] == (3, 0.5)
    assert back.top_features[0][0] == 7
    assert math.isnan(back.top_features[0][1])


def test_types_come_back_as_annotated() -> None:
    back = Forecast.from_json(forecast(domain_forecast()).to_json().replace('"seconds": 1.5', '"seconds": 2'))
    assert type(back.seconds) is float
    assert type(back.features) is tuple
    assert type(back.identity) is Identity
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
    for field in dataclasses.fields(record):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}: keys differ: \['{field.name}'\]\.$"):
            kind.from_json(_without(record, field.name))


def test_unknown_key_deep_within_is_refused() -> None:
    content = json.loads(forecast(domain_forecast("law")).to_json())
    content["domains"]["law"]["mood"] = 1
    with pytest.raises(ValueError, match=r"^DomainForecast: keys differ: \['mood'\]\.$"):
        Forecast.from_json(json.dumps(content))


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
