"""The encoder against answers worked out by hand and against plain NumPy; what it makes of a user's SAE; what it refuses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sae_lens
import torch
from sae_lens import (
    SAE,
    AbsTopKSAE,
    AbsTopKSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TemporalSAE,
    TemporalSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)

from sts_callback.errors import SaeError
from sts_callback.model import registry
from sts_callback.model.sae import SaeEncoder, load_encoder
from tiny import rotated_sae, saved_sae

HOOK = "blocks.1.hook_resid_post"
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 1}),
    "transcoder": (Transcoder, TranscoderConfig, {"d_out": 3, "apply_b_dec_to_input": False}),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig, {"d_out": 3, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig, {"d_out": 3, "apply_b_dec_to_input": False}),
}
NORMALISATIONS = ["none", "layer_norm", "constant_norm_rescale"]


def made(kind: str, d_in: int = 2, d_sae: int = 3, weights: dict[str, list[Any]] | None = None, **options: Any) -> SAE[Any]:
    """An SAE with given weights, or else with random ones, all of them."""
    sae_class, config_class, needed = KINDS[kind]
    sae: SAE[Any] = sae_class(config_class(d_in=d_in, d_sae=d_sae, **{**needed, **options}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sae.named_parameters():
        given = (weights or {}).get(name)
        drawn = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = drawn.abs() if name == "threshold" else drawn
        if given is not None:
            parameter.data = torch.tensor(given)
    sae.cfg.metadata.hook_name = HOOK
    return sae


def encoder(sae: SAE[Any]) -> SaeEncoder:
    return load_encoder(sae, "gpt2", 12)


def inputs(n: int, d: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


# By hand

TOY = {"W_enc": [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], "b_enc": [0.0, -1.0, 0.5], "b_dec": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("kind", "more", "options", "expected"),
    [
        # [2, 3] - b_dec = [1, 3]; times W_enc [1, 3, -1]; plus b_enc [1, 2, -0.5]
        ("standard", {}, {}, [1.0, 2.0, 0.0]),
        ("standard", {}, {"apply_b_dec_to_input": False}, [2.0, 2.0, 0.0]),  # [2, 2, -1.5]
        ("jumprelu", {"threshold": [1.0, 1.0, -1.0]}, {}, [0.0, 2.0, 0.0]),  # 1 is at its threshold, not above
        ("jumprelu", {"threshold": [0.99, 2.5, 0.0]}, {}, [1.0, 0.0, 0.0]),
        ("topk", {}, {}, [0.0, 2.0, 0.0]),
        ("topk", {}, {"k": 2}, [1.0, 2.0, 0.0]),
        ("topk", {}, {"k": 3}, [1.0, 2.0, 0.0]),  # the third is below 0
        # gates [1, 3, -1] + b_gate = [0, 2, 1]; magnitudes [1, 3 * 2, -1] + b_mag
        ("gated", {"b_gate": [-1.0, -1.0, 2.0], "r_mag": [0.0, math.log(2), 0.0], "b_mag": [0.0, 0.5, 3.0]}, {}, [0.0, 6.5, 2.0]),
        ("transcoder", {"b_dec": [9.0] * 3}, {}, [2.0, 2.0, 0.0]),  # b_dec belongs to the output
        ("skip_transcoder", {"b_dec": [9.0] * 3}, {}, [2.0, 2.0, 0.0]),
        ("jumprelu_transcoder", {"b_dec": [9.0] * 3, "threshold": [2.0, 1.9, 0.0]}, {}, [0.0, 2.0, 0.0]),
    ],
)
def test_features_are_those_worked_out_by_hand(
    kind: str, more: dict[str, list[float]], options: dict[str, Any], expected: list[float]
) -> None:
    found = encoder(made(kind, weights={**TOY, **more}, **options)).encode(torch.tensor([[2.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-6, atol=0)
    assert found.dtype == torch.float32


# Against NumPy


def numpy_features(sae: SAE[Any], x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Features in float64, from the weights and the definitions."""
    w = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}
    a = x.double().numpy()
    if sae.cfg.normalize_activations == "layer_norm":
        a = a - a.mean(axis=1, keepdims=True)
        a = a / (a.std(axis=1, ddof=1, keepdims=True) + 1e-5)
    elif sae.cfg.normalize_activations == "constant_norm_rescale":
        a = a * np.sqrt(a.shape[1]) / np.linalg.norm(a, axis=1, keepdims=True)
    if sae.cfg.apply_b_dec_to_input:
        a = a - w["b_dec"]
    kind = sae.cfg.architecture()
    if kind == "gated":
        gate = a @ w["W_enc"] + w["b_gate"] > 0
        return gate * np.maximum(a @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"], 0)
    pre = a @ w["W_enc"] + w["b_enc"]
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        pre = pre * np.linalg.norm(w["W_dec"], axis=1)
    if "jumprelu" in kind:
        return np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    if kind == "topk":
        kth = np.sort(pre, axis=1)[:, -sae.cfg.k, None]
        return np.where(pre >= kth, np.maximum(pre, 0), 0)
    return np.maximum(pre, 0)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_numpy(kind: str, normalisation: str) -> None:
    options = {"k": 5} if kind == "topk" else {}
    sae, x = made(kind, 12, 40, normalize_activations=normalisation, **options), inputs(50, 12)
    found = encoder(sae).encode(x).double().numpy()
    np.testing.assert_allclose(found, numpy_features(sae, x), rtol=1e-4, atol=1e-5)
    assert 0.05 < (found > 0).mean() < 0.95


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_saelens_to_the_last_bit(kind: str, normalisation: str) -> None:
    """Thresholds below 0 and inputs that are not finite among them."""
    sae, x = made(kind, 12, 40, normalize_activations=normalisation, **({"k": 5} if kind == "topk" else {})), inputs(50, 12)
    if "jumprelu" in kind:
        sae.threshold.data[::3] *= -1
    x[3, 2], x[4, 5], x[5, 6] = math.nan, math.inf, -math.inf
    found, theirs = encoder(sae).encode(x), sae.encode(x)
    assert found.isnan().any() and (found == 0).any() and (found > 0).any()
    assert torch.equal(found.nan_to_num(nan=-1), theirs.nan_to_num(nan=-1))


def test_features_of_a_training_class_are_its_own() -> None:
    """It goes by the same architecture, and keeps what is below 0 but above its threshold."""
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=12, d_sae=40))
    sae.cfg.metadata.hook_name = HOOK
    sae.threshold.data.fill_(-0.3)
    x = inputs(50, 12)
    assert (sae.encode(x) < 0).any()
    assert torch.equal(encoder(sae).encode(x), sae.encode(x))


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_what_few_active_features_leave_is_what_the_whole_decoder_leaves(kind: str, normalisation: str) -> None:
    """So few that only they are multiplied; some tokens have none."""
    sae, x = made(kind, 12, 400, normalize_activations=normalisation, **({"k": 4} if kind == "topk" else {})), inputs(200, 12)
    sae.b_dec.data = torch.randn(12, generator=torch.Generator().manual_seed(1))
    bias = sae.b_gate if kind == "gated" else sae.b_enc
    for _ in range(100):
        if (encoder(sae).encode(x) > 0).double().mean() < 0.005:
            break
        bias.data -= 0.25
    one = encoder(sae)
    found = one.reconstruct(x)
    n_active = (found.acts > 0).sum(dim=1)
    assert n_active.min() == 0 < n_active.max() and n_active.sum() < 0.05 * found.acts.numel()
    one.encode(x)  # what undoes a normalisation is kept until the next decoding
    torch.testing.assert_close(found.left, x - one.sae.decode(found.acts), rtol=1e-5, atol=1e-5)
    acts, gradient = one.encode(x).requires_grad_(), inputs(200, 12, seed=2)
    (whole,) = torch.autograd.grad(one.sae.decode(acts), acts, gradient)
    torch.testing.assert_close(one.feature_gradient(x, gradient), whole * (acts != 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_scale_is_folded_as_by_hand(kind: str) -> None:
    sae, x = made(kind, 12, 40, normalize_activations="expected_average_only_in"), inputs(50, 12) * 30
    raw, mean_norm = encoder(sae), float(x.norm(dim=1).mean())
    scaled = raw.scaled(mean_norm)
    # `expected_average_only_in` takes activations scaled to a mean norm of sqrt(d_in); thresholds and biases stay.
    np.testing.assert_allclose(
        scaled.encode(x).numpy(), numpy_features(sae, x.double() * (math.sqrt(12) / mean_norm)), rtol=1e-4, atol=1e-5
    )
    assert raw.needs_scale and not scaled.needs_scale
    assert not torch.allclose(raw.encode(x), scaled.encode(x))
    np.testing.assert_allclose(raw.encode(x).numpy(), numpy_features(sae, x), rtol=1e-4, atol=1e-5)  # not scaled in place


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_centred_sae_reads_activations_less_their_mean(kind: str) -> None:
    sae, x = rotated_sae(kind=kind), inputs(20, 32)
    plain = encoder(sae)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    centred = encoder(sae)
    assert centred.centred and not plain.centred
    torch.testing.assert_close(centred.encode(x), plain.encode(x - x.mean(dim=1, keepdim=True)), rtol=0, atol=0)
    assert not torch.allclose(centred.encode(x), plain.encode(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_activations_are_encoded_in_float32(dtype: torch.dtype) -> None:
    one, x = encoder(made("jumprelu", 12, 40)), inputs(30, 12).to(dtype)
    assert torch.equal(one.encode(x), one.encode(x.float()))
    assert one.encode(x).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind: str) -> None:
    one, x = encoder(made(kind, 12, 40)), inputs(30, 12)

    def everything() -> list[torch.Tensor]:
        more = [one.feature_gradient(x, inputs(30, 12, seed=2))] if one.reconstructs else []
        return [one.encode(x), *one.reconstruct(x), *more]

    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16
        found = everything()
    for one_tensor, other in zip(found, expected, strict=True):
        assert torch.equal(one_tensor.nan_to_num(-1), other.nan_to_num(-1))


def test_encoding_builds_no_graph() -> None:
    one, x = encoder(made("standard", 12, 40)), inputs(3, 12).requires_grad_()
    acts, _, left = one.reconstruct(x)
    for found in (one.encode(x), acts, left, one.feature_gradient(x, inputs(3, 12).requires_grad_())):
        assert not found.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in one.sae.parameters())


def test_heads_are_taken_flat() -> None:
    flat = made("standard", 12, 40)
    heads = StandardSAE(StandardSAEConfig(d_in=12, d_sae=40, reshape_activations="hook_z"))
    heads.load_state_dict(flat.state_dict())
    heads.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    x = inputs(8, 12)
    assert torch.equal(encoder(heads).encode(x), encoder(flat).encode(x))
    assert all(map(torch.equal, encoder(heads).reconstruct(x), encoder(flat).reconstruct(x)))
    assert heads.hook_z_reshaping_mode  # the user's own is as it was
    assert heads.encode(x.view(8, 3, 4)).shape == (8, 40)


def numpy_decoded(sae: SAE[Any], acts: np.ndarray[Any, Any], a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The reconstruction of `a` from its features, in float64."""
    w_dec, b_dec = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        acts = acts / np.linalg.norm(w_dec, axis=1)
    decoded = acts @ w_dec + b_dec
    if sae.cfg.normalize_activations == "layer_norm":
        return decoded * a.std(axis=1, ddof=1, keepdims=True) + a.mean(axis=1, keepdims=True)
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        return decoded * np.linalg.norm(a, axis=1, keepdims=True) / np.sqrt(a.shape[1])
    return decoded


DECODING = [
    ("standard", {}),
    ("jumprelu", {}),
    ("gated", {}),
    ("topk", {"k": 5}),
    ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
]


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize(("kind", "options"), DECODING)
def test_what_the_dictionary_leaves_is_that_of_numpy(
    kind: str, options: dict[str, Any], normalisation: str, centre: bool
) -> None:
    sae, x = made(kind, 12, 40, normalize_activations=normalisation, **options), inputs(50, 12)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": centre}
    a = x.double().numpy()
    a = a - a.mean(axis=1, keepdims=True) if centre else a
    acts = numpy_features(sae, torch.from_numpy(a))
    found = encoder(sae).reconstruct(x)
    np.testing.assert_allclose(found.acts.numpy(), acts, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.x.numpy(), a, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.left.numpy(), a - numpy_decoded(sae, acts, a), rtol=1e-4, atol=1e-5)
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_exact_reconstruction_leaves_nothing() -> None:
    assert encoder(rotated_sae()).reconstruct(inputs(50, 32)).left.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_holds_the_features_of_encoding(kind: str) -> None:
    one, x = encoder(made(kind, 12, 40)), inputs(20, 12)
    assert torch.equal(one.reconstruct(x.bfloat16()).acts, one.encode(x.bfloat16()))


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_transcoder_reconstructs_something_else(kind: str) -> None:
    one = encoder(made(kind))
    assert not one.reconstructs
    assert one.reconstruct(inputs(5, 2)).left.isnan().all()
    assert one.reconstruct(inputs(5, 2)).left.shape == (5, 2)


@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize(("kind", "options"), DECODING)
def test_feature_gradient_is_what_one_unit_more_of_a_feature_decodes_to(
    kind: str, options: dict[str, Any], normalisation: str, centre: bool
) -> None:
    sae, x, gradient = made(kind, 12, 40, normalize_activations=normalisation, **options), inputs(20, 12), inputs(20, 12, seed=2)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": centre}
    a, g = x.double().numpy(), gradient.double().numpy()
    a = a - a.mean(axis=1, keepdims=True) if centre else a
    acts = numpy_features(sae, torch.from_numpy(a))
    more = np.stack(
        [numpy_decoded(sae, acts + one, a) - numpy_decoded(sae, acts, a) for one in np.eye(40)], axis=1
    )  # decoding is linear, so a whole unit is as good as a small step
    expected = np.where(acts > 0, np.einsum("tfd,td->tf", more, g), 0)
    assert 0.05 < (expected != 0).mean() < 0.95
    np.testing.assert_allclose(encoder(sae).feature_gradient(x, gradient).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_feature_gradient_takes_half_precision() -> None:
    one, x, gradient = encoder(made("standard", 12, 40)), inputs(20, 12).bfloat16(), inputs(20, 12, seed=2).bfloat16()
    found = one.feature_gradient(x, gradient)
    assert found.dtype == torch.float32
    assert torch.equal(found, one.feature_gradient(x.float(), gradient.float()))


# The user's own object


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("normalisation", [*NORMALISATIONS, "expected_average_only_in"])
def test_users_object_is_not_altered(normalisation: str, dtype: str) -> None:
    sae = made("jumprelu", 12, 40, normalize_activations=normalisation, apply_b_dec_to_input=True).to(dtype=getattr(torch, dtype))
    sae.b_dec.requires_grad_(False)
    sae.hook_sae_input.eval()
    x = inputs(20, 12)

    def state() -> list[Any]:
        tensors = {name: p.clone() for name, p in sae.named_parameters()}
        flags = [m.training for m in sae.modules()], [p.requires_grad for p in sae.parameters()]
        return [flags, sae.cfg.to_dict(), sae.dtype, sorted(vars(sae)), {n: (t.dtype, t.tolist()) for n, t in tensors.items()}]

    before = state()
    one = encoder(sae)
    one.encode(x)
    one.reconstruct(x)
    one.feature_gradient(x, x)
    one.scaled(3.0).encode(x)
    one.to(torch.device("cpu")).encode(x)
    assert state() == before
    assert not any(p.requires_grad for p in one.sae.parameters())
    assert not one.sae.training
    assert one.sae.W_enc.dtype == torch.float32
    assert {p.data_ptr() for p in one.sae.parameters()}.isdisjoint({p.data_ptr() for p in sae.parameters()})


def test_name_and_hook_point_are_those_of_the_metadata() -> None:
    sae = rotated_sae("blocks.3.hook_resid_post")
    assert (encoder(sae).name, encoder(sae).hook_name) == ("SAE object", "blocks.3.hook_resid_post")
    sae.cfg.metadata.hf_hook_name = "model.layers.3.output"
    assert encoder(sae).hook_name == "model.layers.3.output"  # says what transformers calls it, so no translation is needed


@pytest.mark.parametrize(
    "alter",
    [
        lambda sae: sae.W_enc.data[0, 0].add_(1),
        lambda sae: sae.b_enc.data[0].add_(1),
        lambda sae: sae.b_dec.data[0].add_(1),  # subtracted from the input
        lambda sae: sae.W_dec.data[0, 0].add_(1),  # what it leaves is kept from step 0
        lambda sae: sae.threshold.data[0].add_(1),
        lambda sae: setattr(sae.cfg, "apply_b_dec_to_input", False),
        lambda sae: setattr(sae.cfg, "normalize_activations", "layer_norm"),
        lambda sae: setattr(sae.cfg.metadata, "model_from_pretrained_kwargs", {"center_writing_weights": True}),
    ],
    ids=["W_enc", "b_enc", "b_dec", "W_dec", "threshold", "apply_b_dec_to_input", "normalize_activations", "centred"],
)
def test_fingerprint_tells_saes_apart(alter: Callable[[SAE[Any]], object]) -> None:
    sae = rotated_sae(kind="jumprelu")
    before = encoder(sae).fingerprint
    assert encoder(rotated_sae(kind="jumprelu")).fingerprint == before
    alter(sae)
    assert encoder(sae).fingerprint != before


def test_fingerprint_tells_numbers_of_active_features_apart() -> None:
    assert encoder(made("topk", k=1)).fingerprint != encoder(made("topk", k=2)).fingerprint


# What its makers say of it


def test_metadata_says_where_an_sae_is_from() -> None:
    sae = rotated_sae()
    assert (encoder(sae).nominal_l0, encoder(sae).trained_on, encoder(sae).neuronpedia_id) == (None, None, None)
    sae.cfg.metadata.l0 = 42
    sae.cfg.metadata.model_name = "gpt2-small"
    sae.cfg.metadata.neuronpedia_id = "gpt2-small/8-res-jb"
    found = encoder(sae)
    assert (found.nominal_l0, found.trained_on, found.neuronpedia_id) == (42.0, "gpt2-small", "gpt2-small/8-res-jb")


def test_topk_sae_states_its_own_number_of_active_features() -> None:
    assert encoder(rotated_sae(kind="topk")).nominal_l0 == 16.0


def test_registry_fills_in_what_the_metadata_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = rotated_sae()
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda release, sae_id, **options: sae)
    found = load_encoder("gpt2-small-res-jb/blocks.8.hook_resid_pre", "any", 12)
    assert (found.nominal_l0, found.trained_on, found.neuronpedia_id) == (60.0, "gpt2-small", "gpt2-small/8-res-jb")
    sae.cfg.metadata.l0 = 7.5
    sae.cfg.metadata.model_name = "another"
    found = load_encoder("gpt2-small-res-jb/blocks.8.hook_resid_pre", "any", 12)
    assert (found.nominal_l0, found.trained_on) == (7.5, "gpt2-small")  # the registry knows its own models better


# Loading


@pytest.mark.parametrize("as_path", [str, Path])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
def test_folder_and_object_give_the_same_encoder(tmp_path: Path, kind: str, as_path: Callable[[Path], Any]) -> None:
    folder, x = saved_sae(tmp_path / "my_sae", kind=kind), inputs(9, 32)
    loaded, given = load_encoder(as_path(folder), "any", 4), encoder(rotated_sae(kind=kind))
    assert (loaded.name, loaded.hook_name, loaded.architecture) == ("my_sae", "blocks.2.hook_resid_post", kind)
    assert (loaded.d_in, loaded.d_sae) == (32, 64)
    assert loaded.fingerprint == given.fingerprint
    assert torch.equal(loaded.encode(x), given.encode(x))


def test_folder_in_half_precision_is_loaded_in_float32(tmp_path: Path) -> None:
    rotated_sae().to(dtype=torch.bfloat16).save_model(tmp_path / "half")
    loaded = load_encoder(tmp_path / "half", "any", 4)
    assert loaded.sae.W_enc.dtype == torch.float32
    assert loaded.encode(inputs(3, 32)).dtype == torch.float32


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    folder = saved_sae(tmp_path / "sae")
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    load_encoder(folder, "any", 4)
    found = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    assert found == (torch.rand(1).item(), np.random.rand(), random.random())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was asked of the hub, which is out of reach."""
    asked: list[tuple[str, str]] = []

    def fail(release: str, sae_id: str, **options: Any) -> None:
        asked.append((release, sae_id))
        raise OSError("no network")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: fail(name, ",".join(allow_patterns)))
    return asked


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")),
        (
            "gemma-scope-2b-pt-res-canonical/layer_5/width_16k/canonical",
            ("gemma-scope-2b-pt-res-canonical", "layer_5/width_16k/canonical"),
        ),
        ("owner/repository/folder", ("owner/repository", "folder/cfg.json,")),
        ("owner/repository/folder/inner", ("owner/repository", "folder/inner/cfg.json,")),
        ("auto", (registry.best_for("gpt2", 12).release, registry.best_for("gpt2", 12).sae_id)),
    ],
)
def test_hub_names_are_split_into_release_and_id(hub: list[tuple[str, str]], spec: str, expected: tuple[str, str]) -> None:
    with pytest.raises(SaeError, match=r"could not be loaded from the hub \(OSError\('no network'\)\); check the connection"):
        load_encoder(spec, "gpt2", 12)
    ((release, sae_id),) = hub
    assert release == expected[0]
    assert sae_id.startswith(expected[1])


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("gpt2-small-res-jbb/blocks.8.hook_resid_pre", "gpt2-small-res-jb/blocks.8.hook_resid_pre"),
        ("gpt2-small-res-jb/blocks.99.hook_resid_pre", "gpt2-small-res-jb/blocks.9.hook_resid_pre"),
        (
            "gemma-scope-2b-pt-res-canonical/layer_5/width_17k/canonical",
            "gemma-scope-2b-pt-res-canonical/layer_5/width_16k/canonical",
        ),
    ],
)
def test_unknown_name_suggests_near_ones(hub: list[tuple[str, str]], spec: str, near: str) -> None:
    with pytest.raises(SaeError, match=rf"'{spec}' is no folder and not in SAELens' registry; near are: .*{near}"):
        load_encoder(spec, "gpt2", 12)
    assert hub == []


