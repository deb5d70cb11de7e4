"""`ledger`: how good past forecasts were."""

from __future__ import annotations

import argparse
import json

from sts_callback.cli.common import GO
from sts_callback.cli.options import add_json

HELP = "show how good past forecasts were"
DESCRIPTION = (
    "Show how good the forecasts of finished runs were, for each model and SAE separately. "
    "Exit code: 0 shown, also if there are none; 2 the ledger cannot be read."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_json(command)


def run(args: argparse.Namespace) -> int:
    """Show how good past forecasts were."""
    from sts_callback.errors import DataError
    from sts_callback.report.terminal.ledger import ledger_table
    from sts_callback.runs.ledger import ledger_file, read
    from sts_callback.runs.track_record import track_records

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
        print("No ledger is kept: set STS_LEDGER, or STSCallback(ledger=...), to a file that is to keep finished runs.")
    else:
        print(ledger_table(records) if records else "No finished run is in the ledger yet.")
        print(f"{file}" + (f"\nLines in it that cannot be read: {found.n_unreadable}" if found.n_unreadable else ""))
    return GO
