"""SAEs of every loader of SAELens through a stand-in for the hub, and all that can be wrong with files: told apart, never run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import requests
import sae_lens
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from model import sae_files
from model.sae_files import AS_SAE_LENS, CASES, D_SAE, TABLE, Case, of_dictionary_learning, stand_in
from sts_callback.errors import SaeError
from sts_callback.model.sae import SaeEncoder, load_encoder
from tiny import D_MODEL, saved_sae


def case_of(start: str) -> Case:
    return next(case for case in CASES if case.spec.startswith(start))


QWEN, RES_JB = case_of("qwen-scope-3-"), case_of("gpt2-small-res-jb")

# What becomes of them


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec)
def test_the_table_says_what_becomes_of_an_sae(case: Case, tmp_path: Path) -> None:
    assert sae_files.row(case, tmp_path) in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_every_loader_and_no_more_rows_than_cases() -> None:
    used = {release.conversion_func or "sae_lens" for release in get_pretrained_saes_directory().values()}
    assert {case.loader for case in CASES} == used
    assert set(loaders.NAMED_PRETRAINED_SAE_LOADERS) - used == {"sparsify"}
    text = TABLE.read_text(encoding="utf-8")
    assert len(re.findall("^\\| [a-z_0-9]+ \\| .*/", text, re.MULTILINE)) == len(CASES)
    assert f"sae-lens {sae_lens.__version__} " in text


def test_features_that_differ_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = SaeEncoder.encode
    monkeypatch.setattr(SaeEncoder, "encode", lambda self, x: encode(self, x) * (1 + 1e-6))
    assert sae_files.examine(RES_JB, tmp_path)[2] != AS_SAE_LENS


def test_an_sae_is_named_after_its_model_by_the_registry_and_found_by_its_place_on_the_hub(tmp_path: Path) -> None:
    case = case_of("llama_scope_r1")
    case.write(tmp_path / case.entry.repo_id, case.path)
    with stand_in(tmp_path):
        by_name, by_place = (load_encoder(s, "any", 4) for s in (case.spec, f"{case.entry.repo_id}/{case.path}"))
    assert by_name.trained_on == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"  # its files are said to be of Llama 3.1 8B
    assert (by_place.name, by_place.fingerprint) == (case.spec, by_name.fingerprint)


def test_an_sae_that_was_saved_where_there_is_a_connection_is_the_same(tmp_path: Path) -> None:
    case = case_of("gemma-scope-2-270m-pt-att")
    case.write(tmp_path / case.entry.repo_id, case.path)
    with stand_in(tmp_path):
        from_hub = load_encoder(case.spec, "any", 4)
        SAE.from_pretrained(*case.spec.split("/")).save_model(tmp_path / "saved")
    saved = load_encoder(tmp_path / "saved", "any", 4)
    assert (saved.fingerprint, saved.hook_name) == (from_hub.fingerprint, from_hub.hook_name)


# What is wrong with files


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def cut_to_a_few_bytes(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # NumPy leaves a file open that is no archive
@pytest.mark.parametrize("damage", [cut, cut_to_a_few_bytes, emptied])
@pytest.mark.parametrize(
    "start",
    [
        "gpt2-small-res-jb/",
        "gemma-scope-2b-pt-res-c",
        "gemma-scope-2-270m-pt-res",
        "qwen-scope-3-",
        "goodfire",
        "deepseek",
        "sae_b",
    ],
)
def test_a_damaged_file_is_told(start: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    case = case_of(start)
    case.write(tmp_path / case.entry.repo_id, case.path)
    (weights,) = [f for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".npz", ".pt", ".pth")]
    damage(weights)
    with (
        stand_in(tmp_path, {"d_in": D_MODEL, "d_sae": D_SAE} if case.sized else {}),
        pytest.raises(
            SaeError, match=rf"{case.spec} could not be loaded from the hub \(.*cut off or damaged; save the SAE again"
        ),
    ):
        load_encoder(case.spec, "any", 24)


def test_what_is_wrong_with_an_sae_of_the_hub_is_told_apart(tmp_path: Path) -> None:
    def told(remedy: str, case: Case = RES_JB, **overrides: Any) -> None:
        with stand_in(tmp_path, overrides), pytest.raises(SaeError, match=rf"could not be loaded from the hub \(.*{remedy}"):
            load_encoder(case.spec, "any", 12)

    folder = tmp_path / RES_JB.entry.repo_id / RES_JB.path
    told("the hub's repository has no such file; correct the name")
    RES_JB.write(tmp_path / RES_JB.entry.repo_id, RES_JB.path)
    config = json.loads((folder / "cfg.json").read_text())
    told("other shapes than its configuration .* says", d_in=D_MODEL // 2)
    QWEN.write(tmp_path / QWEN.entry.repo_id, QWEN.path)
    told("other shapes than its configuration .* says", QWEN)  # which is written in SAELens: of the real size
    told("this SAELens does not know that architecture", architecture="of the future")
    told("not those of its architecture", architecture="gated")
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if k != "d_in"}))
    told("lack this")
    (folder / "cfg.json").write_text(json.dumps(config)[:-9])
    told("cannot be parsed: a file is cut off or damaged")


def of_the_hub(kind: type[Exception], text: str) -> Exception:
    """An error of the hub's client, which wants the answer that it is about."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            LocalEntryNotFoundError("not cached"),
            "the hub cannot be reached, and it is not in the cache, .*; check the connection",
        ),
        (OfflineModeIsEnabled("offline"), "check the connection and HF_HUB_OFFLINE"),
        (requests.ConnectionError("no route"), "the hub cannot be reached"),
        (requests.Timeout("too long"), "the hub cannot be reached"),
        (of_the_hub(GatedRepoError, "403"), "accept its conditions"),
        (
            of_the_hub(RepositoryNotFoundError, "404"),
            "the hub has no such repository, or it is private; correct the name, or log in",
        ),
        (requests.HTTPError("404 Client Error: Not Found"), "no such file"),
        (requests.HTTPError("503 Server Error"), "the hub refuses; try again later"),
        (MemoryError(), "memory does not suffice; take an SAE with fewer features"),
        (PermissionError(13, "denied"), "change its permissions"),
        (OSError(28, "No space left on device"), "the room on the disk"),
        (ValueError("a file of the future"), "not in the form that SAELens expects"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("spec", [RES_JB.spec, "owner/repository/layers.2"])
def test_what_went_wrong_on_the_way_is_told_apart(
    error: Exception, remedy: str, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(SAE, "from_pretrained", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SaeError, match=rf"^sae: {spec} could not be loaded from the hub \(.*{remedy}"):
        load_encoder(spec, "gpt2", 12)


@pytest.mark.parametrize("spec", [case.spec for case in CASES if case.write is sae_files.of_nothing])
def test_nothing_is_loaded_of_an_sae_that_is_refused(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SAE, "from_pretrained")
    with pytest.raises(SaeError, match=r"cannot be used: it (reads|encodes) .*take another of `sts-callback saes --model"):
        load_encoder(spec, "any", 26)


# SAEs of the hub that are in no registry


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a repository, and all of it that anyone asks for is there."""
    root = tmp_path / "owner" / "repository"
    root.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / name))
    return root


def test_a_folder_of_a_hub_repository_is_read_in_every_layout(hub: Path) -> None:
    saved_sae(hub / "own")
    of_dictionary_learning("AutoEncoderTopK")(hub, "theirs/trainer_0")
    assert load_encoder("owner/repository/own", "any", 4).fingerprint == load_encoder(hub / "own", "any", 4).fingerprint
    loaded = load_encoder("owner/repository/theirs/trainer_0", "any", 4)
    assert (loaded.name, loaded.architecture) == ("owner/repository/theirs/trainer_0", "topk")


def test_a_hub_repository_without_that_folder_is_told(hub: Path) -> None:
    with pytest.raises(SaeError, match=r"owner/repository on the hub has no SAE in layers.9; correct the name"):
        load_encoder("owner/repository/layers.9", "any", 12)
    (hub / "layers.8").mkdir()
    with pytest.raises(SaeError, match=r"cannot be read as an SAE \(FileNotFoundError.*must hold cfg.json"):
        load_encoder("owner/repository/layers.8", "any", 12)


def test_only_files_of_an_sae_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: asked.append((args, options)) or tmp_path)
    with pytest.raises(SaeError):
        load_encoder("owner/repository/run/layers.9", "any", 12)
    ((args, options),) = asked
    assert args == ("owner/repository",)
    assert {"run/layers.9/sae.safetensors", "run/layers.9/ae.pt", "run/config.json"} < set(options["allow_patterns"])
    assert not any("*" in pattern for pattern in options["allow_patterns"])


# Pickles


class Planted:
    """Makes a file when it is unpickled by what runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


PICKLES = ["qwen-scope-3-", "goodfire", "deepseek", "sae_bench_pythia70m_sweep_topk"]


@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}], ids=["as usual", "unsafe environment"])
@pytest.mark.parametrize("start", [*PICKLES, "a folder"])
def test_code_in_a_pickle_is_not_run(
    start: str, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    if start == "a folder":
        of_dictionary_learning("AutoEncoder")(tmp_path, "sae")
        weights, spec = tmp_path / "sae" / "ae.pt", str(tmp_path / "sae")
    else:
        case = case_of(start)
        case.write(tmp_path / case.entry.repo_id, case.path)
        (weights,) = [f for f in tmp_path.rglob("*") if f.suffix in (".pt", ".pth")]
        spec = case.spec
    torch.save({**torch.load(weights, weights_only=True), "more": Planted(planted)}, weights)
    with stand_in(tmp_path), pytest.raises(SaeError, match="holds code beside tensors, which is not run"):
        load_encoder(spec, "any", 24)
    assert not planted.exists()
    assert dict(os.environ) == before


def test_the_planted_code_would_be_run(tmp_path: Path) -> None:
    torch.save({"more": Planted(tmp_path / "planted")}, tmp_path / "weights.pt")
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert (tmp_path / "planted").exists()


def test_every_loader_of_pickles_is_tried() -> None:
    written = {case.loader for case in CASES if case.write in (sae_files.of_qwen_scope, sae_files.of_goodfire)}
    assert {case_of(start).loader for start in PICKLES} >= written | {"deepseek_r1", "dictionary_learning_1"}
    assert (
        len(re.findall(r"torch\.load\(", Path(loaders.__file__).read_text())) == len(PICKLES) + 1
    )  # and hook_z, which is refused


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    case = case_of("gemma-scope-2b-pt-res-c")
    case.write(tmp_path / case.entry.repo_id, case.path)
    (weights,) = tmp_path.rglob("*.npz")
    np.savez(weights, w_enc=np.array([Planted(tmp_path / "planted")], dtype=object))
    with stand_in(tmp_path), pytest.raises(SaeError, match="could not be loaded from the hub"):
        load_encoder(case.spec, "any", 24)
    assert not (tmp_path / "planted").exists()