def break_nothing_there(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def break_no_weights(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()


def break_cut_weights(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def break_config_not_json(folder: Path) -> None:
    (folder / "cfg.json").write_text("{")


def break_config_of_another_width(folder: Path) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "d_in": 16}))


def break_config_without_width(folder: Path) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    del config["d_in"]
    (folder / "cfg.json").write_text(json.dumps(config))


def break_unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "architecture": "of the future"}))


def break_saved_for_training(folder: Path) -> None:
    BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=32, d_sae=64)).save_model(folder)


@pytest.mark.parametrize(
    ("damage", "remedy"),
    [
        (break_nothing_there, "it must hold cfg.json and sae_weights"),
        (break_no_weights, "it must hold cfg.json and sae_weights"),
        (break_cut_weights, "a file is cut off or damaged"),
        (break_config_not_json, "cannot be parsed"),
        (break_config_of_another_width, "its weights have other shapes than its configuration .* says"),
        (break_config_without_width, "lack this"),
        (break_unknown_architecture, "'of the future'.*does not know that architecture"),
        (break_saved_for_training, "'batchtopk'.*saved for training with save_inference_model"),
    ],
)
def test_broken_folder_is_refused(tmp_path: Path, damage: Callable[[Path], None], remedy: str) -> None:
    folder = saved_sae(tmp_path / "sae")
    damage(folder)
    with pytest.raises(SaeError, match=rf"sae: the folder .*sae cannot be read as an SAE \(.*{remedy}"):
        load_encoder(folder, "any", 4)


