"""The section on steps that were taken before training, measured and put back."""

from __future__ import annotations

from sts_callback.records import DomainDrift
from sts_callback.records.rehearsal import Dose, Rehearsal
from sts_callback.report import formatting
from sts_callback.report.data import ReportData
from sts_callback.report.html.components import badge, domain, meanings, more, name_row, say, section, table, with_interval
from sts_callback.report.html.markup import Html, join, tag

_NET = ("net", "the score behind transfer, with the features that these steps moved in place of the forecast's")


def rehearsal_section(story: ReportData) -> Html:
    """What a few steps at the run's own rate have done to each domain, and what more of them have."""
    title = "Rehearsal: a few steps, measured and put back"
    rehearsal = story.rehearsal
    if rehearsal is None:
        return section("rehearsal", title, say("No rehearsal can be read in this run's folder."))
    if not rehearsal.doses:
        return section("rehearsal", title, say(f"The run was not rehearsed: {rehearsal.skipped}"))
    own, *further = rehearsal.doses
    features = len(own.check.realised_features)
    return section(
        "rehearsal",
        title,
        say(
            f"Before the first of {rehearsal.steps_planned} steps, the trainer took {_steps(own)}, the peak of the schedule, on "
            "rows of its own data; then all was put back, to the bit. What these steps have done to each domain is a sign of "
            "what training at this rate will do.",
            *(f" {_steps(dose)}, {dose.multiple:.1f} times that, followed." for dose in further),
        ),
        _judged(story),
        _doses(story, rehearsal),
        say(
            f"Of the {features} features that the first {own.n_steps} steps moved most on the training data, the forecast had "
            f"named {own.check.n_shared}; {formatting.percent(own.check.train.share_on_forecast)} of that drift lies on the "
            "forecast's features."
        )
        if story.has_sae
        else join(),
    )


def _judged(story: ReportData) -> Html:
    verdict = story.rehearsal_verdict
    if verdict is None or not verdict.reasons:
        return join()
    reasons = [tag("li", domain(name), f" {reason}") for name, reason in verdict.reasons.items()]
    return join(
        say("Verdict before training, by the steps at the run's own rate: ", badge(verdict.decision, 0)),
        more("Its reasons", tag("ul", *reasons)),
    )


def _doses(story: ReportData, rehearsal: Rehearsal) -> Html:
    own = rehearsal.doses[0].check
    states = story.rehearsal_verdict.states if story.rehearsal_verdict else {}
    names = [own.train.name, *(name for name in story.domains if name in own.domains)]
    rows = []
    for name in names:
        expected = [
            with_interval(rehearsal.expected[name], formatting.nats) if name in rehearsal.expected else formatting.UNKNOWN
        ]
        cells: list[str] = [name_row(name, story.budgets), states.get(name, ""), *expected]
        for dose in rehearsal.doses:
            found: DomainDrift = dose.check.domains.get(name, dose.check.train)
            cells += [
                formatting.nats(found.nll_change.value),
                formatting.interval(found.nll_change, formatting.nats),
                formatting.percent_1(found.relative_drift.value),
                *([formatting.plain(found.sts_net)] if story.has_sae else []),
            ]
        rows.append(cells)
    each = ["NLL change", "95%", "drift", *(["net"] if story.has_sae else [])]
    groups = [("", 3), *((_steps(dose), len(each)) for dose in rehearsal.doses)]
    return join(
        table(["domain", "state", "expected at the end", *each * len(rehearsal.doses)], rows, groups=groups),
        meanings(
            ("state", "within the budget, on course to pass it (over half of it for sure), over it, or inconclusive"),
            (
                "expected at the end",
                "change of NLL, nats a token, with the interval for a single domain: by runs of a model of this size that were "
                "rehearsed and then made; a dash where none are known",
            ),
            *([_NET] if story.has_sae else []),
        ),
    )


def _steps(dose: Dose) -> str:
    return f"{dose.n_steps} steps at a rate of {dose.learning_rate:.2g}"
