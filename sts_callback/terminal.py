"""Records as text that fits a terminal: tables of 80 columns, coloured only where a terminal shows it."""

from __future__ import annotations

import io
import math
import sys
import textwrap
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sts_callback.ledger import FEWEST, LEVEL, Expectations, Skill, TrackRecord
from sts_callback.records import (
    Check,
    Decision,
    DriftSnapshot,
    Estimate,
    FeatureInWords,
    Forecast,
    Snippet,
    Status,
    Verdict,
    in_capitals,
)
from sts_callback.remedies import Blame, BudgetFinding, Dial, Mix
from sts_callback.validated import WHAT_HOLDS

_WIDTH = 80
_COLOURS: dict[Decision, str] = {
    "go": "green",
    "watch": "yellow",
    "no-go": "bold red",
    "not covered": "magenta",
    "cannot tell": "magenta",
}
_FINDINGS: dict[BudgetFinding, str] = {"within": "green", "beyond": "bold red", "cannot tell": "magenta"}
_BAR = 8  # characters of twice a budget

_LEDGER_LEGEND = (
    "Spearman: of the forecast's number with the outcome over the domains of a run,\n"
    "mean over training sets. off by: what is expected for a set from all others\n"
    "against its outcome, typically, drift by a factor, NLL in nats a token; beside\n"
    "it the same of their plain mean. inside: outcomes within their "
    f"{LEVEL:.0%} intervals."
)

_OWN_ROLLOUTS = "training examples: the model's own best-rewarded rollouts of the first step"


def forecast_table(forecast: Forecast, verdict: Verdict, *, colour: bool | None = None) -> str:
    """The forecast: one row a domain, the most moved first, the training data itself on top; below it, what it stands on."""
    rows = (forecast.train, *sorted(forecast.domains.values(), key=lambda d: _downwards(d.sts_net.value)))
    table = _table("domain", "transfer", "95 %", "rank", "NLL change", "95 %", "gradient")
    for row in rows:
        transfer, change = row.transfer, row.nll_change
        table.add_row(
            Text(("! " if row.name in verdict.threatened else "  ") + row.name),
            _percent(transfer.value),
            _interval(transfer),
            f"{row.rank[0]}-{row.rank[1]}" if row.rank[0] else "",
            f"{change.value:+.2f}",
            f"{change.low:+.2f} to {change.high:+.2f}",
            f"{row.gradient_change.value:+.2f}",
            style=_COLOURS[verdict.decision] if row.name in verdict.threatened else None,
        )
    rivals = _table("domain", "net", "cross", "random", "rel", "ICL", "act", "raw", "cosine", "NLL", "unseen")
    for row in rows:
        rivals.add_row(
            Text("  " + row.name),
            f"{row.sts_net.value:.3f}",
            f"{row.sts_cross.value:.3f}",
            f"{row.sts_cross.random:.3f}",
            f"{row.sts_rel.value:.3f}",
            _short(row.sts_icl.value),
            _short(row.sts_act.value),
            f"{row.raw_shift.value:.3f}",
            f"{row.cosine:.2f}",
            f"{row.nll.value:.2f}",
            f"{row.unseen:.0%}",
            style="dim",
        )
    held = f"{len(forecast.features)} features hold {forecast.features_share:.0%} of the shift"
    legend = (
        "transfer: STS_net, 0 % as by plain prose, 100 % as the training data itself;\n"
        "how much, not in which direction. NLL change: of the answers, with training\n"
        "examples in context against plain prose, nats a token; gradient: by a small\n"
        "step that gains the training data one nat; + is bad."
    )
    if math.isnan(forecast.train.transfer.value):
        legend += (
            "\nTransfer is unknown: the training examples shift hardly more than plain prose\n"
            "does. What order there is, by net, has told nothing in such a case."
        )
    parts_of_time = ", ".join(f"{part} {seconds:.0f}" for part, seconds in forecast.seconds_by_part.items() if seconds >= 0.5)
    foot = (
        f"{forecast.identity.sae_name} at {forecast.identity.hook_name}, {forecast.unexplained:.0%} of variance\n"
        f"unexplained; noise floor of drift {forecast.noise_floor:.0e}; {forecast.seconds:.0f} s"
        + (f"\n({parts_of_time})" if parts_of_time else "")
    )
    verdict_line = Text(f"Verdict: {in_capitals(verdict.decision, verdict.step)}", style=_COLOURS[verdict.decision])
    parts: list[Text | Table] = [
        Text(f"STS forecast: what training will move ({held})", style="bold"),
        table,
        Text(legend, style="dim"),
        Text(textwrap.fill(WHAT_HOLDS, _WIDTH) + "\n", style="dim"),
        rivals,
        Text(foot + "\n", style="dim"),
        *([Text(_OWN_ROLLOUTS, style="yellow")] if forecast.train_source == "own rollouts" else []),
        *(Text(f"{c.name}: {c.found}; {c.remedy}", style="yellow") for c in forecast.checks if c.status == "warn"),
    ]
    return _rendered([*parts, verdict_line, *_reasons(verdict)], colour)


