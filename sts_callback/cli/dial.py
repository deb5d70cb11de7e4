"""`dial`: the largest scale of a LoRA adapter that keeps every budget."""

from __future__ import annotations

import argparse
import json

from sts_callback.cli.common import FINDING_CODES, loaded, settings
from sts_callback.cli.options import add_measurement
from sts_callback.config import SCALES

HELP = "find the largest scale of a LoRA adapter that keeps every budget"
DESCRIPTION = (
    "Find, after a LoRA run, the largest scale of the adapter at which every protected domain keeps its budget. "
    "Exit code: 0 some scale keeps them, 3 none does, 4 cannot tell, 2 wrong input."
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    command.add_argument("--model", required=True, help="folder or hub id of the model that was tuned")
    command.add_argument("--adapter", required=True, metavar="DIR", help="folder with the LoRA adapter")
    command.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=list(SCALES),
        metavar="X",
        help=f"shares of the adapter's own scale (default {' '.join(f'{scale:g}' for scale in SCALES)})",
    )
    add_measurement(command, several_saes=False, numbers=("n_queries", "max_tokens", "seed"))


def run(args: argparse.Namespace) -> int:
    """Measure the domains at several scales of an adapter."""
    domains, policy, config = settings(args)

    from sts_callback.remedies.adapter_scale import dial, require_lora, require_possible, with_adapter
    from sts_callback.report.terminal.remedies import adapter_scales_table

    require_possible(policy.budgets, args.scales)
    require_lora(args.adapter)
    model, tokenizer = loaded(args.model, args.device)
    found = dial(
        with_adapter(model, tokenizer, args.adapter),
        tokenizer,
        sae=args.sae,
        domains=domains,
        budgets=policy.budgets,
        scales=args.scales,
        config=config,
    )
    print(json.dumps({**found.to_dict(), "largest": found.largest}) if args.json else adapter_scales_table(found))
    return FINDING_CODES[found.finding]
