"""What is built from `pyproject.toml`: a wheel with every file of the package, its metadata, and one version in all places."""

from __future__ import annotations

import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import sts_callback
from pages import DOCS, ROOT

backend = pytest.importorskip("hatchling.build", reason="it builds the wheel; the dev extra has it")


def package_files(root: Path = ROOT) -> set[str]:
    """All of the package but what Python has compiled, by the path from the root."""
    files = (file for file in (root / "sts_callback").rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {file.relative_to(root).as_posix() for file in files}


def wheel_of(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], Message]:
    """The names of its files but those of its metadata, and these."""
    monkeypatch.chdir(root)
    with zipfile.ZipFile(out / backend.build_wheel(str(out))) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        return {name for name in names if ".dist-info/" not in name}, HeaderParser().parsestr(wheel.read(metadata).decode())


def test_the_wheel_has_every_file_of_the_package_and_says_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, metadata = wheel_of(ROOT, tmp_path, monkeypatch)
    assert files == package_files()
    data = {name for name in files if not name.endswith(".py")}
    assert {"sts_callback/py.typed", "sts_callback/data/filler.txt", "sts_callback/runs/rehearsed.json"} < data
    assert {"sts_callback/data/domains/law.jsonl", "sts_callback/report/html/page.css"} < data
    assert metadata["Version"] == sts_callback.__version__
    assert f"\n## [{metadata['Version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_all("Project-URL")


def test_the_source_archive_has_the_pages_and_makes_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {page.name for page in (unpacked / "docs").iterdir()} == {page.name for page in DOCS}
    assert wheel_of(unpacked, tmp_path, monkeypatch)[0] == package_files()


def test_a_file_that_is_left_out_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".gitignore").write_text("*.jsonl\n", encoding="utf-8")
    package = tmp_path / "sts_callback"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.1.0"\n', encoding="utf-8")
    (package / "law.jsonl").touch()
    assert package_files(tmp_path) - wheel_of(tmp_path, tmp_path, monkeypatch)[0] == {"sts_callback/law.jsonl"}
