"""The command line of `sts-callback`, a function for each command. Only it prints.

Exit codes: 0 go, 3 no-go, 4 cannot tell or not covered, 2 wrong input, 1 a bug of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.errors import CannotTell, StsError
from sts_callback.options import NUMBERS, parser

if TYPE_CHECKING:
    from sts_callback.config import PolicyConfig, ProbeConfig
    from sts_callback.domains.reader import Source
    from sts_callback.ledger import Expectations
    from sts_callback.monitor import Monitor
    from sts_callback.policy import Judgement
    from sts_callback.records import Forecast, Identity
    from sts_callback.remedies import Blame, MixBasis
    from sts_callback.runlog import RunLog

GO, BUG, WRONG_INPUT, NO_GO, CANNOT_TELL = 0, 1, 2, 3, 4
_WIDE = 160  # columns where nobody sees a terminal: each SAE on a line of its own
PIPE_CLOSED = 141  # as shells have it of programs that the signal ends
_BUDGET_CODES = {"within": GO, "beyond": NO_GO, "cannot tell": CANNOT_TELL}
_EXIT_CODES = {"go": GO, "watch": GO, "no-go": NO_GO, "not covered": CANNOT_TELL, "cannot tell": CANNOT_TELL}


def entry() -> None:
    """Run as a console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name.

    Returns:
        The exit code.

    """
    try:
        args = parser(COMMANDS).parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or a complaint
        return stop.code if isinstance(stop.code, int) else WRONG_INPUT
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # its reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at the end
        return PIPE_CLOSED
    except CannotTell as error:
        print(f"sts-callback: {error}", file=sys.stderr)
        return CANNOT_TELL
    except StsError as error:
        print(f"sts-callback: {error}", file=sys.stderr)
        return WRONG_INPUT
    except Exception:
        traceback.print_exc()
        print("sts-callback: this is a bug of ours; please report it with the lines above.", file=sys.stderr)
        return BUG


def _doctor(args: argparse.Namespace) -> int:
    made_monitor, policy = _prepared(args)

    from sts_callback.terminal import doctor_table

    refused = False
    for sae in args.sae:
        monitor = made_monitor(sae=sae)
        checks = monitor.examine(policy)
        refused |= any(check.status == "refuse" for check in checks)
        if args.json:
            print("\n".join(check.to_json() for check in checks))
        else:
            print(f"{monitor.identity.sae_name} at {monitor.identity.hook_name}\n{doctor_table(checks)}")
    return CANNOT_TELL if refused else GO


def _forecast(args: argparse.Namespace) -> int:
    from sts_callback.lock import lock_of, read_lock, require_same, write_lock

    _require_places(args)
    locked = read_lock(args.lock) if args.lock and not args.write_lock else None
    made_monitor, policy = _prepared(args)

    from sts_callback.policy import judge_domains, judge_forecast
    from sts_callback.scoring import rank_agreement
    from sts_callback.terminal import expectations_table, forecast_table, layers_table, words_lines

    monitor = made_monitor(sae=args.sae)
    lock = lock_of(monitor, policy) if args.lock else None
    if lock and locked:
        require_same(locked, lock, args.lock)
    try:
        forecasts = monitor.forecasts()
    except CannotTell as error:
        _write_junit(args, dict.fromkeys(policy.budgets, ("cannot tell", str(error))), None)
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
        print(forecast_table(forecasts[0], verdict))
        if expected:
            print(expectations_table(expected))
        if len(forecasts) > 1:
            print(layers_table(forecasts, [rank_agreement(forecasts[0], forecast) for forecast in forecasts]))
        if args.words:
            print("\nWhere the features that training is expected to shift fire most:")
            print(words_lines(monitor.words()))
    return _EXIT_CODES[verdict.decision]


def _expectations(forecast: Forecast) -> Expectations | None:
    """What past runs say beside the forecast, which must not fail for want of them."""
    from sts_callback import hindsight, ledger

    try:
        return hindsight.expectations(ledger.read().entries, forecast)
    except OSError as error:
        print(f"sts-callback: past runs are left out, the ledger cannot be read ({error}).", file=sys.stderr)
        return None


def _require_places(args: argparse.Namespace) -> None:
    """Refuse files that could not be written, before the model is loaded."""
    from sts_callback.errors import ConfigError
    from sts_callback.files import require_place

    if args.write_lock and not args.lock:
        raise ConfigError("--write-lock: got no file; name it with --lock, such as --lock sts.lock.")
    if args.junit and not args.protect:
        raise ConfigError("--junit: got no protected domain to write a test case for; name one with --protect.")
    for option, file in (("--junit", args.junit), ("--lock", args.lock if args.write_lock else None)):
        if file:
            require_place(file, option)


def _write_junit(args: argparse.Namespace, judged: Mapping[str, Judgement], forecast: Forecast | None) -> None:
    from sts_callback.files import write_asked
    from sts_callback.junit import junit_xml

    if args.junit:
        write_asked(args.junit, junit_xml(judged, forecast), "--junit")


def _mix(args: argparse.Namespace) -> int:
    from sts_callback.errors import ConfigError
    from sts_callback.files import require_place, write_asked
    from sts_callback.settings import named, number

    if args.out:
        require_place(args.out, "--out")
    domains, policy, config = _settings(args)

    from sts_callback.domains.reader import read_rows
    from sts_callback.mix import Caps, pilot_effects, plan, require_sources, search
    from sts_callback.records import TRAIN
    from sts_callback.remedies import Mix
    from sts_callback.terminal import mix_table

    replay = named(args.replay, "--replay", "NAME=FILE")
    pilots = named(args.pilot, "--pilot", "NAME=RUN_DIR")
    max_share = {n: number(x, f"--max-share {n}", "a share") for n, x in named(args.max_share, "--max-share", "NAME=X").items()}
    caps = Caps(args.rows, args.max_replay, args.max_repeats, max_share)
    require_sources(replay, policy)
    files = {TRAIN: args.train, **replay}
    sources = {name: read_rows(file, f"--replay {name}" if name in replay else "--train") for name, file in files.items()}
    n_rows = {name: len(rows) for name, rows in sources.items()}
    caps.weights(n_rows)  # refused now if it must be
    started = time.monotonic()
    if pilots:
        identity, effects = pilot_effects(pilots, n_rows, policy)
    else:
        if not (args.model and args.sae):
            raise ConfigError("mix: got no --pilot and no --model with --sae; give a --pilot for each source, or these two.")
        from sts_callback.sources import context_effects

        model, tokenizer = _loaded(args.model, args.device)
        identity, effects = context_effects(
            model,
            tokenizer,
            sae=args.sae,
            sources=sources,
            domains={name: read_rows(domains[name], f"domains[{name!r}]") for name in policy.budgets},
            policy=policy,
            config=config,
            progress=sys.stderr.isatty(),
        )
    basis: MixBasis = "pilot runs" if pilots else "examples in context"
    found = Mix(identity, basis, effects, search(effects, policy, caps), time.monotonic() - started)
    print(found.to_json() if args.json else mix_table(found))
    if args.out:
        write_asked(args.out, plan(found, found.nearest, files, config.seed), "--out")
    return _BUDGET_CODES[found.finding]


def _blame(args: argparse.Namespace) -> int:
    from sts_callback.blame import blame, filter_files, write_filtered

    files = filter_files(args.train, args.out) if args.out else None
    run = _run_with_forecast(args.run_dir) if args.run_dir else None
    made_monitor, policy = _prepared(args)

    from sts_callback.domains.reader import read_rows
    from sts_callback.terminal import blame_table

    rows, monitor = read_rows(args.train, "train_data"), made_monitor(sae=args.sae)
    if run is not None:
        _require_same_maker(run[1], monitor.identity)
    found = blame(monitor, rows, list(policy.budgets), n_rows=args.rows, n_top=args.top)
    print(found.to_json() if args.json else blame_table(found))
    if files is not None:
        write_filtered(found, rows, *files)
        print(f"{files[0]}: {len(rows) - len(found.left_out)} rows kept; {files[1]}: which are not.", file=sys.stderr)
    if run is not None:
        print(f"{_reported(run[0], 'blame', found)}: has them too.", file=sys.stderr)
    return GO


def _run_with_forecast(folder: Path) -> tuple[RunLog, Identity]:
    """A run, and what its forecast was made with."""
    from sts_callback.errors import ConfigError
    from sts_callback.runlog import run_log_in

    log = run_log_in(folder)
    forecast = log.read_all().forecast
    if forecast is None:
        raise ConfigError(f"--run-dir: {log.folder} holds no forecast; give the output_dir of a run with STSCallback.")
    return log, forecast.identity


def _require_same_maker(run: Identity, ours: Identity) -> None:
    """Refuse rows read by another model or SAE than the run's."""
    from sts_callback.errors import ConfigError

    for name in ("model", "sae", "hook_name"):
        if getattr(run, name) != getattr(ours, name):
            raise ConfigError(
                f"--run-dir: its forecast was made with {run.model_name}, {run.sae_name} at {run.hook_name}, not with "
                f"{ours.model_name}, {ours.sae_name} at {ours.hook_name}; give the run's own model and SAE."
            )


