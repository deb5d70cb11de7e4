"""Folders of sparsify and of dictionary_learning, written as eai-sparsify 1.3.3 and dictionary_learning 0.1.0 write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.sae_files import D_SAE, dictionary_weights, drawn, in_json, in_pickle, in_safetensors, of_dictionary_learning
from sts_callback import Monitor, ProbeConfig
from sts_callback.errors import SaeError
from sts_callback.model.sae import SaeEncoder, load_encoder
from sts_callback.records import Forecast
from tiny import D_MODEL, rotated_sae, rows, tiny_model, tiny_tokenizer

X = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def loaded(folder: Path) -> SaeEncoder:
    return load_encoder(folder, "any", 4)


def plain(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: weight.double().numpy() for name, weight in weights.items()}


def kept(pre: Any, k: int) -> Any:
    """ReLU of the k largest of each row."""
    return np.where(pre >= np.sort(pre, axis=1)[:, -k, None], np.maximum(pre, 0), 0)


def of_sparsify(folder: Path, **config: Any) -> dict[str, Any]:
    """Write an SAE into a folder as `SparseCoder.save_to_disk` does, and its run's configuration beside it."""
    weights = {
        "encoder.weight": drawn(D_SAE, D_MODEL),
        "encoder.bias": drawn(D_SAE),
        "W_dec": drawn(D_SAE, D_MODEL) * 2,
        "b_dec": drawn(D_MODEL),
        **({"W_skip": drawn(D_MODEL, D_MODEL)} if config.get("skip_connection") else {}),
    }
    known = {
        "activation": "topk",
        "expansion_factor": 4,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": 6,
        "multi_topk": False,
    }
    in_json(folder / "cfg.json", {**known, "skip_connection": False, "transcode": False, "d_in": D_MODEL, **config})
    in_safetensors(folder / "sae.safetensors", weights)
    in_json(folder.parent / "config.json", {"sae": known, "model": "EleutherAI/pythia-70m", "ctx_len": 2048})
    return plain(weights)


# sparsify


@pytest.mark.parametrize("config", [{}, {"normalize_decoder": False}, {"multi_topk": True}, {"signed": False}])
@pytest.mark.parametrize(
    ("name", "hook_name"),
    [("layers.2", "layers.2.output"), ("h.2.mlp", "h.2.mlp.output"), ("layers.2/seed1", "layers.2.output")],
)
def test_an_sae_of_sparsify_subtracts_its_bias_and_keeps_the_top(
    tmp_path: Path, config: dict[str, Any], name: str, hook_name: str
) -> None:
    w, one = of_sparsify(tmp_path / "run" / name, **config), loaded(tmp_path / "run" / name)
    acts = kept((X.double().numpy() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 6)
    found = one.reconstruct(X)
    np.testing.assert_allclose(found.acts.numpy(), acts, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.left.numpy(), X.numpy() - acts @ w["W_dec"] - w["b_dec"], rtol=1e-4, atol=1e-4)
    assert (one.hook_name, one.nominal_l0, one.trained_on) == (hook_name, 6.0, "EleutherAI/pythia-70m")


@pytest.mark.parametrize("skip_connection", [False, True])
def test_a_transcoder_of_sparsify_reads_the_input_as_it_is(tmp_path: Path, skip_connection: bool) -> None:
    w = of_sparsify(tmp_path / "layers.2.mlp", transcode=True, skip_connection=skip_connection)
    one = loaded(tmp_path / "layers.2.mlp")
    acts = kept(X.double().numpy() @ w["encoder.weight"].T + w["encoder.bias"], 6)
    np.testing.assert_allclose(one.encode(X).numpy(), acts, rtol=1e-4, atol=1e-5)
    assert one.hook_name == "layers.2.mlp.input"
    assert not one.reconstructs
    assert one.reconstruct(X).left.isnan().all()


@pytest.mark.parametrize(("skip_connection", "run"), [(False, {"transcode": True}), (True, {})])
def test_an_early_transcoder_of_sparsify_reads_the_input_less_its_bias(
    tmp_path: Path, skip_connection: bool, run: dict[str, Any]
) -> None:
    """Its `cfg.json` does not say that it is one: its run does, or its skip connection."""
    folder = tmp_path / "run" / "layers.2.mlp"
    w = of_sparsify(folder, skip_connection=skip_connection)
    config = json.loads((folder / "cfg.json").read_text())
    in_json(folder / "cfg.json", {k: v for k, v in config.items() if k != "transcode"})
    in_json(folder.parent / "config.json", run)
    acts = kept((X.double().numpy() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], 6)
    one = loaded(folder)
    np.testing.assert_allclose(one.encode(X).numpy(), acts, rtol=1e-4, atol=1e-5)
    assert (one.hook_name, one.reconstructs) == ("layers.2.mlp.input", False)


def test_a_folder_is_named_by_itself_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_sparsify(tmp_path / "layers.2")
    monkeypatch.chdir(tmp_path / "layers.2")
    assert loaded(Path(".")).hook_name == "layers.2.output"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("layers.2", {"activation": "groupmax"}, r"has the activation 'groupmax' of sparsify; allowed is 'topk'"),
        ("layers.2", {"signed": True}, r"has the activation 'signed' of sparsify"),
        ("my_sae", {}, r"my_sae does not say where it reads: .*name it so, such as layers.12 or layers.12.mlp"),
        ("embed_tokens", {}, r"embed_tokens does not say where it reads"),
    ],
)
def test_what_sparsify_has_and_we_have_not_is_refused(tmp_path: Path, name: str, config: dict[str, Any], message: str) -> None:
    of_sparsify(tmp_path / name, **config)
    with pytest.raises(SaeError, match=message):
        loaded(tmp_path / name)


