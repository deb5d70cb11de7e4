"""`sts-callback launch`: a training command as it is, watched; what it does to the Pythons that it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from guest.runs import checked_steps
from sts_callback import STSCallback
from sts_callback.cli import main
from sts_callback.cli.common import CANNOT_TELL, WRONG_INPUT
from sts_callback.errors import ConfigError
from sts_callback.launched import watch
from tiny import rows, saved_sae, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

pytestmark = pytest.mark.versions

TRAIN = """
from pathlib import Path
from transformers import Trainer, TrainingArguments
from tiny import rows, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

tokenizer = tiny_tokenizer()
args = TrainingArguments(**tiny_arguments(Path("out"), max_steps=2, per_device_train_batch_size=1))
Trainer(model=tiny_model(), args=args, train_dataset=tokenised(rows(), tokenizer), processing_class=tokenizer).train()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with settings in it; what commands start there finds the package and the tests' helpers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STS_CALLBACK_CONFIG", raising=False)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), str(root), str(root / "tests")]))
    saved_sae(tmp_path / "sae")
    (tmp_path / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20, "sums", seed=50)))
    (tmp_path / "sts.yaml").write_text(
        "sts_sae: sae\nsts_protect: [near]\nsts_domains: [near=near.jsonl]\n"
        "sts_n_queries: 8\nsts_n_features: 8\nsts_check_on: 1\nsts_max_overhead: null\n"
    )
    return tmp_path


def python(code: str) -> list[str]:
    return ["launch", sys.executable, "-c", code]


@pytest.mark.slow
def test_a_script_that_knows_nothing_of_us_is_watched(place: Path) -> None:
    (place / "train.py").write_text(TRAIN)
    assert main(["launch", sys.executable, "train.py"]) == 0
    assert checked_steps(place / "out") == [1, 2]
    assert (place / "out" / "sts" / "forecast.json").exists()


@pytest.mark.parametrize("code", [0, 1, 3])
def test_the_exit_code_is_the_commands_own_unless_nothing_was_watched(
    code: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(python(f"raise SystemExit({code})")) == (code or CANNOT_TELL)
    assert ("nothing was watched" in capsys.readouterr().err) is (code == 0)


def test_a_sitecustomize_of_the_users_own_is_run_all_the_same(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (place / "own").mkdir()
    (place / "own" / "sitecustomize.py").write_text("told = 'by the user'\n")
    main(python("import sitecustomize; print(sitecustomize.told)"))
    assert capfd.readouterr().out == "by the user\n"


def test_options_and_empty_texts_are_the_commands(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main([*python("import sys; print(sys.argv[1:])"), "--help", "", "--report_to="])
    assert capfd.readouterr().out == "['--help', '', '--report_to=']\n"


def test_a_signal_ends_the_command(place: Path) -> None:
    code = "import os, time; open('began', 'w').close(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-m", "sts_callback", *python(code)], cwd=place)
    while not (place / "began").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        (["launch"], "sts_sae: sae", "command: got none; give the one that trains"),
        (["launch", "no-such-program"], "sts_sae: sae", "command: no-such-program cannot be run (No such file or directory)"),
        (["launch", sys.executable, "-c", "open('ran', 'w')"], "sts_protct: [law]", "did you mean sts_protect?"),
    ],
)
def test_what_cannot_be_run_is_refused(
    command: list[str], settings: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "sts.yaml").write_text(settings)
    assert main(command) == WRONG_INPUT
    assert message in capsys.readouterr().err
    assert not (place / "ran").exists()


class _Other(TrainerCallback):
    """Somebody else's."""


def trainer(folder: Path, kind: type[Trainer], *args: object, **options: object) -> Trainer:
    tokenizer = tiny_tokenizer()
    given = {"args": TrainingArguments(**tiny_arguments(folder)), "processing_class": tokenizer, **options}
    return kind(tiny_model(), *args, train_dataset=tokenised(rows(6), tokenizer), **given)


def test_each_trainer_has_one_callback_that_is_attached_to_it(place: Path) -> None:
    class Watched(Trainer):
        pass

    class Theirs(Watched):
        pass

    watch(Watched, place / "mark")
    assert not (place / "mark").exists()
    made = trainer(place, Theirs, callbacks=[_Other()])
    kinds = [type(one) for one in made.callback_handler.callbacks]
    assert kinds.index(STSCallback) == kinds.index(_Other) - 1
    (ours,) = [one for one in made.callback_handler.callbacks if isinstance(one, STSCallback)]
    assert ours._attached() is made
    assert (place / "mark").exists()

    own = STSCallback()
    made = trainer(place, Theirs, callbacks=[own])
    assert [one for one in made.callback_handler.callbacks if isinstance(one, STSCallback)] == [own]


def test_wrong_settings_end_it_when_the_trainer_is_made(place: Path) -> None:
    class Watched(Trainer):
        pass

    watch(Watched, place / "mark")
    (place / "sts.yaml").write_text("sts_sae: sae\nsts_protect: [lore]\n")
    with pytest.raises(ConfigError, match="lore"):
        trainer(place, Watched)
    assert not (place / "mark").exists()