def _dial(args: argparse.Namespace) -> int:
    domains, policy, config = _settings(args)

    from sts_callback.dial import dial, with_adapter
    from sts_callback.terminal import dial_table

    model, tokenizer = _loaded(args.model, args.device)
    found = dial(
        with_adapter(model, tokenizer, args.adapter),
        tokenizer,
        sae=args.sae,
        domains=domains,
        budgets=policy.budgets,
        scales=args.scales,
        config=config,
        progress=sys.stderr.isatty(),
    )
    print(json.dumps({**found.to_dict(), "largest": found.largest}) if args.json else dial_table(found))
    return _BUDGET_CODES[found.finding]


def _prepared(args: argparse.Namespace) -> tuple[Callable[..., Monitor], PolicyConfig]:
    """What doctor, forecast and blame share: the settings checked, then the model loaded; all but the SAEs is given."""
    domains, policy, config = _settings(args)

    from sts_callback.monitor import Monitor

    model, tokenizer = _loaded(args.model, args.device)
    made_monitor = functools.partial(
        Monitor,
        model,
        tokenizer,
        train_data=args.train,
        domains=domains,
        config=config,
        progress=sys.stderr.isatty(),
    )
    return made_monitor, policy


def _settings(args: argparse.Namespace) -> tuple[dict[str, Source], PolicyConfig, ProbeConfig]:
    """What to measure, what to protect, and how."""
    from sts_callback.config import DEFAULT_BUDGET, PolicyConfig, ProbeConfig
    from sts_callback.domains.starter import choose_domains
    from sts_callback.settings import named, number

    files = named(args.domain, "--domain", "NAME=FILE")
    protect = named(args.protect, "--protect", "NAME or NAME=NATS", DEFAULT_BUDGET)
    domains, budgets = choose_domains({name: number(nats, f"--protect {name}") for name, nats in protect.items()}, files)
    numbers = {name: getattr(args, name) for name in NUMBERS if hasattr(args, name)}
    return domains, PolicyConfig(budgets=budgets), ProbeConfig(**numbers)