# dictionary_learning


def expected(kind: str) -> tuple[Any, Any]:
    """Features of `X` by each class's own definition, and what they decode to."""
    w, x = plain(dictionary_weights(kind)), X.double().numpy()
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        pre = (x - (w["b_dec"] if kind == "MatryoshkaBatchTopKSAE" else 0)) @ w["W_enc"] + w["b_enc"]
        acts = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
        return acts, acts @ w["W_dec"] + w["b_dec"]
    w_enc, w_dec = w["encoder.weight"].T, w["decoder.weight"].T
    if kind == "GatedAutoEncoder":
        pre = (x - w["decoder_bias"]) @ w_enc
        acts = (pre + w["gate_bias"] > 0) * np.maximum(np.exp(w["r_mag"]) * pre + w["mag_bias"], 0)
        return acts, acts @ w_dec + w["decoder_bias"]
    if kind == "AutoEncoderNew":
        acts = np.maximum(x @ w_enc + w["encoder.bias"], 0)
        return acts, acts @ w_dec + w["decoder.bias"]
    bias = w["bias"] if kind == "AutoEncoder" else w["b_dec"]
    pre = (x - bias) @ w_enc + w["encoder.bias"]
    acts = {
        "AutoEncoder": lambda: np.maximum(pre, 0),
        "AutoEncoderTopK": lambda: kept(pre, 6),
        "BatchTopKSAE": lambda: np.where(pre > w["threshold"], np.maximum(pre, 0), 0),
    }[kind]()
    decoded = acts @ w_dec + bias
    return (acts * np.linalg.norm(w_dec, axis=1) if kind == "AutoEncoder" else acts), decoded


