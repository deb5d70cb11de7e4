"""`rehearse`: which learning rate, and how much replay, keeps every budget."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.common import FINDING_CODES, given_by, loaded, settings, write_report_of
from sts_callback.cli.options import add_details, add_measurement, add_model
from sts_callback.errors import ConfigError

if TYPE_CHECKING:
    from sts_callback.config import PolicyConfig, ProbeConfig
    from sts_callback.data.pairs import Row
    from sts_callback.records import Forecast
    from sts_callback.records.rehearsal import Trials
    from sts_callback.records.run import Given
    from sts_callback.runs.directory import RunDirectory
    from sts_callback.training.trials import Mixture

HELP = "try learning rates and mixtures with a few real steps, before training"
DESCRIPTION = (
    "Take a few real training steps at each learning rate and with each share of replay, measure what they do to the protected "
    "domains, and put everything back. Names the largest rate and the smallest share of replay that keep every budget. "
    "Exit code: 0 some rate and mixture keep them, 3 none does, 4 cannot tell, 2 wrong input."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """What can be asked."""
    add_model(command)
    command.add_argument(
        "--learning-rate",
        type=float,
        nargs="+",
        default=[],
        metavar="X",
        help="rates to try (default: the one in --trainer-args)",
    )
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--lora-r", type=int, metavar="R", help="train a LoRA adapter of this rank on all linear layers (default 16)"
    )
    how.add_argument("--full", action="store_true", help="train all parameters")
    command.add_argument(
        "--replay",
        action="append",
        default=[],
        metavar="NAME=FILE:SHARE",
        help="also try each rate with this share of rows from another file, such as cases=cases.jsonl:0.1; repeatable",
    )
    command.add_argument("--steps-planned", type=int, metavar="N", help="optimizer steps of the run (default: --trainer-args)")
    command.add_argument("--batch-size", type=int, metavar="N", help="rows in a step on one device (default: --trainer-args)")
    command.add_argument(
        "--trainer-args", type=Path, metavar="FILE", help="YAML of SFTConfig and LoRA arguments, as `trl sft --config` takes it"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="write a report with dose curves, DIR/sts/report.html")
    add_details(command)
    add_measurement(command, several_saes=False)


def run(args: argparse.Namespace) -> int:
    """Load the model once, rehearse every rate and mixture, compare."""
    from sts_callback.config import require_protected, whole
    from sts_callback.data.reader import read_rows
    from sts_callback.runs.directory import RunDirectory

    for option, n in (("lora-r", args.lora_r), ("batch-size", args.batch_size), ("steps-planned", args.steps_planned)):
        if n is not None:
            whole(n, f"--{option}", "1 or more", least=1)
    domains, policy, config = settings(args)
    require_protected(policy.budgets)
    directory = RunDirectory(args.out / "sts", anew=True) if args.out else None
    if directory:
        directory.require_place()
    rows = read_rows(args.train, "train_data")
    mixtures, sources = _mixtures(args.replay)

    from sts_callback.measure.monitor import Monitor
    from sts_callback.progress import tell
    from sts_callback.report.terminal.rehearsal import trials_details, trials_table
    from sts_callback.training.sft import read_setup
    from sts_callback.training.trials import Rows, try_out

    options = {"max_steps": args.steps_planned, "per_device_train_batch_size": args.batch_size}
    setup = read_setup(args.trainer_args, lora_r=args.lora_r, full=args.full, options=options)
    rates = _rates(args.learning_rate, setup.learning_rate)
    model, tokenizer = loaded(args.model, args.device)
    made_monitor = functools.partial(Monitor, tokenizer=tokenizer, sae=args.sae, train_data=rows, domains=domains, config=config)
    forecast, found = try_out(
        model,
        tokenizer,
        setup,
        Rows(rows, sources, config.seed),
        mixtures,
        rates,
        made_monitor,
        policy,
        told=tell,
    )
    print(found.to_json() if args.json else trials_table(found))
    if args.details and not args.json:
        print(f"\n{trials_details(found)}")
    if directory:
        _write_report(directory, forecast, found, policy, config, given_by(args))
    return FINDING_CODES[found.finding]


def _mixtures(given: Sequence[str]) -> tuple[list[Mixture], dict[str, Sequence[Row]]]:
    """The training data alone and each `--replay`, and the rows of all sources; none is trained on yet."""
    from sts_callback.data.reader import read_rows
    from sts_callback.training.arguments import number
    from sts_callback.training.trials import Mixture

    mixtures, files = [Mixture({})], dict[str, str]()
    for one in given:
        name, _, rest = one.partition("=")
        file, _, share = rest.rpartition(":")
        if not (name and file and share) or files.setdefault(name, file) != file:
            raise ConfigError(
                f"--replay: got {one!r}; allowed is NAME=FILE:SHARE such as cases=cases.jsonl:0.1, one FILE a NAME."
            )
        mixtures.append(Mixture({name: number(share, f"--replay {name}", "a share above 0, under 1")}))
    return mixtures, {name: read_rows(file, f"--replay {name}") for name, file in files.items()}


def _rates(given: Sequence[float], of_file: float | None) -> list[float]:
    from sts_callback.config import finite, require

    rates = sorted({*given} or ({of_file} if of_file is not None else set()))
    if not rates:
        raise ConfigError("--learning-rate: got none; give the rates to try, such as --learning-rate 1e-4 3e-4 1e-3.")
    for rate in rates:
        require(finite(rate, "--learning-rate") > 0, "--learning-rate", rate, "above 0")
    return rates


def _write_report(
    directory: RunDirectory, forecast: Forecast, found: Trials, policy: PolicyConfig, config: ProbeConfig, given: Given
) -> None:
    from sts_callback.policy import judge_forecast
    from sts_callback.records.run import RunSettings

    asked = {"check_on": "rehearsal", "action": "warn"}
    directory.write_settings(RunSettings.of(policy, config, **asked, max_overhead=1.0, looks=None, given=given))
    directory.write_forecast(forecast, judge_forecast(forecast, policy))
    directory.write_trials(found)
    print(f"Report: {write_report_of(directory, 'rehearse')}", file=sys.stderr)
