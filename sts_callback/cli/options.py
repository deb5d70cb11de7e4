"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from sts_callback.config import CHAT_TEMPLATE, PROBE_NUMBERS, ProbeConfig

_MEANINGS = {
    "n_queries": "queries from each domain and from the training data",
    "n_draws": "draws of demonstrations",
    "n_features": "shifted features to look at",
    "max_tokens": "longest query and longest answer, in tokens",
    "seed": "random seed",
}
"""What each of these numbers is."""
QUICK = {"n_queries": 8, "n_draws": 4, "max_tokens": 64}
"""What `--quick` sets of them. Our choice: enough to see which features move, too little to be sure of small harm. With two draws
the training data's own place on the scale is too unsure to measure others by."""


def add_model(command: argparse.ArgumentParser) -> None:
    """Add options for the model and the training examples."""
    command.add_argument("--model", required=True, help="folder or hub id of the model to be tuned")
    command.add_argument("--train", required=True, metavar="FILE", help="training examples with answers, JSON lines")


def add_protect(command: argparse.ArgumentParser) -> None:
    """Add options for domains and budgets."""
    command.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="NAME[=BUDGET]",
        help="a domain that must not get worse, your own or a shipped one, and what its answers may lose: 0.1 (nats a token), "
        "'0.05 bits/byte' or 2points (of token accuracy); repeatable",
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """Add the option for JSON output."""
    command.add_argument("--json", action="store_true", help="print JSON, no table")


def add_details(command: argparse.ArgumentParser) -> None:
    """Add the option for all numbers below the table."""
    command.add_argument("--details", action="store_true", help="also print all scores and counts, below the table")


def add_run_dir(command: argparse.ArgumentParser) -> None:
    """Add the argument for the folder of a run."""
    command.add_argument("run_dir", metavar="RUN_DIR", help="the trainer's output_dir, or the folder sts in it")


def chosen_probes(args: argparse.Namespace) -> ProbeConfig:
    """The probes that the options of `add_measurement` ask for."""
    given = {name: getattr(args, name, None) for name in (*PROBE_NUMBERS, "chat_template")}
    return ProbeConfig(**(QUICK if args.quick else {}) | {name: value for name, value in given.items() if value is not None})


def add_measurement(command: argparse.ArgumentParser, *, several_saes: bool, numbers: Iterable[str] = PROBE_NUMBERS) -> None:
    """Add the options of all commands that measure.

    Args:
        command: parser of the command.
        several_saes: whether the command takes more than one SAE.
        numbers: fields of `ProbeConfig` that have an option.

    """
    sae = "SAELens release/sae_id, a folder, auto, or none to read raw activations (none:12: those after layer 12)"
    if several_saes:
        command.add_argument("--sae", action="append", help=f"{sae}; repeatable: the first decides, all are compared")
    else:
        command.add_argument("--sae", help=sae)
    command.add_argument(
        "--domain", action="append", default=[], metavar="NAME=FILE", help="a domain to measure, JSON lines; repeatable"
    )
    add_protect(command)
    add_json(command)
    command.add_argument("--device", help="where to run, such as cuda or cpu (default: a GPU if there is one)")
    command.add_argument(
        "--quick", action="store_true", help="a first look, with few and short queries unless you set their numbers"
    )
    defaults = ProbeConfig()
    for name in numbers:
        quick = f"; with --quick {QUICK[name]}" if name in QUICK else ""
        command.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"{_MEANINGS[name]} (default {getattr(defaults, name)}{quick})"
        )
    command.add_argument(
        "--chat-template",
        choices=CHAT_TEMPLATE,
        default=defaults.chat_template,
        help="put plain rows of domains into the model's chat template (auto: if the training data use it)",
    )