@pytest.mark.parametrize("hook_name", [None, ""])
def test_sae_of_unknown_hook_point_is_refused(hook_name: str | None) -> None:
    sae = rotated_sae()
    sae.cfg.metadata.hook_name = hook_name
    with pytest.raises(SaeError, match=r"sae: SAE object does not say which hook point .*set metadata.hook_name in its cfg.json"):
        encoder(sae)


def of_the_sequence() -> SAE[Any]:
    sae = TemporalSAE(TemporalSAEConfig(d_in=4, d_sae=64, n_heads=1, kval_topk=4))
    sae.cfg.metadata.hook_name = HOOK
    return sae


def of_the_batch() -> SAE[Any]:
    """Keeps what is above the mean of the batch, as top-k over a batch does in training."""
    sae = rotated_sae()
    encode = sae.encode
    sae.encode = lambda x: encode(x) * (encode(x) > encode(x).mean())  # type: ignore[method-assign]
    return sae


@pytest.mark.parametrize("make", [of_the_sequence, of_the_batch])
def test_sae_that_does_not_encode_token_by_token_is_refused(make: Callable[[], SAE[Any]]) -> None:
    with pytest.raises(SaeError, match=r"sae: SAE object is a \w+ SAE, which does not encode a token by itself as it does among"):
        encoder(make())


