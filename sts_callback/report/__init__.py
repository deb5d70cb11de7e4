"""The report of a run: what its folder tells, as one page that needs nothing else, and as JSON."""

from __future__ import annotations

from pathlib import Path

from sts_callback.errors import DataError
from sts_callback.report.page import page
from sts_callback.report.story import tell
from sts_callback.runlog import RunLog


def write_report(log: RunLog) -> Path:
    """Write `report.html` and `report.json` into the folder of a run, of all that can be read there.

    Args:
        log: of the run, also of one that goes on or has died.

    Returns:
        Where the page is.

    Raises:
        DataError: if there is nothing to tell.
        OSError: if the folder cannot be read or written.

    """
    logged = log.read_all()
    if logged.is_empty:
        reasons = f" {' '.join(logged.unreadable)}" if logged.unreadable else ""
        raise DataError(
            f"report: {log.folder} holds no record of a run that can be read.{reasons} Give the output_dir of a run with "
            "STSCallback, or the folder sts in it."
        )
    story = tell(logged)
    return log.write_report(page(story), story.to_json())
