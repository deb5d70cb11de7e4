"""Draw what the terminal showed of a run, as an SVG for documents.

python examples/picture.py runs/demo examples/demo.svg
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sts_callback.records import DriftSnapshot, Forecast, Verdict
from sts_callback.report.terminal.forecast import check_lines, forecast_table

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


def records(run: Path) -> str:
    """Forecast table and check lines of a run, with colours."""
    made = json.loads((run / "sts" / "forecast.json").read_text())
    forecast, verdict = Forecast.from_dict(made["forecast"]), Verdict.from_dict(made["verdict"])
    parts = [forecast_table(forecast, verdict, colour=True)]
    for line in (run / "sts" / "drift.jsonl").read_text().splitlines():
        check = json.loads(line)
        snapshot, verdict = DriftSnapshot.from_dict(check["snapshot"]), Verdict.from_dict(check["verdict"])
        parts.append(check_lines(snapshot, verdict, len(forecast.features), colour=True))
    return "\n\n".join(parts)


def main(run: str, picture: str) -> None:
    console = Console(record=True, width=82, file=io.StringIO())
    console.print(Text.from_ansi(records(Path(run))))
    Path(picture).write_text(console.export_svg(title="", code_format=_SVG))


if __name__ == "__main__":
    main(*sys.argv[1:])
