"""`forecast`: go or no-go, before training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.common import DECISION_CODES, given_by, prepared
from sts_callback.cli.options import add_details, add_measurement, add_model
from sts_callback.errors import CannotTell

if TYPE_CHECKING:
    from sts_callback.policy import Judgement
    from sts_callback.records import Forecast
    from sts_callback.runs.ledger import Expectations


HELP = "forecast which domains training on a file will move"
DESCRIPTION = "Forecast which domains training on a file will move. Exit code: 0 go, 3 no-go, 4 cannot tell, 2 wrong input."


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    command.add_argument("--words", action="store_true", help="also show where in the texts the shifted features are active")
    add_details(command)
    command.add_argument(
        "--junit", type=Path, metavar="FILE", help="also write JUnit XML for a CI system: a test case for each protected domain"
    )
    command.add_argument(
        "--lock", type=Path, metavar="FILE", help="refuse to forecast if anything but the training data differs from this file"
    )
    command.add_argument("--write-lock", action="store_true", help="instead, write the file of --lock after the forecast")
    add_model(command)
    add_measurement(command, several_saes=True)


def run(args: argparse.Namespace) -> int:
    """Forecast and decide."""
    from sts_callback.runs.lock import lock_of, read_lock, require_same, write_lock

    _require_places(args)
    locked = read_lock(args.lock) if args.lock and not args.write_lock else None
    made_monitor, policy = prepared(args)

    from sts_callback.errors import NEEDS_SAE
    from sts_callback.measure.scoring import rank_agreement
    from sts_callback.policy import Judgement, judge_domains, judge_forecast
    from sts_callback.report.terminal.forecast import examples_lines, forecast_details, forecast_view, layers_table
    from sts_callback.report.terminal.ledger import expectations_table
    from sts_callback.report.terminal.rows import rows_doubts, rows_table

    monitor = made_monitor(sae=args.sae)
    lock = lock_of(monitor, policy) if args.lock else None
    if lock and locked:
        require_same(locked, lock, args.lock)
    try:
        forecasts = monitor.forecasts(policy)
    except CannotTell as error:
        _write_junit(args, dict.fromkeys(policy.budgets, Judgement("cannot tell", str(error))), None)
        raise
    verdict = judge_forecast(forecasts[0], policy)
    expected = _expectations(forecasts[0])
    _write_junit(args, judge_domains(forecasts[0], policy), forecasts[0])
    if lock and args.write_lock:
        write_lock(args.lock, lock)
    if args.json:
        made = [forecast.to_dict() for forecast in forecasts]
        past = expected.to_dict() if expected else None
        print(json.dumps({"forecast": made[0], "verdict": verdict.to_dict(), "other_saes": made[1:], "expectations": past}))
    else:
        changes = expected.nll_change if expected else {}
        print(forecast_view(forecasts[0], verdict, policy, expected=changes, given=given_by(args)))
        if not args.details and (doubts := rows_doubts(monitor.reads)):
            print(doubts)
        if args.details:
            print(f"\n{forecast_details(forecasts[0], verdict)}\n\n{rows_table(monitor.reads)}")
            if expected:
                print(expectations_table(expected))
        if len(forecasts) > 1:
            print(layers_table(forecasts, [rank_agreement(forecasts[0], forecast) for forecast in forecasts]))
        if args.words:
            if monitor.identity.has_sae:
                print("\nWhere the features that training is expected to shift are most active:")
                print(examples_lines(monitor.top_activating_examples()))
            else:
                print(f"\n--words: {NEEDS_SAE}")
    return DECISION_CODES[verdict.decision]


def _expectations(forecast: Forecast) -> Expectations | None:
    """Expectations from past runs. The forecast must not fail because of them."""
    from sts_callback.runs import ledger, track_record

    try:
        return track_record.expectations(ledger.read().entries, forecast)
    except OSError as error:
        print(f"sts-callback: past runs are left out, the ledger cannot be read ({error}).", file=sys.stderr)
        return None


def _require_places(args: argparse.Namespace) -> None:
    """Refuse files that cannot be written, before the model is loaded."""
    from sts_callback.errors import ConfigError
    from sts_callback.runs.files import require_place

    if args.write_lock and not args.lock:
        raise ConfigError("--write-lock: got no file; name it with --lock, such as --lock sts.lock.")
    if args.junit and not args.protect:
        raise ConfigError("--junit: got no protected domain to write a test case for; name one with --protect.")
    for option, file in (("--junit", args.junit), ("--lock", args.lock if args.write_lock else None)):
        if file:
            require_place(file, option)


def _write_junit(args: argparse.Namespace, judged: Mapping[str, Judgement], forecast: Forecast | None) -> None:
    from sts_callback.report.junit import junit_xml
    from sts_callback.runs.files import write_asked

    if args.junit:
        write_asked(args.junit, junit_xml(judged, forecast), "--junit")
