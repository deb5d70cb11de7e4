"""What a check moves between processes is what `docs/several-gpus.md` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guest.distributed import traffic
from guest.distributed.launch import launch, seen

SMALL = {"n_domains": 1, "n_queries": 4, "n_features": 8}
CASES = {"ddp": SMALL, "fsdp2": {**SMALL, "mode": "fsdp2"}}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("traffic")
    launch(folder, CASES, seconds=120, worker=Path(traffic.__file__))
    return {name: seen(folder, name)[-1] for name in CASES}


def test_sharded_weights_are_all_that_a_sharded_model_moves_beside(counted: dict[str, dict[str, Any]]) -> None:
    plain, sharded = counted["ddp"], counted["fsdp2"]
    assert plain["weights"] == []
    assert sharded["forwards"] > 0
    assert 0 < sum(sharded["weights"]) <= sharded["forwards"] * sharded["model"] / 2
    assert sorted(plain["longest"])[-2:] == sorted(sharded["longest"])[-2:]  # the activations of both sets
    assert traffic.received(plain, 2) > sum(plain["longest"]) > 0
