"""The README's recipes for frameworks that are not installed here, run against stand-ins of the entry points that they use."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sts_callback import STSCallback
from sts_callback.training.arguments import STSArguments

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def block(after: str, language: str = "python") -> str:
    """The first code block of a language behind some words."""
    found = re.search(rf"```{language}\n(.*?)```", README[README.index(after) :], re.DOTALL)
    assert found is not None
    return found[1]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module by this name, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(content)


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sts.yaml").write_text(block("reads them from `sts.yaml`", "yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STS_CALLBACK_CONFIG", raising=False)


def test_axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    names: dict[str, Any] = {"__name__": "sts_plugin"}
    exec(block("**Axolotl**"), names)
    (callback,) = names["STSPlugin"]().add_callbacks_pre_trainer({}, None)
    assert isinstance(callback, STSCallback)
    assert STSArguments.of_environment().options()["protect"] == {"law": 0.1, "code": 0.2}


def test_llama_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[list[Any]] = []
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda args=None, callbacks=None: runs.append(callbacks))
    exec(block("**LLaMA-Factory**"), {"__name__": "__main__"})
    ((callback,),) = runs
    assert isinstance(callback, STSCallback)
