"""The command line as a program: exit codes, tables, JSON, and errors that say what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import LoraConfig, get_peft_model

from logs import whole_run, written
from past import lawful_runs
from samples import IDENTITY, domain_drift, domain_forecast, estimate, forecast, snapshot
from sts_callback.cli import INTERRUPTED, PIPE_CLOSED, main, parser
from sts_callback.cli.common import BUG, CANNOT_TELL, GO, NO_GO, WRONG_INPUT
from sts_callback.cli.options import QUICK
from sts_callback.policy import Judgement
from sts_callback.records import Check, Forecast, Verdict
from sts_callback.records.rehearsal import Trials
from sts_callback.records.remedies import AdapterScales, Attribution, Mix, ScalePoint
from sts_callback.records.run import Given, JudgedCheck
from sts_callback.runs.directory import RunDirectory
from sts_callback.runs.ledger import Entry, Expectations, TrackRecord, append
from tiny import rotated_sae, rows, saved_sae, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    saved_sae(folder / "sae", d_in=32)
    for name, subject in (("train", "sums"), ("poems", "poems")):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(30, subject)))
    saved_sae(folder / "narrow", d_in=16)
    noise = rotated_sae()
    for parameter in (noise.W_enc, noise.W_dec):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    noise.save_model(folder / "noise")
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder


def command(files: Path, *more: str, name: str = "forecast") -> list[str]:
    options = {"--model": files / "model", "--train": files / "train.jsonl"}
    if "--sae" not in more:
        options["--sae"] = files / "sae"
    flat = [str(part) for pair in options.items() for part in pair]
    return [name, *flat, "--domain", f"poems={files / 'poems.jsonl'}", "--n-queries", "6", "--n-features", "8", *more]


def test_a_forecast_is_a_table_that_fits_a_terminal(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(command(files, "--protect", "poems"))
    shown = capsys.readouterr().out
    assert code in (GO, CANNOT_TELL, NO_GO)
    assert "poems" in shown
    assert shown.startswith("STS forecast: ")
    assert "All scores" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_json_can_be_read_back_and_agrees_with_the_exit_code(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(command(files, "--protect", "poems=0.2", "--json"))
    content = json.loads(capsys.readouterr().out)
    forecast = Forecast.from_json(json.dumps(content["forecast"]))
    verdict = Verdict.from_json(json.dumps(content["verdict"]))
    assert set(forecast.domains) == set(verdict.reasons) == {"poems"}
    assert code == {"go": GO, "no-go": NO_GO, "not covered": CANNOT_TELL, "cannot tell": CANNOT_TELL}[verdict.decision]


def test_budgets_may_have_units(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that gets no token right has none to lose."""
    assert main(command(files, "--protect", "poems=2points")) == GO
    assert "poems +0.0 [+0.0, +0.0]" in (shown := " ".join(capsys.readouterr().out.split())) and "within 2 points" in shown
    assert main(command(files, "--protect", "poems=90 bits/byte")) == GO
    assert "within 90 bits/byte" in capsys.readouterr().out


def named(files: Path) -> Given:
    """What `command` names."""
    model, sae, train, poems = (str(files / name) for name in ("model", "sae", "train.jsonl", "poems.jsonl"))
    return Given(model, sae, train, {"poems": poems}, probes={"n_queries": 6, "n_features": 8})


def rehearsal(files: Path, *more: str) -> list[str]:
    replay = f"poems={files / 'poems.jsonl'}:0.25"
    options = ["--protect", "poems", "--replay", replay, "--batch-size", "2", "--steps-planned", "40", *more]
    return command(files, *options, name="rehearse")


