"""What runs have left, and what there is to run with: `report`, `card`, `ledger` and `saes`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.common import GO, WRONG_INPUT

if TYPE_CHECKING:
    from sts_callback.remedies import Blame
    from sts_callback.runlog import RunLog

_WIDE = 160  # columns where nobody sees a terminal: each SAE on a line of its own


def report(args: argparse.Namespace) -> int:
    """Write the page of a run."""
    from sts_callback.runlog import run_log_in

    print(reported(run_log_in(Path(args.run_dir)), "report"))
    return GO


def reported(log: RunLog, command: str, blame: Blame | None = None) -> Path:
    """Write the report of a run, with rows to blame if there are new ones."""
    from sts_callback.errors import DataError
    from sts_callback.report import write_report

    try:
        if blame is not None:
            log.write_blame(blame)
        return write_report(log)
    except OSError as error:
        raise DataError(f"{command}: {log.folder} cannot be read or written ({error}).") from error


def card(args: argparse.Namespace) -> int:
    """Print the section of a model card, or put it into one."""
    from sts_callback.card import card_section, put_into
    from sts_callback.errors import DataError
    from sts_callback.runlog import run_log_in

    log = run_log_in(Path(args.run_dir))
    try:
        section = card_section(log)
        if args.into:
            put_into(args.into, section)
    except OSError as error:
        raise DataError(f"card: {log.folder} or {args.into} cannot be read or written ({error}).") from error
    print(args.into or section)
    return GO


def ledger(args: argparse.Namespace) -> int:
    """Show how good past forecasts were."""
    from sts_callback.errors import DataError
    from sts_callback.hindsight import track_records
    from sts_callback.ledger import ledger_file, read
    from sts_callback.terminal.ledger import ledger_table

    file = ledger_file()
    try:
        found = read()
    except OSError as error:
        raise DataError(f"ledger: {file} cannot be read ({error}); set STS_LEDGER to a file that can.") from error
    records = track_records(found.entries)
    if args.json:
        made = [record.to_dict() for record in records]
        print(json.dumps({"file": str(file) if file else None, "n_unreadable": found.n_unreadable, "groups": made}))
        return GO
    if file is None:
        print("No ledger is kept: STS_LEDGER is empty, or there is no home folder to keep one in.")
    else:
        print(ledger_table(records) if records else "No finished run is in the ledger yet.")
        print(f"{file}" + (f"\nLines in it that cannot be read: {found.n_unreadable}" if found.n_unreadable else ""))
    return GO


def saes(args: argparse.Namespace) -> int:
    """List the SAEs that SAELens has for a model."""
    from rich.console import Console
    from rich.table import Table

    from sts_callback.model.registry import saes_for

    entries = sorted(saes_for(args.model), key=lambda entry: entry.kind == "transcoder")  # SAEs first: transcoders tell less
    if not entries:
        print(
            f"sts-callback: SAELens has no SAE for {args.model!r}; train one with examples/train_sae.py, or check the name.",
            file=sys.stderr,
        )
        return WRONG_INPUT
    if args.json:
        for entry in entries:
            print(json.dumps({**dataclasses.asdict(entry), "spec": entry.spec}))
        return GO
    table = Table(box=None, pad_edge=False)
    table.add_column("sae (release/sae_id)", overflow="fold", ratio=1)
    for title in ("kind", "layer", "width", "L0"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in entries:
        cells = (entry.layer, entry.width, None if entry.l0 is None else f"{entry.l0:.0f}")
        table.add_row(entry.spec, entry.kind, *("" if cell is None else str(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    return GO
