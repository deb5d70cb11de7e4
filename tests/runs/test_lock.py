"""The lock file: written, read back, and each thing that differs told with both values and what to do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sts_callback.cli import main
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.errors import ConfigError, DataError
from sts_callback.measure.monitor import Monitor
from sts_callback.records.record import SCHEMA_VERSION
from sts_callback.runs.lock import Difference, Lock, differences, lock_of, read_lock, require_same, write_lock
from tiny import rotated_sae, rows, tiny_model, tiny_tokenizer

LOCK = Lock(
    model="m" * 64,
    model_weights="w" * 64,
    model_dtype="torch.float32",
    model_name="tiny-llama",
    sae="s" * 64,
    sae_name="tiny-sae",
    hook_name="blocks.2.hook_resid_post",
    domains={"law": "l" * 64, "v1.2": "v" * 64},
    policy=PolicyConfig({"law": 0.1}),
    probes=ProbeConfig(),
    versions={"sts-callback": "0.1.0", "torch": "2.9.0", "scipy": "1.16.0"},
)


def test_what_is_written_is_read_back_and_can_be_compared_line_by_line(tmp_path: Path) -> None:
    write_lock(tmp_path / "sts.lock", LOCK)
    assert read_lock(tmp_path / "sts.lock") == LOCK
    text = (tmp_path / "sts.lock").read_text()
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION
    assert '\n      "law": 0.1\n' in text
    assert [file.name for file in tmp_path.iterdir()] == ["sts.lock"]


def test_the_same_is_not_refused() -> None:
    require_same(LOCK, replace(LOCK, model_name="another folder", sae_name="another folder"), Path("sts.lock"))


VERSIONS = dict(LOCK.versions)


@pytest.mark.parametrize(
    ("changes", "name", "locked", "here", "remedy"),
    [
        ({"model": "x"}, "model", "m" * 64, "x", "give the model that was locked, tiny-llama, as it was then"),
        ({"model_weights": "x"}, "model_weights", "w" * 64, "x", "give the model that was locked, tiny-llama, as it was then"),
        ({"model_dtype": "torch.bfloat16"}, "model_dtype", "torch.float32", "torch.bfloat16", "(--device)"),
        ({"sae": "x"}, "sae", "s" * 64, "x", "give --sae tiny-sae, as it was then"),
        ({"hook_name": "x"}, "hook_name", "blocks.2.hook_resid_post", "x", "give --sae tiny-sae, as it was then"),
        ({"domains": {"law": "x", "v1.2": "v" * 64}}, "domains.law", "l" * 64, "x", "give the texts of law and the tokenizer"),
        ({"domains": {"law": "l" * 64}}, "domains.v1.2", "v" * 64, "none", "give the texts of v1.2"),
        ({"domains": {**LOCK.domains, "new": "n"}}, "domains.new", "none", "n", "leave out --domain new and --protect new"),
        ({"policy": PolicyConfig({"law": 0.2})}, "policy.budgets.law", "0.1", "0.2", "give --protect law=0.1"),
        ({"policy": PolicyConfig()}, "policy.budgets.law", "0.1", "none", "give --protect law=0.1"),
        (
            {"policy": PolicyConfig({"law": "2points"})},
            "policy.budgets.law",
            "0.1",
            "2 points",
            "give --protect law=0.1",
        ),
        (
            {"policy": PolicyConfig({"law": 0.1, "code": 0.3})},
            "policy.budgets.code",
            "none",
            "0.3",
            "leave out --protect code",
        ),
        ({"policy": PolicyConfig({"law": 0.1}, alpha=0.01)}, "policy.alpha", "0.05", "0.01", "install sts-callback==0.1.0"),
        ({"probes": ProbeConfig(n_queries=8)}, "probes.n_queries", "32", "8", "give --n-queries 32"),
        ({"probes": ProbeConfig(batch_tokens=8)}, "probes.batch_tokens", "1024", "8", "install sts-callback==0.1.0"),
        ({"versions": VERSIONS | {"torch": "2.8.0"}}, "versions.torch", "2.9.0", "2.8.0", "install torch==2.9.0"),
        ({"versions": VERSIONS | {"numpy": "2"}}, "versions.numpy", "none", "2", "uninstall numpy"),
        ({"versions": VERSIONS | {"sts-callback": "1"}}, "versions.sts-callback", "0.1.0", "1", "install sts-callback==0.1.0"),
    ],
)
def test_each_difference_is_named_with_both_values_and_what_to_do(
    changes: dict[str, Any], name: str, locked: str, here: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = differences(LOCK, replace(LOCK, **changes))
    assert (found.name, found.locked, found.here) == (name, locked, here)
    assert remedy in found.remedy
    assert main(["forecast", "--help"]) == 0
    assert set(re.findall(r"--[a-z-]+", found.remedy)) <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_a_budget_with_a_unit_is_given_again_as_the_shell_takes_it(tmp_path: Path) -> None:
    locked = replace(LOCK, policy=PolicyConfig({"law": "0.05 bits/byte"}))
    write_lock(tmp_path / "sts.lock", locked)
    assert read_lock(tmp_path / "sts.lock") == locked
    (found,) = differences(locked, LOCK)
    assert (found.locked, found.here, found.remedy) == ("0.05 bits/byte", "0.1", "give --protect 'law=0.05 bits/byte'")


def test_all_differences_are_told_at_once() -> None:
    here = replace(LOCK, sae="x", versions=VERSIONS | {"torch": "2.8.0"}, policy=PolicyConfig({"law": 0.2}))
    with pytest.raises(ConfigError) as refused:
        require_same(LOCK, here, Path("sts.lock"))
    told = str(refused.value).splitlines()
    assert told[0].startswith("--lock: 3 ") and "sts.lock" in told[0]
    assert [line.split(":")[0].strip() for line in told[1:4]] == ["sae", "policy.budgets.law", "versions.torch"]
    assert "--write-lock" in told[-1]


def test_texts_that_are_drawn_otherwise_are_not_told_beside_the_setting_that_does_so() -> None:
    here = replace(LOCK, probes=ProbeConfig(seed=1), domains={"law": "x", "other": "o"})
    assert [d.name for d in differences(LOCK, here)] == ["domains.v1.2", "probes.seed", "domains.other"]


def test_a_missing_lock_is_told_how_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*; add --write-lock"):
        read_lock(tmp_path / "sts.lock")


WRITTEN = json.loads(LOCK.to_json())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "\udcff",
        json.dumps(WRITTEN | {"schema_version": 0}),
        json.dumps(WRITTEN | {"colour": "red"}),
        json.dumps(WRITTEN | {"policy": WRITTEN["policy"] | {"alpha": 7}}),
        json.dumps(WRITTEN | {"versions": 3}),
        json.dumps({name: value for name, value in WRITTEN.items() if name != "sae"}),
    ],
)
def test_a_damaged_lock_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "sts.lock").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"sts.lock cannot be read .*--write-lock"):
        read_lock(tmp_path / "sts.lock")


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--lock: .* cannot be written"):
        write_lock(tmp_path / "nowhere" / "sts.lock", LOCK)


def made_monitor(**changes: Any) -> Monitor:
    options: dict[str, Any] = {
        "sae": rotated_sae(),
        "train_data": rows(20),
        "domains": {"poems": rows(20, "poems")},
        "config": ProbeConfig(n_queries=6, n_features=8),
        "progress": False,
    }
    model = changes.pop("model", None) or tiny_model()
    return Monitor(model, tiny_tokenizer(), **(options | changes))


def lock(**changes: Any) -> Lock:
    return lock_of(made_monitor(**changes), PolicyConfig({"poems": 0.1}))


def names(found: tuple[Difference, ...]) -> list[str]:
    return [difference.name for difference in found]


def test_a_lock_of_the_same_things_is_the_same_whatever_the_training_data() -> None:
    assert lock() == lock(train_data=rows(30, "other things", seed=50))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": tiny_model(seed=1)}, ["model_weights"]),  # another tune: the configuration is the same
        ({"model": tiny_model("qwen3")}, ["model", "model_weights"]),
        ({"sae": rotated_sae(seed=1)}, ["sae"]),
        ({"sae": rotated_sae(hook_name="blocks.1.hook_resid_post")}, ["hook_name"]),
        ({"domains": {"poems": rows(20, "prose")}}, ["domains.poems"]),
        ({"config": ProbeConfig(n_queries=6, n_features=8, seed=1)}, ["probes.seed"]),
    ],
)
def test_what_a_forecast_depends_on_is_locked(changes: dict[str, Any], expected: list[str]) -> None:
    assert names(differences(lock(), lock(**changes))) == expected