def test_rates_and_mixtures_are_compared_and_reported_again_and_again(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for times in (1, 2):  # what an earlier one has left is moved aside
        code = main(rehearsal(files, "--learning-rate", "1e-5", "1e-1", "--out", str(out), *(["--json"] if times == 2 else [])))
        shown, told = capsys.readouterr()
        assert "then 4 trials (2 rates, 2 mixtures)" in told
        assert len(re.findall(r"^Trial [1-4] of 4, rate .*: .*; worst domain poems ", told, re.MULTILINE)) == 4
        assert "Trial 1" not in shown
        page = (out / "sts" / "report.html").read_text(encoding="utf-8")
        assert "Which learning rate keeps the budgets?" in page and "not what training did" not in page
        if times == 1:
            assert max(map(len, shown.splitlines())) <= 80 and "25% poems" in shown
    found = Trials.from_json(shown)
    assert [(one.learning_rate, dict(one.replay)) for one in found.trials] == [
        (rate, replay) for replay in ({}, {"poems": 0.25}) for rate in (1e-5, 1e-1)
    ]
    assert code == {"within": GO, "beyond": NO_GO, "cannot tell": CANNOT_TELL}[found.finding]
    assert (out / "sts.1" / "trials.json").is_file()
    assert RunDirectory(out / "sts").read_all().given == named(files)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ((), "--learning-rate: got none"),
        (("--learning-rate", "0"), "--learning-rate: got 0.0"),
        (("--learning-rate", "nan"), "--learning-rate: got nan"),
        (("--learning-rate", "1e-3", "--replay", "poems"), "--replay: got 'poems'"),
        (("--learning-rate", "1e-3", "--replay", "poems=other.jsonl:0.1"), "--replay: got 'poems=other.jsonl:0.1'"),
        (("--learning-rate", "1e-3", "--replay", "more=missing.jsonl:0.1"), "--replay more"),
        (("--learning-rate", "1e-3", "--replay", "more=missing.jsonl:1"), "--replay more"),
        (("--learning-rate", "1e-3", "--trainer-args", "missing.yaml"), "--trainer-args"),
        (("--learning-rate", "1e-3", "--batch-size", "0"), "--batch-size: got 0"),
        (("--learning-rate", "1e-3", "--steps-planned", "-5"), "--steps-planned: got -5"),
        (("--learning-rate", "1e-3", "--lora-r", "0"), "--lora-r: got 0"),
    ],
)
def test_a_rehearsal_that_cannot_be_is_refused(
    more: tuple[str, ...], field: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(rehearsal(files, *more)) == WRONG_INPUT
    assert capsys.readouterr().err.startswith(f"sts-callback: {field}")


def test_features_can_be_shown_in_words(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for more in ((), ("--words",)):
        assert main(command(files, "--protect", "poems", *more)) in (GO, CANNOT_TELL, NO_GO)
        shown.append(capsys.readouterr().out)
    assert [len(re.findall(r"^feature \d+, ", text, re.MULTILINE)) > 0 for text in shown] == [False, True]
    assert max(map(len, shown[1].splitlines())) <= 80


def test_the_number_of_draws_can_be_chosen(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n_draws, made in (("2", 2), ("8", 3)):  # a group has two of the six queries at least
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "sts_callback.measure.monitor.Monitor.examine", lambda monitor, policy, seen=seen: seen.append(monitor) or ()
            )
            assert main(command(files, "--n-draws", n_draws, name="doctor")) == GO
        assert len(seen[0].train.demo_sets) == made
    capsys.readouterr()


@pytest.mark.parametrize("more", [(), ("--n-queries", "6"), ("--max-tokens", "16", "--n-draws", "3")])
def test_a_quick_look_asks_less_unless_its_numbers_are_given(
    more: tuple[str, ...], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    given = [str(part) for name in ("model", "sae") for part in (f"--{name}", files / name)]
    domain = ("--domain", f"poems={files / 'poems.jsonl'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sts_callback.measure.monitor.Monitor.examine", lambda monitor, policy: seen.append(monitor.config) or ())
        assert (
            main(["doctor", *given, "--train", str(files / "train.jsonl"), "--n-features", "8", "--quick", *domain, *more]) == GO
        )
    named = dict(zip([name[2:].replace("-", "_") for name in more[::2]], map(int, more[1::2]), strict=True))
    (config,) = seen
    assert {name: getattr(config, name) for name in QUICK} == QUICK | named
    told = capsys.readouterr().err
    assert f"Quick look: {config.n_queries} queries a domain of at most {config.max_tokens} tokens" in told


def test_the_doctor_passes_what_can_be_answered(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--protect", "poems", "--n-queries", "8", name="doctor")) == GO
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for name in ("explained variance", "layer", "noise floor", "cost"):
        assert re.search(rf"^{name} +pass ", shown, re.MULTILINE), shown
    assert re.search(r"^alarm power +warn ", shown, re.MULTILINE), shown
    assert "fewer than 28 queries: poems 8" in " ".join(shown.split())
    assert "Verdict" not in shown


@pytest.mark.parametrize(
    ("change", "refused", "remedy"),
    [
        (("--n-queries", "4"), "alarm power", "more rows, raise n_queries"),
        (("--n-queries", "8", "--sae", "noise"), "explained variance", "SAE that was trained on this model"),
    ],
)
def test_the_doctor_refuses_with_a_remedy(
    change: tuple[str, ...], refused: str, remedy: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(files, "--protect", "poems", *(str(files / "noise") if part == "noise" else part for part in change))
    assert main(["doctor", *argv[1:]]) == CANNOT_TELL
    flat = " ".join(capsys.readouterr().out.split())
    assert f"{refused} refuse " in flat
    assert remedy in flat


@pytest.mark.parametrize(("sae", "code"), [("sae", GO), ("noise", CANNOT_TELL)])
def test_the_doctor_writes_json_lines_that_can_be_read_back(
    sae: str, code: int, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(files, "--protect", "poems", "--n-queries", "8", "--sae", str(files / sae), "--json", name="doctor")
    assert main(argv) == code
    checks = [Check.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert len({check.name for check in checks}) == len(checks) > 4
    assert any(check.status == "refuse" for check in checks) == (code == CANNOT_TELL)


@pytest.mark.parametrize(("statuses", "expected"), [(("pass", "warn"), GO), (("refuse", "pass"), CANNOT_TELL), ((), GO)])
def test_only_a_refusal_has_an_exit_code_of_its_own(
    statuses: tuple[str, ...], expected: int, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = tuple(Check("x", status, "", "") for status in statuses)  # type: ignore[arg-type]
    monkeypatch.setattr("sts_callback.measure.monitor.Monitor.examine", lambda monitor, policy: checks)
    assert main(command(files, name="doctor")) == expected


def test_a_forecast_with_a_wrong_sae_cannot_tell_and_shows_no_numbers(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--sae", str(files / "noise"))) == CANNOT_TELL
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"^sts-callback: explained variance: none: it leaves .* take an SAE", captured.err, re.MULTILINE)


def test_several_saes_are_compared_and_the_first_one_decides(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ("--sae", str(files / "sae"), "--sae", str(files / "sae"))
    assert main(command(files, "--protect", "poems", *two)) in (GO, CANNOT_TELL, NO_GO)
    assert "agreement in order" in capsys.readouterr().out
    assert main(command(files, "--protect", "poems", *two, "--json")) in (GO, CANNOT_TELL, NO_GO)
    content = json.loads(capsys.readouterr().out)
    assert len(content["other_saes"]) == 1
    assert content["other_saes"][0]["identity"] == content["forecast"]["identity"]
    assert main(command(files, "--protect", "poems", "--n-queries", "8", *two, name="doctor")) == GO
    assert capsys.readouterr().out.count("\nexplained variance ") == 2


def test_a_shipped_domain_can_be_protected_by_name(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--protect", "law", "--max-tokens", "40")) in (GO, CANNOT_TELL, NO_GO)
    assert "law" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("decision", "expected"), [("go", 0), ("watch", 0), ("no-go", 3), ("not covered", 4), ("cannot tell", 4)]
)
def test_each_decision_has_its_exit_code(decision: str, expected: int, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(decision, (), {}, 0)  # type: ignore[arg-type]
    monkeypatch.setattr("sts_callback.policy.judge_forecast", lambda forecast, policy: verdict)
    assert main(command(files, "--protect", "poems")) == expected


def test_a_forecast_advises_what_it_was_asked_with(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = Verdict("no-go", ("poems",), {"poems": "is worse."}, 0)
    monkeypatch.setattr("sts_callback.policy.judge_forecast", lambda forecast, policy: verdict)
    assert main(command(files, "--protect", "poems=0.2")) == NO_GO
    (blame,) = re.findall(r"sts-callback (blame .*?)\n  Find", capsys.readouterr().out.replace(" \\\n", ""), re.DOTALL)
    asked, given = parser().parse_args(shlex.split(blame)), named(files)
    assert (asked.model, asked.sae, asked.train) == (given.model, given.sae, given.train)
    assert (asked.domain, asked.protect) == ([f"poems={given.domains['poems']}"], ["poems=0.2"])
    assert (asked.n_queries, asked.n_features, asked.max_tokens) == (6, 8, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--domain", "law"], "--domain: got 'law'; allowed is NAME=FILE"),
        (["--domain", "law=nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--protect", "poem"], "did you mean 'poems'"),
        (["--protect", "poems=much"], "allowed is a budget above 0"),
        (["--protect", "poems=-1"], "budget above 0"),
        (["--n-queries", "1"], "n_queries: got 1; allowed is 4 or more"),
        (["--sae", "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_smal"], "near are: .*layer_12_width_16k_l0_small"),
        (["--model", "nowhere/at-all"], "--model: nowhere/at-all cannot be loaded"),
        (["--train", "nowhere.jsonl"], "train_data: there is no file"),
        (["--n-features", "60"], "60 of 64 features"),
        (["--n-draws", "1"], "n_draws: got 1; allowed is 2 or more"),
    ],
)
@pytest.mark.parametrize("name", ["forecast", "doctor", "blame"])
def test_wrong_input_is_named_with_its_remedy(
    name: str, change: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    protect = () if "--protect" in change else ("--protect", "poems")
    assert main(command(files, *protect, *change, name=name)) == WRONG_INPUT
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_an_sae_of_another_width_is_wrong_input(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--sae", str(files / "narrow"))) == WRONG_INPUT
    assert "width 16" in capsys.readouterr().err


def test_a_bug_of_ours_is_told_apart(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sts_callback.policy.judge_forecast", lambda forecast, policy: 1 / 0)
    assert main(command(files)) == BUG
    assert "bug of ours" in capsys.readouterr().err


def test_an_interrupt_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("sts_callback.cli.saes.run", interrupted)
    assert main(["saes", "--model", "gpt2"]) == INTERRUPTED
    assert capsys.readouterr().err == "sts-callback: interrupted before its end.\n"


def test_a_reader_that_has_seen_enough_is_no_bug(tmp_path: Path) -> None:
    written(RunDirectory(tmp_path / "sts"), whole_run())
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sts_callback", "card", str(tmp_path)]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (PIPE_CLOSED, "")


def test_a_forecast_is_also_written_for_ci_whatever_the_verdict(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "reports" / "forecast.xml"
    for decision, tag in (("no-go", "failure"), ("cannot tell", "error"), ("go", "system-out")):
        monkeypatch.setattr(
            "sts_callback.policy.judge_domains", lambda *args, found=decision: {"poems": Judgement(found, "why.")}
        )
        code = main(command(files, "--protect", "poems", "--junit", str(made)))
        assert code == {"go": GO, "no-go": NO_GO, "cannot tell": CANNOT_TELL}[decision]
        (case,) = ElementTree.parse(made).getroot().iter("testcase")
        assert (case.attrib["name"], [child.tag for child in case]) == ("poems", [tag])
    assert [file.name for file in made.parent.iterdir()] == ["forecast.xml"]


def test_ci_is_also_told_why_there_is_no_forecast(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "forecast.xml"
    argv = command(files, "--protect", "poems", "--sae", str(files / "noise"), "--junit", str(made))
    assert main(argv) == CANNOT_TELL
    (error,) = ElementTree.parse(made).getroot().iter("error")
    assert error.attrib["message"].removeprefix("cannot tell: ") in capsys.readouterr().err


def test_a_lock_is_written_once_and_then_held(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked = ("--protect", "poems", "--lock", str(tmp_path / "sts.lock"))
    decided = (GO, CANNOT_TELL, NO_GO)
    assert main(command(files, *locked)) == WRONG_INPUT
    assert "add --write-lock" in capsys.readouterr().err
    assert main(command(files, *locked, "--write-lock")) in decided
    before = (tmp_path / "sts.lock").read_bytes()
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps(row) for row in rows(30, "something new")))
    for same in ((), ("--train", str(tmp_path / "new.jsonl"))):
        assert main(command(files, *locked, *same)) in decided
    assert (tmp_path / "sts.lock").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--protect", "poems=0.2"), ["policy.budgets.poems: locked 0.1, here 0.2; give --protect poems=0.1"]),
        (("--seed", "1", "--n-draws", "2"), ["probes.n_draws: locked 8, here 2", "probes.seed: locked 0, here 1; give --seed 0"]),
        (("--model", "other"), ["model_weights: locked "]),
    ],
)
def test_what_is_not_as_it_is_locked_is_refused_before_anything_is_forecast(
    change: tuple[str, ...],
    told: list[str],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lock, protect = ("--lock", str(tmp_path / "sts.lock")), ("--protect", "poems")
    assert main(command(files, *lock, *protect, "--write-lock")) in (GO, CANNOT_TELL, NO_GO)
    locked = lock if "--protect" in change else (*lock, *protect)
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    capsys.readouterr()
    monkeypatch.setattr("sts_callback.measure.monitor.Monitor.forecasts", lambda monitor: pytest.fail("a forecast was made"))
    changed = [str(other) if part == "other" else part for part in change]
    assert main(command(files, *locked, *changed)) == WRONG_INPUT
    error = capsys.readouterr().err
    lines = error[error.index("sts-callback: --lock") :].splitlines()  # behind the bars of loading
    assert len(lines) == len(told) + 2
    assert all(start in line for start, line in zip(told, lines[1:], strict=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--junit", "out.xml"], "--junit: got no protected domain"),
        (["--protect", "poems", "--write-lock"], "--write-lock: got no file; name it with --lock"),
        (["--protect", "poems", "--junit", "FILE/out.xml"], "--junit: the folder of .* cannot be made"),
        (["--protect", "poems", "--junit", "FOLDER"], "--junit: .* cannot be written; give a file in a folder"),
        (["--protect", "poems", "--lock", "FOLDER", "--write-lock"], "--lock: .* cannot be written; give a file in a folder"),
        (["--protect", "poems", "--lock", "FILE"], "--lock: .* cannot be read"),
    ],
)
def test_files_that_cannot_be_used_are_refused_before_the_model_is_loaded(
    change: list[str],
    message: str,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("sts_callback.cli.common.loaded", lambda *args: pytest.fail("the model was loaded"))
    given = [part.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path)) for part in change]
    assert main(command(files, *given)) == WRONG_INPUT
    assert re.search(message, capsys.readouterr().err)


def test_a_card_section_is_printed_or_put_into_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(RunDirectory(tmp_path / "run" / "sts"), whole_run())
    assert main(["card", str(tmp_path / "run")]) == GO
    section = capsys.readouterr().out
    card = tmp_path / "README.md"
    card.write_text("# Model\n")
    for _ in range(2):
        assert main(["card", str(tmp_path / "run" / "sts"), "--into", str(card)]) == GO
        assert capsys.readouterr().out == f"{card}\n"
        assert card.read_text() == f"# Model\n\n{section}"


@pytest.mark.parametrize(("given", "message"), [("empty", "holds neither a forecast nor a check"), ("run", "there is no file")])
def test_a_card_that_cannot_be_made_is_wrong_input(
    given: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(RunDirectory(tmp_path / "run" / "sts"), whole_run())
    assert main(["card", str(tmp_path / given), "--into", str(tmp_path / "README.md")]) == WRONG_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["doctor", "--help"],
        ["forecast", "--help"],
        ["report", "--help"],
        ["card", "--help"],
        ["ledger", "--help"],
        ["mix", "--help"],
        ["blame", "--help"],
        ["dial", "--help"],
        ["report", "--help"],
        ["saes", "--help"],
    ],
)
def test_help_is_there(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == GO
    assert "usage: sts-callback" in capsys.readouterr().out


def test_no_command_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == WRONG_INPUT
    assert "COMMAND" in capsys.readouterr().err


def test_saes_of_a_model_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["saes", "--model", "google/gemma-3-270m"]) == GO
    shown = capsys.readouterr().out
    assert "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small" in shown
    assert main(["saes", "--model", "google/gemma-3-270m", "--json"]) == GO
    assert all("spec" in json.loads(line) for line in capsys.readouterr().out.splitlines())


def test_saes_that_are_refused_come_last_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["saes", "--model", "gpt2"]) == GO
    lines = capsys.readouterr().out.splitlines()
    refused = [line for line in lines if line.endswith("reads heads without the value bias, which transformers adds")]
    assert refused == lines[-12:]
    assert all(line.startswith("gpt2-small-hook-z-kk/") for line in refused)
    assert lines[0].rstrip().endswith("refused: it")
    assert main(["saes", "--model", "google/gemma-3-270m"]) == GO
    assert "refused" not in capsys.readouterr().out  # no column where none is


def test_a_model_without_saes_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["saes", "--model", "nobody/nothing-7b"]) == WRONG_INPUT
    assert "reads raw activations" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["run", "run/sts"])
def test_a_report_is_made_of_a_run(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(RunDirectory(tmp_path / "run" / "sts"), whole_run())
    assert main(["report", str(tmp_path / given)]) == GO
    made = tmp_path / "run" / "sts" / "report.html"
    assert capsys.readouterr().out == f"{made}\n"
    assert made.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(made.with_suffix(".json").read_text())["headline"]["decision"] == "no-go"


@pytest.mark.parametrize("given", ["nowhere", "empty", "file", "empty/sts"])
def test_a_report_of_nothing_is_wrong_input(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty" / "sts").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / given)]) == WRONG_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "holds no record of a run" in captured.err and "output_dir" in captured.err


def test_a_report_that_cannot_be_written_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(RunDirectory(tmp_path), whole_run())

    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["report", str(tmp_path)]) == WRONG_INPUT
    assert "cannot be read or written ([Errno 28]" in capsys.readouterr().err


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "ledger.jsonl"
    monkeypatch.setenv("STS_LEDGER", str(file))
    return file


def test_the_ledger_is_shown_as_a_table_and_as_json(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for entry in (*lawful_runs(6), *lawful_runs(1, model="another")):
        append(entry)
    with ledger.open("a") as lines:
        lines.write("damage\n")
    assert main(["ledger"]) == GO
    shown = capsys.readouterr().out
    assert "6 runs on 6 training sets" in shown and "1 run on 1 training set" in shown
    assert str(ledger) in shown and shown.endswith(": 1\n")  # the line that cannot be read
    assert max(len(line) for line in shown.splitlines() if line != str(ledger)) <= 80
    assert main(["ledger", "--json"]) == GO
    content = json.loads(capsys.readouterr().out)
    assert (content["file"], content["n_unreadable"]) == (str(ledger), 1)
    assert [TrackRecord.from_dict(group).n_runs for group in content["groups"]] == [6, 1]


def test_an_empty_ledger_is_told_so(ledger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ledger"]) == GO
    shown = capsys.readouterr().out
    assert "No finished run" in shown and str(ledger) in shown
    assert main(["ledger", "--json"]) == GO
    assert json.loads(capsys.readouterr().out) == {"file": str(ledger), "n_unreadable": 0, "groups": []}


def test_a_ledger_that_is_switched_off_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STS_LEDGER", "")
    assert main(["ledger"]) == GO
    assert "No ledger is kept" in capsys.readouterr().out
    assert main(["ledger", "--json"]) == GO
    assert json.loads(capsys.readouterr().out)["file"] is None


def test_a_ledger_that_cannot_be_read_is_no_bug_and_no_forecast_fails_for_it(
    files: Path, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.mkdir()
    assert main(["ledger"]) == WRONG_INPUT
    assert "set STS_LEDGER to a file that can" in capsys.readouterr().err
    assert main(command(files)) in (GO, CANNOT_TELL, NO_GO)
    captured = capsys.readouterr()
    assert captured.out.startswith("STS forecast: ")
    assert "past runs are left out" in captured.err


def test_a_forecast_tells_what_past_runs_of_its_own_model_and_sae_let_expect(
    files: Path, ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(files, "--protect", "poems", "--json")) in (GO, CANNOT_TELL, NO_GO)
    content = json.loads(capsys.readouterr().out)
    assert content["expectations"] is None
    identity = content["forecast"]["identity"]
    for entry in lawful_runs(6):
        append(entry)
        own = {**entry.to_dict(), "identity": {**identity, "probes": entry.identity.probes}, "forecast": entry.forecast[::-1]}
        append(Entry.from_dict(own))
    assert main(command(files, "--protect", "poems", "--json")) in (GO, CANNOT_TELL, NO_GO)
    expected = Expectations.from_dict(json.loads(capsys.readouterr().out)["expectations"])
    assert expected.past.n_runs == 6
    assert set(expected.relative_drift) == {"poems"}
    assert main(command(files, "--protect", "poems", "--details")) in (GO, CANNOT_TELL, NO_GO)
    shown = capsys.readouterr().out
    assert "expected at the end" in shown and "expected from past runs" in shown and "All scores" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_rows_to_blame_are_shown_and_written(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept.jsonl"
    argv = command(files, "--protect", "poems", "--top", "3", "--rows", "20", "--out", str(out), name="blame")
    assert main(argv) == GO
    captured = capsys.readouterr()
    assert len(re.findall(r"^ +\d+ +-?\d+\.\d\d +\d+  \.\.\.", captured.out, re.MULTILINE)) == 3
    assert max(map(len, captured.out.splitlines())) <= 80
    left_out = json.loads((tmp_path / "kept.left_out.json").read_text())
    assert len(out.read_text().splitlines()) == 30 - len(left_out)
    assert f"{out}: {30 - len(left_out)} rows kept" in captured.err


def test_rows_to_blame_stand_in_the_report_of_their_run(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(files, "--protect", "poems", "--run-dir", str(tmp_path), name="blame")
    assert main(argv) == WRONG_INPUT
    assert f"--run-dir: {tmp_path} holds no forecast" in capsys.readouterr().err
    main(command(files, "--protect", "poems", "--json"))
    made = Forecast.from_dict(json.loads(capsys.readouterr().out)["forecast"])
    log = RunDirectory(tmp_path / "sts")
    written(log, whole_run(forecast=made, blame=None))
    assert main([*argv, "--json"]) == GO
    out = capsys.readouterr()
    assert log.read_all().blame == Attribution.from_json(out.out)
    assert f"{tmp_path / 'sts' / 'report.html'}: has them too." in out.err
    assert "No training rows were ranked" not in (tmp_path / "sts" / "report.html").read_text()
    written(log, whole_run(forecast=forecast(domain_forecast("poems"))))  # by another model
    assert main(argv) == WRONG_INPUT
    assert "its forecast was made with tiny-llama, tiny-sae at" in capsys.readouterr().err


def test_rows_to_blame_come_as_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(files, "--protect", "poems", "--json", name="blame")) == GO
    found = Attribution.from_json(capsys.readouterr().out)
    assert (found.n_rows, found.n_read, set(found.domains)) == (30, 30, {"poems"})
    assert len(found.domains["poems"].rows) == 10


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "protect: got none"),
        (["--protect", "poems", "--rows", "0"], "rows: got 0"),
        (["--protect", "poems", "--out", "kept.csv"], "out: got 'kept.csv'"),
    ],
)
def test_what_cannot_be_blamed_is_wrong_input(
    more: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(files, *more, name="blame")) == WRONG_INPUT
    assert message in capsys.readouterr().err


def dial_command(files: Path, *more: str) -> list[str]:
    places = ["--model", files / "model", "--adapter", files / "adapter", "--sae", files / "sae"]
    return ["dial", *map(str, places), "--domain", f"poems={files / 'poems.jsonl'}", "--n-queries", "6", *more]


def test_an_adapter_is_dialled(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = dial_command(files, "--protect", "poems=50", "--scales", "0.5", "1")
    assert main(argv) == GO
    shown = capsys.readouterr().out
    assert "Largest scale that keeps every budget: 1" in shown
    assert len(re.findall(r"^  poems +(0\.5|1) ", shown, re.MULTILINE)) == 2
    assert main([*argv, "--json"]) == GO
    content = json.loads(capsys.readouterr().out)
    assert content.pop("largest") == 1
    assert [point.scale for point in AdapterScales.from_dict(content).points] == [0.5, 1]


@pytest.mark.parametrize(("finding", "expected"), [("within", GO), ("beyond", NO_GO), ("cannot tell", CANNOT_TELL)])
def test_each_finding_of_a_dial_has_its_exit_code(
    finding: str, expected: int, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = AdapterScales(IDENTITY, (ScalePoint(0.5, finding, {}),), 1.0)  # type: ignore[arg-type]
    monkeypatch.setattr("sts_callback.remedies.adapter_scale.dial", lambda *args, **options: found)
    assert main(dial_command(files, "--protect", "poems")) == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "protect: got none"),
        (["--protect", "poems", "--scales", "2"], "scales: got [2.0]"),
        (["--protect", "poems", "--adapter", "nowhere"], "nowhere holds no adapter_config.json"),
    ],
)
def test_what_cannot_be_dialled_is_wrong_input(
    more: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(dial_command(files, *more)) == WRONG_INPUT
    assert message in capsys.readouterr().err


def mix_command(files: Path, *more: str) -> list[str]:
    return ["mix", "--train", str(files / "train.jsonl"), "--replay", f"verse={files / 'poems.jsonl'}", *more]


@pytest.fixture
def pilots(tmp_path: Path) -> Callable[[float], list[str]]:
    """Two pilots that did the same to a domain, as options of `mix`."""

    def made(change: float) -> list[str]:
        drift = domain_drift("poems", nll_change=estimate(change))
        check = JudgedCheck(snapshot(20, drift), Verdict("go", (), {}, 20), None)
        written(RunDirectory(tmp_path / "sts"), whole_run(forecast=forecast(domain_forecast("poems")), checks=(check,)))
        return ["--pilot", f"train={tmp_path}", "--pilot", f"verse={tmp_path}"]

    return made


def test_a_mixture_is_searched_and_written(
    files: Path, tmp_path: Path, pilots: Callable[[float], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mix.json"
    argv = mix_command(files, "--protect", "poems=50", "--rows", "20", "--out", str(out), *pilots(0.01))
    assert main(argv) == GO
    assert "No replay is needed" in capsys.readouterr().out
    made = json.loads(out.read_text())
    assert made["files"] == [str(files / "train.jsonl")]
    assert made["interleave_datasets"]["probabilities"] == [1.0]
    assert main([*argv, "--json"]) == GO
    found = Mix.from_json(capsys.readouterr().out)
    assert list(found.sources) == ["train", "verse"]
    assert found.points[-1].rows == {"train": 10, "verse": 10}


@pytest.mark.parametrize(("change", "expected"), [(0.01, GO), (0.5, NO_GO), (float("nan"), CANNOT_TELL)])
def test_the_exit_code_of_a_mixture_is_what_was_found(
    change: float, expected: int, files: Path, pilots: Callable[[float], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = mix_command(files, "--protect", "poems")
    assert main(argv) == WRONG_INPUT
    assert "give one for each source" in capsys.readouterr().err
    assert main([*argv, *pilots(change)]) == expected
    assert "Measured by pilot runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "protect: got none"),
        (["--protect", "poems", "--max-replay", "2"], "max_replay: got 2.0"),
        (["--protect", "poems", "--max-share", "verse=much"], "--max-share verse: got 'much'; allowed is a share"),
        (["--protect", "poems", "--max-share", "prose=0.5"], "max_share: got ['prose']; allowed are ['verse']"),
        (["--protect", "poems", "--replay", "verse"], "--replay: got 'verse'; allowed is NAME=FILE"),
        (["--protect", "poems", "--replay", "prose=nowhere.jsonl"], "nowhere.jsonl"),
        (["--protect", "poems", "--pilot", "verse=nowhere"], "pilot: got ['verse']; give one for each source"),
        (["--protect", "poems", "--out", "/"], "--out: /"),
    ],
)
def test_what_cannot_be_mixed_is_wrong_input(
    more: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(mix_command(files, *more)) == WRONG_INPUT
    assert message in capsys.readouterr().err
