"""`report`: a page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from sts_callback.cli.common import GO, write_report_of
from sts_callback.cli.options import add_run_dir

HELP = "write the report of a run, as one page"
DESCRIPTION = (
    "Write report.html and report.json from the files of a run, also of one that goes on or has died. "
    "Exit code: 0 written, 2 there is nothing to tell."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_run_dir(command)


def run(args: argparse.Namespace) -> int:
    """Write the page of a run."""
    from sts_callback.runs.directory import run_directory_in

    print(write_report_of(run_directory_in(Path(args.run_dir)), "report"))
    return GO
