"""`watch`: follow a run in the terminal, from its folder alone."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sts_callback.cli.common import CANNOT_TELL, DECISION_CODES, GO
from sts_callback.cli.options import add_run_dir

if TYPE_CHECKING:
    from sts_callback.runs.directory import RunDirectory

HELP = "follow a run in the terminal"
DESCRIPTION = (
    "Follow a run from its folder: the newest verdict, its table, the next check, alarms. Start it before or during the run. "
    "It ends with the run, or by Ctrl-C. "
    "Exit code, by the newest verdict: 0 go or watch, 3 no-go or alarm, 4 cannot tell, or no run yet; 2 wrong input."
)
INTERRUPTED = 130
_EVERY_S = 2.0


class View(NamedTuple):
    """What there is to show."""

    text: str
    code: int
    is_over: bool


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    command.add_argument("--once", action="store_true", help="show the run as it is now, and end")
    add_run_dir(command)


def run(args: argparse.Namespace) -> int:
    """Show the run again and again until it has ended."""
    folder = Path(args.run_dir)
    if args.once:
        view = look(folder)
        print(view.text)
        return view.code
    try:
        with _screen() as show:
            while not (view := look(folder)).is_over:
                show(view.text)
                time.sleep(_EVERY_S)
            show(view.text)
    except KeyboardInterrupt:
        return INTERRUPTED
    return view.code


def look(folder: Path) -> View:
    """Read a run.

    Args:
        folder: the trainer's `output_dir`, or the folder `sts` in it. It may not be there yet.

    """
    from sts_callback.errors import ConfigError, DataError
    from sts_callback.report.terminal.watch import waiting_line, watch_view
    from sts_callback.runs.directory import run_directory_in

    if folder.is_file():
        raise ConfigError(f"RUN_DIR: {folder} is a file; give the output_dir of a run, or the folder sts in it.")
    directory = run_directory_in(folder)
    try:
        logged = directory.read_all()
    except OSError as error:
        raise DataError(f"watch: {directory.folder} cannot be read ({error}).") from error
    if logged.is_empty and not logged.has_ended:
        return View(waiting_line(folder), CANNOT_TELL, is_over=False)
    text = watch_view(logged, _output_dir(directory), _silent_s(directory))
    verdict = logged.verdict
    if verdict is None:
        return View(text, CANNOT_TELL, logged.has_ended)
    return View(text, DECISION_CODES[verdict.decision] if verdict.reasons else GO, logged.has_ended)


def _output_dir(directory: RunDirectory) -> Path:
    return directory.folder.parent if directory.folder.name == "sts" else directory.folder


def _silent_s(directory: RunDirectory) -> float:
    """Seconds since the run has written something. Only for a terminal: elsewhere each second would be a new view."""
    return max(0.0, time.time() - directory.written_at()) if sys.stdout.isatty() else float("nan")


@contextmanager
def _screen() -> Iterator[Callable[[str], None]]:
    """Shows texts in place of one another on a terminal; elsewhere below one another, each that differs from the one before."""
    if sys.stdout.isatty():
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
            yield lambda text: live.update(Text.from_ansi(text), refresh=True)
        return
    shown = ""

    def show(text: str) -> None:
        nonlocal shown
        if text != shown:
            print(text, flush=True)
        shown = text

    yield show
