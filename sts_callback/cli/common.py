"""What several commands share: exit codes, settings from arguments, the model."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.cli.options import NUMBERS

if TYPE_CHECKING:
    from sts_callback.config import PolicyConfig, ProbeConfig
    from sts_callback.data.reader import Source
    from sts_callback.measure.monitor import Monitor
    from sts_callback.records.remedies import Attribution
    from sts_callback.runs.directory import RunDirectory

GO, BUG, WRONG_INPUT, NO_GO, CANNOT_TELL = 0, 1, 2, 3, 4
FINDING_CODES = {"within": GO, "beyond": NO_GO, "cannot tell": CANNOT_TELL}
"""Of what was found about budgets."""


def settings(args: argparse.Namespace) -> tuple[dict[str, Source], PolicyConfig, ProbeConfig]:
    """What to measure, what to protect, and how."""
    from sts_callback.config import DEFAULT_BUDGET, PolicyConfig, ProbeConfig
    from sts_callback.data.starter import choose_domains
    from sts_callback.training.arguments import named, number

    files = named(args.domain, "--domain", "NAME=FILE")
    protect = named(args.protect, "--protect", "NAME or NAME=NATS", DEFAULT_BUDGET)
    domains, budgets = choose_domains({name: number(nats, f"--protect {name}") for name, nats in protect.items()}, files)
    chosen = {name: getattr(args, name) for name in (*NUMBERS, "chat_template") if hasattr(args, name)}
    return domains, PolicyConfig(budgets=budgets), ProbeConfig(**chosen)


def prepared(args: argparse.Namespace) -> tuple[Callable[..., Monitor], PolicyConfig]:
    """What doctor, forecast and blame share: the settings checked, then the model loaded; all but the SAEs is given."""
    domains, policy, config = settings(args)

    from sts_callback.measure.monitor import Monitor

    model, tokenizer = loaded(args.model, args.device)
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


def loaded(name: str, device: str | None):  # type: ignore[no-untyped-def]  # transformers types stay out of the fast path
    """Model and tokenizer."""
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


def write_report_of(log: RunDirectory, command: str, blame: Attribution | None = None) -> Path:
    """Write the report of a run, with rows to blame if there are new ones."""
    from sts_callback.errors import DataError
    from sts_callback.report.html.page import write_report

    try:
        if blame is not None:
            log.write_attribution(blame)
        return write_report(log)
    except OSError as error:
        raise DataError(f"{command}: {log.folder} cannot be read or written ({error}).") from error
