"""Bars of long work: gone from a terminal when it is done, a line that stays in a log, nothing where none is wanted."""

from __future__ import annotations

import io

import pytest

from sts_callback.progress import progress_bar, tell


class Stderr(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal  # type: ignore[method-assign]


@pytest.mark.parametrize(("is_terminal", "is_shown", "stays"), [(True, True, False), (False, True, True), (False, False, False)])
def test_what_is_left_of_a_bar(is_terminal: bool, is_shown: bool, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr(is_terminal=is_terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    with progress_bar("Forecast", 3, "query", is_shown=is_shown) as bar:
        for _ in range(3):
            bar.update()
    written = stderr.getvalue()
    assert ("Forecast" in written) == is_shown
    last = written.rpartition("\r")[2]
    assert ("Forecast: 100%" in last and last.endswith("\n")) == stays
    if is_terminal:
        assert last.strip() == ""  # blanked


def test_in_a_notebook_a_bar_goes_as_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Stderr(is_terminal=False))
    monkeypatch.setattr("sts_callback.progress._IN_NOTEBOOK", True)
    with progress_bar("Forecast", 3, "query", is_shown=True) as bar:
        assert (bar.leave, bar.mininterval) == (False, 0.1)


def test_without_standard_error_nothing_is_shown_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):
        monkeypatch.setattr("sys.stderr", stderr)
        with progress_bar("Forecast", 1, "query", is_shown=True) as bar:
            bar.update()
        tell("One is done.")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_line_that_is_told_stays_as_it_is(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr(is_terminal=is_terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    tell("One is done.")
    tell("Two are done.")
    assert stderr.getvalue() == "One is done.\nTwo are done.\n"
