"""The demo's picture: the words of the terminal, in a file that loads nothing."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import picture
from logs import whole_run, written
from sts_callback.runs.directory import RunDirectory


def drawn(run: Path, **changes: object) -> str:
    """Its words."""
    written(RunDirectory(run / "sts", anew=True), whole_run(**changes))
    picture.main(str(run), str(run / "picture.svg"))
    source = (run / "picture.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]+", source) == ["http://www.w3.org/2000/svg"]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", source)).split())


def test_it_shows_what_was_known_before_and_the_last_check(tmp_path: Path) -> None:
    words = drawn(tmp_path / "rehearsed")
    assert words.index("STS rehearsal:") < words.index("STS step 30:")
    assert "STS forecast" not in words and "STS step 20" not in words
    assert "STS forecast:" in drawn(tmp_path / "not rehearsed", rehearsal=None, rehearsal_verdict=None)
