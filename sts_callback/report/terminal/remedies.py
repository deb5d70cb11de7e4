"""Remedies for a threat, as text."""

from __future__ import annotations

import math
import textwrap

from rich.table import Table
from rich.text import Text

from sts_callback.config import DIGITS, Budget
from sts_callback.records.remedies import AdapterScales, Attribution, DomainAttribution, Mix
from sts_callback.report.formatting import budget, counted, too_few_rows
from sts_callback.report.terminal.text import FINDING_COLOURS, WIDTH, marked, new_table, rendered

_BAR = 8  # characters that stand for twice a budget


def attribution_table(found: Attribution, *, colour: bool | None = None) -> str:
    """Show the training rows with the highest scores for each protected domain, with the active token in brackets."""
    parts: list[Text | Table] = []
    for domain in found.domains.values():
        parts.append(Text(f"Training rows that activate {domain.name}'s features", style="bold"))
        parts.append(Text(f"{'row':>9} {'score':>6} {'feature':>8}  where it is active", style="bold"))
        for row in domain.rows:
            head = f"{row.row:>9} {row.score:>6.2f} {row.feature:>8}  "
            line = marked(head, row.snippet, n_before=18)
            line.stylize("red" if row.score > domain.threshold else "", 0, len(head))
            parts.append(line)
        stand_out = (
            f"{domain.n_standing_out} of {found.n_read} rows stand out: above {domain.threshold:.2f}; the median is "
            f"{domain.median:.2f}, {domain.name}'s own texts score {domain.own_score:.2f}."
        )
        parts += [Text(line, style="dim") for line in textwrap.wrap(stand_out, WIDTH - 2)]
        parts += _by_source(domain)
        parts.append(Text())
    notes = ["Score: 0 is an average row, 1 as the domain; rows are counted from 0."]
    if found.n_read < found.n_rows:
        notes.append(
            f"{found.n_read} of {found.n_rows} rows were read (a sample, without rows that hold no text); all others stay."
        )
    if found.n_cut:
        notes.append(f"{found.n_cut} were cut.")
    notes.append(found.meaning)
    parts += [Text(line, style="dim") for line in textwrap.wrap(" ".join(notes), WIDTH - 2)]
    n = len(found.left_out)
    told = f"To leave out: {counted(n, 'row')}, a tenth of those read at most."
    parts.append(Text(told if n else "No row stands out, so none is to be left out: try a lower rate.", style="bold"))
    return rendered(parts, colour)


def _by_source(domain: DomainAttribution) -> list[Text | Table]:
    """The training sources by mean score, and the names of those with too few rows."""
    told = [one for one in domain.sources if not one.has_few_rows]
    parts: list[Text | Table] = []
    if told:
        table = new_table(f"by source, for {domain.name}", "rows", "mean score", "95 %", "stand out")
        for one in told:
            between = f"{one.score.low:+.2f} to {one.score.high:+.2f}"
            name = textwrap.shorten(one.name, 30, placeholder="...")
            table.add_row(Text("  " + name), str(one.n_read), f"{one.score.value:+.2f}", between, str(one.n_standing_out))
        parts.append(table)
    return parts + [Text(line, style="dim") for line in textwrap.wrap(too_few_rows(domain.sources), WIDTH - 2)]


