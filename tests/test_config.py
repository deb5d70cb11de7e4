"""Settings: each limit from both sides, and nothing can change afterwards."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, get_args

import pytest

from sts_callback.config import DEFAULT_BUDGET, Budget, PolicyConfig, ProbeConfig, Unit
from sts_callback.errors import ConfigError

NAN = float("nan")
LIMITS: list[tuple[type, str, Any, Any]] = [  # settings, field, a value just allowed, one just refused
    (ProbeConfig, "n_queries", 4, 3),
    (ProbeConfig, "n_train_demonstrations", 1, 0),
    (ProbeConfig, "n_domain_demonstrations", 1, 0),
    (ProbeConfig, "n_draws", 2, 1),
    (ProbeConfig, "n_features", 1, 0),
    (ProbeConfig, "max_tokens", 8, 7),
    (ProbeConfig, "max_norm_multiple", 1.001, 1.0),
    (ProbeConfig, "max_norm_multiple", 3.0, NAN),
    (ProbeConfig, "batch_tokens", 1, 0),
    (ProbeConfig, "seed", 0, -1),
    (ProbeConfig, "chat_template", "never", "sometimes"),
    (PolicyConfig, "min_drift", 1e-6, 0.0),
    (PolicyConfig, "min_drift", 1.0, NAN),
    (PolicyConfig, "patience", 1, 0),
    (PolicyConfig, "alpha", 1e-9, 0.0),
    (PolicyConfig, "alpha", 0.999, 1.0),
    (PolicyConfig, "alpha", 0.05, NAN),
    (PolicyConfig, "max_unseen", 1e-6, 0.0),
    (PolicyConfig, "max_unseen", 1.0, 1.001),
    (PolicyConfig, "max_unseen", 0.5, NAN),
    (PolicyConfig, "max_masked_share", 1e-6, 0.0),
    (PolicyConfig, "max_masked_share", 1.0, 1.001),
]
IDS = [f"{name}-{refused}" for _, name, _, refused in LIMITS]


@pytest.mark.parametrize(("settings", "name", "allowed", "refused"), LIMITS, ids=IDS)
def test_limits_from_both_sides(settings: type, name: str, allowed: Any, refused: Any) -> None:
    assert getattr(settings(**{name: allowed}), name) == allowed
    with pytest.raises(ConfigError, match=rf"^{name}: got {re.escape(repr(refused))}; allowed is .+\.$"):
        settings(**{name: refused})


def test_every_number_in_the_settings_has_a_limit() -> None:
    named = {(settings, name) for settings, name, _, _ in LIMITS}
    fields = {(settings, f.name) for settings in (ProbeConfig, PolicyConfig) for f in dataclasses.fields(settings)}
    assert fields - named == {(PolicyConfig, "budgets")}


def test_defaults_are_those_of_the_paper_where_it_has_them() -> None:
    probes = ProbeConfig()
    assert (probes.n_train_demonstrations, probes.n_domain_demonstrations, probes.n_features) == (2, 5, 100)
    assert PolicyConfig().budgets == {}


@pytest.mark.parametrize("budget", [0.0, -0.1, NAN])
def test_budgets_must_be_above_nothing(budget: float) -> None:
    assert PolicyConfig({"law": 0.001}).budgets == {"law": 0.001}
    with pytest.raises(ConfigError, match=r"^protect\['law'\]: got .*; allowed is a budget above 0: a number of nats a token "):
        PolicyConfig({"code": DEFAULT_BUDGET, "law": budget})


SPELLINGS: dict[Unit, tuple[str, ...]] = {
    "nats/token": ("0.5", " 5e-1 ", ".5 nats", "0.5 nats/token", "0.5nat", "0.5 nats a token", "0.50 nats per token", "+0.5"),
    "bits/byte": ("0.5 bits/byte", "0.5bits/byte", "0.5 bit/byte", "0.5 bits per byte", "5E-1 BITS A BYTE", "0.5 bpb"),
    "points": (
        "0.5 points",
        "0.5points",
        "0.5 point",
        ".5pp",
        "0.5 pts",
        "0.5 percentage points",
        "0.5 points of token accuracy",
    ),
}


@pytest.mark.parametrize(("text", "unit"), [(text, unit) for unit, texts in SPELLINGS.items() for text in texts])
def test_a_budget_may_be_a_text_with_its_unit(text: str, unit: Unit) -> None:
    assert Budget.of(text) == Budget(0.5, unit)
    plain = {"nats/token": 0.5, "bits/byte": "0.5 bits/byte", "points": "0.5 points"}[unit]
    assert PolicyConfig({"law": text}) == PolicyConfig({"law": plain})
    assert PolicyConfig({"law": text}).budgets == {"law": plain}
    assert PolicyConfig({"law": text}).limits == {"law": Budget(0.5, unit)}


@pytest.mark.parametrize(
    "text",
    [
        *("much", "", " ", "points", "two points", "2 %", "2%", "0.05 bits", "0.05 bits/token", "1 nat/byte", "2 points/byte"),
        *("0 points", "-1 points", "100.5 points", "nan points", "inf bits/byte", "1e999", "1,5 points", "1 2 points", "1_0"),
    ],
)
def test_a_text_that_is_no_budget_is_refused_with_what_is(text: str) -> None:
    for refused in (lambda: PolicyConfig({"law": text}), lambda: Budget.of(text, "protect['law']")):
        with pytest.raises(ConfigError) as error:
            refused()
        told = str(error.value)
        assert told.startswith(f"protect['law']: got {text!r}; allowed is a budget above 0: ")
        assert "0.1" in told and "'0.05 bits/byte'" in told and "'2 points'" in told


@pytest.mark.parametrize("value", [2.0, 0.1, 1 / 3, 1e-7, 100])
@pytest.mark.parametrize("unit", get_args(Unit))
def test_a_budget_is_read_back_from_its_plain_form(value: float, unit: Unit) -> None:
    plain = Budget(float(value), unit).plain
    assert Budget.of(plain) == Budget(float(value), unit)
    assert isinstance(plain, float) == (unit == "nats/token")
    assert Budget.of("2 points").plain == "2 points"


def test_settings_are_frozen() -> None:
    for settings, name in ((ProbeConfig(), "seed"), (PolicyConfig(), "patience")):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(settings, name, 5)


def test_budgets_are_frozen_from_within_and_from_without() -> None:
    given = {"law": 0.1}
    policy = PolicyConfig(given)
    with pytest.raises(TypeError, match="does not support item assignment"):
        policy.budgets["law"] = 9.0  # type: ignore[index]
    given["law"] = 9.0
    given["code"] = 9.0
    assert policy.budgets == {"law": 0.1}


def test_error_can_be_caught_as_value_error() -> None:
    with pytest.raises(ValueError, match="n_queries"):
        ProbeConfig(n_queries=1)