KINDS = {
    "AutoEncoder": "standard",
    "AutoEncoderNew": "standard",
    "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "jumprelu",
    "MatryoshkaBatchTopKSAE": "jumprelu",
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_of_dictionary_learning_is_what_its_class_defines(tmp_path: Path, kind: str) -> None:
    of_dictionary_learning(kind)(tmp_path, "trainer_0")
    one = loaded(tmp_path / "trainer_0")
    acts, decoded = expected(kind)
    found = one.reconstruct(X)
    np.testing.assert_allclose(found.acts.numpy(), acts, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.left.numpy(), X.double().numpy() - decoded, rtol=1e-4, atol=1e-4)
    assert 0.02 < (acts > 0).mean() < 0.98
    assert (one.name, one.architecture, one.hook_name) == ("trainer_0", KINDS[kind], "blocks.2.hook_resid_post")
    assert (one.trained_on, one.nominal_l0) == ("EleutherAI/pythia-70m-deduped", 6.0 if KINDS[kind] == "topk" else None)


def of_a_place(folder: Path, io: str, name: Any) -> Path:
    """An SAE that says where it reads by `submodule_name` and `io`."""
    of_dictionary_learning("AutoEncoder", submodule_name=name)(folder, "sae")
    config = json.loads((folder / "sae" / "config.json").read_text())
    in_json(folder / "sae" / "config.json", {**config, "buffer": {**config["buffer"], "io": io}})
    return folder / "sae"


@pytest.mark.parametrize(
    ("io", "name", "hook_name", "reconstructs"),
    [
        ("out", None, "blocks.2.hook_resid_post", True),
        ("out", "resid_pre_layer_2", "blocks.2.hook_resid_pre", True),
        ("out", "attention_out_layer_2", "blocks.2.attn.hook_out", True),
        ("out", "mlp_out", "blocks.2.mlp.hook_out", True),
        ("out", "gpt_neox.layers.2.mlp", "gpt_neox.layers.2.mlp.output", True),
        ("in", "gpt_neox.layers.2.mlp", "gpt_neox.layers.2.mlp.input", True),
        ("in_and_out", "gpt_neox.layers.2.mlp", "gpt_neox.layers.2.mlp.input", False),
    ],
)
def test_the_place_is_that_of_the_submodule(tmp_path: Path, io: str, name: Any, hook_name: str, reconstructs: bool) -> None:
    one = loaded(of_a_place(tmp_path, io, name))
    assert (one.hook_name, one.reconstructs) == (hook_name, reconstructs)


@pytest.mark.parametrize(
    ("io", "name"), [("in", "resid_post_layer_2"), ("out", "the third layer"), ("in", None), ("up", "layers.2")]
)
def test_a_place_that_is_not_sure_is_refused(tmp_path: Path, io: str, name: Any) -> None:
    with pytest.raises(
        SaeError, match=r"does not say where it reads: .*set submodule_name to a module, such as model.layers.12.mlp"
    ):
        loaded(of_a_place(tmp_path, io, name))


def test_a_class_of_another_time_is_refused(tmp_path: Path) -> None:
    of_dictionary_learning("AutoEncoder")(tmp_path, "sae")
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    config["trainer"]["dict_class"] = "CrossCoder"
    in_json(tmp_path / "sae" / "config.json", config)
    with pytest.raises(SaeError, match="is a CrossCoder of dictionary_learning; allowed are AutoEncoder, "):
        loaded(tmp_path / "sae")


def test_half_precision_is_read_in_float32(tmp_path: Path) -> None:
    of_dictionary_learning("AutoEncoderTopK")(tmp_path, "sae")
    weights = {k: w.bfloat16() if w.is_floating_point() else w for k, w in dictionary_weights("AutoEncoderTopK").items()}
    in_pickle(tmp_path / "sae" / "ae.pt", weights)
    assert loaded(tmp_path / "sae").encode(X).dtype == torch.float32


# To the end


def forecast_with(folder: Path) -> Forecast:
    monitor = Monitor(
        tiny_model(),
        tiny_tokenizer(),
        sae=folder,
        train_data=rows(30),
        domains={"near": rows(16, seed=50)},
        config=ProbeConfig(n_queries=8, n_features=8),
        progress=False,
    )
    return monitor.forecast()


def test_a_forecast_is_that_of_the_same_sae_in_sae_lens(tmp_path: Path) -> None:
    sae = rotated_sae("blocks.2.hook_out", kind="topk")
    sae.cfg.k = D_MODEL  # as many as one rotation has, so that they fit every layer
    sae.save_model(tmp_path / "own")
    in_json(tmp_path / "layers.2" / "cfg.json", {"k": sae.cfg.k, "d_in": D_MODEL})
    in_safetensors(
        tmp_path / "layers.2" / "sae.safetensors",
        {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec},
    )
    theirs, own = forecast_with(tmp_path / "layers.2"), forecast_with(tmp_path / "own")
    assert (theirs.identity.hook_name, own.identity.hook_name) == ("layers.2.output", "blocks.2.hook_out")
    assert theirs.identity.sae == own.identity.sae
    assert (theirs.fvu, theirs.to_dict()["domains"]) == (own.fvu, own.to_dict()["domains"])


def test_a_forecast_is_made_with_a_transcoder(tmp_path: Path) -> None:
    """It does not reconstruct what it reads, so whether it fits is not known."""
    of_sparsify(tmp_path / "layers.2.mlp", transcode=True)
    forecast = forecast_with(tmp_path / "layers.2.mlp")
    assert forecast.identity.hook_name == "layers.2.mlp.input"
    assert np.isnan(forecast.fvu)
    assert np.isfinite(forecast.domains["near"].sts_net.value)
