"""What to do about a threat: `mix`, `blame` and `dial`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.common import CANNOT_TELL, GO, NO_GO, loaded, prepared, settings
from sts_callback.cli.finished import reported

if TYPE_CHECKING:
    from sts_callback.config import PolicyConfig, ProbeConfig
    from sts_callback.domains.reader import Row, Source
    from sts_callback.mix import Caps
    from sts_callback.records import Identity
    from sts_callback.remedies import MixBasis, SourceEffect
    from sts_callback.runlog import RunLog

_EXIT_CODES = {"within": GO, "beyond": NO_GO, "cannot tell": CANNOT_TELL}


def mix(args: argparse.Namespace) -> int:
    """Measure sources, search mixtures of them, recommend one."""
    from sts_callback.files import require_place, write_asked

    if args.out:
        require_place(args.out, "--out")
    domains, policy, config = settings(args)
    files, sources, caps = _sources(args, policy)

    from sts_callback.mix import plan, search
    from sts_callback.remedies import Mix
    from sts_callback.terminal.remedies import mix_table

    started = time.monotonic()
    basis, identity, effects = _effects(args, sources, domains, policy, config)
    found = Mix(identity, basis, effects, search(effects, policy, caps), time.monotonic() - started)
    print(found.to_json() if args.json else mix_table(found))
    if args.out:
        write_asked(args.out, plan(found, found.nearest, files, config.seed), "--out")
    return _EXIT_CODES[found.finding]


def _sources(args: argparse.Namespace, policy: PolicyConfig) -> tuple[dict[str, str], dict[str, Sequence[Row]], Caps]:
    """The files of training data and replay, their rows, and what may be made of them: refused now if it must be."""
    from sts_callback.domains.reader import read_rows
    from sts_callback.mix import Caps, require_sources
    from sts_callback.records import TRAIN
    from sts_callback.settings import named, number

    replay = named(args.replay, "--replay", "NAME=FILE")
    max_share = {n: number(x, f"--max-share {n}", "a share") for n, x in named(args.max_share, "--max-share", "NAME=X").items()}
    caps = Caps(args.rows, args.max_replay, args.max_repeats, max_share)
    require_sources(replay, policy)
    files = {TRAIN: args.train, **replay}
    sources = {name: read_rows(file, f"--replay {name}" if name in replay else "--train") for name, file in files.items()}
    caps.weights({name: len(rows) for name, rows in sources.items()})
    return files, sources, caps


def _effects(
    args: argparse.Namespace,
    sources: Mapping[str, Sequence[Row]],
    domains: Mapping[str, Source],
    policy: PolicyConfig,
    config: ProbeConfig,
) -> tuple[MixBasis, Identity, dict[str, SourceEffect]]:
    """What each source does alone: by pilots if there are any, else by examples in context."""
    from sts_callback.domains.reader import read_rows
    from sts_callback.errors import ConfigError
    from sts_callback.mix import pilot_effects
    from sts_callback.settings import named

    if pilots := named(args.pilot, "--pilot", "NAME=RUN_DIR"):
        return "pilot runs", *pilot_effects(pilots, {name: len(rows) for name, rows in sources.items()}, policy)
    if not (args.model and args.sae):
        raise ConfigError("mix: got no --pilot and no --model with --sae; give a --pilot for each source, or these two.")
    from sts_callback.sources import context_effects

    model, tokenizer = loaded(args.model, args.device)
    measured = context_effects(
        model,
        tokenizer,
        sae=args.sae,
        sources=sources,
        domains={name: read_rows(domains[name], f"domains[{name!r}]") for name in policy.budgets},
        policy=policy,
        config=config,
        progress=sys.stderr.isatty(),
    )
    return "examples in context", *measured


def blame(args: argparse.Namespace) -> int:
    """Rank training rows, and write the file without the worst."""
    from sts_callback.blame import blame, filter_files, write_filtered

    files = filter_files(args.train, args.out) if args.out else None
    run = _run_with_forecast(args.run_dir) if args.run_dir else None
    made_monitor, policy = prepared(args)

    from sts_callback.domains.reader import read_rows
    from sts_callback.terminal.remedies import blame_table

    rows, monitor = read_rows(args.train, "train_data"), made_monitor(sae=args.sae)
    if run is not None:
        _require_same_maker(run[1], monitor.identity)
    found = blame(monitor, rows, list(policy.budgets), n_rows=args.rows, n_top=args.top)
    print(found.to_json() if args.json else blame_table(found))
    if files is not None:
        write_filtered(found, rows, *files)
        print(f"{files[0]}: {len(rows) - len(found.left_out)} rows kept; {files[1]}: which are not.", file=sys.stderr)
    if run is not None:
        print(f"{reported(run[0], 'blame', found)}: has them too.", file=sys.stderr)
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


def dial(args: argparse.Namespace) -> int:
    """Probe scales of an adapter."""
    domains, policy, config = settings(args)

    from sts_callback.dial import dial, with_adapter
    from sts_callback.terminal.remedies import dial_table

    model, tokenizer = loaded(args.model, args.device)
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
    return _EXIT_CODES[found.finding]