def test_negative_activations_are_active() -> None:
    sae = AbsTopKSAE(AbsTopKSAEConfig(d_in=32, d_sae=64, k=8, apply_b_dec_to_input=False))
    sae.load_state_dict({name: p for name, p in rotated_sae(kind="topk").state_dict().items() if name in sae.state_dict()})
    x, gradient = torch.randn(20, 32), torch.randn(20, 32)
    sae.cfg.metadata.hook_name = HOOK
    reader = encoder(sae)
    acts = reader.encode(x)
    assert (acts < 0).any()
    by_feature = reader.feature_gradient(x, gradient)
    assert torch.equal(by_feature != 0, acts != 0)
    assert torch.allclose(by_feature, gradient @ sae.W_dec.T * (acts != 0), atol=1e-6)


def of_several(folder: Path) -> None:
    saved_sae(folder / "layer_1")
    saved_sae(folder / "layer_2")


def of_several_of_sparsify(folder: Path) -> None:
    (folder / "layers.5").mkdir()
    (folder / "layers.5" / "cfg.json").write_text("{}")
    (folder / "layers.5" / "sae.safetensors").write_bytes(b"")


def of_several_of_dictionary_learning(folder: Path) -> None:
    (folder / "trainer_0").mkdir()
    (folder / "trainer_0" / "ae.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("fill", "named"),
    [
        (of_several, "layer_1, layer_2"),
        (of_several_of_sparsify, "layers.5"),
        (of_several_of_dictionary_learning, "trainer_0"),
    ],
)
def test_of_a_folder_of_several_one_is_asked_for(tmp_path: Path, fill: Callable[[Path], None], named: str) -> None:
    fill(tmp_path)
    with pytest.raises(SaeError, match=f"holds several, give one of {named}; a folder must hold"):
        load_encoder(tmp_path, "any", 4)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").write_bytes(b"")
    for spec in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(SaeError, match=r"holds ae.pt without the config.json that dictionary_learning saves .*; add it"):
            load_encoder(spec, "any", 4)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SaeError, match=r"ae.pt is a file; give its folder"):
        load_encoder(tmp_path / "ae.pt", "any", 4)
    for spec in ("sae.pt", "./there", str(tmp_path / "there")):
        with pytest.raises(SaeError, match="is not there; correct the path"):
            load_encoder(spec, "any", 4)


def test_a_choice_is_told_with_its_reason(hub: list[tuple[str, str]], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SaeError):
        load_encoder("auto", "gpt2", 12)
    (told,) = caplog.messages
    assert told == registry.why_best(registry.best_for("gpt2", 12), 12)
