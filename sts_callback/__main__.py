"""Run as `python -m sts_callback`."""

from sts_callback.cli import entry

entry()
