"""Runs as their folders tell them, each part open to change: what tests of the report read."""

from __future__ import annotations

from typing import Any

from samples import IDENTITY, domain_drift, domain_forecast, estimate, forecast, rehearsal, snapshot
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.records import UNKNOWN, Check, Decision, Estimate, Snippet, TopActivatingExamples, Verdict
from sts_callback.records.remedies import AttributedRow, Attribution, DomainAttribution, SourceAttribution
from sts_callback.records.run import Fault, JudgedCheck, Logged, Looks, Postponed, RunSettings, TimeSpent
from sts_callback.runs.directory import RunDirectory

EMPTY = Logged(None, None, None, (), (), (), None, (), (), ())


def verdict(
    decision: Decision, *threatened: str, step: int = 0, about: tuple[str, ...] = ("law", "code"), **changes: Any
) -> Verdict:
    """A decision about two protected domains."""
    return Verdict(decision, threatened, {name: f"why {name} is {decision}." for name in about}, step, **changes)


def check(
    step: int, judged: Verdict | None = None, *, time: TimeSpent | None = None, drift: float = 0.125, **changes: Any
) -> JudgedCheck:
    """A check of two domains, both protected."""
    domains = [domain_drift(name, relative_drift=estimate(drift, drift / 2, 2 * drift)) for name in ("law", "code")]
    return JudgedCheck(snapshot(step, *domains, **changes), judged or verdict("go", step=step), time)


def words(feature: int, *, token: str = " law", **changes: Any) -> TopActivatingExamples:
    """A feature that activates in the training data and in one domain."""
    snippets = {"train": (Snippet("before", token, " after", 2.0),), "law": (Snippet("in", token, " court", 1.0),), "code": ()}
    return TopActivatingExamples(**({"feature": feature, "share": 0.25, "link": "", "snippets": snippets} | changes))


SETTINGS = RunSettings(
    PolicyConfig({"law": 0.1, "code": 0.2}),
    ProbeConfig(),
    check_on="save",
    action="warn",
    max_overhead=0.01,
    versions={"python": "3.11.2", "torch": "2.9.0"},
    looks=Looks(30, 10),
)


def whole_run(**changes: Any) -> Logged:
    """A run with something of everything: law alarms at the last of three checks."""
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "forecast": forecast(
            domain_forecast("law", sts_net=0.75, nll_change=estimate(0.05, -0.1, 0.2)),
            domain_forecast("code", sae_error_share=0.625, n_cut=3),
            checks=(Check("explained variance", "warn", "0.70", "take another SAE"), Check("layer", "pass", "fits", "")),
        ),
        "forecast_verdict": verdict("go"),
        "checks": (
            check(10, time=TimeSpent(1.0, 50.0)),
            check(20, verdict("watch", "law", step=20), time=TimeSpent(2.0, 100.0), drift=0.25),
            check(30, verdict("no-go", "law", step=30, supersedes_forecast=True), time=TimeSpent(1.0, 25.0), drift=0.5),
        ),
        "top_examples": (words(7, link="https://example.org/7"), words(3), words(4), words(99)),
        "blame": blamed(),
        "postponed": (Postponed(15, "a check takes about 2 s"),),
        "rehearsal": rehearsal(*(check(step).snapshot for step in (5, 10))),
        "rehearsal_verdict": verdict("go", states={"law": "within", "code": "inconclusive"}),
        "faults": (Fault(5, "screen", "OSError('gone')", "Traceback"), Fault(6, "screen", "OSError('gone')", "Traceback")),
    }
    return Logged(**(vars(EMPTY) | fields | changes))


def blamed(text: str = "court") -> Attribution:
    """Two rows to blame for a domain, one of which stands out."""
    rows = (
        AttributedRow(41, 0.75, 7, Snippet("the high ", text, " held", 2.0)),
        AttributedRow(3, 0.25, 3, Snippet(text, " of", text, 1.0)),
    )
    name = "law" if text == "court" else text
    sources = (SourceAttribution("opinions", 390, Estimate(0.25, 0.125, 0.375), 1), SourceAttribution("notes", 4, UNKNOWN, 0))
    found = DomainAttribution(name, 0.75, -0.125, 0.5, 1, rows, sources)
    return Attribution(IDENTITY, n_rows=400, n_read=400, n_cut=0, domains={name: found}, left_out=(41,), seconds=9.0)


def written(log: RunDirectory, logged: Logged) -> None:
    """Write a run as the callback does."""
    if logged.settings is not None:
        log.write_settings(logged.settings)
    if logged.forecast is not None and logged.forecast_verdict is not None:
        log.write_forecast(logged.forecast, logged.forecast_verdict, logged.other_forecasts)
    if logged.rehearsal is not None:
        log.write_rehearsal(logged.rehearsal, logged.rehearsal_verdict)
    log.append_top_examples(logged.top_examples)
    if logged.blame is not None:
        log.write_attribution(logged.blame)
    for one in logged.checks:
        log.append_check(one.snapshot, one.verdict, one.time)
    for one in logged.postponed:
        log.append_postponed(one.step, one.reason)
    for one in logged.faults:
        log.append_fault(one.step, one.what, one.error, one.trace)
