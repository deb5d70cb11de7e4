"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from sts_callback.errors import ConfigError, DataError


def write_whole(file: Path, text: str) -> None:
    """Write a text atomically: a reader, also after a kill, finds the old file or the new one.

    Args:
        file: the file; its folder must exist.
        text: content; line ends are kept.

    """
    scratch = file.with_suffix(".part")
    try:
        with scratch.open("w", encoding="utf-8", newline="") as content:
            content.write(text)
            content.flush()
            os.fsync(content.fileno())
        os.replace(scratch, file)
    finally:  # half a file must not fill a full disk further
        scratch.unlink(missing_ok=True)


def require_place(file: Path, option: str) -> None:
    """Refuse a file that cannot be written, before the work for it begins. Its folder is made.

    Args:
        file: the file that the user named.
        option: the option that named it.

    Raises:
        ConfigError: if it is a folder, or its folder can be neither made nor written to.

    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: the folder of {file} cannot be made ({error}); give another file.") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise ConfigError(f"{option}: {file} cannot be written; give a file in a folder that may be written to.")


def require_new_folder(folder: Path, option: str) -> None:
    """Refuse a folder that holds something already, or could not be made.

    Args:
        folder: what the user named.
        option: by which.

    Raises:
        ConfigError: with the reason.

    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{option}: {folder} is there already; give a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: the folder of {folder} cannot be made ({error}); give another.") from error
    if not os.access(folder.parent, os.W_OK):
        raise ConfigError(f"{option}: {folder} cannot be written; give a folder in one that may be written to.")


def write_asked(file: Path, text: str, option: str) -> None:
    """Write a file that the user asked for, whole or not at all.

    Args:
        file: the file that the user named.
        text: content.
        option: the option that named it.

    Raises:
        DataError: if it cannot be written.

    """
    try:
        write_whole(file, text)
    except OSError as error:
        raise DataError(f"{option}: {file} cannot be written ({error}).") from error
