"""`mix`: how much other data to mix in to keep every budget."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.common import FINDING_CODES
from sts_callback.cli.options import add_json, add_protect
from sts_callback.config import MAX_REPEATS, MAX_REPLAY, PolicyConfig, ProbeConfig

if TYPE_CHECKING:
    from sts_callback.data.pairs import Row
    from sts_callback.remedies.mixture import MixtureConstraints


HELP = "find how much other data to mix in so that every budget is kept"
DESCRIPTION = (
    "Find how much other data to mix into the training data, so that every protected domain keeps its budget. Each source is "
    "measured by a short run on it alone (--pilot); mixtures are extrapolated from these. "
    "Exit code: 0 some mixture, or the training data alone, keeps them; 3 none does, 4 cannot tell, 2 wrong input."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    command.add_argument("--train", required=True, metavar="FILE", help="training examples with answers, JSON lines")
    command.add_argument(
        "--replay", action="append", default=[], metavar="NAME=FILE", help="other data to mix in, JSON lines; repeatable"
    )
    command.add_argument(
        "--pilot",
        action="append",
        default=[],
        metavar="NAME=RUN_DIR",
        help="folder of a short run with STSCallback on one source alone, one for each; `train` is the name of --train",
    )
    command.add_argument("--rows", type=int, metavar="N", help="rows of the mixture (default: as many as --train has)")
    command.add_argument(
        "--max-replay", type=float, default=MAX_REPLAY, metavar="X", help=f"largest share of replay (default {MAX_REPLAY:g})"
    )
    command.add_argument(
        "--max-share", action="append", default=[], metavar="NAME=X", help="largest share of one source; repeatable"
    )
    command.add_argument(
        "--max-repeats",
        type=float,
        default=MAX_REPEATS,
        metavar="X",
        help=f"how often a row may appear (default {MAX_REPEATS:g})",
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="write the mixture, as datasets.interleave_datasets takes it")
    command.add_argument(
        "--seed", type=int, default=ProbeConfig.seed, help=f"random seed of the mixing (default {ProbeConfig.seed})"
    )
    add_protect(command)
    add_json(command)


def run(args: argparse.Namespace) -> int:
    """Read the results of pilot runs, search mixtures and recommend one."""
    from sts_callback.config import whole
    from sts_callback.runs.files import require_place, write_asked
    from sts_callback.training.arguments import budgets_in, named

    if args.out:
        require_place(args.out, "--out")
    whole(args.seed, "seed", "0 or more", least=0)  # otherwise `datasets` refuses the mixture
    policy = PolicyConfig(budgets=budgets_in(args.protect, "--protect"))
    files, sources, constraints = _sources(args, policy)

    from sts_callback.records.remedies import Mix
    from sts_callback.remedies.mixture import pilot_effects, plan, search
    from sts_callback.report.terminal.remedies import mix_table

    started = time.monotonic()
    pilots = named(args.pilot, "--pilot", "NAME=RUN_DIR")
    identity, effects = pilot_effects(pilots, {name: len(rows) for name, rows in sources.items()}, policy)
    found = Mix(identity, effects, search(effects, policy, constraints), time.monotonic() - started)
    print(found.to_json() if args.json else mix_table(found))
    if args.out:
        write_asked(args.out, plan(found, found.nearest, files, args.seed), "--out")
    return FINDING_CODES[found.finding]


def _sources(
    args: argparse.Namespace, policy: PolicyConfig
) -> tuple[dict[str, str], dict[str, Sequence[Row]], MixtureConstraints]:
    """Read the arguments: files of training data and replay, their rows, and the constraints. Wrong ones are refused now."""
    from sts_callback.data.reader import read_rows
    from sts_callback.records import TRAIN
    from sts_callback.remedies.mixture import MixtureConstraints, require_sources
    from sts_callback.training.arguments import named, number

    replay = named(args.replay, "--replay", "NAME=FILE")
    max_share = {n: number(x, f"--max-share {n}", "a share") for n, x in named(args.max_share, "--max-share", "NAME=X").items()}
    constraints = MixtureConstraints(args.rows, args.max_replay, args.max_repeats, max_share)
    require_sources(replay, policy)
    files = {TRAIN: args.train, **replay}
    sources = {name: read_rows(file, f"--replay {name}" if name in replay else "--train") for name, file in files.items()}
    constraints.weights({name: len(rows) for name, rows in sources.items()})
    return files, sources, constraints
