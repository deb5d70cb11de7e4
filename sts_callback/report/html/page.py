"""The page: its frame, the verdict and the sections in order. It loads nothing and runs no scripts."""

from __future__ import annotations

import math
from pathlib import Path

from sts_callback.errors import DataError
from sts_callback.report import formatting
from sts_callback.report.data import ReportData, build, reached_in
from sts_callback.report.html.components import badge, beyond, domain, flagged, more, name_row, say, table, with_interval
from sts_callback.report.html.cost import cost_section, faults_section, reproduce_section
from sts_callback.report.html.drift import drift_section, overlap_section
from sts_callback.report.html.forecast import forecast_section
from sts_callback.report.html.limits import attribution_section, blind_section, examples_section, left_out_section
from sts_callback.report.html.markup import Html, join, tag
from sts_callback.report.html.rehearsal import rehearsal_section
from sts_callback.report.html.trials import trials_section
from sts_callback.runs.directory import RunDirectory

_STYLE = Path(__file__).with_name("page.css")
_SECTIONS = {
    "doses": ("Dose curves", trials_section),
    "forecast": ("Forecast", forecast_section),
    "rehearsal": ("Rehearsal", rehearsal_section),
    "drift": ("Drift", drift_section),
    "overlap": ("Overlap", overlap_section),
    "features": ("Features", examples_section),
    "blame": ("Rows", attribution_section),
    "blind-spots": ("Blind spots", blind_section),
    "left-out": ("Measured", left_out_section),
    "cost": ("Cost", cost_section),
    "faults": ("Faults", faults_section),
    "reproduce": ("Reproduce", reproduce_section),
}
_MOST_REASONS = 4  # unfolded; the table below has the same numbers of all domains
_OF_NLL = ("nats/token", "bits/byte")  # units of budgets; the other one is of token accuracy
_NOTHING_LOADED = "default-src 'none'; style-src 'unsafe-inline'"


def page(story: ReportData) -> str:
    """Make the report as one HTML page.

    Args:
        story: the content.

    """
    name = story.forecast.identity.model_name if story.forecast else "a run"
    head = tag(
        "head",
        Html('<meta charset="utf-8"><meta name="color-scheme" content="light dark">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_LOADED}">'),
        tag("title", f"STS report: {name}"),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    sections = {anchor: made(story) for anchor, (_, made) in _SECTIONS.items()}
    links = [tag("a", _SECTIONS[anchor][0], href=f"#{anchor}") for anchor, made in sections.items() if made]
    body = tag("body", tag("header", *_top(story)), tag("nav", *links, aria_label="sections"), tag("main", *sections.values()))
    return f'<!DOCTYPE html>\n<html lang="en">{head}{body}</html>\n'


def _top(story: ReportData) -> list[Html]:
    """The verdict, its reasons, and movement and harm of all domains."""
    headline, forecast = story.headline, story.forecast
    made_with = (
        f"{forecast.identity.model_name}, read by {forecast.identity.sae_name} at {forecast.identity.hook_name}"
        if forecast
        else ""
    )
    reasons = [tag("li", domain(name), f" {reason}") for name, reason in headline.reasons.items()]
    others = [tag("li", domain(name), f" {reason}") for name, reason in headline.other_reasons.items()]
    shown, folded = reasons[:_MOST_REASONS], reasons[_MOST_REASONS:]
    notes = [tag("li", note) for note in headline.notes]
    return [
        tag("p", "STS report", *([": ", tag("bdi", made_with)] if made_with else []), class_="over"),
        tag(
            "h1",
            *([badge(headline.decision, headline.step), " "] if headline.decision else []),
            headline.sentence,
        ),
        tag("ul", *shown) if shown else join(),
        more(formatting.counted(len(folded), "more reason"), tag("ul", *folded)) if folded else join(),
        more(f"{formatting.counted(len(others), 'other protected domain')}", tag("ul", *others)) if others else join(),
        tag("ul", *notes, class_="notes") if notes else join(),
        _two_questions(story),
    ]


def _two_questions(story: ReportData) -> Html:
    """Movement and harm, as expected and as found."""
    then = dict(story.forecast.domains) if story.forecast else {}
    now = dict(story.drift.latest.domains) if story.drift else {}
    if not (then or now):
        return join()
    policy = story.settings.policy if story.settings else None
    rows = []
    for name in story.domains:
        budget, cells = story.budgets.get(name, math.nan), [formatting.UNKNOWN] * 5
        if name in then:
            transfer, change = then[name].transfer.value, then[name].nll_change
            cells[0] = formatting.percent(transfer)
            reached = reached_in(then[name], budget)
            cells[2] = flagged(reached in _OF_NLL, formatting.nats(change.value))
        if name in now:
            drift, change = now[name].relative_drift, now[name].nll_change
            cells[1] = beyond(drift.value, policy.min_drift if policy else math.inf, with_interval(drift, formatting.percent_1))
            reached = reached_in(now[name], budget)
            cells[3] = flagged(reached in _OF_NLL, with_interval(change, formatting.nats))
            cells[4] = flagged(reached == "points", formatting.accuracy(now[name].accuracy))
        rows.append([name_row(name, story.budgets), *cells, formatting.budget(budget) if name in story.budgets else ""])
    titles = ["domain", "expected: transfer", "found: drift", "expected: NLL change", "found: NLL change"]
    titles += ["found: token accuracy", "budget"]
    return join(
        table(titles, rows, groups=[("", 1), ("Does it move?", 2), ("Does it get worse?", 4)]),
        say(
            "A verdict is about harm. Transfer and drift say how much a domain moves, never in which direction. \u25b2: reaches "
            "its threshold. NLL change: in nats a token, above 0 is worse. Token accuracy: share of the answers' tokens that are "
            "the model's most likely next ones, before training and now."
        ),
    )


def write_report(log: RunDirectory) -> Path:
    """Write `report.html` and `report.json` into the folder of a run, from all that can be read there.

    Args:
        log: directory of the run, which may still run or have died.

    Returns:
        Path of the page.

    Raises:
        DataError: if nothing can be read.
        OSError: if the folder cannot be read or written.

    """
    logged = log.read_all()
    if logged.is_empty:
        reasons = f" {' '.join(logged.unreadable)}" if logged.unreadable else ""
        raise DataError(
            f"report: {log.folder} holds no record of a run that can be read.{reasons} Give the output_dir of a run with "
            "STSCallback, or the folder sts in it."
        )
    story = build(logged)
    return log.write_report(page(story), story.to_json())
