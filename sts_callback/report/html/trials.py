"""Dose curves: what a few steps at each learning rate, with and without replay, did to each protected domain."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sts_callback.records.rehearsal import Trial, Trials
from sts_callback.report import formatting
from sts_callback.report.data import ReportData
from sts_callback.report.html import charts
from sts_callback.report.html.components import domain, more, say, section, table, with_interval
from sts_callback.report.html.markup import Html, join, tag
from sts_callback.report.trials import answers, replay_words

_KINDS = ("harm", "dashed", "second")
"""Classes of the style sheet for the mixtures of a picture, the training data alone first."""


def trials_section(story: ReportData) -> Html:
    """A picture for each protected domain, and all numbers; nothing where nothing was tried."""
    found = story.trials
    if found is None:
        return join()
    n_steps = found.trials[0].rehearsal.doses[0].n_steps
    return section(
        "doses",
        "Which learning rate keeps the budgets?",
        say(
            f"Each point is {n_steps} real steps ({found.adapter}), measured and put back. The line across is the budget. "
            "Domains share one scale."
        ),
        tag("ul", *(tag("li", answer) for answer in answers(found))),
        tag("div", *(_panel(found, name) for name in found.budgets), class_="panels"),
        _key(found) if len(found.mixtures) > 1 else join(),
        more("All numbers", _table(found)),
    )


def _panel(found: Trials, name: str) -> Html:
    budget = found.limits[name]
    form = formatting.harm_form(budget.unit)
    curves = _curves(found, name)
    alike = [other for other, limit in found.limits.items() if limit.unit == budget.unit]  # these share a scale
    drawn = [e for other in alike for curve in _curves(found, other) for _, e in curve.points]
    rates = sorted({trial.learning_rate for trial in found.trials})
    low, high = math.log10(rates[0]), math.log10(rates[-1])
    room = 0.06 * (high - low) or 0.5
    return tag(
        "figure",
        tag("figcaption", domain(name), tag("small", f"change after the steps by learning rate, {budget.unit}")),
        charts.lines(
            curves,
            charts.Axis(low - room, high + room),
            charts.Axis.over(drawn, 0.0, *(found.limits[other].value for other in alike)),
            label=f"change of {name} by learning rate, budget {formatting.budget(found.budgets[name])}",
            form=form,
            levels=[(budget.value, "threshold")],
            along=[(math.log10(rate), f"{rate:g}") for rate in rates],
        ),
    )


def _curves(found: Trials, name: str) -> list[charts.Line]:
    """Of a domain, a curve over rates for each mixture that is drawn."""
    unit = found.limits[name].unit
    return [
        charts.Line([(_place(t), t.check.domains[name].harm_in(unit)) for t in found.of(replay)], kind)
        for replay, kind in zip(found.mixtures, _KINDS, strict=False)
    ]


def _place(trial: Trial) -> float:
    return math.log10(trial.learning_rate)


def _key(found: Trials) -> Html:
    def words(replay: Mapping[str, float]) -> str:
        return f"replay: {replay_words(replay)} "

    shown = [tag("span", tag("i", class_=f"key {kind}"), words(r)) for r, kind in zip(found.mixtures, _KINDS, strict=False)]
    left_out = found.mixtures[len(_KINDS) :]
    return tag("figcaption", *shown, *([tag("small", f"{len(left_out)} more in the table")] if left_out else []))


def _table(found: Trials) -> Html:
    units = {name: budget.unit for name, budget in found.limits.items()}
    rows = [
        [
            replay_words(trial.replay),
            f"{trial.learning_rate:g}",
            trial.finding,
            *(with_interval(trial.check.domains[n].harm_in(unit), formatting.harm_form(unit)) for n, unit in units.items()),
        ]
        for trial in found.trials
    ]
    return table(["replay", "rate", "budgets", *(f"{name}, {unit}" for name, unit in units.items())], rows)
