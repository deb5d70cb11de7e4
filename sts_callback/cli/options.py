"""Options of the command line: what can be asked, and how. What is done then is in the other modules here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sts_callback.config import MAX_REPEATS, MAX_REPLAY, ROWS_READ, ROWS_SHOWN, SCALES, ProbeConfig

NUMBERS = ("n_queries", "n_draws", "n_features", "max_tokens", "seed")
"""Of `ProbeConfig`, what can be chosen."""


def parser(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """What `sts-callback` can be asked; the arguments that it reads hold the chosen command as `run`.

    Args:
        commands: what each does, by its name.

    """
    made = argparse.ArgumentParser(prog="sts-callback", description="Which domains will a fine-tune move? Ask before training.")
    subparsers = made.add_subparsers(required=True, metavar="COMMAND")

    def added(name: str, *, help: str, description: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=description)
        command.set_defaults(run=commands[name])
        return command

    doctor = added(
        "doctor",
        help="check whether SAE, model and data allow an answer",
        description="Check whether SAE, model and data allow an answer. Exit code: 0 they do, 4 they do not, 2 wrong input.",
    )
    forecast = added(
        "forecast",
        help="forecast what training on a file will move",
        description="Forecast what training on a file will move. "
        "Exit code: 0 go, 3 no-go, 4 cannot tell or not covered, 2 wrong input.",
    )
    forecast.add_argument("--words", action="store_true", help="also show where in the texts the shifted features fire")
    forecast.add_argument(
        "--junit", type=Path, metavar="FILE", help="also write JUnit XML for a CI system: a test case for each protected domain"
    )
    forecast.add_argument(
        "--lock", type=Path, metavar="FILE", help="refuse to forecast if anything but the training data is not as in this file"
    )
    forecast.add_argument("--write-lock", action="store_true", help="write that file after the forecast instead")
    blame = added(
        "blame",
        help="rank training rows by how far they fire what a protected domain lives on",
        description="Rank training rows by how far they fire the features on which a protected domain lives: where features "
        "fire, not a proof of cause. Exit code: 0 ranked, 4 cannot tell, 2 wrong input.",
    )
    blame.add_argument(
        "--top", type=int, default=ROWS_SHOWN, metavar="N", help=f"rows shown for each domain (default {ROWS_SHOWN})"
    )
    blame.add_argument(
        "--rows", type=int, default=ROWS_READ, metavar="N", help=f"rows read; of more, a sample (default {ROWS_READ})"
    )
    blame.add_argument(
        "--out", metavar="FILE", help="write the rows that do not stand out here (.jsonl), the others' numbers beside it"
    )
    blame.add_argument("--run-dir", type=Path, metavar="RUN_DIR", help="also put them into the report of this run")
    mix = added(
        "mix",
        help="find how much of other data to mix in, so that every budget is kept",
        description="Find how much of other data to mix into the training data, so that every protected domain keeps its budget. "
        "Sources are measured, by a short run on each (--pilot) or by examples in context, and mixtures extrapolated from them. "
        "Exit code: 0 some mixture keeps them, or the training data alone; 3 none does, 4 cannot tell, 2 wrong input.",
    )
    mix.add_argument(
        "--replay", action="append", default=[], metavar="NAME=FILE", help="what may be mixed in, JSON lines; repeatable"
    )
    mix.add_argument("--rows", type=int, metavar="N", help="rows of the mixture (default: as many as --train has)")
    mix.add_argument(
        "--max-replay", type=float, default=MAX_REPLAY, metavar="X", help=f"largest share of replay (default {MAX_REPLAY:g})"
    )
    mix.add_argument("--max-share", action="append", default=[], metavar="NAME=X", help="largest share of one source; repeatable")
    mix.add_argument(
        "--max-repeats", type=float, default=MAX_REPEATS, metavar="X", help=f"how often a row may come (default {MAX_REPEATS:g})"
    )
    mix.add_argument("--out", type=Path, metavar="FILE", help="write the mixture here, as datasets.interleave_datasets takes it")
    mix.add_argument(
        "--pilot",
        action="append",
        default=[],
        metavar="NAME=RUN_DIR",
        help="a short run on one source alone, by train for --train; with one for each source no model is loaded",
    )
    for command in (doctor, forecast, blame, mix):
        needed = command is not mix  # pilots take the place of both
        command.add_argument("--model", required=needed, help="folder or hub id of the model to be tuned")
        command.add_argument("--train", required=True, metavar="FILE", help="training examples with answers, JSON lines")
        _add_measurement(command, several_saes=command in (doctor, forecast), needs_sae=needed, numbers=NUMBERS)

    dial = added(
        "dial",
        help="find the largest scale of a LoRA adapter that keeps every budget",
        description="Find, after a LoRA run, the largest scale of the adapter at which every protected domain keeps its budget. "
        "Exit code: 0 some scale keeps them, 3 none does, 4 cannot tell, 2 wrong input.",
    )
    dial.add_argument("--model", required=True, help="folder or hub id of the model that was tuned")
    dial.add_argument("--adapter", required=True, metavar="DIR", help="folder with the LoRA adapter")
    dial.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=list(SCALES),
        metavar="X",
        help=f"shares of the adapter's own scale (default {' '.join(f'{scale:g}' for scale in SCALES)})",
    )
    _add_measurement(dial, several_saes=False, needs_sae=True, numbers=("n_queries", "max_tokens", "seed"))

    report = added(
        "report",
        help="make a page of what a run has left",
        description="Make report.html and report.json of what a run has left, also of one that goes on or has died. "
        "Exit code: 0 made, 2 there is nothing to tell.",
    )
    card = added(
        "card",
        help="tell a run in a section for a model card",
        description="Print what a run has left as a section of Markdown for a model card. "
        "Exit code: 0 told, 2 there is nothing to tell.",
    )
    card.add_argument(
        "--into", type=Path, metavar="FILE", help="put it into this model card instead, in place of the one that is there"
    )
    for command in (report, card):
        command.add_argument("run_dir", metavar="RUN_DIR", help="the trainer's output_dir, or the folder sts in it")

    ledger = added(
        "ledger",
        help="show how good past forecasts were",
        description="Show how good the forecasts of finished runs were, for each model and SAE by itself. "
        "Exit code: 0 shown, also if there are none; 2 the ledger cannot be read.",
    )
    ledger.add_argument("--json", action="store_true", help="print JSON, no table")

    saes = added("saes", help="list the SAEs that SAELens has for a model", description="List SAELens' SAEs for a model.")
    saes.add_argument("--model", required=True, help="hub id or name of the model")
    saes.add_argument("--json", action="store_true", help="print JSON lines, no table")
    return made


def _add_measurement(command: argparse.ArgumentParser, *, several_saes: bool, needs_sae: bool, numbers: Sequence[str]) -> None:
    """Options of all commands that measure.

    Args:
        command: gets them.
        several_saes: whether it takes more than one.
        needs_sae: whether it takes at least one.
        numbers: of `ProbeConfig` that can be chosen.

    """
    sae = "SAELens release/sae_id, a folder, or auto"
    if several_saes:
        command.add_argument(
            "--sae", required=True, action="append", help=f"{sae}; repeatable: the first decides, all are compared"
        )
    else:
        command.add_argument("--sae", required=needs_sae, help=sae)
    command.add_argument(
        "--domain", action="append", default=[], metavar="NAME=FILE", help="a domain to measure, JSON lines; repeatable"
    )
    command.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="NAME[=NATS]",
        help="a domain that must not suffer, your own or a shipped one, with its budget in nats per token; repeatable",
    )
    command.add_argument("--json", action="store_true", help="print JSON, no table")
    command.add_argument("--device", help="where to run, such as cuda or cpu (default: a GPU if there is one)")
    defaults = ProbeConfig()
    for name in numbers:
        option = f"--{name.replace('_', '-')}"
        command.add_argument(option, type=int, default=getattr(defaults, name), help=f"default {getattr(defaults, name)}")
