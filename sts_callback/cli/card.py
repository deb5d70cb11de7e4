"""`card`: a run as a section of a model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from sts_callback.cli.common import GO
from sts_callback.cli.options import add_run_dir

HELP = "print a section about a run for a model card"
DESCRIPTION = "Print a section of Markdown about a run, for a model card. Exit code: 0 printed, 2 there is nothing to tell."


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    command.add_argument(
        "--into", type=Path, metavar="FILE", help="put the section into this model card instead, in place of an earlier one"
    )
    add_run_dir(command)


def run(args: argparse.Namespace) -> int:
    """Print the section, or put it into a model card."""
    from sts_callback.errors import DataError
    from sts_callback.report.card import card_section, put_into
    from sts_callback.runs.directory import run_directory_in

    log = run_directory_in(Path(args.run_dir))
    try:
        section = card_section(log)
        if args.into:
            put_into(args.into, section)
    except OSError as error:
        raise DataError(f"card: {log.folder} or {args.into} cannot be read or written ({error}).") from error
    print(args.into or section)
    return GO