def mix_table(found: Mix, *, colour: bool | None = None) -> str:
    """Show the measured effect of each source, the trade-off with the worst domain, and the recommended mixture."""
    sources = list(found.sources)
    measured = new_table("domain", "budget", *sources)
    for name, domain in found.points[0].domains.items():
        changes = [found.sources[source].nll_change[name].value for source in sources]
        measured.add_row(Text("  " + name), f"{domain.budget:.2f}", *(f"{change:+.2f}" for change in changes))
    curve = new_table("worst domain", *sources, "NLL change", "95 %", "finding", "of budget")
    for point in found.points:
        worst = point.worst
        filled = 0 if math.isnan(worst.nll_change.high) else round(_BAR / 2 * worst.nll_change.high / worst.budget)
        curve.add_row(
            Text("  " + worst.name),
            *(f"{point.weights[source]:.0%}" for source in sources),
            f"{worst.nll_change.value:+.2f}",
            f"{worst.nll_change.low:+.2f} to {worst.nll_change.high:+.2f}",
            Text(point.finding, style=FINDING_COLOURS[point.finding]),
            Text(("\u2588" * min(_BAR, max(0, filled))).ljust(_BAR, "\u00b7"), style=FINDING_COLOURS[point.finding]),
        )
    legend = (
        "of budget: the interval's upper end; a full bar is twice the budget. Weights are\n"
        "the best of each row: the worst domain stays as far within its budget as can be.\n"
        "An interval is as wide as if the errors of all sources had the same sign.\n"
    )
    best = found.nearest
    shares = ", ".join(f"{n} rows of {source} ({best.weights[source]:.0%})" for source, n in best.rows.items() if n)
    if found.recommended is found.points[0]:
        answer = "No replay is needed: the training data alone is expected to keep every budget."
    elif found.recommended:
        answer = f"Recommended: {shares}."
    elif found.finding == "beyond":
        answer = f"No mixture within these caps keeps every budget; train at a lower rate. The nearest: {shares}."
    else:
        answer = f"Cannot tell: no mixture is sure to keep every budget; give more queries. The nearest: {shares}."
    moved = [
        f"  {name}: {alone.nll_change.value:+.2f} alone, {best.domains[name].nll_change.value:+.2f} in this mixture"
        for name, alone in found.points[0].domains.items()
        if alone.finding != "within"
    ]
    heading = f"STS mix: training data and what may be mixed in ({found.identity.sae_name}, "
    return rendered(
        [
            Text(f"{heading}{found.seconds:.0f} s)", style="bold"),
            Text("Measured by pilot runs: change of the answers' NLL by each source, nats a token"),
            measured,
            Text("\nExtrapolated: mixtures, with ever less of the training data"),
            curve,
            Text(legend, style="dim"),
            *(Text(line, style=FINDING_COLOURS[found.finding]) for line in (*textwrap.wrap(answer, WIDTH), *moved)),
            Text("\n" + textwrap.fill(found.meaning, WIDTH), style="dim"),
        ],
        colour,
    )


def adapter_scales_table(found: AdapterScales, *, colour: bool | None = None) -> str:
    """An adapter's scales: for each how far the protected domains have moved, and whether they keep their budgets."""
    table = new_table("domain", "scale", "drift", "harm", "95 %", "budget", "finding")
    for point in found.points:
        for domain in point.domains.values():
            harm, unit = domain.harm, Budget.of(domain.budget).unit
            table.add_row(
                Text("  " + domain.name),
                f"{point.scale:g}",
                f"{domain.relative_drift.value:.1%}",
                f"{harm.value:+.{DIGITS[unit]}f}",
                f"{harm.low:+.{DIGITS[unit]}f} to {harm.high:+.{DIGITS[unit]}f}",
                budget(domain.budget),
                Text(domain.finding, style=FINDING_COLOURS[domain.finding]),
            )
    legend = (
        "drift and harm against the model without the adapter. harm: what the answers\n"
        "have lost, in nats a token unless the budget names another unit. within: the\n"
        "interval lies under the budget; beyond: the harm reaches it and the interval\n"
        "lies above 0.\n"
    )
    if found.largest is not None:
        answer = f"Largest scale that keeps every budget: {found.largest:g}"
        if found.largest < 1:
            answer += "\n  to use it, multiply lora_alpha (and alpha_pattern) in adapter_config.json by it"
    elif found.finding == "beyond":
        answer = "None of these scales keeps every budget; try smaller ones"
    else:
        answer = "Cannot tell: none of these scales is sure to keep every budget; give more queries"
    heading = Text(f"STS dial: an adapter by its scale ({found.identity.sae_name}, {found.seconds:.0f} s)", style="bold")
    return rendered([heading, table, Text(legend, style="dim"), Text(answer, style=FINDING_COLOURS[found.finding])], colour)