def layers_table(forecasts: Sequence[Forecast], agreement: Sequence[float], *, colour: bool | None = None) -> str:
    """Transfer by several SAEs, the first of which is the one that is watched.

    Args:
        forecasts: of the same domains.
        agreement: of each with the first.
        colour: as for the others.

    """
    table = _table("transfer by SAE", *(f"{number}" for number in range(1, len(forecasts) + 1)))
    for name in forecasts[0].domains:
        table.add_row(Text("  " + name), *(_percent(f.domains[name].transfer.value) for f in forecasts))
    table.add_row(Text("agreement in order", style="bold"), *(f"{value:.2f}" for value in agreement))
    names = [Text(f"  {n}: {f.identity.sae_name} at {f.identity.hook_name}", style="dim") for n, f in enumerate(forecasts, 1)]
    return _rendered([table, *names], colour)


def doctor_table(checks: Sequence[Check], *, colour: bool | None = None) -> str:
    """What was looked at: a line a check, and below it what to do."""
    colours: dict[Status, str] = {"pass": "green", "warn": "yellow", "refuse": "bold red"}
    table = Table(box=None, pad_edge=False, width=_WIDTH, show_header=False)
    for width in (19, 7):
        table.add_column(width=width, no_wrap=True)
    table.add_column(ratio=1)
    for check in checks:
        remedy = f"\n-> {check.remedy}" if check.remedy else ""
        table.add_row(Text(check.name), Text(check.status, style=colours[check.status]), Text(check.found + remedy))
    return _rendered([table], colour)


def words_lines(words: Sequence[FeatureInWords], *, colour: bool | None = None) -> str:
    """Features in words: for each, the place in every set where it fires most, the token in brackets."""
    parts: list[Text | Table] = []
    for feature in words:
        parts.append(Text(f"feature {feature.feature}, {feature.share:.1%}  {feature.link}".rstrip(), style="bold"))
        for name, snippets in feature.snippets.items():
            for snippet in snippets[:1]:
                parts.append(_marked(f"  {name[:12]:<12} ", snippet, n_before=32))
    return _rendered(parts, colour)


def blame_table(found: Blame, *, colour: bool | None = None) -> str:
    """Training rows to blame: for each protected domain those that score highest, the token that fires in brackets."""
    parts: list[Text | Table] = []
    for domain in found.domains.values():
        parts.append(Text(f"Training rows that fire what threatens {domain.name}", style="bold"))
        parts.append(Text(f"{'row':>9} {'score':>6} {'feature':>8}  where it fires", style="bold"))
        for row in domain.rows:
            head = f"{row.row:>9} {row.score:>6.2f} {row.feature:>8}  "
            line = _marked(head, row.snippet, n_before=18)
            line.stylize("red" if row.score > domain.threshold else "", 0, len(head))
            parts.append(line)
        stand_out = (
            f"{domain.n_standing_out} of {found.n_read} rows stand out: above {domain.threshold:.2f}; the median is "
            f"{domain.median:.2f}, {domain.name}'s own texts score {domain.own_score:.2f}."
        )
        if domain.silent_weight >= 0.005:
            stand_out += f" No row fires the features that make {domain.silent_weight:.0%} of the threat."
        parts += [Text(line, style="dim") for line in textwrap.wrap(stand_out, _WIDTH - 2)]
        parts.append(Text())
    notes = ["A score of 1 is an average row; rows are counted from 0."]
    if found.n_read < found.n_rows:
        notes.append(
            f"{found.n_read} of {found.n_rows} rows were read (a sample, without rows that hold no text); all others stay."
        )
    if found.n_cut:
        notes.append(f"{found.n_cut} were cut.")
    notes.append(found.meaning)
    parts += [Text(line, style="dim") for line in textwrap.wrap(" ".join(notes), _WIDTH - 2)]
    parts.append(Text(f"To leave out: {len(found.left_out)} rows, a tenth of those read at most.", style="bold"))
    return _rendered(parts, colour)


