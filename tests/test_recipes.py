"""Recipes for frameworks: what the page shows is what the scripts run; plug-ins run against stand-ins of what they import."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from sts_callback import STSCallback
from sts_callback.training.arguments import STSArguments
from tiny import rows, saved_sae, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
SCRIPTS = ROOT / "examples" / "frameworks"


def section(script: str) -> str:
    """What the page says of a framework: from the heading before its script's name to the next heading."""
    return next(part for part in PAGE.split("\n## ") if f"({Path('../examples/frameworks') / script})" in part)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """A module by this name, and the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(content)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer, in a folder with the settings that the page shows."""
    (tmp_path / "sts.yaml").write_text(blocks(PAGE, "yaml")[0])
    saved_sae(tmp_path / "my-sae")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STS_CALLBACK_CONFIG", raising=False)
    tokenizer = tiny_tokenizer()
    args = TrainingArguments(**tiny_arguments(tmp_path))
    return Trainer(tiny_model(), args, train_dataset=tokenised(rows(6), tokenizer), processing_class=tokenizer)


@pytest.mark.parametrize("script", sorted(file.name for file in SCRIPTS.glob("*.sh") if file.name != "common.sh"))
def test_the_page_shows_what_the_script_runs(script: str) -> None:
    content, shown = (SCRIPTS / script).read_text(encoding="utf-8"), section(script)
    commands = [line for block in blocks(shown, "sh") for line in block.splitlines()]
    assert commands
    assert set(commands) <= set(content.splitlines())
    for block in [*blocks(shown, "python"), *blocks(shown, "yaml")]:
        assert block in content


def test_axolotl(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    names: dict[str, Any] = {"__name__": "sts_plugin"}
    exec(blocks(section("axolotl.sh"), "python")[0], names)
    (callback,) = names["STSPlugin"]().add_callbacks_post_trainer({}, trainer)
    assert isinstance(callback, STSCallback)
    assert callback._attached() is trainer
    assert set(STSArguments.of_environment().options()["protect"]) == {"law", "code"}


def test_ms_swift(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {}
    stand_in(monkeypatch, "swift.callbacks", callbacks_map=known)
    exec(blocks(section("ms_swift.sh"), "python")[0], {})
    callback = known["sts"](trainer.args, trainer)
    assert isinstance(callback, STSCallback)
    assert callback._attached() is trainer
