"""Forecasts, and the checks before one, as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sts_callback.config import PolicyConfig
from sts_callback.records import Check, Estimate, Forecast, Status, TopActivatingExamples, Verdict, downwards
from sts_callback.records.run import Given
from sts_callback.report.headline import in_a_sentence
from sts_callback.report.summary import of_forecast
from sts_callback.report.terminal.text import WIDTH, marked, new_table, rendered, wrapped
from sts_callback.report.terminal.verdict import (
    COLOURS,
    advice_lines,
    open_reasons,
    reason_lines,
    summary_parts,
    verdict_line,
)
from sts_callback.report.validated import WHAT_HOLDS


def forecast_view(
    forecast: Forecast,
    verdict: Verdict,
    policy: PolicyConfig | None,
    *,
    expected: Mapping[str, Estimate] | None = None,
    given: Given | None = None,
    colour: bool | None = None,
) -> str:
    """A forecast: the verdict, a row a domain, what it rests on, doubts, and what to do about a no-go.

    Args:
        forecast: to be shown.
        verdict: on it.
        policy: with the protected domains; None where that is not known.
        expected: change of each domain's NLL at the end of the run, by past runs.
        given: what the run was given, for the commands that are advised.
        colour: whether to use colours; by default where a terminal shows them.

    """
    budgets = policy.budgets if policy else {}
    return rendered(
        [
            verdict_line("STS forecast", verdict, "forecast"),
            *summary_parts(of_forecast(forecast, verdict, policy, expected)),
            *doubts(forecast),
            *open_reasons(verdict),
            *advice_lines(verdict, Path("OUTPUT_DIR"), given, budgets, has_sae=forecast.identity.has_sae),
        ],
        colour,
    )


def forecast_details(forecast: Forecast, verdict: Verdict, *, colour: bool | None = None) -> str:
    """All scores of a forecast, the most moved domain first and the training data itself on top; and what holds of them.

    Args:
        forecast: to be shown.
        verdict: on it.
        colour: as for the others.

    """
    rows = (forecast.train, *sorted(forecast.domains.values(), key=lambda d: downwards(d.sts_net.value)))
    has_sae = forecast.identity.has_sae
    has_order = len(forecast.domains) > 1
    rank, harm = (["rank"], ["harm"]) if has_order else ([], [])
    table = new_table("domain", "transfer", "95 %", *rank, "change", "95 %", *(["grad"] if has_sae else []), *harm)
    places = forecast.harm_rank
    for row in rows:
        transfer, change = row.transfer, row.nll_change
        table.add_row(
            Text(("! " if row.name in verdict.threatened else "  ") + row.name),
            _percent(transfer.value),
            _interval(transfer),
            *([f"{row.rank[0]}-{row.rank[1]}" if row.rank[0] else ""] if has_order else []),
            f"{change.value:+.2f}",
            f"{change.low:+.2f} to {change.high:+.2f}",
            *([f"{row.gradient_change.value:+.2f}"] if has_sae else []),
            *([str(places.get(row.name, ""))] if has_order else []),
            style=COLOURS[verdict.decision] if row.name in verdict.threatened else None,
        )
    by_features = ("cross", "random", "rel", "ICL", "act") if has_sae else ()
    baselines = new_table("domain", "net", *by_features, "raw", "cosine", "NLL", *(["unseen"] if has_sae else []))
    for row in rows:
        scores = (
            f"{row.sts_cross.value:.3f}",
            f"{row.sts_cross.random:.3f}",
            f"{row.sts_rel.value:.3f}",
            _short(row.sts_icl.value),
            _short(row.sts_act.value),
        )
        baselines.add_row(
            Text("  " + row.name),
            f"{row.sts_net.value:.3f}",
            *(scores if has_sae else ()),
            f"{row.raw_over_prose.value:.2f}",
            f"{row.cosine:.2f}",
            f"{row.nll.value:.2f}",
            *([f"{row.sae_error_share:.0%}"] if has_sae else []),
            style="dim",
        )
    held = f"{len(forecast.features)} features hold {forecast.features_share:.0%} of the shift" if has_sae else "without an SAE"
    legend = (
        f"transfer: {'STS_net, ' if has_sae else ''}0 % as by plain prose, 100 % as the training data itself;\n"
        "how much, not in which direction. change: of the answers' NLL, with training\n"
        "examples in context against plain prose, nats a token; "
        + ("grad: the same by a small\nstep that gains the training data one nat; + is worse." if has_sae else "+ is worse.")
    )
    if has_order:
        by = "place by both\ntogether" if has_sae else "\nplace by it"
        legend += f" harm: the {by}, 1 the worst; an order, not a sign.".replace(" \n", "\n")
    if math.isnan(forecast.train.transfer.value):
        legend += (
            "\nTransfer is unknown: the training examples shift hardly more than plain prose\n"
            "does. What order there is, by net, has told nothing in such a case."
        )
    parts_of_time = ", ".join(f"{part} {seconds:.0f}" for part, seconds in forecast.seconds_by_part.items() if seconds >= 0.5)
    foot = (
        f"{forecast.identity.sae_name} at {forecast.identity.hook_name}"
        + (f", {forecast.fvu:.0%} of variance\nunexplained" if has_sae else "")
        + f"; noise floor of drift {forecast.noise_floor:.0e}; {forecast.seconds:.0f} s"
        + (f"\n({parts_of_time})" if parts_of_time else "")
    )
    return rendered(
        [
            Text(f"All scores ({held})", style="bold"),
            table,
            Text(legend, style="dim"),
            Text(textwrap.fill(WHAT_HOLDS, WIDTH) + "\n", style="dim"),
            baselines,
            Text(foot, style="dim"),
            *reason_lines(verdict.reasons),
        ],
        colour,
    )


def layers_table(forecasts: Sequence[Forecast], agreement: Sequence[float], *, colour: bool | None = None) -> str:
    """Show transfer by several SAEs. The first SAE is the one that watches drift.

    Args:
        forecasts: forecasts of the same domains, one per SAE.
        agreement: agreement of each with the first.
        colour: as for the others.

    """
    table = new_table("transfer by SAE", *(f"{number}" for number in range(1, len(forecasts) + 1)))
    for name in forecasts[0].domains:
        table.add_row(Text("  " + name), *(_percent(f.domains[name].transfer.value) for f in forecasts))
    table.add_row(Text("agreement in order", style="bold"), *(f"{value:.2f}" for value in agreement))
    names = [Text(f"  {n}: {f.identity.sae_name} at {f.identity.hook_name}", style="dim") for n, f in enumerate(forecasts, 1)]
    return rendered([table, *names], colour)


def doctor_table(checks: Sequence[Check], *, colour: bool | None = None) -> str:
    """Show one line per check, with what to do below it."""
    colours: dict[Status, str] = {"pass": "green", "warn": "yellow", "refuse": "bold red"}
    table = Table(box=None, pad_edge=False, width=WIDTH, show_header=False)
    for width in (19, 7):
        table.add_column(width=width, no_wrap=True)
    table.add_column(ratio=1)
    for check in checks:
        remedy = f"\n-> {check.remedy}" if check.remedy else ""
        table.add_row(Text(check.name), Text(check.status, style=colours[check.status]), Text(check.found + remedy))
    return rendered([table], colour)


def examples_lines(words: Sequence[TopActivatingExamples], *, colour: bool | None = None) -> str:
    """Show where each feature is most active in every set, with the token in brackets."""
    parts: list[Text | Table] = []
    for feature in words:
        parts.append(Text(f"feature {feature.feature}, {feature.share:.1%}  {feature.link}".rstrip(), style="bold"))
        for name, snippets in feature.snippets.items():
            for snippet in snippets[:1]:
                parts.append(marked(f"  {name[:12]:<12} ", snippet, n_before=32))
    return rendered(parts, colour)


def doubts(forecast: Forecast) -> list[Text]:
    """What weakens a forecast, and what to do about it."""
    told = [in_a_sentence(check) for check in forecast.checks if check.status == "warn"]
    if forecast.train_source == "own rollouts":
        told.insert(0, "Training examples: the model's own best-rewarded rollouts of the first step.")
    return wrapped(told, "yellow")


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.0%}"


def _interval(share: Estimate) -> str:
    return "" if math.isnan(share.low) else f"{share.low:.0%} to {share.high:.0%}"


def _short(number: float) -> str:
    """Format with three digits and a letter for thousands: at most five characters up to 999 T."""
    for letter in ("", "k", "M", "G"):
        if abs(number) < 999.5 or not math.isfinite(number):
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:.3g}T"
