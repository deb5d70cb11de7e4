"""README and `docs/`: links lead somewhere, commands are ours, Python runs or at least compiles."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import Dataset, interleave_datasets, load_dataset
from trl import SFTConfig, SFTTrainer

from guest.runs import TINY_DOMAINS
from pages import DOCS, ROOT, blocks, page, prose
from sts_callback import ProbeConfig, STSCallback
from sts_callback.cli import parser
from sts_callback.runs.directory import RunDirectory
from tiny import rows, saved_sae, tiny_arguments, tiny_model, tiny_tokenizer

PAGES = [ROOT / "README.md", *DOCS]
ALL = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("*.md"))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(text: str) -> set[str]:
    """Those that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links without a file, or with an anchor that the file does not have."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        place = folder / file
        is_there = not file or place.exists()
        if is_there and anchor:
            is_there = anchor in anchors(place.read_text(encoding="utf-8") if file else text)
        if not is_there:
            broken.append(target)
    return broken


def commands(text: str) -> list[str]:
    """Every command of ours: in shell blocks, continued lines joined, and in code in lines."""
    lines = "\n".join([*blocks(text, "sh"), *re.findall(r"`(sts-callback [^`\n]*)`", text)])
    lines = lines.replace("\\\n", " ")
    return [line.strip() for line in lines.splitlines() if line.strip().startswith("sts-callback ")]


@pytest.mark.parametrize("path", ALL, ids=name)
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_a_link_that_leads_nowhere_would_be_noticed() -> None:
    text = "# A `b` c?\n[a](#a-b-c) [b](#b) [c](README.md#install) [d](README.md#none) [e](none.md) [f](https://x.y) `[g](h)`\n"
    assert broken_links(text, ROOT) == ["#b", "README.md#none", "none.md"]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_command_is_one(path: Path) -> None:
    known = set(re.findall(r"^    (\w+) ", parser().format_help(), re.MULTILINE))
    for line in commands(path.read_text(encoding="utf-8")):
        _, command, *arguments = shlex.split(line, comments=True)
        assert command in known, line
        if arguments:
            parser().parse_args([command, *arguments])


def test_a_command_that_is_none_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = commands("```sh\nsts-callback report \\\n  --juint run  # a comment\n```\n")
    with pytest.raises(SystemExit):
        parser().parse_args(shlex.split(line, comments=True)[1:])
    assert "unrecognized arguments: --juint" in capsys.readouterr().err


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    named = {target for path in PAGES for target in re.findall(r"`make ([a-z-]+)", path.read_text(encoding="utf-8"))}
    assert named
    assert named <= targets


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_can_be_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        compile(block, name(path), "exec")
    for block in blocks(text, "yaml"):
        assert yaml.safe_load(block)
    for block in blocks(text, "json"):
        assert json.loads(block)


def test_a_newcomer_is_served_first() -> None:
    readme = page("README.md")
    assert len(readme.splitlines()) <= 150
    assert [path.name for path in DOCS if f"(docs/{path.name}" not in readme] == []


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_a_page_says_for_whom_it_is(path: Path) -> None:
    title, empty, first, *_ = path.read_text(encoding="utf-8").splitlines()
    assert title.startswith("# ")
    assert empty == ""
    assert first.startswith("For every")


def test_the_floor_plan_has_every_room() -> None:
    plan, table = page("docs/how-it-works.md").split("## Floor plan\n")[1].split("## ")[0].split("\n| floor |")
    inside = (path for path in (ROOT / "sts_callback").iterdir() if not path.name.startswith("_") and path.name != "py.typed")
    rooms = {f"{path.name}/" if path.is_dir() else path.name for path in inside}
    assert set(re.findall(r"[a-z_]+(?:/|\.py)(?= |$)", blocks(plan, "text")[0], re.MULTILINE)) == rooms
    assert {room for room in rooms if f"`{room}`" not in table} == set()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STS_CALLBACK_CONFIG", raising=False)
    return tmp_path


def wide_sae(folder: Path) -> Path:
    """One of more than 100 features, from which as many can be selected."""
    return saved_sae(folder, n_rotations=4)


def written(folder: Path, **files: list[dict[str, str]]) -> None:
    for stem, content in files.items():
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def starts(output: str) -> set[str]:
    """What lines that are not indented begin with, up to the first number or colon: what does not differ from run to run."""
    return {
        " ".join(found[0].split())
        for line in output.splitlines()
        if (found := re.match(r"[A-Za-z][A-Za-z ]*(:|(?= \d)|(?=  )|$)", line))
    }


