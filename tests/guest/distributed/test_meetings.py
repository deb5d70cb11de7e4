"""Processes that meet: results come to all, a failure of any comes to all, and nobody is left waiting."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from guest.distributed.launch import Hang, launch, seen
from guest.distributed.meeting import meet
from killable import together
from sts_callback.distributed import Ranks

PLACES = ("start", "first meeting", "between", "end")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meetings")
    cases = {f"{place}-{failing}": {"place": place, "ranks": [failing]} for place in PLACES for failing in (0, 1)}
    cases |= {"none": {"place": "", "ranks": []}, "both": {"place": "between", "ranks": [0, 1]}}
    cases |= {"first only": {"place": "second meeting", "ranks": [0]}}
    cases |= {f"same-{i}": {"place": "between", "ranks": [1], "same": True} for i in range(2)}
    (folder / "cases.json").write_text(json.dumps(cases))
    together(meet, folder, limit_s=90)
    return folder


def test_all_get_the_results_of_all(folder: Path) -> None:
    for rank in seen(folder, "none"):
        assert rank == {"found": [[0, 1], "by 0"], "error": None, "next": [0, 1]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("failing", [0, 1])
def test_wherever_one_fails_all_raise_and_stay_in_step(place: str, failing: int, folder: Path) -> None:
    told = seen(folder, f"{place}-{failing}")
    assert told[failing]["error"] == f"ValueError: rank {failing} fell"
    assert told[1 - failing]["error"] == f"RankFailed: process {failing} failed with ValueError: rank {failing} fell"
    assert all(rank["next"] == [0, 1] for rank in told)


def test_where_both_fail_each_raises_its_own(folder: Path) -> None:
    assert [rank["error"] for rank in seen(folder, "both")] == ["ValueError: rank 0 fell", "ValueError: rank 1 fell"]


def test_a_failure_of_work_that_only_the_first_does_comes_to_all(folder: Path) -> None:
    first, other = seen(folder, "first only")
    assert first["error"] == "ValueError: rank 0 fell"
    assert other["error"] == "RankFailed: process 0 failed with ValueError: rank 0 fell"


def test_the_same_error_object_is_told_of_each_time_it_is_raised(folder: Path) -> None:
    for i in range(2):
        first, other = seen(folder, f"same-{i}")
        assert first["error"] == "RankFailed: process 1 failed with ValueError: rank 1 fell"
        assert other["error"] == "ValueError: rank 1 fell"


def test_a_monitor_that_was_told_of_no_others_waits_for_none(folder: Path) -> None:
    assert seen(folder, "alone") == [[0, 1], [0, 1]]


def test_alone_it_waits_for_nobody_and_raises_what_was_raised() -> None:
    def broken() -> int:
        raise KeyError("mine")

    alone = Ranks.of_run()
    assert alone == Ranks(0, 1)
    assert alone.together(lambda: 5) == 5
    assert alone.gathered(lambda: 7) == [7]
    assert alone.from_first(lambda: 6) == 6
    with pytest.raises(KeyError, match="mine"):
        alone.together(broken)


@pytest.mark.slow  # it waits
def test_a_hang_is_ended_and_leaves_no_process(tmp_path: Path) -> None:
    worker = tmp_path / "sleeper.py"
    worker.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(Hang, match="killed after 12 s"):
        launch(tmp_path, {}, seconds=12, worker=worker)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(worker) in (p.info["cmdline"] or [])]
