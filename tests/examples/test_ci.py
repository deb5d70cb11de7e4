"""The example workflow is one that GitHub reads, and its commands are ones that we read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sts_callback.cli import parser

FILE = Path(__file__).parents[2] / "examples" / "ci" / "forecast.yml"
TEXT = FILE.read_text(encoding="utf-8")


def workflow() -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(TEXT)
    return content


def commands(text: str) -> list[list[str]]:
    """The arguments of each command line of ours in a piece of shell."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("sts-callback ")]


def steps() -> list[dict[str, Any]]:
    return [step for job in workflow()["jobs"].values() for step in job["steps"]]


def test_it_has_what_a_workflow_needs() -> None:
    content = workflow()
    assert set(content) == {"name", True, "permissions", "env", "jobs"}  # YAML 1.1 reads `on` as true
    assert set(content[True]) == {"pull_request", "workflow_dispatch"}
    assert all(job["runs-on"] for job in content["jobs"].values())
    assert all(("run" in step) != ("uses" in step) for step in steps())
    assert all("@" in step["uses"] for step in steps() if "uses" in step)


def test_every_command_of_ours_is_one() -> None:
    in_steps = [argv for step in steps() for argv in commands(step.get("run", ""))]
    in_comments = commands(
        "\n".join(line.strip().removeprefix("#").strip() for line in TEXT.splitlines() if line.strip()[:1] == "#")
    )
    assert [argv[0] for argv in in_steps] == ["doctor", "forecast"]
    assert [argv[0] for argv in in_comments] == ["forecast"]
    for argv in (*in_steps, *in_comments):
        parser().parse_args(argv)
    forecast = parser().parse_args(in_steps[1])
    assert (forecast.lock, forecast.junit, forecast.write_lock) == (Path("sts.lock"), Path("reports/forecast.xml"), False)
    # What is locked is what is run: only the training data may differ.
    locking = parser().parse_args(in_comments[0])
    assert locking.write_lock and (locking.lock, locking.protect) == (forecast.lock, forecast.protect)


def test_a_command_that_is_none_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    (argv,) = commands("  sts-callback forecast --model x --sae y \\\n    --train z --juint out.xml\n  echo done")
    with pytest.raises(SystemExit):
        parser().parse_args(argv)
    assert "--juint" in capsys.readouterr().err


def test_what_is_shown_is_what_is_written_also_on_a_no_go() -> None:
    (run,) = [step for step in steps() if step.get("name") == "Forecast"]
    shown = steps()[steps().index(run) + 1 :]
    assert [step["with"].get("path") or step["with"]["report_paths"] for step in shown] == ["reports/forecast.xml"] * 2
    assert all(step["if"] == "${{ !cancelled() }}" for step in shown)


def test_variables_that_are_used_are_set() -> None:
    used = {part.strip('"$') for step in steps() for part in step.get("run", "").split() if part.startswith('"$')}
    assert used == {"MODEL", "SAE", "TRAIN"} <= set(workflow()["env"])
