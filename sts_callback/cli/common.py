"""Shared by several commands: exit codes, settings from arguments, loading the model."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_callback.cli.options import chosen_probes

if TYPE_CHECKING:
    from sts_callback.config import PolicyConfig, ProbeConfig
    from sts_callback.data.pairs import Row
    from sts_callback.measure.monitor import Monitor
    from sts_callback.records.remedies import Attribution
    from sts_callback.records.run import Given
    from sts_callback.runs.directory import RunDirectory

GO, BUG, WRONG_INPUT, NO_GO, CANNOT_TELL = 0, 1, 2, 3, 4
FINDING_CODES = {"within": GO, "beyond": NO_GO, "cannot tell": CANNOT_TELL}
"""Exit code for each finding about budgets."""
DECISION_CODES = {"go": GO, "watch": GO, "no-go": NO_GO, "not covered": CANNOT_TELL, "cannot tell": CANNOT_TELL}
"""Exit code for each decision of a verdict."""


def settings(args: argparse.Namespace) -> tuple[Mapping[str, Sequence[Row]], PolicyConfig, ProbeConfig]:
    """Read settings from arguments: domains, policy and probes. All that is wrong without the model is refused here."""
    from sts_callback.config import PolicyConfig, ProbeConfig
    from sts_callback.data.reader import read_rows
    from sts_callback.data.starter import choose_domains
    from sts_callback.errors import ConfigError
    from sts_callback.training.arguments import budgets_in, named

    files = named(args.domain, "--domain", "NAME=FILE")
    domains, budgets = choose_domains(budgets_in(args.protect, "--protect"), files)
    policy, config = PolicyConfig(budgets=budgets), chosen_probes(args)
    if args.quick:
        usual = ProbeConfig()
        print(
            f"Quick look: {config.n_queries} queries a domain of at most {config.max_tokens} tokens, usually {usual.n_queries} "
            f"of {usual.max_tokens}. Intervals are wider, and small harm is not found.",
            file=sys.stderr,
        )
    rows = {name: read_rows(source, f"domains[{name!r}]") for name, source in domains.items()}

    from sts_callback.model.registry import ways_without
    from sts_callback.model.sae_files import place_of

    if not args.sae:
        raise ConfigError(f"--sae: got none. {ways_without(args.model)}")
    for sae in args.sae if isinstance(args.sae, list) else [args.sae]:
        place_of(sae)
    if args.device:
        require_device(args.device)
    return rows, policy, config


def given_by(args: argparse.Namespace) -> Given:
    """What the options name, for the commands that are advised."""
    from sts_callback.records.run import Given
    from sts_callback.training.arguments import named

    sae = args.sae[0] if isinstance(args.sae, list) else args.sae
    domains = named(args.domain, "--domain", "NAME=FILE")
    return Given(args.model, sae, args.train, domains, probes=chosen_probes(args).unusual_numbers)


def prepared(args: argparse.Namespace) -> tuple[Callable[..., Monitor], PolicyConfig]:
    """Check the settings, then load the model, for doctor, forecast and blame. The monitor lacks only its SAEs."""
    from sts_callback.data.reader import read_rows

    domains, policy, config = settings(args)
    train_data = read_rows(args.train, "train_data")

    from sts_callback.measure.monitor import Monitor

    model, tokenizer = loaded(args.model, args.device)
    made_monitor = functools.partial(
        Monitor,
        model,
        tokenizer,
        train_data=train_data,
        domains=domains,
        config=config,
    )
    return made_monitor, policy


def loaded(name: str, device: str | None):  # type: ignore[no-untyped-def]  # transformers types stay out of the fast path
    """Load model and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sts_callback.errors import ModelError

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if device.startswith("cuda") else torch.float32
    remedy = "give a folder or hub id of a causal language model"
    try:
        made: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
        model, info = made
        config = AutoConfig.from_pretrained(model.name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers, tokenizers, safetensors and code that comes with a model raise these
        raise ModelError(f"--model: {name} cannot be loaded ({str(error) or repr(error)}); {remedy}.") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"--model: {name} lacks {', '.join(missing):.200}, which would be random numbers; {remedy}.")
    if config.is_encoder_decoder:
        raise ModelError(f"--model: {name} has an encoder and a decoder ({config.model_type}); {remedy}.")
    return model.to(torch.device(device)).eval(), tokenizer


def require_device(name: str) -> None:
    """Refuse a device that PyTorch does not have here."""
    import torch

    from sts_callback.errors import ConfigError

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # it depends on the device and on the build of torch
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device: got {name!r}; allowed is one that PyTorch has here, such as cpu ({reason})") from error


def write_report_of(log: RunDirectory, command: str, blame: Attribution | None = None) -> Path:
    """Write the report of a run, with new results of `blame` if there are any."""
    from sts_callback.errors import DataError
    from sts_callback.report.html.page import write_report

    try:
        if blame is not None:
            log.write_attribution(blame)
        return write_report(log)
    except OSError as error:
        raise DataError(f"{command}: {log.folder} cannot be read or written ({error}).") from error
