"""Folders of SAEs that EleutherAI's sparsify and dictionary_learning have saved, read as configuration and weights of SAELens.

The layouts, and features equal to within 1e-5, were checked against files and encoders of eai-sparsify 1.3.3 and
dictionary_learning 0.1.0.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors.torch import load_file

from sts_callback.errors import SaeError
from sts_callback.model.hooks import is_module_path

Parts: TypeAlias = "tuple[dict[str, Any], dict[str, torch.Tensor]]"
"""What a converter of SAELens returns: configuration and weights."""


class _Site(NamedTuple):
    """Where an SAE reads, and where the activation is that a transcoder predicts."""

    hook_name: str
    predicts: str | None = None


def _site_of(module: str, io: str) -> _Site:
    """The site of an SAE of a module's input or output, or of a transcoder from one to the other."""
    return _Site(f"{module}.input", f"{module}.output") if io == "in_and_out" else _Site(f"{module}.{io}put")


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise SaeError(f"sae: {file} holds a {type(content).__name__}, not names and values; save the SAE again.")
    return content


def _parts(
    architecture: str, weights: dict[str, torch.Tensor], site: _Site, *, centres: bool, metadata: dict[str, Any], **more: Any
) -> Parts:
    """Configuration and weights in the form of SAELens 6.

    Args:
        architecture: by SAELens' name.
        weights: by SAELens' names, `W_enc` of shape `(d_in, d_sae)`.
        site: where it reads.
        centres: whether `b_dec` is subtracted from what it reads.
        metadata: what is known of its origin.
        more: settings of the architecture.

    """
    d_in, d_sae = weights["W_enc"].shape
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centres,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # of this form; without it SAELens takes the configuration for an older one
            "hook_name": site.hook_name,
            "hook_name_out": site.predicts,
            **metadata,
        },
        **more,
    }
    return config, {name: weight.float().contiguous() for name, weight in weights.items()}


# EleutherAI's sparsify


def read_sparsify(folder: Path) -> Parts:
    """Read `cfg.json` and `sae.safetensors` of a folder whose name is the module's, such as `layers.12` or `layers.12.mlp`.

    `b_dec` is subtracted from what an SAE reads, whatever `normalize_decoder` says, and not from what a transcoder reads. Until
    February 2025 the run's `config.json` said `transcode`, not `cfg.json`, and transcoders subtracted `b_dec` too.

    Raises:
        SaeError: if its folder names no module, or if its activation is none of SAELens'.

    """
    config, weights = _json(folder / "cfg.json"), load_file(folder / "sae.safetensors")
    activation = "signed" if config.get("signed") else config.get("activation", "topk")
    if activation != "topk":
        raise SaeError(f"sae: {folder} has the activation {activation!r} of sparsify; allowed is 'topk'. Take another SAE.")
    module = [part for part in Path(os.path.abspath(folder)).parts if not re.fullmatch(r"seed\d+", part)][-1]
    if not is_module_path(module):
        raise SaeError(
            f"sae: {folder} does not say where it reads: sparsify names the folder after the module; name it so, such as "
            "layers.12 or layers.12.mlp."
        )
    run = next((_json(file) for up in folder.absolute().parents[:2] if (file := up / "config.json").is_file()), {})
    transcodes = config.get("transcode") or run.get("transcode") or config.get("skip_connection")
    renamed = {
        "W_enc": weights["encoder.weight"].T,
        "b_enc": weights["encoder.bias"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    return _parts(
        "topk",  # of transcoders too: SAELens has none with this activation, and only their features are used
        renamed,
        _site_of(module, "in_and_out" if transcodes else "out"),
        centres=not config.get("transcode"),
        metadata={"model_name": run.get("model")},
        k=config["k"],
    )


# dictionary_learning

_ARCHITECTURES = {  # SAELens' architecture of each class, and whether it subtracts b_dec from what it reads
    "AutoEncoder": ("standard", True),
    "AutoEncoderNew": ("standard", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("jumprelu", True),  # by the threshold that training has set, as its own `encode` does
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
}
_WEIGHTS = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "encoder.bias": "b_enc",
    "decoder.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
}
_SUBMODULES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "attn.hook_out",
    "attention_out": "attn.hook_out",
    "mlp_out": "mlp.hook_out",
}


def read_dictionary_learning(folder: Path) -> Parts:
    """Read `config.json` and `ae.pt`, without running what a pickle may hold.

    The decoder's rows of an `AutoEncoder` are brought to norm 1, as its own `from_pretrained` does.

    Raises:
        SaeError: if its kind is unknown, or if it does not say where it reads.

    """
    config = _json(folder / "config.json")
    trainer, buffer = config["trainer"], config.get("buffer") or {}
    kind = trainer["dict_class"]
    if kind not in _ARCHITECTURES:
        raise SaeError(
            f"sae: {folder} is a {kind} of dictionary_learning; allowed are {', '.join(_ARCHITECTURES)}. Take another."
        )
    architecture, centres = _ARCHITECTURES[kind]
    saved = torch.load(folder / "ae.pt", map_location="cpu", weights_only=True)
    k, threshold = saved.pop("k", None), saved.pop("threshold", None)
    saved.pop("group_sizes", None)
    weights = {_WEIGHTS.get(name, name): w.T if name.endswith(".weight") else w for name, w in saved.items()}
    if architecture == "jumprelu":
        weights["threshold"] = threshold.expand(weights["b_enc"].shape)
    if kind == "AutoEncoder":
        norms = torch.linalg.vector_norm(weights["W_dec"], dim=1)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norms, weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms.clamp_min(1e-12)[:, None]
    return _parts(
        architecture,
        weights,
        _dictionary_site(folder, trainer, buffer.get("io", "out")),
        centres=centres,
        metadata={"model_name": trainer.get("lm_name"), "context_size": buffer.get("ctx_len")},
        **({"k": int(trainer["k"] if k is None else k)} if architecture == "topk" else {}),
    )


def _dictionary_site(folder: Path, trainer: dict[str, Any], io: str) -> _Site:
    """Where it reads: `submodule_name` is free text, so only what is sure to be a place is taken for one."""
    name = trainer.get("submodule_name") or "resid_post"  # what has no name reads the residual stream, as SAELens has it
    if is_module_path(name) and io in ("in", "out", "in_and_out"):
        return _site_of(name.removesuffix(".output"), io)
    known = re.fullmatch(rf"({'|'.join(_SUBMODULES)})(_layer_\d+)?", name)
    if known and io == "out":
        return _Site(f"blocks.{int(trainer['layer'])}.{_SUBMODULES[known[1]]}")
    raise SaeError(
        f"sae: {folder} does not say where it reads: its config.json has submodule_name {name!r} and io {io!r}; set "
        f"submodule_name to a module, such as model.layers.12.mlp, or, with io 'out', to one of {', '.join(_SUBMODULES)}."
    )
