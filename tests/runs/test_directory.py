"""The run directory: what a kill, a resume or damage leaves of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from logs import EMPTY, SETTINGS, whole_run, written
from samples import GO, domain_drift, domain_forecast, estimate, forecast, rehearsal, snapshot
from sts_callback.errors import CannotTell
from sts_callback.records import Snippet, TopActivatingExamples
from sts_callback.records.run import Given, Looks, RunSettings, TimeSpent
from sts_callback.runs.directory import RunDirectory


@pytest.fixture
def log(tmp_path: Path) -> RunDirectory:
    log = RunDirectory(tmp_path / "run" / "sts")
    log.start_anew()
    return log


def _steps(log: RunDirectory, before: int = 10**9) -> list[int]:
    return [check.step for check in log.checks_before(before)]


def test_nothing_is_written_until_it_is_started(tmp_path: Path) -> None:
    log = RunDirectory(tmp_path / "run" / "sts")
    assert list(tmp_path.iterdir()) == []
    assert log.checks_before(100) == []
    log.start_anew()
    assert list(log.folder.iterdir()) == []


def test_an_earlier_run_is_moved_aside_and_kept(log: RunDirectory) -> None:
    for number in (1, 2):
        log.append_check(snapshot(number, domain_drift()), GO)
        log.start_anew()
        assert log.checks_before(100) == []
    assert sorted(p.name for p in log.folder.parent.iterdir()) == ["sts", "sts.1", "sts.2"]
    assert _steps(RunDirectory(log.folder.with_name("sts.1"))) == [1]
    assert _steps(RunDirectory(log.folder.with_name("sts.2"))) == [2]


def test_an_empty_folder_is_used_as_it_is(log: RunDirectory) -> None:
    log.start_anew()
    assert [p.name for p in log.folder.parent.iterdir()] == ["sts"]


def test_forecast_comes_back_with_nothing_half_written(log: RunDirectory) -> None:
    record = forecast(domain_forecast("law"))
    log.write_forecast(record, GO)
    assert log.read_forecast() == record
    assert [p.name for p in log.folder.iterdir()] == ["forecast.json"]
    content = json.loads((log.folder / "forecast.json").read_text())
    assert content["verdict"]["decision"] == "go"


def test_a_forecast_is_replaced_whole_or_not_at_all(log: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    first = forecast(domain_forecast("law"))
    log.write_forecast(first, GO)

    def killed(*names: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            log.write_forecast(forecast(domain_forecast("code")), GO)
    assert log.read_forecast() == first


def test_missing_forecast_can_not_tell(log: RunDirectory) -> None:
    with pytest.raises(CannotTell, match=r"^forecast: .*forecast\.json cannot be read .*start the run anew"):
        log.read_forecast()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0" * len(text),
        lambda text: "{}",
        lambda text: "null",
        lambda text: '{"forecast": null}',
        lambda text: text.replace('"features"', '"traits"'),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 99'),
    ],
    ids=["empty", "cut", "zeros", "no forecast", "null", "null forecast", "other keys", "other version"],
)
def test_damaged_forecast_can_not_tell(log: RunDirectory, damage: object) -> None:
    log.write_forecast(forecast(domain_forecast()), GO)
    file = log.folder / "forecast.json"
    assert log.read_forecast()
    file.write_text(damage(file.read_text()))  # type: ignore[operator]
    with pytest.raises(CannotTell, match="cannot be read"):
        log.read_forecast()


def test_checks_come_back_in_order_up_to_a_step(log: RunDirectory) -> None:
    known = estimate(0.125, -0.25, 0.5)  # what is unknown, NaN, equals nothing
    checks = [snapshot(s, domain_drift("law", relative_drift=s / 100), output_drift=known) for s in (10, 20, 30)]
    for check in checks:
        log.append_check(check, GO)
    assert log.checks_before(30) == checks
    assert log.checks_before(29) == checks[:2]
    assert log.checks_before(9) == []


def test_of_a_stretch_run_twice_the_later_check_counts(log: RunDirectory) -> None:
    for step, share in ((10, 0.1), (20, 0.2), (30, 0.3), (20, 0.4), (30, 0.5)):
        log.append_check(snapshot(step, domain_drift("law", relative_drift=share)), GO)
    assert [(c.step, c.domains["law"].relative_drift.value) for c in log.checks_before(30)] == [(10, 0.1), (20, 0.4), (30, 0.5)]


@pytest.mark.parametrize("keep", [1, 100, -2])
def test_a_kill_loses_at_most_the_line_being_written(log: RunDirectory, keep: int) -> None:
    file = log.folder / "drift.jsonl"
    log.append_check(snapshot(10, domain_drift()), GO)
    whole = file.read_bytes()
    log.append_check(snapshot(20, domain_drift()), GO)
    file.write_bytes(whole + file.read_bytes()[len(whole) :][:keep])  # killed while writing the second line
    assert _steps(log) == [10]
    log.append_check(snapshot(30, domain_drift()), GO)
    log.append_check(snapshot(40, domain_drift()), GO)
    assert _steps(log) == [10, 30, 40]


def test_a_line_that_lacks_only_its_end_is_kept(log: RunDirectory) -> None:
    file = log.folder / "drift.jsonl"
    log.append_check(snapshot(10, domain_drift()), GO)
    file.write_bytes(file.read_bytes()[:-1])
    assert _steps(log) == [10]
    log.append_check(snapshot(20, domain_drift()), GO)
    assert _steps(log) == [10, 20]


def test_a_first_line_torn_to_nothing_is_no_obstacle(log: RunDirectory) -> None:
    (log.folder / "drift.jsonl").touch()
    log.append_check(snapshot(10, domain_drift()), GO)
    assert _steps(log) == [10]
    assert (log.folder / "drift.jsonl").read_text().startswith("{")


ROLLOUTS = [
    {"prompt": "« a\n»", "completion": None, "reward": None, "sample": ""},
    {"prompt": [], "completion": "b", "sample": "c"},
]


def test_rollouts_come_back_as_they_were(log: RunDirectory) -> None:
    assert log.read_rollouts() == []
    log.write_rollouts([])
    assert list(log.folder.iterdir()) == []
    log.write_rollouts(ROLLOUTS)
    assert log.read_rollouts() == ROLLOUTS
    log.write_rollouts(ROLLOUTS[:1])
    assert log.read_rollouts() == ROLLOUTS[:1]


@pytest.mark.parametrize("damaged", [b"{", b"[]", b'{"prompt": "p", "completion": "c"}', b"\xff"])
def test_damaged_rollouts_are_left_out(damaged: bytes, log: RunDirectory) -> None:
    log.write_rollouts(ROLLOUTS)
    with (log.folder / "rollouts.jsonl").open("ab") as file:
        file.write(damaged)
    assert log.read_rollouts() == ROLLOUTS


def test_faults_are_lines_whatever_their_trace_holds(log: RunDirectory) -> None:
    traces = ['Traceback:\n  File "x"\nValueError: ±\u2028"', "again"]
    for step, trace in enumerate(traces):
        log.append_fault(step, "drift check", "ValueError('±')", trace)
    lines = [json.loads(line) for line in (log.folder / "faults.jsonl").read_text().splitlines()]
    known = {"what": "drift check", "error": "ValueError('±')"}
    assert lines == [{"step": step, "trace": trace, **known} for step, trace in enumerate(traces)]


def test_a_feature_is_told_once_also_after_a_resume(log: RunDirectory) -> None:
    snippets = {"law": (Snippet("the ", "court", " held", 2.5),)}
    one, other = (TopActivatingExamples(j, 0.5, "", snippets) for j in (7, 3))
    log.append_top_examples([one])
    RunDirectory(log.folder).append_top_examples([TopActivatingExamples(7, 0.25, "", {}), other])
    (file,) = log.folder.iterdir()
    assert [TopActivatingExamples.from_json(line) for line in file.read_text().splitlines()] == [one, other]


def test_taking_up_a_run_drops_what_will_be_written_again(log: RunDirectory) -> None:
    for step, share in ((10, 0.1), (20, 0.2), (30, 0.3), (20, 0.4)):
        log.append_check(snapshot(step, domain_drift("law", relative_drift=share)), GO)
        log.append_postponed(step + 1, "too dear")
    assert RunDirectory(log.folder).take_up(20) == 0
    rows = [json.loads(line) for line in (log.folder / "drift.jsonl").read_text().splitlines()]
    found = [(row["snapshot"]["step"], row["snapshot"]["domains"]["law"]["relative_drift"]["value"]) for row in rows]
    assert found == [(10, 0.1), (20, 0.4)]
    assert [json.loads(line)["step"] for line in (log.folder / "skipped.jsonl").read_text().splitlines()] == [11]
    assert (log.postponed_since(10, 20), log.postponed_since(11, 20), log.postponed_since(0, 10)) == (True, False, False)


@pytest.mark.parametrize(("damage", "n_damaged"), [(b"\xff\n", 1), (b"[1]\n{}\n", 2), (b'{"cut', 0), (b"", 0)])
@pytest.mark.parametrize("name", ["drift.jsonl", "features.jsonl"])
def test_taking_up_a_run_counts_damage_but_not_the_line_of_a_kill(
    log: RunDirectory, name: str, damage: bytes, n_damaged: int
) -> None:
    log.append_check(snapshot(10, domain_drift()), GO)
    log.append_top_examples([TopActivatingExamples(7, 0.5, "", {})])
    file = log.folder / name
    whole = file.read_bytes()
    file.write_bytes(whole + damage)
    assert log.take_up(10) == n_damaged
    assert file.read_bytes() == whole
    assert not list(log.folder.glob("*.part"))


def test_the_folder_of_an_earlier_run_is_moved_before_the_first_line_is_written(log: RunDirectory) -> None:
    log.append_check(snapshot(10, domain_drift()), GO)
    later = RunDirectory(log.folder, anew=True)
    assert _steps(log) == [10]
    later.append_fault(0, "forecast", "KeyError()", "trace")
    assert [file.name for file in log.folder.iterdir()] == ["faults.jsonl"]
    assert _steps(RunDirectory(log.folder.with_name("sts.1"))) == [10]


def test_faults_that_cannot_be_written_are_written_later(log: RunDirectory) -> None:
    log.folder.rmdir()
    log.folder.touch()  # a file in its place
    for step in (1, 2):
        with pytest.raises(OSError, match="exists"):
            log.append_fault(step, "run log", "OSError()", "trace")
    log.folder.unlink()
    log.write_waiting_faults()
    log.write_waiting_faults()
    assert [json.loads(line)["step"] for line in (log.folder / "faults.jsonl").read_text().splitlines()] == [1, 2]


def test_all_that_was_written_is_read_at_once(log: RunDirectory) -> None:
    run = whole_run(other_forecasts=(forecast(domain_forecast("law")),))
    written(log, run)
    read = log.read_all()
    assert read.to_json() == run.to_json()
    assert not read.is_empty


def test_a_rehearsal_that_was_not_made_has_no_verdict(log: RunDirectory) -> None:
    log.write_rehearsal(rehearsal(skipped="its model is sharded."), None)
    assert log.read_rehearsal() is not None
    read = log.read_all()
    assert read.rehearsal is not None
    assert (read.rehearsal.skipped, read.rehearsal_verdict, read.unreadable) == ("its model is sharded.", None, ())


def test_a_damaged_rehearsal_is_none(log: RunDirectory) -> None:
    assert log.read_rehearsal() is None
    log.write_rehearsal(rehearsal(), None)
    file = log.folder / "rehearsal.json"
    file.write_text(file.read_text()[:-9])
    assert log.read_rehearsal() is None
    assert log.read_all().unreadable == ("rehearsal.json cannot be read: cut off or damaged.",)


def test_where_nothing_was_written_there_is_nothing_to_read(log: RunDirectory, tmp_path: Path) -> None:
    assert log.read_all() == RunDirectory(tmp_path / "nowhere").read_all() == EMPTY
    assert log.read_all().is_empty


def test_settings_alone_are_nothing_to_tell(log: RunDirectory) -> None:
    log.write_settings(SETTINGS)
    assert log.read_all().settings == SETTINGS
    assert log.read_all().is_empty


def test_what_cannot_be_read_is_named_with_its_reason_and_the_rest_is_read(log: RunDirectory) -> None:
    written(log, whole_run())
    drift, forecast_file = log.folder / "drift.jsonl", log.folder / "forecast.json"
    first, second, third = drift.read_text().splitlines()
    drift.write_text("\n".join([first, second.replace('"n_shared"', '"shared"'), third[:-9]]))
    forecast_file.write_text(forecast_file.read_text()[:-20])
    read = log.read_all()
    assert [c.snapshot.step for c in read.checks] == [10]
    assert read.forecast is read.forecast_verdict is None
    assert read.faults and read.top_examples and read.postponed
    assert read.unreadable == (
        "drift.jsonl cannot be read in 2 of 3 lines: cut off or damaged.",
        "forecast.json cannot be read: cut off or damaged.",
    )


def test_a_stretch_run_twice_is_read_as_it_went_later(log: RunDirectory) -> None:
    for share in (0.25, 0.5):
        log.append_check(snapshot(10, domain_drift(relative_drift=share)), GO)
    (only,) = log.read_all().checks
    assert only.snapshot.domains["law"].relative_drift.value == 0.5


def test_time_stands_beside_a_check_where_earlier_versions_do_not_look(log: RunDirectory) -> None:
    log.append_check(snapshot(10, domain_drift()), GO)
    log.append_check(snapshot(20, domain_drift()), GO, TimeSpent(1.0, 50.0))
    assert [c.time for c in log.read_all().checks] == [None, TimeSpent(1.0, 50.0)]
    assert _steps(log) == [10, 20]
    row = json.loads((log.folder / "drift.jsonl").read_text().splitlines()[1])
    assert sorted(row) == ["snapshot", "time", "verdict"]
    assert sorted(row["snapshot"]) == sorted(snapshot(20, domain_drift()).to_dict())
    assert log.take_up(20) == 0
    assert log.read_all().checks[1].time == TimeSpent(1.0, 50.0)


def test_settings_come_back_with_the_versions_that_are_installed(log: RunDirectory) -> None:
    def mine() -> None: ...

    given = Given("base", "none:12", "train.jsonl", {"bikes": "bikes.jsonl"}, 1e-3, 300, 4, 8)
    for action, named in ((mine, mine.__qualname__), ("stop", "stop")):
        asked = {"check_on": 6, "action": action}
        settings = RunSettings.of(SETTINGS.policy, SETTINGS.probes, **asked, max_overhead=1.0, looks=Looks(40, 6), given=given)
        log.write_settings(settings)
        assert log.read_all().settings == settings
        assert log.read_looks() == Looks(40, 6)
        assert (settings.check_on, settings.action) == ("6", named)
        assert {"python", "sts-callback", "torch"} <= set(settings.versions)
    assert log.read_all().given == given


def test_of_a_run_from_before_settings_told_what_it_was_given_the_rehearsal_has_the_rate(log: RunDirectory) -> None:
    old = SETTINGS.to_dict()
    del old["given"]
    log.start_anew()
    (log.folder / "settings.json").write_text(json.dumps(old))
    assert (log.read_all().given, log.read_all().unreadable) == (Given(), ())
    log.write_rehearsal(rehearsal(snapshot(5, domain_drift())), None)
    assert log.read_all().given == Given(learning_rate=0.001)


@pytest.mark.parametrize(
    ("shares", "best"),
    [
        ({10: 0.5, 20: 0.25, 30: 0.75}, 20),
        ({10: 0.5, 20: 0.5}, 20),  # the latest of equal ones
        ({10: 0.5, 20: -3.0}, 20),  # better than before training
        ({10: 1.0, 20: 31.6}, 0),  # none keeps the budgets
        ({10: math.nan, 20: 0.5, 40: 0.0}, 20),  # unknown, and not on disk
        ({}, 0),
    ],
)
def test_the_checkpoint_to_go_back_to_is_on_disk_and_keeps_the_budgets(
    shares: dict[int, float], best: int, tmp_path: Path
) -> None:
    for step in (10, 20, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").touch()
    assert RunDirectory(tmp_path / "sts", anew=True).best_checkpoint(shares) == best
