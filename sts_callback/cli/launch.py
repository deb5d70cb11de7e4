"""`launch`: a training command as it is, with the callback in each trainer that it makes."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sts_callback.cli.common import CANNOT_TELL
from sts_callback.errors import ConfigError
from sts_callback.training.arguments import DEFAULT_FILE, VARIABLE, STSArguments

HELP = "run a training command and watch its trainer"
DESCRIPTION = (
    "Run a command, such as 'trl sft ...', 'accelerate launch ...' or 'python train.py', and give each transformers Trainer "
    f"that it makes an STSCallback with the settings in {DEFAULT_FILE}, or in the file that {VARIABLE} names. "
    "Exit code: the command's own, 2 wrong settings, 4 no Trainer was made and so nothing was watched."
)
_START = """\
try:
    from sts_callback.launched import begin
except ModuleNotFoundError:  # another Python, in which nothing of ours is installed
    pass
else:
    begin(__file__, {mark!r})
"""


def add_options(command: argparse.ArgumentParser) -> None:
    """What can be asked."""
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="with its arguments")


def run(args: argparse.Namespace) -> int:
    """Run the command, in an environment that Python reads as it starts."""
    if not args.command:
        raise ConfigError("command: got none; give the one that trains, as in 'sts-callback launch trl sft --config sft.yaml'.")
    STSArguments.of_environment().options()
    settings = os.path.abspath(os.environ.get(VARIABLE) or DEFAULT_FILE)
    with tempfile.TemporaryDirectory(prefix="sts-callback-") as folder:
        mark = Path(folder, "watched")
        Path(folder, "sitecustomize.py").write_text(_START.format(mark=str(mark)), encoding="utf-8")
        found_first = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        code = _finished(args.command, {**os.environ, "PYTHONPATH": found_first, VARIABLE: settings})
        is_watched = mark.exists()
    if code == 0 and not is_watched:
        print(
            "sts-callback: the command made no transformers Trainer that we could see, so nothing was watched.", file=sys.stderr
        )
        return CANNOT_TELL
    return code


def _finished(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Its exit code, as a shell would have it; signals that end us end it."""
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        raise ConfigError(f"command: {command[0]} cannot be run ({error.strerror}); give one that the shell finds.") from error
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        while True:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # which the terminal has sent to the command as well
                continue
            return code if code >= 0 else 128 - code
    finally:
        signal.signal(signal.SIGTERM, before)
