"""A run, as its folder tells it while it trains or after, as text."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sts_callback.records.run import Logged
from sts_callback.report.formatting import counted, seconds
from sts_callback.report.headline import alarms_since, ended_notes, stage_of
from sts_callback.report.summary import next_check, of_run
from sts_callback.report.terminal.check import beside_lines
from sts_callback.report.terminal.text import rendered, wrapped
from sts_callback.report.terminal.verdict import advice_lines, open_reasons, summary_parts, verdict_line


def watch_view(logged: Logged, output_dir: Path, silent_s: float = math.nan, *, colour: bool | None = None) -> str:
    """The newest verdict, a row a domain, what to do about an alarm, and the state of the run.

    Args:
        logged: all that can be read of it.
        output_dir: of the run.
        silent_s: seconds since its folder was last written; NaN to leave that out.
        colour: whether to use colours; by default where a terminal shows them.

    """
    verdict, summary = logged.verdict, of_run(logged)
    verdicts = [check.verdict for check in logged.checks]
    parts: list[Text | Table] = []
    if verdict is not None:
        stage = stage_of(logged)
        what = f"STS step {verdict.step}" if stage == "check" else f"STS {stage}"
        parts.append(verdict_line(what, verdict, stage, alarms_since(verdicts), is_first=len(verdicts) == 1))
    parts += summary_parts(summary) if summary is not None else []
    budgets = logged.settings.policy.budgets if logged.settings else {}
    if logged.checks:
        parts += beside_lines(logged.checks[-1].snapshot, logged.checks[-1].verdict, budgets)
    if verdict is not None:
        parts += open_reasons(verdict)
        parts += advice_lines(verdict, output_dir, logged.given, budgets, has_sae=logged.has_sae)
    parts += wrapped(ended_notes(verdicts))
    parts += wrapped(logged.unreadable, "yellow")
    parts += wrapped(
        [_state(logged, silent_s), f"All of it as a page: sts-callback report {shlex.quote(str(output_dir))}"], "bold"
    )
    return rendered(parts, colour)


def waiting_line(folder: Path, *, colour: bool | None = None) -> str:
    """That there is nothing to show yet."""
    told = f"STS watch: waiting for a run in {folder}; it is there once the callback has made its forecast."
    return rendered([*wrapped([told])], colour)


def _state(logged: Logged, silent_s: float) -> str:
    """Whether it goes on, and what has gone wrong."""
    step = max([check.snapshot.step for check in logged.checks], default=0)
    parts = []
    if logged.has_ended:
        parts.append(f"Training has ended at step {logged.ended_at or step}")
    else:
        following = next_check(logged)
        parts.append("No end of training is recorded" + (f"; next planned check: step {following}" if following else ""))
        if math.isfinite(silent_s):
            parts.append(f"last written {seconds(silent_s)} ago")
    if logged.postponed:
        parts.append(f"{counted(len(logged.postponed), 'check')} skipped for their time")
    if logged.faults:
        parts.append(f"{counted(len(logged.faults), 'failure')} of ours, see faults.jsonl")
    return "; ".join(parts) + "."
