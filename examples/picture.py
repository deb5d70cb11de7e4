"""Draw what the terminal showed before the first step of a run and at its end, as an SVG for documents.

python examples/picture.py runs/demo examples/demo.svg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sts_callback.report.headline import alarms_since
from sts_callback.report.terminal.check import check_view
from sts_callback.report.terminal.forecast import forecast_view
from sts_callback.report.terminal.rehearsal import rehearsal_view
from sts_callback.runs.directory import RunDirectory

# Rich's own template would fetch a font from outside.
_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px;
line-height: {line_height}px; }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect width="100%" height="100%" rx="8" fill="#292929"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def elsewhere(text: str) -> str:
    """A text without the folders of this machine: whoever reads it has others."""
    return text.replace(f"{Path(__file__).resolve().parent.parent}/", "").replace(str(Path.home()), "~")


def records(run: Path) -> str:
    """What was known before the first step, and the last check, with colours."""
    logged = RunDirectory(run / "sts").read_all()
    if logged.forecast is None or logged.forecast_verdict is None or logged.settings is None or not logged.checks:
        raise SystemExit(f"{run} holds no forecast, or no check, that can be read.")
    policy, rehearsal, last = logged.settings.policy, logged.rehearsal, logged.checks[-1]
    forecast, in_context = logged.forecast, logged.forecast_verdict
    if rehearsal is not None and logged.rehearsal_verdict is not None:
        before = rehearsal_view(
            rehearsal, logged.rehearsal_verdict, forecast, in_context, policy.budgets, given=logged.given, colour=True
        )
    else:
        before = forecast_view(forecast, in_context, policy, given=logged.given, colour=True)
    check = check_view(
        last.snapshot,
        last.verdict,
        policy.budgets,
        since=alarms_since([check.verdict for check in logged.checks]),
        expected=rehearsal.expected if rehearsal else {},
        output_dir=run,
        given=logged.given,
        colour=True,
    )
    return elsewhere(f"{before}\n\n{check}")


def main(run: str, picture: str) -> None:
    console = Console(record=True, width=82, file=io.StringIO())
    console.print(Text.from_ansi(records(Path(run))))
    Path(picture).write_text(console.export_svg(title="", code_format=_SVG))


if __name__ == "__main__":
    main(*sys.argv[1:])
