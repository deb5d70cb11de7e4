"""A run as a section of a model card: Markdown without links and without any of the user's texts.

Names of domains, model and SAE are in code spans, so nothing in a name becomes a link or markup.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.errors import DataError
from sts_callback.records import Decision, DomainDrift, DomainForecast
from sts_callback.records.run import Logged
from sts_callback.report.data import ReportData, build
from sts_callback.report.formatting import UNKNOWN, budget, counted, interval, nats, percent, percent_1
from sts_callback.report.headline import alarm_rule, ended_alarms
from sts_callback.runs.directory import RunDirectory, run_directory_in
from sts_callback.runs.files import write_whole

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

BEGIN, END = "<!-- sts-callback: begin -->", "<!-- sts-callback: end -->"
"""The section is between these markers. The rest of the card stays as it is."""

_MEANINGS: dict[Decision, str] = {
    "go": "none of the protected domains was found to be threatened",
    "watch": "a protected domain may be on course to pass its budget: not surely, or not for long enough to alarm",
    "no-go": "a protected domain has become worse by more than half its budget, or is expected to by more than all of it",
    "not covered": "nothing speaks against it, but most of the change lies outside the SAE",
    "cannot tell": "the evidence does not suffice",
}


def card_section(log: RunDirectory) -> str:
    """Write the section of a run.

    Args:
        log: directory of the run, which may still run or have died.

    Returns:
        Markdown between the two markers, without a line end.

    Raises:
        DataError: if the run has neither forecast nor check.
        OSError: if the folder cannot be read.

    """
    logged = log.read_all()
    if logged.forecast is None and not logged.checks:
        raise DataError(
            f"card: {log.folder} holds neither a forecast nor a check that can be read; give the output_dir of a run with "
            "STSCallback, or the folder sts in it."
        )
    story = build(logged)
    parts = [
        "## What training moved, by sts-callback",
        _verdicts(logged),
        "### Forecast and outcome",
        _table(story),
        "\n".join(f"- {line}" for line in _under_table(story)),
        "### Blind spots",
        "\n".join(f"- {line}" for line in _blind_spots(logged, story)),
        "### How this was measured",
        "\n".join(f"- {line}" for line in _how(story)),
    ]
    return "\n\n".join([BEGIN, *(part for part in parts if part), END])


def put_into(card: Path, section: str) -> None:
    """Put a section into a model card: in place of an earlier one, or at the end.

    Args:
        card: an existing file.
        section: the section from `card_section`.

    Raises:
        DataError: if there is no card, or its markers are not one pair.
        OSError: if the card cannot be read or written.

    """
    card = card.resolve()  # write the target of a link and keep the link
    if not card.is_file():
        raise DataError(f"card: there is no file {card}; give a model card that exists, or leave --into out to have it printed.")
    try:
        with card.open(encoding="utf-8", newline="") as content:
            text = content.read()
    except UnicodeDecodeError as error:
        raise DataError(f"card: {card} is not text in UTF-8 ({error}); give a model card.") from error
    ending = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", ending)
    if (text.count(BEGIN), text.count(END)) == (0, 0):
        gap = ending * 2 if text.strip() else ""
        write_whole(card, text.rstrip() + gap + section + ending)
        return
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if (text.count(BEGIN), text.count(END)) != (1, 1) or END in before:
        raise DataError(f"card: {card} must hold {BEGIN!r} and, after it, {END!r} once each, or neither; correct it by hand.")
    write_whole(card, before + section + after)


def add_to_card(trainer: Trainer) -> None:
    """Put the section into the card that a trainer has just written. Call it at the end of an overridden `create_model_card`.

    If it fails, the log says why and training goes on.

    Args:
        trainer: a trainer with an `STSCallback`. Only its first process writes.

    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir or ".")
    try:
        put_into(folder / "README.md", card_section(run_directory_in(folder)))
    except Exception as error:
        logger.warning("The model card has no section by sts-callback: %s", error, exc_info=not isinstance(error, DataError))


def _verdicts(logged: Logged) -> str:
    """The verdicts before and after training. The newest comes with its reasons."""
    lines, newest = [], logged.verdict
    if newest is None or not newest.reasons:
        return "No domain was protected, so nothing was judged."
    when = "Before training (no check of drift was made)"
    if logged.checks:
        when = f"After {counted(newest.step, 'step')} of training"
    lines.append(f"{when}: **{newest.decision}**, that is, {_MEANINGS[newest.decision]}.")
    before, by = logged.verdict_before, "rehearsal" if logged.rehearsal_verdict else "forecast"
    if logged.checks and before is not None and before.reasons:
        lines.append(f"The {by} before training had said: **{before.decision}**.")
    reasons = "\n".join(f"- {_code(name)}: {reason}" for name, reason in newest.reasons.items())
    ended = ended_alarms([check.verdict for check in logged.checks])
    told = "".join(f" An alarm for {_code(name)} at step {steps[0]} has ended since." for name, steps in ended.items())
    return f"{' '.join(lines)}{told}\n\n{reasons}"


