"""`sae`: an SAE for a model that has none."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.common import CANNOT_TELL, GO, loaded, require_device
from sts_callback.cli.options import add_json
from sts_callback.config import TRAIN, SaeConfig, require_once

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sts_callback.data.pairs import Row

HELP = "train an SAE for a model that has none"
DESCRIPTION = "Train an SAE for a model that has none."
_TRAIN = (
    "Train an SAE on one hook point of any causal language model, with SAELens' trainer, and measure how good it is on texts "
    "that are held out. If it was killed, the same command goes on where it stopped. "
    "Exit code: 0 made, 4 made, but too poor to be used, 2 wrong input."
)
_SHIPPED = "shipped domains"


def add_options(command: argparse.ArgumentParser) -> None:
    """What can be asked."""
    actions = command.add_subparsers(required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train an SAE on texts", description=_TRAIN)
    train.add_argument("--model", required=True, help="folder or hub id of the model")
    train.add_argument("--train", metavar="FILE", help="training examples to learn from, JSON lines")
    train.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="other texts, in any format that --train takes; repeatable (default: the shipped domains)",
    )
    train.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="new folder for the SAE")
    defaults = SaeConfig()
    train.add_argument(
        "--hook-name",
        metavar="NAME",
        help="where the SAE reads: blocks.N.hook_resid_post and the like, a module path, or a share of the depth such as 0.5 "
        "(default: after two thirds of the layers)",
    )
    train.add_argument(
        "--d-sae",
        type=int,
        metavar="N",
        help="number of features (default: the power of two up to 8 times the width of the activations)",
    )
    for option, kind, default, what in (
        ("--l0", float, defaults.l0, "mean number of active features a token"),
        ("--tokens", int, defaults.n_tokens, "tokens whose activations are read"),
        ("--passes", float, defaults.n_passes, "how often training goes through these tokens"),
        ("--seed", int, defaults.seed, "random seed"),
    ):
        train.add_argument(option, type=kind, default=default, metavar="N", help=f"{what} (default {default:,g})")
    train.add_argument("--device", help="where to run, such as cuda or cpu (default: a GPU if there is one)")
    add_json(train)


def run(args: argparse.Namespace) -> int:
    """Train an SAE and tell how good it is."""
    from sts_callback.runs.files import require_new_folder

    config = SaeConfig(args.hook_name, args.d_sae, args.l0, args.tokens, args.passes, args.seed)
    require_new_folder(args.out, "--out")
    sources = _sources(args)
    if args.device:
        require_device(args.device)

    from sts_callback.report.terminal.rows import rows_table
    from sts_callback.sae_training.train import train_sae

    model, tokenizer = loaded(args.model, args.device)
    made = train_sae(model, tokenizer, sources, config, args.out, progress=True)
    faults = made.card.faults()
    if args.json:
        print(made.card.to_json())
    else:
        print(rows_table(made.reads))
        print((args.out / "README.md").read_text(encoding="utf-8"))
    if faults:
        print(f"sts-callback: {args.out} is below the floor: {'; '.join(faults)}.", file=sys.stderr)
        return CANNOT_TELL
    return GO


def _sources(args: argparse.Namespace) -> dict[str, Sequence[Row]]:
    """Rows to learn from, by name."""
    from sts_callback.data.reader import read_rows
    from sts_callback.data.starter import starter_domains
    from sts_callback.errors import ConfigError

    if not args.train and not args.text:
        raise ConfigError("--train: got none; give training examples, or other texts with --text.")
    require_once(args.text, "--text")
    sources = {TRAIN: read_rows(args.train, "--train")} if args.train else {}
    sources |= {file: read_rows(file, "--text") for file in args.text}
    if not args.text:
        sources[_SHIPPED] = [row for name, file in starter_domains().items() for row in read_rows(file, name)]
    return sources
