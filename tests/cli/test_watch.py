"""Following a run from its folder: what is shown at each stage, and when it ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from logs import EMPTY, SETTINGS, check, verdict, whole_run, written
from sts_callback.cli import main, watch
from sts_callback.cli.common import CANNOT_TELL, GO, NO_GO, WRONG_INPUT
from sts_callback.records.run import Logged, Looks
from sts_callback.runs.directory import RunDirectory

LONG = dataclasses.replace(SETTINGS, looks=Looks(100, 10))


def folder_of(out: Path, logged: Logged, ended_at: int = 0) -> RunDirectory:
    log = RunDirectory(out / "sts")
    written(log, logged)
    if ended_at:
        log.write_ended(ended_at)
    return log


def shown(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["watch", str(out), "--once"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 or " " not in max(text.splitlines(), key=len)
    return code, text


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = shown(tmp_path / "none", capsys)
    assert code == CANNOT_TELL
    assert text.startswith("STS watch: waiting for a run in ")


@pytest.mark.parametrize("sub", ["", "sts"])
def test_an_alarm_is_shown_first_then_the_table_what_to_do_and_the_state(
    sub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    states: dict[str, Any] = {"law": "over", "code": "within"}
    checks = [check(step, verdict("no-go", "law", step=step, states=states)) for step in (10, 20)]
    folder_of(Path("out"), whole_run(settings=LONG, checks=tuple(checks)))
    code, text = shown(Path("out") / sub, capsys)
    assert code == NO_GO
    first, second, *rest = text.splitlines()
    assert first == "STS step 20: ALARM, law is over its budget since step 10"
    assert second.startswith("domain ")
    flat = " ".join(rest)
    assert "over 0.10" in flat and "within 0.20" in flat
    assert "What to do:" in flat and "--run-dir out" in flat
    assert (
        "No end of training is recorded; next planned check: step 30; 1 check skipped for their time; 2 failures of ours"
        in " ".join(flat.split())
    )


def test_before_the_first_check_the_rehearsal_or_the_forecast_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "one", whole_run(settings=LONG, checks=(), postponed=()))
    assert shown(tmp_path / "one", capsys)[1].startswith("STS rehearsal: GO, no sign of harm")
    alone: dict[str, Any] = {"rehearsal": None, "rehearsal_verdict": None}
    folder_of(tmp_path / "two", whole_run(settings=LONG, checks=(), postponed=(), **alone))
    code, text = shown(tmp_path / "two", capsys)
    assert (code, text.splitlines()[0]) == (GO, "STS forecast: GO, no sign of harm to law and code before training")
    assert "next planned check: step 1" in text


def test_an_alarm_that_has_ended_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = check(10, verdict("no-go", "law", step=10)), check(20)
    folder_of(tmp_path, whole_run(settings=LONG, checks=checks))
    code, text = shown(tmp_path, capsys)
    assert code == GO
    assert "An alarm for law stood at step 10 and ended." in text and "What to do" not in text


def test_a_run_without_protected_domains_and_one_that_was_not_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path / "one", whole_run(checks=(check(10, verdict("go", about=(), step=10)),)))
    code, text = shown(tmp_path / "one", capsys)
    assert code == GO and "nothing to judge" in text
    folder_of(tmp_path / "two", EMPTY, ended_at=12)
    code, text = shown(tmp_path / "two", capsys)
    assert code == CANNOT_TELL and "Training has ended at step 12" in text


def test_it_follows_until_the_run_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait stands for something that the run does."""
    log = RunDirectory(tmp_path / "sts")
    running = whole_run(settings=LONG, checks=(check(10),))

    def alarms() -> None:
        log.append_check(check(20).snapshot, verdict("no-go", "law", step=20))

    happens = [lambda: written(log, running), lambda: None, alarms, lambda: log.write_ended(20)]
    monkeypatch.setattr(watch.time, "sleep", lambda _: happens.pop(0)())
    assert main(["watch", str(tmp_path)]) == NO_GO
    text = capsys.readouterr().out
    assert happens == []
    assert text.index("waiting for") < text.index("STS step 10: GO") < text.index("STS step 20: ALARM")
    assert text.count("STS step 10: GO") == 1  # what has not changed is not printed again
    assert "Training has ended at step 20" in text.split("STS step 20: ALARM")[-1]


def test_an_older_run_has_ended_with_its_last_planned_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path, whole_run())
    assert main(["watch", str(tmp_path)]) == NO_GO
    assert "Training has ended at step 30" in capsys.readouterr().out


def test_a_run_that_is_taken_up_goes_on(tmp_path: Path) -> None:
    log = folder_of(tmp_path, whole_run(settings=LONG), ended_at=30)
    assert log.read_all().has_ended
    log.take_up(20)
    assert not log.read_all().has_ended


def test_an_interrupt_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    assert main(["watch", str(tmp_path)]) == watch.INTERRUPTED


def test_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["watch", str(tmp_path / "file"), "--once"]) == WRONG_INPUT
    assert "is a file" in capsys.readouterr().err


def test_on_a_terminal_each_view_takes_the_place_of_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = folder_of(tmp_path, whole_run(settings=LONG, checks=(check(10),)))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(watch.time, "sleep", lambda _: log.write_ended(10))
    monkeypatch.setenv("TERM", "xterm")
    assert main(["watch", str(tmp_path)]) == GO
    text = capsys.readouterr().out
    assert "last written" in text and "Training has ended at step 10" in text