def _table(story: ReportData) -> str:
    then: Mapping[str, DomainForecast] = story.forecast.domains if story.forecast else {}
    now: Mapping[str, DomainDrift] = story.drift.latest.domains if story.drift else {}
    titles = ("domain", "budget", "transfer, expected", "drift, found", "NLL change, expected", "NLL change, found")
    rows = [titles, ("---", *["---:"] * (len(titles) - 1))]
    for name in story.domains:
        cells = [budget(story.budgets.get(name, math.nan)), *[UNKNOWN] * 4]
        if name in then:
            cells[1] = percent(then[name].transfer.value)
            cells[3] = nats(then[name].nll_change.value)
        if name in now:
            cells[2] = percent_1(now[name].relative_drift.value)
            change = now[name].nll_change
            cells[4] = " ".join(part for part in (nats(change.value), f"({interval(change, nats)})") if part != "()")
        rows.append((_code(name), *cells))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _under_table(story: ReportData) -> Iterator[str]:
    moving = "features" if story.has_sae else "raw activations"
    yield (
        f"Transfer: 0% as by plain prose, 100% as the training data itself. Drift: squared change of the domain's {moving} as a "
        "share of their squared activity before training. Both say how much, never in which direction."
    )
    yield (
        "NLL change: of reference answers, in nats a token, with its 95% interval; above 0 is worse. Expected: with training "
        "examples in context. How far a domain moves decides nothing; how its answers stand against the budget does."
    )
    if story.drift is not None and story.forecast is not None and story.has_sae:
        yield (
            f"Of the {story.drift.n_features} features that training moved most on its own data, the forecast had named "
            f"{story.drift.n_shared[-1]}."
        )


def _blind_spots(logged: Logged, story: ReportData) -> Iterator[str]:
    measured: Mapping[str, DomainForecast | DomainDrift] = {}
    if story.drift is not None:
        measured = story.drift.latest.domains
    elif story.forecast is not None:
        measured = story.forecast.domains
    sae_error_share = {name: d.sae_error_share for name, d in measured.items() if math.isfinite(d.sae_error_share)}
    if sae_error_share:
        yield f"Change that the SAE cannot express, so that nothing said of movement sees it: {_each(sae_error_share)}."
    elif story.has_sae:
        yield "What share of the change the SAE cannot express is unknown."
    masked = {name: d.n_masked / max(1, d.n_masked + d.n_tokens) for name, d in measured.items()}
    if story.drift is None and masked:
        yield f"Tokens left out as attention sinks: {_each(masked)}."
    if story.forecast is not None and (cut := sum(d.n_cut for d in story.forecast.domains.values())):
        yield f"Cut, because they were too long: {counted(cut, 'text')}."
    yield "Nothing is known of domains that are not in the table, nor of what the model writes by itself."
    if story.drift is None:
        yield "A forecast is a weaker push than training: no harm in it is no promise of none."
    else:
        yield f"The numbers are of the weights at step {story.drift.steps[-1]}; those of another step may differ."
    if logged.postponed:
        yield f"{counted(len(logged.postponed), 'check')} {_were(logged.postponed)} skipped for taking more than max_overhead."
    if logged.faults:
        yield f"{counted(len(logged.faults), 'failure')} of the measurement itself {_were(logged.faults)} recorded."
    if logged.unreadable:
        yield f"{counted(len(logged.unreadable), 'file')} of the record of this run could not be read."


def _how(story: ReportData) -> Iterator[str]:
    if story.forecast is not None:
        identity = story.forecast.identity
        read_by = f"{_code(identity.sae_name)} at {_code(identity.hook_name)}"
        yield f"Model before training: {_code(identity.model_name)}; {'SAE' if identity.has_sae else 'no SAE'}: {read_by}."
        yield (
            f"Fingerprints (SHA-256, first 12 digits): model configuration {identity.model[:12]}, "
            + (f"SAE {identity.sae[:12]}, " if identity.has_sae else "")
            + f"texts and how they are counted {identity.probes[:12]}."
        )
        if story.forecast.train_source == "own rollouts":
            yield "The forecast stands on the model's own best-rewarded answers at the first step."
        queries = {name: d.n_queries for name, d in story.forecast.domains.items()}
        yield f"Queries: {', '.join(f'{_code(name)} {n}' for name, n in queries.items())}."
    if story.drift is not None:
        yield f"Drift was checked {counted(len(story.drift.steps), 'time')}, the last time at step {story.drift.steps[-1]}."
    if story.settings is not None:
        yield alarm_rule(story.settings, story.drift.steps if story.drift else ())
        yield f"Versions: {', '.join(f'{name} {number}' for name, number in story.settings.versions.items())}."


def _each(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{_code(name)} {percent(share)}" for name, share in shares.items())


def _were(some: Sequence[object]) -> str:
    return "was" if len(some) == 1 else "were"


def _code(name: str) -> str:
    """Put a name into a code span. Characters that could end the span, the table cell or the section are left out."""
    readable = re.sub(r"[`|<>\s]+", " ", name).strip() or UNKNOWN
    return f"`{readable}`"
