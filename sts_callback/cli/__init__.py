"""The command line of `sts-callback`. Each command has its own module.

Exit codes: 0 go, 3 no-go, 4 cannot tell, 2 wrong input, 1 a bug of ours.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import traceback
from collections.abc import Sequence

from sts_callback.cli import blame, card, dial, doctor, forecast, launch, ledger, mix, rehearse, report, sae, saes, watch
from sts_callback.cli.common import BUG, CANNOT_TELL, WRONG_INPUT
from sts_callback.errors import CannotTell, ConfigError, StsError

PIPE_CLOSED, INTERRUPTED = 141, 130  # the codes that shells give to programs ended by these signals
COMMANDS = {
    "doctor": doctor,
    "forecast": forecast,
    "rehearse": rehearse,
    "launch": launch,
    "watch": watch,
    "blame": blame,
    "mix": mix,
    "dial": dial,
    "report": report,
    "card": card,
    "ledger": ledger,
    "sae": sae,
    "saes": saes,
}
"""The module of each command, by name. It holds the help text, the options and the function to run."""


def parser() -> argparse.ArgumentParser:
    """Make the parser. Parsed arguments hold the function of the chosen command as `run`."""
    made = argparse.ArgumentParser(
        prog="sts-callback", description="Forecast, rehearse and watch what a fine-tune does to other domains."
    )
    subparsers = made.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        command.set_defaults(run=module.run)
        module.add_options(command)
    return made


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
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or an error
        return stop.code if isinstance(stop.code, int) else WRONG_INPUT
    from sts_callback.versions import require_versions  # here: --help does without what it imports

    try:
        require_versions()
        _require_no_empty(argv[: len(argv) - len(getattr(args, "command", ()))])  # what follows is for another program
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python prints an error when it flushes at the end
        return PIPE_CLOSED
    except KeyboardInterrupt:
        print("sts-callback: interrupted before its end.", file=sys.stderr)
        return INTERRUPTED
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


def _require_no_empty(argv: Sequence[str]) -> None:
    """Refuse empty texts, which an unset shell variable leaves. They would mean the working directory."""
    for before, word in itertools.pairwise(argv):
        option = before if word == "" else word.removesuffix("=") if word.startswith("--") and word.endswith("=") else None
        if option is not None:
            raise ConfigError(f"{option}: got ''; allowed is no empty text. Is a variable of the shell not set?")
