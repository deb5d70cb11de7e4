"""`blame`: which training rows activate a protected domain's features."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.common import GO, prepared, write_report_of
from sts_callback.cli.options import add_measurement, add_model
from sts_callback.config import ROWS_READ, ROWS_SHOWN

if TYPE_CHECKING:
    from sts_callback.records import Identity
    from sts_callback.runs.directory import RunDirectory


HELP = "rank training rows by how strongly they activate a protected domain's features"
DESCRIPTION = (
    "Rank training rows by how strongly they activate a protected domain's features. This does not prove that a row does harm. "
    "Exit code: 0 ranked, 4 cannot tell, 2 wrong input."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    command.add_argument(
        "--top", type=int, default=ROWS_SHOWN, metavar="N", help=f"rows to show for each domain (default {ROWS_SHOWN})"
    )
    command.add_argument(
        "--rows",
        type=int,
        default=ROWS_READ,
        metavar="N",
        help=f"rows to read; from a longer file, a random sample (default {ROWS_READ})",
    )
    command.add_argument(
        "--out",
        metavar="FILE",
        help="write the rows that do not stand out to this file (.jsonl), and the numbers of the others beside it",
    )
    command.add_argument("--run-dir", type=Path, metavar="RUN_DIR", help="also put the ranking into the report of this run")
    add_model(command)
    add_measurement(command, several_saes=False)


def run(args: argparse.Namespace) -> int:
    """Rank training rows and, if asked, write the training data without the highest."""
    from sts_callback.config import NO_SAE
    from sts_callback.errors import NEEDS_SAE, ConfigError
    from sts_callback.model.sae_files import is_no_sae
    from sts_callback.remedies.attribution import blame, filter_files, require_possible, write_filtered

    require_possible(args.protect, args.rows, args.top)
    files = filter_files(args.train, args.out) if args.out else None
    past_run = _run_with_forecast(args.run_dir) if args.run_dir else None
    if not args.sae or is_no_sae(args.sae):
        raise ConfigError(f"--sae: got {args.sae or NO_SAE}. {NEEDS_SAE}")
    made_monitor, policy = prepared(args)

    from sts_callback.data.reader import read_rows
    from sts_callback.report.terminal.remedies import attribution_table

    rows, monitor = read_rows(args.train, "train_data"), made_monitor(sae=args.sae)
    if past_run is not None:
        _require_same_maker(past_run[1], monitor.identity)
    found = blame(monitor, rows, list(policy.budgets), n_rows=args.rows, n_top=args.top)
    print(found.to_json() if args.json else attribution_table(found))
    if files is not None:
        write_filtered(found, rows, *files)
        print(f"{files[0]}: {len(rows) - len(found.left_out)} rows kept; {files[1]}: which are not.", file=sys.stderr)
    if past_run is not None:
        print(f"{write_report_of(past_run[0], 'blame', found)}: has them too.", file=sys.stderr)
    return GO


def _run_with_forecast(folder: Path) -> tuple[RunDirectory, Identity]:
    """The folder of a run and the identity of its forecast."""
    from sts_callback.errors import ConfigError
    from sts_callback.runs.directory import run_directory_in

    log = run_directory_in(folder)
    forecast = log.read_all().forecast
    if forecast is None:
        raise ConfigError(f"--run-dir: {log.folder} holds no forecast; give the output_dir of a run with STSCallback.")
    if not forecast.identity.has_sae:
        raise ConfigError(f"--run-dir: {log.folder} is of a run without an SAE, whose report can have no rows; leave it out.")
    return log, forecast.identity


def _require_same_maker(run: Identity, ours: Identity) -> None:
    """Refuse rows that another model or SAE than the run's has read."""
    from sts_callback.errors import ConfigError

    for name in ("model", "sae", "hook_name"):
        if getattr(run, name) != getattr(ours, name):
            raise ConfigError(
                f"--run-dir: its forecast was made with {run.model_name}, {run.sae_name} at {run.hook_name}, not with "
                f"{ours.model_name}, {ours.sae_name} at {ours.hook_name}; give the run's own model and SAE."
            )
