"""Settings from a parser, a YAML file or the environment are those of the same arguments in Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from sts_callback import PolicyConfig, ProbeConfig, STSArguments, STSCallback
from sts_callback.errors import ConfigError
from test_callback import checked_steps, made_trainer
from tiny import rows, saved_sae

EVERYTHING: dict[str, Any] = {
    "sts_sae": ["one", "two"],
    "sts_protect": ["law", "mine=0.25", "code=0.05 bits/byte", "math=2points"],
    "sts_domains": ["mine=rows.jsonl"],
    "sts_train_data": "train.jsonl",
    "sts_check_on": "50",
    "sts_action": "stop",
    "sts_on_forecast": "refuse",
    "sts_on_forecast_error": "train unwatched",
    "sts_on_error": "raise",
    "sts_rehearse": "false",
    "sts_max_overhead": 0.5,
    "sts_ledger": "past.jsonl",
    "sts_n_queries": 16,
    "sts_n_draws": 4,
    "sts_n_features": 50,
    "sts_max_tokens": 99,
    "sts_batch_tokens": 77,
    "sts_seed": 5,
    "sts_chat_template": "never",
    "sts_alpha": 0.02,
    "sts_patience": 3,
}
WANTED: dict[str, Any] = {
    "sae": ["one", "two"],
    "protect": {"law": 0.1, "mine": 0.25, "code": "0.05 bits/byte", "math": "2 points"},
    "domains": {"mine": "rows.jsonl"},
    "train_data": "train.jsonl",
    "check_on": 50,
    "action": "stop",
    "on_forecast": "refuse",
    "on_forecast_error": "train unwatched",
    "on_error": "raise",
    "rehearse": False,
    "max_overhead": 0.5,
    "ledger": "past.jsonl",
    "probes": ProbeConfig(n_queries=16, n_draws=4, n_features=50, max_tokens=99, batch_tokens=77, seed=5, chat_template="never"),
    "policy": PolicyConfig(alpha=0.02, patience=3),
}


def flags() -> list[str]:
    words = []
    for name, value in EVERYTHING.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def test_a_parser_beside_the_trainers_own_arguments_takes_all(tmp_path: Path) -> None:
    parser = HfArgumentParser((TrainingArguments, STSArguments))  # type: ignore[arg-type]
    training, ours = parser.parse_args_into_dataclasses([*flags(), "--output_dir", str(tmp_path), "--seed", "9", "--use_cpu"])
    assert ours.options() == WANTED
    assert training.seed == 9


def test_a_file_takes_all_and_leaves_other_keys_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(EVERYTHING | {"learning_rate": 1e-4, "plugins": ["x"]}))
    assert STSArguments.from_yaml(file).options() == WANTED


@pytest.mark.parametrize(
    ("written", "rehearse"), [("auto", "auto"), ("true", True), ("True", True), (True, True), (False, False)]
)
def test_yes_and_no_may_be_words(written: Any, rehearse: Any) -> None:
    assert STSArguments(sts_rehearse=written).options()["rehearse"] is rehearse


def test_every_setting_is_in_the_test_above() -> None:
    assert set(EVERYTHING) == {f.name for f in dataclasses.fields(STSArguments)}


def test_defaults_are_those_of_python() -> None:
    options = STSArguments(sts_sae=["x"], sts_protect=["law"]).options()
    assert options["probes"] == ProbeConfig()
    assert options["policy"] == PolicyConfig()
    defaults = STSCallback.__init__.__kwdefaults__
    for name in ("check_on", "action", "on_forecast", "on_error", "max_overhead", "train_data"):
        assert options[name] == defaults[name]


def test_mappings_and_single_texts_are_taken_too(tmp_path: Path) -> None:
    file = tmp_path / "sts.yaml"
    file.write_text("sts_sae: one\nsts_protect: {law: 0.2, mine: 2 points}\nsts_domains: {mine: rows.jsonl}\nsts_check_on: 7\n")
    options = STSArguments.from_yaml(file).options()
    assert (options["sae"], options["protect"]) == (["one"], {"law": 0.2, "mine": "2 points"})
    assert (options["domains"], options["check_on"]) == ({"mine": "rows.jsonl"}, 7)


@pytest.mark.parametrize("by", ["variable", "sts.yaml"])
def test_a_callback_without_arguments_reads_the_file_and_watches_the_run(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_sae(tmp_path / "sae")
    (tmp_path / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20, "sums", seed=50)))
    file = tmp_path / ("framework.yaml" if by == "variable" else "sts.yaml")
    file.write_text(
        f"sts_sae: {tmp_path / 'sae'}\nsts_protect: [near]\nsts_domains: [near={tmp_path / 'near.jsonl'}]\n"
        "sts_n_queries: 8\nsts_n_features: 8\nsts_check_on: 3\nsts_max_overhead: null\nbase_model: x\n"
    )
    if by == "variable":
        monkeypatch.setenv("STS_CALLBACK_CONFIG", str(file))
    else:
        monkeypatch.delenv("STS_CALLBACK_CONFIG", raising=False)
        monkeypatch.chdir(tmp_path)
    made_trainer("plain", tmp_path / "out", [STSCallback()]).train()
    assert checked_steps(tmp_path / "out") == [1, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sts_protct: [law]", r"sts_protct is no setting; did you mean sts_protect\?"),
        ("sts_xyzzyqqq: 1", "sts_xyzzyqqq is no setting; allowed are sts_sae, "),
        ("- law", "holds no settings; give lines such as"),
        ("a: [", "(?s)cannot be read .*; give a YAML file"),
        ("sts_protect: [law]", "sae: got none"),
        ("sts_sae: x\nsts_protect: [law=much]", "sts_protect law: got 'much'; allowed is a budget above 0"),
        ("sts_sae: x\nsts_protect: [law=]", "sts_protect: got 'law='; allowed is NAME or NAME=BUDGET"),
        ("sts_sae: x\nsts_domains: [law]", "sts_domains: got 'law'; allowed is NAME=FILE"),
        ("sts_sae: x\nsts_protect: [law]\nsts_check_on: never", "check_on: got 'never'"),
        ("sts_sae: x\nsts_protect: [law]\nsts_n_queries: 2", "n_queries: got 2; allowed is 4 or more"),
    ],
)
def test_wrong_files_are_refused_with_the_setting_and_the_remedy(
    content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sts.yaml"
    file.write_text(content)
    monkeypatch.setenv("STS_CALLBACK_CONFIG", str(file))
    with pytest.raises(ConfigError, match=message):
        STSCallback()


def test_without_any_file_it_is_told_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STS_CALLBACK_CONFIG", raising=False)
    with pytest.raises(ConfigError, match=r"sae: got none; give STSCallback\(sae=.*sts.yaml.*STS_CALLBACK_CONFIG"):
        STSCallback()
    monkeypatch.setenv("STS_CALLBACK_CONFIG", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        STSCallback()


def test_some_arguments_without_an_sae_do_not_read_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sts.yaml"
    file.write_text("sts_sae: x\nsts_protect: [law]")
    monkeypatch.setenv("STS_CALLBACK_CONFIG", str(file))
    with pytest.raises(ConfigError, match=r"sae: got none\. There are three ways"):
        STSCallback(protect=["code"])
