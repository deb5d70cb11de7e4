"""Results in a notebook: tables that say what they are, whatever the names in them."""

from __future__ import annotations

import html
from typing import Any

import pytest

from logs import verdict
from reading import Page
from samples import IDENTITY, domain_drift, domain_forecast, estimate, forecast, rehearsal, snapshot
from sts_callback.records.rehearsal import Trial, Trials

NAN = float("nan")
NASTY = '<script>alert("1")</script>'


def shown(name: str) -> dict[str, Any]:
    check = snapshot(20, domain_drift(name, nll_change=estimate(0.5, 0.4, 0.6)), domain_drift("code", nll_change=NAN))
    rehearsed = rehearsal(check, expected={name: estimate(0.7, 0.2, 1.2)})
    trial = Trial(1e-3, {name: 0.25}, rehearsal(check), verdict("no-go", name, about=(name,)))
    return {
        "forecast": forecast(domain_forecast(name, nll_change=estimate(0.5, 0.4, 0.6)), domain_forecast("code", sts_net=NAN)),
        "check": check,
        "rehearsal": rehearsed,
        "trials": Trials(IDENTITY, "LoRA of rank 16", (trial,), {name: 0.1}, 1.0),
        "verdict": verdict("no-go", name, step=20, about=(name,)),
    }


@pytest.mark.parametrize("what", shown("law"))
def test_it_is_a_table_of_plain_escaped_html(what: str) -> None:
    read = Page(shown(NASTY)[what]._repr_html_())
    assert set(read.elements) == {"table", "caption", "thead", "tbody", "tr", "th", "td", "p"}
    assert {name for _, name, _ in read.attributes} == {"scope"}
    assert NASTY in read.text and html.escape(NASTY) in read.source
    assert "nan" not in read.text


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("forecast", "law 12% +0.50 [+0.40, +0.60] 8 code \N{EN DASH} 0.00"),
        ("check", "law +0.50 [+0.40, +0.60] 1.0% 8 code \N{EN DASH} 1.0% 8 train 0.00"),
        ("rehearsal", "law +0.70 [+0.20, +1.20] +0.50 [+0.40, +0.60] 1.0%"),
        ("trials", "25% law 0.001 beyond +0.50"),
        ("verdict", "ALARM domain state why law why law is no-go. Threatened: law."),
    ],
)
def test_it_has_the_numbers_of_each_domain(what: str, told: str) -> None:
    assert told in Page(shown("law")[what]._repr_html_()).text


def test_a_run_that_was_not_rehearsed_says_why() -> None:
    assert "its model is sharded." in Page(rehearsal(skipped="its model is sharded.")._repr_html_()).text
