"""Sections on the cost of watching, on failures, and on how to reproduce the numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from sts_callback.report import formatting
from sts_callback.report.data import ReportData
from sts_callback.report.html.components import command, domain, more, say, scrolled, section, table
from sts_callback.report.html.markup import Html, join, shortened, tag

_MOST_ROWS = 12  # rows for skipped checks or failures; the log has them all
_LONGEST_ERROR, _LONGEST_TRACE = 400, 4000  # characters


def cost_section(story: ReportData) -> Html:
    """Time spent: on the forecast by parts, on the rehearsal, on checks, and what was skipped to keep it low."""
    cost, parts = story.cost, []
    if story.forecast is not None:
        whole = story.forecast.seconds
        by_part = sorted(story.forecast.seconds_by_part.items(), key=lambda item: -item[1])
        told = dict(by_part) | {"the rest": whole - sum(s for _, s in by_part)} if by_part else {}
        rows = [
            [part, formatting.seconds(s), formatting.percent(s / whole if whole > 0 else math.nan)] for part, s in told.items()
        ]
        parts.append(say(f"The forecast took {formatting.seconds(whole)}, once, before training."))
        parts.append(table(["part of the forecast", "time", "share"], rows) if rows else join())
    if story.rehearsal is not None and story.rehearsal.doses:
        doses = story.rehearsal.doses
        n_steps = sum(dose.n_steps for dose in doses)
        checks_s = sum(dose.check.seconds for dose in doses)
        parts.append(
            say(
                f"The rehearsal took {formatting.seconds(story.rehearsal.seconds)}, once, before training: {n_steps} steps, and "
                f"{formatting.seconds(checks_s)} of that for {formatting.counted(len(doses), 'check')}."
            )
        )
    if cost.n_checks:
        sentence = (
            f"{formatting.counted(cost.n_checks, 'drift check')} took {formatting.seconds(cost.checks_s)} together, the longest "
            f"{formatting.seconds(cost.longest_check_s)}."
        )
        if math.isfinite(cost.overhead_share):
            sentence += (
                f" Against {formatting.seconds(cost.training_s)} of training up to the last check that is an overhead of "
                f"{formatting.percent_1(cost.overhead_share)}."
            )
        else:
            sentence += " The log does not tell how long training itself took, so the overhead is not known."
        if story.settings is not None:
            limit = story.settings.max_overhead
            allowed = f" Allowed: {formatting.percent_1(limit)}, in which the last check is not counted."
            sentence += allowed if limit < 1 else " No limit was set."
        parts.append(say(sentence))
    if cost.postponed:
        rows = [[f"step {p.step}", shortened(p.reason, _LONGEST_ERROR)] for p in cost.postponed[:_MOST_ROWS]]
        left = len(cost.postponed) - len(rows)
        parts += [
            say(f"Checks were skipped {formatting.counted(len(cost.postponed), 'time')} to stay within that limit."),
            table(["when", "why"], rows, cls="words"),
            say(f"skipped.jsonl has {left} more.") if left else join(),
        ]
    return section("cost", "Cost", *(parts or [say("Nothing about time can be read in this run's folder.")]))


def faults_section(story: ReportData) -> Html:
    """Failures of ours that training survived."""
    if not story.faults:
        return section("faults", "Faults", say("No failure of ours was recorded."))
    shown = []
    for told in story.faults[:_MOST_ROWS]:
        fault = told.first
        when = f"step {fault.step}" if told.n_times == 1 else f"{told.n_times} times, from step {fault.step} to {told.last_step}"
        trace = more("Where", tag("pre", fault.trace[-_LONGEST_TRACE:], **scrolled("traceback"))) if fault.trace else join()
        shown.append(tag("li", tag("b", fault.what), f", {when}: ", tag("code", shortened(fault.error, _LONGEST_ERROR)), trace))
    left = len(story.faults) - len(shown)
    return section(
        "faults",
        "Faults",
        say("Failures of ours, not of your training, which went on."),
        tag("ul", *shown),
        say(f"faults.jsonl has {left} more.") if left else join(),
    )


def reproduce_section(story: ReportData) -> Html:
    """Fingerprints, settings and versions. Two runs can be compared only if their fingerprints agree."""
    parts = []
    if story.forecast is not None:
        identity = story.forecast.identity
        rows = [
            ["model", identity.model_name, tag("code", identity.model)],
            ["SAE", *([identity.sae_name, tag("code", identity.sae)] if identity.has_sae else ["none: raw activations", ""])],
            ["read at", identity.hook_name, ""],
            *([["computed in", identity.precision, ""]] if identity.precision else []),
            ["probes", "all texts and how they are counted", tag("code", identity.probes)],
        ]
        parts += [
            say("Numbers can be compared with another run's only where these agree:"),
            table(["what", "name", "SHA-256"], rows, cls="words"),
        ]
    if story.settings is not None:
        settings = story.settings
        asked = {"check_on": settings.check_on, "action": settings.action, "max_overhead": settings.max_overhead}
        policy = {name: value for name, value in _fields(settings.policy).items() if name != "budgets"}
        budgets = [
            [domain(name), budget if isinstance(budget, str) else f"{budget:g} nats a token"]
            for name, budget in settings.policy.budgets.items()
        ]
        parts += [
            more("Protected domains and their budgets", table(["domain", "budget"], budgets, cls="words")) if budgets else join(),
            more(
                "Settings",
                _settings(asked),
                tag("h3", "ProbeConfig"),
                _settings(_fields(settings.probes)),
                tag("h3", "PolicyConfig"),
                _settings(policy),
            ),
            more("Versions", _settings(settings.versions)),
        ]
    else:
        parts.append(say("Settings and versions are not in this run's log."))
    if again := story.to_report_again:
        parts.append(say(again.what, " ", command(again)))
    parts.append(say("Its numbers are in report.json."))
    return section("reproduce", "How to make these numbers again", *parts)


def _fields(config: object) -> dict[str, object]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]


def _settings(values: Mapping[str, object]) -> Html:
    return table(
        ["name", "value"],
        [[tag("code", name), shortened(str(value), _LONGEST_ERROR)] for name, value in values.items()],
        cls="words",
    )
