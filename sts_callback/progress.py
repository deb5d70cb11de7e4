"""Progress of long work: a bar that goes when the work is done, or in a log a line now and then; lines that stay."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

_SECONDS_IN_A_LOG = 30.0  # between two lines
_IN_NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)  # whose standard error is no terminal either


def progress_bar(title: str, total: int, unit: str, *, is_shown: bool) -> tqdm[Any]:
    """Make one, on standard error.

    Args:
        title: what is being done.
        total: how many units there are.
        unit: of what is counted.
        is_shown: whether anything is.

    """
    is_open = _is_open()
    in_log = is_open and not _IN_NOTEBOOK and not sys.stderr.isatty()
    least, most = (_SECONDS_IN_A_LOG, _SECONDS_IN_A_LOG) if in_log else (0.1, 10.0)  # tqdm's own in a terminal
    hidden = not (is_shown and is_open)
    return tqdm(total=total, desc=title, unit=unit, leave=in_log, disable=hidden, mininterval=least, maxinterval=most)


def tell(line: str) -> None:
    """Write a line that stays, on standard error, above the bars that are open."""
    if _is_open():
        tqdm.write(line, file=sys.stderr)


def _is_open() -> bool:
    return not getattr(sys.stderr, "closed", sys.stderr is None)