def _loaded(name: str, device: str | None):  # type: ignore[no-untyped-def]  # transformers types stay out of the fast path
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sts_callback.errors import ModelError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if device.startswith("cuda") else torch.float32
    try:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model.to(torch.device(device)).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model: {name} cannot be loaded ({error}); give a folder or hub id of a causal language model."
        ) from error


def _report(args: argparse.Namespace) -> int:
    from sts_callback.runlog import run_log_in

    print(_reported(run_log_in(Path(args.run_dir)), "report"))
    return GO


def _reported(log: RunLog, command: str, blame: Blame | None = None) -> Path:
    """Write the report of a run, with rows to blame if there are new ones."""
    from sts_callback.errors import DataError
    from sts_callback.report import write_report

    try:
        if blame is not None:
            log.write_blame(blame)
        return write_report(log)
    except OSError as error:
        raise DataError(f"{command}: {log.folder} cannot be read or written ({error}).") from error


def _card(args: argparse.Namespace) -> int:
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


def _ledger(args: argparse.Namespace) -> int:
    from sts_callback.errors import DataError
    from sts_callback.hindsight import track_records
    from sts_callback.ledger import ledger_file, read
    from sts_callback.terminal import ledger_table

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


def _saes(args: argparse.Namespace) -> int:
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


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": _doctor,
    "forecast": _forecast,
    "mix": _mix,
    "blame": _blame,
    "dial": _dial,
    "report": _report,
    "card": _card,
    "ledger": _ledger,
    "saes": _saes,
}
