"""What each process of `test_meetings` does: goes to meetings, and fails where its case says."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from guest.distributed.worker import made_model, made_monitor
from sts_callback.distributed import Ranks


def course(ranks: Ranks, at: Callable[[str], None]) -> list[Any]:
    """Two meetings inside a third; `at` is told each place where a process may fail."""

    def work() -> list[Any]:
        at("start")
        first = ranks.gathered(lambda: (at("first meeting"), ranks.index)[1])
        at("between")
        second = ranks.from_first(lambda: (at("second meeting"), f"by {ranks.index}")[1])
        at("end")
        return [first, second]

    return ranks.together(work)


def meet(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    ranks = Ranks.of_run()
    always_the_same = ValueError(f"rank {ranks.index} fell")
    for name, case in json.loads((folder / "cases.json").read_text()).items():

        def at(place: str, case: dict[str, Any] = case) -> None:
            if place == case["place"] and ranks.index in case["ranks"]:
                raise always_the_same if case.get("same") else ValueError(f"rank {ranks.index} fell")

        try:
            seen = {"found": course(ranks, at), "error": None}
        except Exception as error:
            seen = {"found": None, "error": f"{type(error).__name__}: {error}"}
        seen["next"] = ranks.gathered(lambda: ranks.index)  # all are in step again
        (folder / name).mkdir(exist_ok=True)
        torch.save(seen, folder / name / f"seen-{ranks.index}.pt")
    if ranks.index == 0:  # an own loop that measures on its first process only
        made_monitor(made_model(lora=False)).forecast()
    (folder / "alone").mkdir(exist_ok=True)
    torch.save(ranks.gathered(lambda: ranks.index), folder / "alone" / f"seen-{ranks.index}.pt")
    distributed.destroy_process_group()
