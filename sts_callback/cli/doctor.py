"""`doctor`: do SAE, model and data allow an answer?"""

from __future__ import annotations

import argparse

from sts_callback.cli.common import CANNOT_TELL, GO, prepared
from sts_callback.cli.options import add_measurement, add_model

HELP = "check that the SAE fits the model and that the rows are enough"
DESCRIPTION = "Check that the SAE fits the model and that the rows are enough. Exit code: 0 yes, 4 no, 2 wrong input."


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model(command)
    add_measurement(command, several_saes=True)


def run(args: argparse.Namespace) -> int:
    """Check whether SAE, model and data allow an answer."""
    made_monitor, policy = prepared(args)

    from sts_callback.report.terminal.forecast import doctor_table
    from sts_callback.report.terminal.rows import rows_table

    refused = False
    for sae in args.sae:
        monitor = made_monitor(sae=sae)
        if not args.json and sae == args.sae[0]:  # these are the same for all SAEs
            print(rows_table(monitor.reads))
        checks = monitor.examine(policy)
        refused |= any(check.status == "refuse" for check in checks)
        if args.json:
            print("\n".join(check.to_json() for check in checks))
        else:
            print(f"{monitor.identity.sae_name} at {monitor.identity.hook_name}\n{doctor_table(checks)}")
    return CANNOT_TELL if refused else GO
