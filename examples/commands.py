"""The commands on Gemma 3 270M, run one after the other as a new user would, with what they say.

    python examples/commands.py [--work-dir DIR]

DIR is to be a new folder: what is there would be told too. `COMMANDS.md` beside this file is what it wrote. Not here are
`launch`, which says what the callback says, and `sae train`, which takes longer than all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from demo import SAE_FOLDER
from gemma import cached_gemma
from picture import elsewhere
from sts_callback.data.starter import starter_domains
from word_problems import word_problems

HERE = Path(__file__).parent
MEASURED = ["--model", "gemma-3-270m", "--sae", "sae"]
SMALL = ["--n-queries", "12", "--max-tokens", "64"]
PROTECTED = ["--protect", "law", "--protect", "code"]
GENERAL = ("economics", "business", "philosophy", "psychology")  # shipped domains that are not protected here: the replay
N_PLANTED = 12  # rows of law among the word problems, for blame to find
MOST_LINES = 60  # of one command's output


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/commands"))
    folder = parser.parse_args(argv).work_dir.resolve()
    if folder.exists():
        parser.error(f"--work-dir: {folder} is there already; give a new folder")
    folder.mkdir(parents=True)
    for name, target in (("gemma-3-270m", Path(cached_gemma())), ("sae", SAE_FOLDER.resolve())):
        (folder / name).symlink_to(target)
    problems, law = word_problems(400), _starter("law")
    _write(folder / "train.jsonl", problems)
    _write(folder / "general.jsonl", [row for name in GENERAL for row in _starter(name)])
    _write(folder / "mixed.jsonl", _planted(problems, law[:N_PLANTED]))

    told = ["# The commands", "", __doc__.splitlines()[0], "Written by `examples/commands.py`."]
    train = ["--train", "train.jsonl"]
    for title, argv in (
        ("Is this the right SAE, and are the probes enough?", ["doctor", *MEASURED, *train, *PROTECTED, *SMALL]),
        (
            "What will training on word problems move? And hold all but the training data fixed for the next time.",
            ["forecast", *MEASURED, *train, *PROTECTED, *SMALL, "--lock", "sts.lock", "--write-lock", "--junit", "forecast.xml"],
        ),
        (
            "The same with other settings than those that were locked.",
            ["forecast", *MEASURED, *train, *PROTECTED, "--n-queries", "16", "--max-tokens", "64", "--lock", "sts.lock"],
        ),
        (
            "Which of two learning rates keeps law and code within their budgets?",
            ["rehearse", *MEASURED, *train, *PROTECTED, *SMALL, "--learning-rate", "1e-4", "2e-3", "--steps-planned", "40"],
        ),
        (
            f"Which rows are to blame? Here {N_PLANTED} rows of law stand among the word problems, every 26th.",
            ["blame", *MEASURED, "--train", "mixed.jsonl", "--protect", "law", *SMALL, "--top", "5", "--out", "kept.jsonl"],
        ),
    ):
        told += _run(folder, title, argv)
    told += _trained(folder, "Train on word problems at a harsh rate, the callback attached.", "--out", "run")
    told += _trained(
        folder, "A pilot of what could be mixed in: questions of other fields.", "--train", "general.jsonl", "--out", "pilot"
    )
    for title, argv in (
        (
            "What to mix in? By the two runs, each on one source alone.",
            [
                *["mix", *train, "--replay", "general=general.jsonl", "--pilot", "train=run", "--pilot", "general=pilot"],
                *["--protect", "law=0.5", "--protect", "code=0.5", "--out", "mix.json"],
            ],
        ),
        (
            "How far may the adapter that was trained be turned up?",
            ["dial", *MEASURED, "--adapter", "run", "--protect", "law", *SMALL, "--scales", "0.05", "0.1", "0.25", "1"],
        ),
        (
            "Which of 100 of its rows activate law's features? In the run's report, too.",
            ["blame", *MEASURED, *train, "--protect", "law", *SMALL, "--rows", "100", "--top", "5", "--run-dir", "run"],
        ),
        ("How does the run fare? While it trains, `watch` goes on; here it has ended.", ["watch", "run"]),
        ("The run as a page.", ["report", "run"]),
        ("The run as a section of a model card.", ["card", "run"]),
        ("How good were the forecasts of all runs so far?", ["ledger"]),
        ("Which SAEs are there for a model?", ["saes", "--model", "google/gemma-3-270m"]),
    ):
        told += _run(folder, title, argv)
    (HERE / "COMMANDS.md").write_text("\n".join(told) + "\n")


def _planted(rows: Sequence[dict[str, str]], culprits: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Before every 25th row a culprit."""
    mixed = []
    for i, row in enumerate(rows[: 25 * len(culprits)]):
        mixed += [row] if i % 25 else [culprits[i // 25], row]
    return mixed


def _starter(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in starter_domains()[name].read_text().splitlines()]


def _write(file: Path, rows: Sequence[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _run(folder: Path, title: str, argv: Sequence[str]) -> list[str]:
    print(f"sts-callback {argv[0]} ...", flush=True)
    done = _done(folder, [sys.executable, "-m", "sts_callback", *argv])
    return _told(title, f"sts-callback {shlex.join(argv)}", done)


def _trained(folder: Path, title: str, *options: str) -> list[str]:
    """A run of the demo, from the first line that is ours."""
    print(f"demo.py {options[-1]} ...", flush=True)
    done = _done(folder, [sys.executable, str(HERE / "demo.py"), *options])
    start = max(0, done.stdout.find("STS: "))
    end = subprocess.CompletedProcess(done.args, done.returncode, done.stdout[start:], "")
    return _told(title, f"python examples/demo.py {shlex.join(options)}", end, most=3 * MOST_LINES)


def _done(folder: Path, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "STS_LEDGER": "ledger.jsonl",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _told(title: str, command: str, done: subprocess.CompletedProcess[str], most: int = MOST_LINES) -> list[str]:
    noise = ("Warning", "warnings.warn", "%|")  # of other libraries, and bars
    lines = [*done.stdout.splitlines(), *(s for s in done.stderr.splitlines() if s and not any(one in s for one in noise))]
    lines = [elsewhere(line) for line in lines]
    if len(lines) > most:
        lines = [*lines[:most], f"... and {len(lines) - most} lines more"]
    return ["", f"## {title}", "", "```console", f"$ {command}", *lines, f"# exit code {done.returncode}", "```"]


if __name__ == "__main__":
    main(sys.argv[1:])
