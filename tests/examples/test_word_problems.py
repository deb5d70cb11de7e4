"""The word problems that the examples train on: right, distinct and the same every time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

import word_problems as module
from word_problems import TEMPLATES, word_problems

N = 500
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
CONSTANTS = {2, 3, 5, 20, 60, 100, 180}  # days, rounds, coins, minutes of an hour, percent, degrees of a triangle
EXACT: dict[str, Callable[[int, int], int | Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": Fraction,
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return word_problems(N)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_as_many_as_asked_for_and_all_different(rows: list[dict[str, str]]) -> None:
    assert len(rows) == N
    assert len({row["prompt"] for row in rows}) == N


def test_every_step_is_right(rows: list[dict[str, str]]) -> None:
    for row in rows:
        steps = STEP.findall(row["completion"])
        assert steps, row
        for left, sign, right, result in steps:
            assert EXACT[sign](int(left), int(right)) == int(result) > 1, row
        assert len(steps) == row["completion"].count(" = "), row


def test_the_answer_is_the_last_number_and_the_result_of_the_last_step(rows: list[dict[str, str]]) -> None:
    for row in rows:
        answer = int(row["completion"].rpartition(" #### ")[2])
        assert answer == int(STEP.findall(row["completion"])[-1][3]), row
        assert answer == _numbers(row["completion"])[-1], row


def test_steps_use_numbers_of_the_question_and_of_earlier_steps_only(rows: list[dict[str, str]]) -> None:
    for row in rows:
        known = {*_numbers(row["prompt"]), *CONSTANTS}
        for left, _, right, result in STEP.findall(row["completion"]):
            assert {int(left), int(right)} <= known, row
            known.add(int(result))


def test_rows_are_whole_sentences_in_the_format_of_the_shipped_domains(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert set(row) == {"prompt", "completion"}
        assert re.fullmatch(r"Question: [A-Z].+\?\nAnswer:", row["prompt"]), row
        assert re.fullmatch(r" [A-Z].+\. #### \d+", row["completion"]), row
        assert not set("{}[]") & set(row["prompt"] + row["completion"]), row


def test_every_kind_of_problem_occurs(rows: list[dict[str, str]]) -> None:
    shapes = [re.sub(r"\\\{\w+\\\}", r".+", re.escape(template.question)) for template in TEMPLATES]
    counts = [sum(bool(re.fullmatch(f"Question: {s}\nAnswer:", row["prompt"])) for row in rows) for s in shapes]
    assert min(counts) >= 1, counts
    assert sum(counts) == N


def test_same_seed_same_rows_and_a_smaller_set_is_the_beginning(rows: list[dict[str, str]]) -> None:
    assert word_problems(N) == rows
    assert word_problems(60) == rows[:60]
    assert word_problems(60, seed=1) != rows[:60]
    assert word_problems(0) == []


def test_run_as_a_script_it_writes_json_lines_and_loads_nothing_heavy() -> None:
    script = (
        "import runpy, sys; sys.argv = ['x', '4', '--seed', '3']; runpy.run_path(sys.path.pop(), run_name='__main__');"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy', 'datasets', 'sts_callback'} & set(sys.modules)) or 0)"
    )
    code = f"import sys; sys.path.append({str(Path(module.__file__))!r}); {script}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == word_problems(4, seed=3)
