"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from sts_callback.errors import ConfigError, DataError


def write_whole(file: Path, text: str) -> None:
    """Write a text so that a reader, and a kill in the middle, find the old file or the new one.

    Args:
        file: in a folder that exists.
        text: line ends in it are kept as they are.

    """
    scratch = file.with_suffix(".part")
    try:
        with scratch.open("w", encoding="utf-8", newline="") as content:
            content.write(text)
            content.flush()
            os.fsync(content.fileno())
        os.replace(scratch, file)
    finally:  # a full disk must not be filled further by half a file
        scratch.unlink(missing_ok=True)


def require_place(file: Path, option: str) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold; its folder is made.

    Args:
        file: what the user named.
        option: by which.

    Raises:
        ConfigError: if it is a folder, or its folder can be neither made nor written to.

    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: the folder of {file} cannot be made ({error}); give another file.") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ConfigError(f"{option}: {file} cannot be written; give a file in a folder that may be written to.")


def write_asked(file: Path, text: str, option: str) -> None:
    """Write what the user asked for, whole or not at all.

    Args:
        file: what the user named.
        text: its content.
        option: by which it was named.

    Raises:
        DataError: if it cannot be written.

    """
    try:
        write_whole(file, text)
    except OSError as error:
        raise DataError(f"{option}: {file} cannot be written ({error}).") from error
