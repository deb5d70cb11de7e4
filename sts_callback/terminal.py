"""Records as text that fits a terminal: tables of 80 columns, coloured only where a terminal shows it."""

from __future__ import annotations

import io
import sys
import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sts_callback.records import Decision, DriftSnapshot, Forecast, Verdict

_WIDTH = 80
_COLOURS: dict[Decision, str] = {"go": "green", "watch": "yellow", "no-go": "bold red", "cannot tell": "magenta"}


def forecast_table(forecast: Forecast, verdict: Verdict, *, colour: bool | None = None) -> str:
    """The forecast: one row a domain, the most moved first, the training data itself on top as anchor."""
    table = Table(box=None, pad_edge=False, width=_WIDTH)
    table.add_column("domain", overflow="fold", ratio=1)
    for title in ("transfer", "cross", "rel", "ICL", "act", "NLL", "in context"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in (forecast.train, *sorted(forecast.domains.values(), key=lambda d: -d.sts_cross)):
        table.add_row(
            Text(("! " if row.name in verdict.threatened else "  ") + row.name),
            f"{forecast.transfer(row):.0%}",
            f"{row.sts_cross:.3f}",
            f"{row.sts_rel:.3f}",
            _short(row.sts_icl),
            _short(row.sts_act),
            f"{row.nll:.2f}",
            f"{row.nll_change:+.2f} ± {row.nll_change_se:.2f}",
            style=_COLOURS[verdict.decision] if row.name in verdict.threatened else None,
        )
    head = (
        "STS forecast: what training will move "
        f"({len(forecast.features)} features hold {forecast.features_share:.0%} of the shift)"
    )
    unexplained = f"{forecast.unexplained:.0%} of variance unexplained"
    foot = (
        f"{forecast.identity.sae_name} at {forecast.identity.hook_name}, {unexplained}; {forecast.seconds:.0f} s\n"
        "transfer: STS_cross against the training data's own. Scores say how much, not in\n"
        "which direction. in context: change of the answers' NLL, nats a token; + is bad"
    )
    verdict_line = Text(f"Verdict: {_name(verdict)}", style=_COLOURS[verdict.decision])
    return _rendered([Text(head, style="bold"), table, Text(foot, style="dim"), verdict_line, *_reasons(verdict)], colour)


def check_lines(snapshot: DriftSnapshot, verdict: Verdict, n_features: int, *, colour: bool | None = None) -> str:
    """A drift check: a line of how far each domain has moved, and reasons if a protected one is threatened."""
    moved = sorted(snapshot.domains.values(), key=lambda d: -d.relative_drift)
    items = [f"{d.name} {d.relative_drift:.1%} ({d.nll_change:+.2f})" for d in (snapshot.train, *moved)]
    head = Text(f"STS step {snapshot.step}: {_name(verdict)}", style=_COLOURS[verdict.decision])
    head.append(f"; drift (change of NLL) since step 0; {snapshot.seconds:.0f} s", style="not bold default")
    # textwrap breaks at plain spaces only, so that an item stays on its line.
    lines = textwrap.wrap("  ".join(item.replace(" ", "\u00a0") for item in items), _WIDTH - 2)
    body = [Text("  " + line.replace("\u00a0", " ")) for line in lines]
    foot = Text(f"  the forecast named {snapshot.n_shared} of the {n_features} features that moved most", style="dim")
    return _rendered([head, *body, foot, *(_reasons(verdict) if verdict.threatened else [])], colour)


def _name(verdict: Verdict) -> str:
    return "ALARM" if verdict.decision == "no-go" and verdict.step else verdict.decision.upper()


def _reasons(verdict: Verdict) -> list[Text]:
    """The reasons that matter: of the threatened domains if there are any, else of all."""
    shown = verdict.threatened or verdict.reasons
    wrap = textwrap.TextWrapper(_WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [Text(line) for name in shown for line in wrap.wrap(f"{name}: {verdict.reasons[name]}")]


def _short(number: float) -> str:
    return f"{number:.3g}" if abs(number) < 1e4 else f"{number:.1e}"


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
