"""`saes`: lists the SAEs for a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from sts_callback.cli.common import GO, WRONG_INPUT
from sts_callback.cli.options import add_json

HELP = "list the SAEs that SAELens has for a model"
DESCRIPTION = "List SAELens' SAEs for a model: those that can be used, then those that are refused, with the reason."
_WIDE = 160  # columns if the output is no terminal, so that each SAE has its own line


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    command.add_argument("--model", required=True, help="hub id or name of the model")
    add_json(command)


def run(args: argparse.Namespace) -> int:
    """List the SAEs of a model that SAELens knows."""
    from rich.console import Console
    from rich.table import Table

    from sts_callback.model.registry import saes_for, ways_without

    entries = sorted(saes_for(args.model), key=lambda e: (e.unusable is not None, e.kind == "transcoder"))  # these show less
    if not entries:
        print(
            f"sts-callback: --model: SAELens has no SAE for {args.model!r}; check the name. {ways_without(args.model)}",
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
    if any(entry.unusable for entry in entries):
        table.add_column("refused: it")
    for entry in entries:
        cells = (entry.layer, entry.width, None if entry.l0 is None else f"{entry.l0:.0f}", entry.unusable)
        table.add_row(entry.spec, entry.kind, *("" if cell is None else str(cell) for cell in cells[: len(table.columns) - 2]))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
    return GO
