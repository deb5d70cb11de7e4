"""The page: its frame, the verdict and the sections in order. It loads nothing and runs no scripts."""

from __future__ import annotations

from pathlib import Path

from sts_callback.errors import DataError
from sts_callback.report.data import ReportData, build
from sts_callback.report.html.components import SIGNS, STANDINGS, badge, command, domain, more, name_row, say, table
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
    """The verdict, the table that the terminal shows, what to do; reasons are unfolded on demand."""
    headline, forecast = story.headline, story.forecast
    made_with = ""
    if forecast:
        reader = f"by {forecast.identity.sae_name}" if forecast.identity.has_sae else "without an SAE"
        made_with = f"{forecast.identity.model_name}, read {reader} at {forecast.identity.hook_name}"
    reasons = [
        tag("li", domain(name), f" {reason}")
        for some in (headline.reasons, headline.other_reasons)
        for name, reason in some.items()
    ]
    notes = [tag("li", note) for note in headline.notes]
    return [
        tag("p", "STS report", *([": ", tag("bdi", made_with)] if made_with else []), class_="over"),
        tag(
            "h1",
            *([badge(headline.decision, headline.step), " "] if headline.decision else []),
            headline.sentence,
        ),
        _summary(story),
        _advice(story),
        more("The reasons, domain by domain", tag("ul", *reasons)) if reasons else join(),
        tag("ul", *notes, class_="notes") if notes else join(),
    ]


def _summary(story: ReportData) -> Html:
    """The table, with a sign and a word where a domain is threatened."""
    summary = story.summary
    if summary is None or story.trials is not None:  # of which the first section tells
        return join()
    rows = []
    for row in summary.rows:
        *cells, last = row.cells
        shown = tag(
            "span", *([SIGNS[row.standing], " "] if row.standing else []), last, class_=f"standing {STANDINGS[row.standing]}"
        )
        found = map(_with_ends_apart, cells)
        rows.append([name_row(row.name, story.budgets), *found, shown if row.is_protected else _with_ends_apart(last)])
    return join(
        table(["domain", *summary.titles], rows), say(" ".join(filter(None, (summary.decides, summary.basis, summary.legend))))
    )


def _with_ends_apart(cell: str) -> Html:
    """A number with its interval in smaller type, which a narrow page sets below it."""
    value, *ends = cell.partition(" [")
    return join(value, *([tag("small", "".join(ends))] if ends[1] else []))


def _advice(story: ReportData) -> Html:
    """What to do about a no-go or an alarm."""
    if not story.advice:
        return join()
    made = [tag("li", one.what, *([" ", command(one)] if one.command else [])) for one in story.advice]
    return join(tag("h2", "What to do"), tag("ol", *made))


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
    story = build(logged, log.folder.parent if log.folder.name == "sts" else log.folder)
    return log.write_report(page(story), story.to_json())