def test_the_first_run_runs(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands, but for the model and its SAE."""
    readme = page("README.md")
    (script,) = blocks(readme, "python")
    assert page("examples/first.py").endswith(f'"""\n\n{script}')
    model = tiny_model()
    model.config.max_position_embeddings = 2048  # its tokens are bytes
    model.save_pretrained(here / "model")
    tiny_tokenizer().save_pretrained(here / "model")
    wide_sae(here / "examples" / "gemma-3-270m-layer-12")
    gemma = ModuleType("gemma")
    vars(gemma)["cached_gemma"] = lambda: str(here / "model")
    monkeypatch.setitem(sys.modules, "gemma", gemma)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(script, names)
    printed, shown = capsys.readouterr().out, "".join(blocks(readme, "text"))
    assert (here / "runs" / "first" / "sts" / "report.html").is_file()
    assert names["callback"].rehearsal.doses
    # Past runs, which no tiny model has, add a column to the table and a line below it.
    shown = "".join(line for line in shown.splitlines(keepends=True) if "the expected one" not in line)
    told = {start for start in starts(shown) if not start.startswith("domain ")}
    assert len(told) >= 3
    assert told <= starts(printed)


def test_a_domain_of_ones_own(here: Path) -> None:
    text = page("docs/protect-your-own-domain.md")
    (row,) = (json.loads(block) for block in blocks(text, "json"))
    written(here, tenancy=[row] * 3)
    attached: list[Any] = []
    names: dict[str, Any] = {
        "STSCallback": STSCallback,
        "SFTTrainer": lambda **options: SimpleNamespace(train=lambda: attached.append("trained"), **options),
        **dict.fromkeys(("model", "args", "data")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(STSCallback, "attach", lambda callback, trainer: attached.append(trainer.callbacks == [callback]))
        exec(blocks(text, "python")[0], names)
    assert attached == [True, "trained"]
    settings = names["callback"]._settings
    assert dict(settings.policy.budgets) == {"tenancy": 0.1, "code": 0.2}
    assert settings.domains["tenancy"] == "tenancy.jsonl"


def test_a_ledger(here: Path) -> None:
    names: dict[str, Any] = {"STSCallback": STSCallback, "sae": str(saved_sae(here / "sae"))}
    exec(blocks(page("docs/past-runs.md"), "python")[0], names)
    assert names["callback"]._settings.ledger == "ledger.jsonl"


def test_a_rehearsal(here: Path) -> None:
    def callback(**options: Any) -> STSCallback:
        return STSCallback(domains={"law": TINY_DOMAINS["near"]}, probes=ProbeConfig(n_queries=8, n_features=8), **options)

    names: dict[str, Any] = {
        "STSCallback": callback,
        "SFTTrainer": lambda **options: SFTTrainer(processing_class=tiny_tokenizer(), **options),
        "sae": str(saved_sae(here / "sae")),
        "model": tiny_model(),
        "args": SFTConfig(**tiny_arguments(here, max_steps=2)),
        "data": Dataset.from_list(rows(20)),
    }
    exec(blocks(page("docs/rehearsal.md"), "python")[0], names)
    assert names["callback"].rehearsal.doses[0].n_steps == 5
    assert RunDirectory(here / "sts").read_rehearsal() is not None


def test_a_loop_of_ones_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(here, train=rows(30), law=rows(40, "laws", seed=50))
    trained: list[int] = []
    names: dict[str, Any] = {
        "model": tiny_model(),
        "tokenizer": tiny_tokenizer(),
        "sae": str(wide_sae(here / "sae")),
        "train_one_step": lambda model: trained.append(1),
    }
    exec(blocks(page("docs/own-loop.md"), "python")[0], names)
    assert len(trained) == 10
    assert [check.step for check in names["checks"]] == [1, 2, 5, 10]
    assert re.findall(r"^(\d+) go ", capsys.readouterr().out, re.MULTILINE) == ["1", "2", "5", "10"]


def test_a_mixture(here: Path) -> None:
    written(here, train=rows(6), law=rows(4, "laws"))
    options = {"probabilities": [0.5, 0.5], "seed": 0, "stopping_strategy": "all_exhausted"}
    (here / "mix.json").write_text(json.dumps({"files": ["train.jsonl", "law.jsonl"], "rows": 5, "interleave_datasets": options}))
    names: dict[str, Any] = {"json": json, "Path": Path, "interleave_datasets": interleave_datasets, "load_dataset": load_dataset}
    exec(blocks(page("docs/what-to-do-about-an-alarm.md"), "python")[0], names)
    assert len(names["mixed"]) == 5
