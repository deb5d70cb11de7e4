"""What is too old is refused before anything fails for want of it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

import sts_callback
from sts_callback import versions
from sts_callback.cli import main
from sts_callback.cli.common import WRONG_INPUT
from sts_callback.errors import VersionError

pytestmark = pytest.mark.versions


def declare(monkeypatch: pytest.MonkeyPatch, declared: list[str] | None, installed: dict[str, str]) -> None:
    def requires(name: str) -> list[str]:
        if declared is None:
            raise PackageNotFoundError(name)
        return declared

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "requires", requires)
    monkeypatch.setattr(versions, "version", version)


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (
            {"torch": "2.13.0+cpu", "trl": "0.23.1"},
            r"trl: got 0\.23\.1; sts-callback needs trl>=0\.24\. Try: pip install 'trl>=0\.24'",
        ),
        ({"torch": "2.13.0+cpu"}, r"trl: got none; sts-callback needs trl>=0\.24"),
        ({"torch": "2.5.1", "trl": "1.0"}, r"torch: got 2\.5\.1; sts-callback needs torch>=2\.6"),
    ],
)
def test_too_old_or_missing_is_refused_with_what_is_needed(
    installed: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declare(monkeypatch, ["torch>=2.6", "trl>=0.24", "peft; extra == 'examples'"], installed)
    for name in ("STSCallback", "Monitor"):
        with pytest.raises(VersionError, match=message):
            getattr(sts_callback, name)
    assert main(["ledger"]) == WRONG_INPUT
    assert "sts-callback needs" in capsys.readouterr().err


@pytest.mark.parametrize("declared", [["torch>=2.6", "trl>=0.24"], None])
def test_what_is_in_the_range_is_not(declared: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, declared, {"torch": "2.6.0+cu124", "trl": "1.17.0.dev0"})
    versions.require_versions()


def test_this_environment_is_in_the_range_that_is_declared() -> None:
    versions.require_versions()
