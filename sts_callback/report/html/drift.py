"""Sections on what training has done and how far the forecast was right."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sts_callback.errors import NEEDS_SAE
from sts_callback.records import DomainDrift, Estimate
from sts_callback.report import formatting
from sts_callback.report.data import Drift, ReportData
from sts_callback.report.headline import alarm_rule
from sts_callback.report.html import charts
from sts_callback.report.html.components import (
    SIGNS,
    STANDINGS,
    badge,
    domain,
    meanings,
    more,
    name_row,
    named,
    say,
    section,
    table,
    with_interval,
)
from sts_callback.report.html.markup import Html, join, tag
from sts_callback.report.summary import standing_of

_MOST_CARDS = 8  # unfolded; further domains are folded away
_MOST_STRETCHES = 8  # likewise
_MOST_STEPS = 4  # named one by one
_DIGIT, _GAP = 3.5, 2.0  # percent of the timeline that a digit takes on a narrow page, and between two numbers
_NAN = math.nan


def drift_section(story: ReportData) -> Html:
    """Charts of movement and harm of each domain over steps, side by side."""
    title = "Drift: what training has moved"
    if story.drift is None:
        return section("drift", title, say("No drift check can be read in this run's folder."))
    drift, policy = story.drift, story.settings.policy if story.settings else None
    if story.settings is None or policy is None:
        thresholds = "Thresholds are not in this run's log, so none is drawn."
    else:
        thresholds = (
            f"Dashed: drift counts as movement from {formatting.percent(policy.min_drift, 1)} on, a rise of NLL as harm from the "
            f"domain's budget on, if that is in nats. {alarm_rule(story.settings, drift.steps)}"
        )
    moving = "features" if story.has_sae else "raw activations"
    train = drift.latest.train.name
    names = [name for name in story.domains if name in drift.series]
    cards = [_card(story, drift, name) for name in names]
    shown, folded = cards[:_MOST_CARDS], cards[_MOST_CARDS:]
    rest = more(f"{formatting.counted(len(folded), 'more domain')}", tag("div", *folded, class_="cards")) if folded else join()
    return section(
        "drift",
        title,
        say(
            "At each check the same texts are read again with the weights of that step. ",
            tag("b", "Drift"),
            f" is how far a domain's {moving} have moved since step 0: squared change over squared activity, 0% if nothing has"
            f"{'' if story.has_sae else '; an estimate'}. ",
            tag("b", "NLL change"),
            " is how much more the right answers surprise the model than at step 0, in nats a token: above 0 is worse. The first "
            "is about movement, the second about harm. Shaded: 95% intervals. At the foot: alarms and watches. ",
            thresholds,
        ),
        _timeline(story, drift),
        tag("div", *shown, _card(story, drift, train), class_="cards"),
        rest,
        say("All domains share one scale; the training data has its own."),
        _verdicts(drift),
        more(f"All numbers of the last check, at step {drift.steps[-1]}", _latest(story, drift)),
        _output_drift(drift),
    )


def overlap_section(story: ReportData) -> Html:
    """Section on how many of the features that moved most the forecast had named."""
    title = "Did the forecast name the features that moved?"
    if story.drift is None or story.forecast is None:
        return section("overlap", title, say("That takes a forecast and a drift check; one of them cannot be read."))
    if not story.has_sae:
        return section("overlap", title, say(NEEDS_SAE))
    drift = story.drift
    shared = [
        Estimate(n / drift.n_features, _NAN, _NAN) if drift.n_features else Estimate(_NAN, _NAN, _NAN) for n in drift.n_shared
    ]
    hit = [Estimate(share, _NAN, _NAN) for share in drift.share_on_forecast]
    lines = [charts.Line(list(zip(drift.steps, shared, strict=True)), "movement")]
    lines.append(charts.Line(list(zip(drift.steps, hit, strict=True)), "second"))
    superseded = (
        say(
            f"From step {drift.superseded_at} on the training data itself has moved for sure. From there the features that "
            "training has moved count, in place of those that were forecast."
        )
        if drift.superseded_at
        else join()
    )
    return section(
        "overlap",
        title,
        say(
            f"At step {drift.steps[-1]} the forecast had named {drift.n_shared[-1]} of the {drift.n_features} features that "
            f"training moved most on its own data; {formatting.percent(drift.share_on_forecast[-1])} of that drift lies on the "
            "forecast's features. The more, the better the forecast was."
        ),
        tag(
            "figure",
            tag(
                "figcaption",
                tag("span", tag("i", class_="key movement"), "features named, of those that moved most "),
                tag("span", tag("i", class_="key second"), "share of the drift on the forecast's features"),
            ),
            charts.lines(lines, _steps(drift), charts.Axis(0, 1), label="overlap over steps", form=formatting.percent),
        ),
        superseded,
    )


def _timeline(story: ReportData, drift: Drift) -> Html:
    """How each protected domain stood at each check: a shape on a line of steps."""
    names = [name for name in story.domains if name in drift.series and any(drift.series[name].states)]
    if not names:
        return join()
    last = max(1, drift.steps[-1])

    def place(step: int) -> float:
        return round(100 * math.log(max(1, step)) / math.log(last), 2) if last > 1 else 0.0

    lines = []
    for name in names:
        found = [(step, standing_of(state)) for step, state in zip(drift.steps, drift.series[name].states, strict=True) if state]
        marks = [
            tag("span", SIGNS[standing], class_=f"standing {STANDINGS[standing]}", style=f"left:{place(step)}%")
            for step, standing in found
        ]
        told = ", ".join(f"step {step} {standing}" for step, standing in found)
        track = tag("div", *marks, class_="track", role="img", aria_label=f"{name}: {told}")
        lines.append(tag("div", domain(name), track, class_="line"))
    round_steps = (step for step in drift.steps if str(step)[0] in "125" and not str(step)[1:].strip("0"))
    room = 100 - _GAP - _DIGIT * len(str(last))  # beside the number of the last step
    marked = [*(step for step in round_steps if place(step) < room), last]
    ticks = tag("div", *(tag("span", str(step), style=f"left:{place(step)}%") for step in marked), class_="ticks")
    lines.append(tag("div", tag("span", "step"), ticks, class_="line", aria_hidden="true"))
    key = [
        tag("span", tag("span", sign, class_=f"standing {STANDINGS[standing]}"), f" {standing} ")
        for standing, sign in SIGNS.items()
        if standing
    ]
    return tag("figure", tag("figcaption", tag("b", "Each check against the budget")), tag("p", *key), *lines, class_="timeline")


def _card(story: ReportData, drift: Drift, name: str) -> Html:
    """Charts of one domain: movement on the left, harm on the right."""
    series, policy, is_train = (
        drift.series[name],
        story.settings.policy if story.settings else None,
        name == drift.latest.train.name,
    )
    scale = [name] if is_train else [other for other in drift.series if other != drift.latest.train.name]
    budgets = [] if is_train else [x for x in map(formatting.in_nats, story.budgets.values()) if math.isfinite(x)]
    least = [policy.min_drift] if policy else []
    moved = charts.Axis.over([e for other in scale for e in drift.series[other].drift], 0.0, *least)
    worse = charts.Axis.over([e for other in scale for e in drift.series[other].nll_change], 0.0, *budgets)
    # The graver marks come last: where checks are dense, they cover the others.
    marks = [*((float(step), "watch") for step in series.watched_at), *((float(step), "alarm") for step in series.alarmed_at)]
    now, change = series.drift[-1], series.nll_change[-1]
    left = charts.lines(
        [charts.Line(list(zip(drift.steps, series.drift, strict=True)), "movement")],
        _steps(drift),
        moved,
        label=f"drift of {name} over steps, {formatting.percent_1(now.value)} at the last check",
        form=formatting.percent,
        levels=[(x, "threshold") for x in least],
        marks=marks,
    )
    right = charts.lines(
        [charts.Line(list(zip(drift.steps, series.nll_change, strict=True)), "harm")],
        _steps(drift),
        worse,
        label=f"NLL change of {name} over steps, {formatting.nats(change.value)} at the last check",
        form=formatting.nats,
        levels=[(0.0, "zero"), (formatting.in_nats(story.budgets.get(name, _NAN)), "threshold")],
        marks=marks,
    )
    return tag(
        "article",
        tag("h3", name_row(name, story.budgets), *_standing(series.alarmed_at, series.watched_at)),
        tag("figure", tag("figcaption", tag("b", "Moved: drift "), with_interval(now, formatting.percent_1)), left),
        tag("figure", tag("figcaption", tag("b", "Worse: NLL change "), with_interval(change, formatting.nats)), right),
    )


def _standing(alarmed_at: Sequence[int], watched_at: Sequence[int]) -> list[Html]:
    """Explain the marks at the bottom of a chart."""
    found = []
    for steps, cls, word in ((alarmed_at, "bad", "alarm"), (watched_at, "warn", "watch")):
        if steps:
            listed = formatting.listing([str(step) for step in steps])
            few = f"{word} at step{'s' if len(steps) > 1 else ''} {listed}"
            many = f"{word} at {len(steps)} checks, step {steps[0]} to {steps[-1]}"
            found.append(tag("span", few if len(steps) <= _MOST_STEPS else many, class_=f"badge {cls}"))
    return found


def _verdicts(drift: Drift) -> Html:
    rows = [
        [
            f"step {s.first_step}" if s.n_checks == 1 else f"steps {s.first_step} to {s.last_step}",
            badge(s.decision, s.last_step),
            named(s.threatened),
            str(s.n_checks),
        ]
        for s in drift.verdicts
    ]
    made = table(["when", "verdict", "about", "checks"], rows, cls="words")
    return more("Verdict over time", made) if len(rows) > _MOST_STRETCHES else join(tag("h3", "Verdict over time"), made)


_BY_FEATURES = (
    ("raw drift", "the same of raw activations, without the SAE: an estimate"),
    ("on forecast", "share of the drift on the features that the forecast had named"),
)


def _latest(story: ReportData, drift: Drift) -> Html:
    snapshot = drift.latest
    sets = [snapshot.train, *(snapshot.domains[name] for name in story.domains if name in snapshot.domains)]
    rows = [
        [
            name_row(d.name, story.budgets),
            formatting.percent_1(d.relative_drift.value),
            formatting.interval(d.relative_drift, formatting.percent_1),
            *([formatting.percent_1(d.raw_drift)] if story.has_sae else []),
            *([formatting.percent(d.share_on_forecast)] if story.has_sae else []),
            formatting.nats(d.nll_change.value),
            formatting.interval(d.nll_change, formatting.nats),
            f"{d.p_worse:.3f}" if math.isfinite(d.p_worse) else formatting.UNKNOWN,
            formatting.plain(d.nll),
            str(d.n_queries),
            drift.latest_states.get(d.name, ""),
        ]
        for d in sets
    ]
    by_features = [title for title, _ in _BY_FEATURES] if story.has_sae else []
    reasons = [tag("li", domain(name), f" {reason}") for name, reason in drift.latest_reasons.items()]
    return join(
        table(["domain", "drift", "95%", *by_features, "NLL change", "95%", "p of a rise", "NLL now", "queries", "state"], rows),
        meanings(
            *(_BY_FEATURES if story.has_sae else ()),
            (
                "p of a rise",
                "of any rise of NLL, above 0: the chance of one like this if there were none, at this check alone and not "
                "corrected for other domains",
            ),
            (
                "state",
                "of the budget: within it, surely over half of it (on course), over it, or inconclusive. Its test is another: "
                "against half the budget, corrected for domains and checks",
            ),
        ),
        _accuracies(story, sets),
        tag("ul", *reasons),
    )


def _accuracies(story: ReportData, sets: Sequence[DomainDrift]) -> Html:
    rows = [
        [
            name_row(d.name, story.budgets),
            formatting.accuracy(found),
            formatting.points(found.change.value),
            formatting.interval(found.change, formatting.points),
            str(found.n_lost),
            str(found.n_gained),
            f"{found.n_queries_lost} of {d.n_queries}",
        ]
        for d in sets
        if (found := d.accuracy) is not None
    ]
    if not rows:
        return join()
    return join(
        table(["domain", "token accuracy", "change", "95%", "tokens lost", "gained", "queries with a loss"], rows),
        meanings(
            (
                "token accuracy",
                "share of the answers' tokens that are the model's most likely next ones, the right ones before them, at step 0 "
                "and now; its change in points",
            ),
            ("lost, gained", "answer tokens that were right at step 0 and are wrong now, and the other way round"),
        ),
    )


def _output_drift(drift: Drift) -> Html:
    if not any(math.isfinite(e.value) for e in drift.output_drift):
        return join()
    y = charts.Axis.over(drift.output_drift, 0.0)
    line = charts.Line(list(zip(drift.steps, drift.output_drift, strict=True)), "movement")
    return join(
        tag("h3", "What the policy writes"),
        say(
            "How far the texts that the model writes have moved since step 0, both read with the weights of the check; 0% where "
            "nothing has moved. The drift above is of the same texts throughout."
        ),
        tag("figure", charts.lines([line], _steps(drift), y, label="text drift over steps", form=formatting.percent)),
    )


def _steps(drift: Drift) -> charts.Axis:
    return charts.Axis(0, 1.03 * max(1, drift.steps[-1]))  # space for the last dot
