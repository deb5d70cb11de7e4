"""Section on the forecast."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from sts_callback.records import DomainForecast, Estimate, Forecast
from sts_callback.report import formatting
from sts_callback.report.data import ReportData
from sts_callback.report.html import charts
from sts_callback.report.html.components import badge, domain, meanings, more, name_row, say, section, table
from sts_callback.report.html.markup import Html, join, tag
from sts_callback.report.validated import WHAT_HOLDS

_NAN = math.nan
_WITH_SAE = (
    "The features (directions in the model's activations that an SAE has found) which they shift are the ones that training is "
    "expected to shift. The {} most shifted hold {} of the whole shift."
)
_WITHOUT_SAE = (
    "How much more than plain prose they shift the raw activations of one layer says how much training is expected to. No SAE "
    "was used."
)
_MEANINGS = (
    ("net", "the score behind transfer: cross, less what plain prose in place of the examples shifts on these features"),
    ("cross", "share of the shift by the examples that falls on the training data's features"),
    ("random", "the same over random features of like activity"),
    ("rel, ICL, act", "further scores by the domain's own examples; the last two grow with how active a domain is"),
    ("shift", "size of the whole shift in features, over their activity"),
    ("raw", "the shift of raw activations over that by plain prose: the strongest baseline without an SAE"),
)
_RAW_MEANINGS = (
    ("net", "the score behind transfer: the share of the shift by the examples that is more than the shift by plain prose"),
    ("shift", "size of the shift of raw activations, over their size"),
    ("raw", "that shift over the shift by plain prose: it orders domains as net does"),
)


def forecast_section(story: ReportData) -> Html:
    """Table and charts of how much each domain is expected to move, and in which direction."""
    title = "Forecast: what training will move"
    if story.forecast is None:
        return section("forecast", title, say("No forecast can be read in this run's folder."))
    forecast, has_sae = story.forecast, story.forecast.identity.has_sae
    return section(
        "forecast",
        title,
        say(
            "Before the first step, answered training examples were put in front of each domain's texts. "
            + (_WITH_SAE.format(len(forecast.features), formatting.percent(forecast.features_share)) if has_sae else _WITHOUT_SAE)
        ),
        _pictures(story, forecast),
        say(
            "The first picture says how much, never in which direction"
            + (f"; the {'other two' if has_sae else 'other'}, which fare worse than others. " if _has_order(forecast) else ". "),
            WHAT_HOLDS,
        ),
        _judged(story),
        more("All scores and their baselines", _all_scores(story, forecast)),
        _by_sae(story),
    )


def _has_order(forecast: Forecast) -> bool:
    return len(forecast.domains) > 1


def _pictures(story: ReportData, forecast: Forecast) -> Html:
    rows = [forecast.domains[name] for name in story.domains if name in forecast.domains]
    budgets = [x for x in map(formatting.in_nats, story.budgets.values()) if math.isfinite(x)]
    has_order = _has_order(forecast)
    places = charts.Axis.over([d.transfer for d in rows], 0.0, 1.0)
    by_context = charts.Axis.over([d.nll_change for d in rows], 0.0, *budgets)

    def budget(d: DomainForecast) -> list[tuple[float, str]]:
        return [(0.0, "zero"), (formatting.in_nats(story.budgets.get(d.name, _NAN)), "threshold")]

    return tag(
        "div",
        _panel(
            "Does it move? Transfer",
            "0%: shifted no more than by plain prose in place of the examples; 100%: as far as the training data itself. "
            f"{'It orders domains; a' if has_order else 'A'} low one is no promise that a domain stays.",
            rows,
            places,
            formatting.percent,
            "movement",
            lambda d: d.transfer,
            lambda d: [(0.0, "zero"), (1.0, "zero")],
        ),
        _panel(
            "Does it get worse? NLL change in context",
            "How much more the right answers surprise the model with the training examples in front than with plain prose, in "
            f"nats a token. {'The further right, the worse a domain fares beside the others. ' if has_order else ''}"
            "Being left of 0 is no promise." + (" Dashed: the budget." if budgets else ""),
            rows,
            by_context,
            formatting.nats,
            "harm",
            lambda d: d.nll_change,
            budget,
        ),
        _by_gradient(rows) if forecast.identity.has_sae else join(),
        class_="panels",
    )


def _by_gradient(rows: Sequence[DomainForecast]) -> Html:
    return _panel(
        "Does it get worse? NLL change by gradient",
        "The same after a small training step that gains the training data one nat a token.",
        rows,
        charts.Axis.over([d.gradient_change for d in rows], 0.0),
        formatting.nats,
        "harm",
        lambda d: d.gradient_change,
        lambda d: [(0.0, "zero")],
    )


def _panel(
    title: str,
    meaning: str,
    rows: Sequence[DomainForecast],
    axis: charts.Axis,
    form: formatting.Form,
    kind: str,
    estimate_of: Callable[[DomainForecast], Estimate],
    bars_of: Callable[[DomainForecast], Iterable[tuple[float, str]]],
) -> Html:
    """One number of each domain, on a common axis."""
    made = []
    for d in rows:
        estimate = estimate_of(d)
        ends = formatting.interval(estimate, form)
        label = f"{d.name}: {form(estimate.value)}" + (f", {ends}" if ends else "")
        picture = charts.row(axis, estimate, kind, label=label, bars=bars_of(d))
        made.append(tag("div", domain(d.name), picture, tag("span", form(estimate.value), class_="value"), class_="line"))
    ticks = tag("div", *(tag("span", form(x), style=f"left:{axis.at(x)}%") for x in axis.ticks(3)), class_="ticks")
    made.append(tag("div", tag("span"), ticks, tag("span"), class_="line", aria_hidden="true"))
    return tag("figure", tag("figcaption", tag("b", title), tag("span", meaning)), *made)


def _judged(story: ReportData) -> Html:
    verdict = story.forecast_verdict
    if verdict is None or not verdict.reasons:
        return join()
    reasons = [tag("li", domain(name), f" {reason}") for name, reason in verdict.reasons.items()]
    return join(
        say("Verdict in context: " if story.rehearsal_verdict else "Verdict before training: ", badge(verdict.decision, 0)),
        more("Its reasons", tag("ul", *reasons)),
    )


def _all_scores(story: ReportData, forecast: Forecast) -> Html:
    ordered = [forecast.train, *(forecast.domains[name] for name in story.domains if name in forecast.domains)]
    places = forecast.harm_rank
    has_sae = forecast.identity.has_sae
    by_gradient = ["gradient", "95%"] if has_sae else []
    has_order = _has_order(forecast)
    rank, harm = (["rank", "above next"], ["harm"]) if has_order else ([], [])
    titles = ["domain", "transfer", "95%", *rank, "NLL change", "95%", *by_gradient, *harm]
    first = [
        [
            name_row(d.name, story.budgets),
            formatting.percent(d.transfer.value),
            formatting.interval(d.transfer, formatting.percent),
            *([f"{d.rank[0]} to {d.rank[1]}" if d.rank[0] else "", formatting.percent(d.p_above_next)] if has_order else []),
            formatting.nats(d.nll_change.value),
            formatting.interval(d.nll_change, formatting.nats),
            *([formatting.nats(d.gradient_change.value)] if has_sae else []),
            *([formatting.interval(d.gradient_change, formatting.nats)] if has_sae else []),
            *([str(places.get(d.name, ""))] if has_order else []),
        ]
        for d in ordered
    ]
    scores = [
        [
            name_row(d.name, story.budgets),
            formatting.plain(d.sts_net.value),
            *(map(formatting.plain, _feature_scores(d)) if has_sae else ()),
            formatting.plain(d.relative_shift.value),
            formatting.plain(d.raw_over_prose.value),
            f"{d.cosine:.3f}" if math.isfinite(d.cosine) else formatting.UNKNOWN,
            formatting.plain(d.nll.value),
        ]
        for d in ordered
    ]
    by_features = ["cross", "random", "rel", "ICL", "act"] if has_sae else []
    order = (
        ("rank", "between which ranks by transfer the domain lies, at 95%"),
        ("above next", "in what share of resamples its transfer is above that of the next one in that order"),
        ("harm", f"place by NLL change{' and gradient together' if has_sae else ''}, 1 the worst: an order, not a sign"),
    )
    return join(
        table(titles, first),
        table(["domain", "net", *by_features, "shift", "raw", "cosine", "NLL"], scores),
        meanings(
            *(order if has_order else ()),
            *(_MEANINGS if has_sae else _RAW_MEANINGS),
            ("cosine, NLL", "likeness of raw activations to the training data's, and NLL before training: baselines too"),
        ),
    )


def _feature_scores(d: DomainForecast) -> tuple[float, ...]:
    return d.sts_cross.value, d.sts_cross.random, d.sts_rel.value, d.sts_icl.value, d.sts_act.value


def _by_sae(story: ReportData) -> Html:
    if not story.transfers:
        return join()
    saes = list(story.transfers)
    numbers = [f"SAE {number}" for number in range(1, len(saes) + 1)]
    rows = [[domain(name), *(formatting.percent(story.transfers[sae].get(name, _NAN)) for sae in saes)] for name in story.domains]
    return join(
        tag("h3", "Transfer by each SAE; the first one decides"),
        table(["domain", *numbers], rows),
        meanings(*((number, sae.partition(": ")[2]) for number, sae in zip(numbers, saes, strict=True))),
    )