def mix_table(found: Mix, *, colour: bool | None = None) -> str:
    """What was measured of each source, the trade-off between training data and its worst domain, and the recommended mixture."""
    sources = list(found.sources)
    measured = _table("domain", "budget", *sources)
    for name, domain in found.points[0].domains.items():
        changes = [found.sources[source].nll_change[name].value for source in sources]
        measured.add_row(Text("  " + name), f"{domain.budget:.2f}", *(f"{change:+.2f}" for change in changes))
    curve = _table("worst domain", *sources, "NLL change", "95 %", "finding", "of budget")
    for point in found.points:
        worst = point.worst
        filled = 0 if math.isnan(worst.nll_change.high) else round(_BAR / 2 * worst.nll_change.high / worst.budget)
        curve.add_row(
            Text("  " + worst.name),
            *(f"{point.weights[source]:.0%}" for source in sources),
            f"{worst.nll_change.value:+.2f}",
            f"{worst.nll_change.low:+.2f} to {worst.nll_change.high:+.2f}",
            Text(point.finding, style=_FINDINGS[point.finding]),
            Text(("\u2588" * min(_BAR, max(0, filled))).ljust(_BAR, "\u00b7"), style=_FINDINGS[point.finding]),
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
    return _rendered(
        [
            Text(f"{heading}{found.seconds:.0f} s)", style="bold"),
            Text(f"Measured by {found.basis}: change of the answers' NLL by each source, nats a token"),
            measured,
            Text("\nExtrapolated: mixtures, with ever less of the training data"),
            curve,
            Text(legend, style="dim"),
            *(Text(line, style=_FINDINGS[found.finding]) for line in (*textwrap.wrap(answer, _WIDTH), *moved)),
            Text("\n" + textwrap.fill(found.meaning, _WIDTH), style="dim"),
        ],
        colour,
    )


def dial_table(found: Dial, *, colour: bool | None = None) -> str:
    """An adapter's scales: for each how far the protected domains have moved, and whether they keep their budgets."""
    table = _table("domain", "scale", "drift", "NLL change", "95 %", "budget", "finding")
    for point in found.points:
        for domain in point.domains.values():
            change = domain.nll_change
            table.add_row(
                Text("  " + domain.name),
                f"{point.scale:g}",
                f"{domain.relative_drift.value:.1%}",
                f"{change.value:+.2f}",
                f"{change.low:+.2f} to {change.high:+.2f}",
                f"{domain.budget:.2f}",
                Text(domain.finding, style=_FINDINGS[domain.finding]),
            )
    legend = (
        "drift and change of the answers' NLL against the model without the adapter, nats\n"
        "a token. within: the interval lies under the budget; beyond: the change reaches\n"
        "the budget and the interval lies above 0.\n"
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
    return _rendered([heading, table, Text(legend, style="dim"), Text(answer, style=_FINDINGS[found.finding])], colour)


def _marked(head: str, snippet: Snippet, n_before: int) -> Text:
    """A line with a place in a text, the token that fires in brackets."""
    before, token, after = (" ".join(part.split()) for part in (snippet.before, snippet.token, snippet.after))
    line = Text(f"{head}...{before[-n_before:]} ")
    line.append(f"[{token or chr(0x2423)}]", style="bold yellow")
    line.append(f" {after}")
    line.truncate(_WIDTH, overflow="ellipsis")
    return line


def check_lines(snapshot: DriftSnapshot, verdict: Verdict, n_features: int, *, colour: bool | None = None) -> str:
    """A drift check: a line of how far each domain has moved, and reasons if a protected one is threatened."""
    moved = sorted(snapshot.domains.values(), key=lambda d: _downwards(d.relative_drift.value))
    items = [f"{d.name} {d.relative_drift.value:.1%} ({d.nll_change.value:+.2f})" for d in (snapshot.train, *moved)]
    head = Text(f"STS step {snapshot.step}: {in_capitals(verdict.decision, verdict.step)}", style=_COLOURS[verdict.decision])
    head.append(f"; drift (change of NLL) since step 0; {snapshot.seconds:.0f} s", style="not bold default")
    # textwrap breaks at plain spaces only, so that an item stays on its line.
    lines = textwrap.wrap("  ".join(item.replace(" ", "\u00a0") for item in items), _WIDTH - 2)
    body = [Text("  " + line.replace("\u00a0", " ")) for line in lines]
    superseded = " and is superseded" if verdict.supersedes_forecast else ""
    foot = [
        Text(f"  the forecast named {snapshot.n_shared} of the {n_features} features that moved most{superseded}", style="dim")
    ]
    text = snapshot.text_drift
    if not math.isnan(text.value):
        interval = f"{text.low:.1%} to {text.high:.1%}"
        foot.append(Text(f"  what the policy writes has moved by {text.value:.1%} ({interval})", style="dim"))
    return _rendered([head, *body, *foot, *(_reasons(verdict) if verdict.threatened else [])], colour)


def ledger_table(records: Sequence[TrackRecord], *, colour: bool | None = None) -> str:
    """How good past forecasts were: a table for each model, SAE and hook point."""
    parts: list[Text | Table] = []
    for record in records:
        identity = record.identity
        parts.append(Text(f"{identity.model_name}, {identity.sae_name}\nat {identity.hook_name}", style="bold"))
        parts.append(Text(_runs(record)))
        table = _table("forecast by", "domains", "Spearman", "95 %", "off by", "mean off by", "inside")
        for name, skill, size in _questions(record):
            table.add_row(
                Text("  " + name),
                f"{skill.n_rows}",
                *(("", "") if math.isnan(skill.spearman.value) else _spearman(skill.spearman)),
                *((size(skill.error), size(skill.error_of_mean), f"{skill.coverage:.0%}") if skill.is_known else ("", "", "")),
            )
        parts += [table, *(Text(line, style="yellow") for line in _doubts(record)), Text("")]
    parts.append(Text(_LEDGER_LEGEND, style="dim"))
    return _rendered(parts, colour)


def expectations_table(expected: Expectations, *, colour: bool | None = None) -> str:
    """What past runs let expect: a row a domain, and how far off they were when left out themselves."""
    interval = f"{100 * LEVEL:.0f} %"
    table = _table("expected from past runs", "drift", interval, "NLL change", interval)
    for name in expected.relative_drift or expected.nll_change:
        drift, change = expected.relative_drift.get(name), expected.nll_change.get(name)
        table.add_row(
            Text("  " + name),
            *((f"{drift.value:.1%}", f"{drift.low:.1%} to {drift.high:.1%}") if drift else ("", "")),
            *((f"{change.value:+.2f}", f"{change.low:+.2f} to {change.high:+.2f}") if change else ("", "")),
        )
    told = [
        f"{name} off by {size(skill.error if skill.is_fit_better else skill.error_of_mean)}, {skill.coverage:.0%} inside"
        for name, skill, size in _questions(expected.past)
        if skill.is_known
    ]
    lines = [
        f"{_runs(expected.past)} of this model and SAE; a set left out: {'; '.join(told)}.",
        "For training of like length and rate only: a forecast knows neither.",
    ]
    foot = [Text(part, style="dim") for line in lines for part in textwrap.wrap(line, _WIDTH)]
    return _rendered([table, *foot, *(Text(line, style="yellow") for line in _doubts(expected.past))], colour)


def _questions(record: TrackRecord) -> tuple[tuple[str, Skill, Callable[[float], str]], ...]:
    """Movement and harm, each with how its errors are written."""
    return (
        ("movement: transfer", record.movement, lambda error: f"x {math.exp(min(error, 99)):.3g}"),
        ("harm: NLL change", record.harm, lambda error: f"{error:.3f}"),
    )


def _runs(record: TrackRecord) -> str:
    sets = "1 training set" if record.n_training_sets == 1 else f"{record.n_training_sets} training sets"
    return f"{record.n_runs} run{'s' * (record.n_runs != 1)} on {sets}"


def _spearman(estimate: Estimate) -> tuple[str, str]:
    interval = "" if math.isnan(estimate.low) else f"{estimate.low:+.2f} to {estimate.high:+.2f}"
    return f"{estimate.value:+.2f}", interval


def _doubts(record: TrackRecord) -> list[str]:
    """What past runs are too few for, and where the forecast's number says nothing that their mean does not."""
    sentences = []
    for name, skill, _ in _questions(record):
        if not skill.is_known:
            sentences.append(
                f"{name}: too few runs to judge by: {skill.n_training_sets} of the {FEWEST} training sets that it takes."
            )
        elif not skill.is_fit_better:
            sentences.append(f"{name}: the forecast says no more than the mean of past outcomes, which is expected instead.")
    return [line for sentence in sentences for line in textwrap.wrap(sentence, _WIDTH)]


def _reasons(verdict: Verdict) -> list[Text]:
    """The reasons that matter: of the threatened domains if there are any, else of all."""
    shown = verdict.threatened or verdict.reasons
    wrap = textwrap.TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [Text(line) for name in shown for line in wrap.wrap(f"{name}: {verdict.reasons[name]}")]


def _table(first: str, *titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), width=_WIDTH)
    table.add_column(first, overflow="fold", ratio=1)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _downwards(number: float) -> tuple[bool, float]:
    """Sorts the largest first and NaN last."""
    return math.isnan(number), -number


def _percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{share:.0%}"


def _interval(share: Estimate) -> str:
    return "" if math.isnan(share.low) else f"{share.low:.0%} to {share.high:.0%}"


def _short(number: float) -> str:
    """Three digits and a letter for the thousands: at most five characters up to 999 T."""
    for letter in ("", "k", "M", "G"):
        if abs(number) < 999.5 or not math.isfinite(number):
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:.3g}T"


def _rendered(parts: list[Text | Table], colour: bool | None) -> str:
    show = sys.stdout.isatty() if colour is None else colour
    console = Console(
        file=io.StringIO(),
        width=_WIDTH,
        force_terminal=show,
        color_system="standard" if show else None,
        highlight=False,
    )
    for part in parts:
        console.print(part)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines())
