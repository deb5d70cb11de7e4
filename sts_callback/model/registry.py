"""SAELens' registry of pre-trained SAEs, read without importing sae_lens or torch.

Importing sae_lens takes seconds and half a gigabyte; the `saes` command and `sae="auto"` need only the YAML file beside
its `__init__`. Nothing here touches the network.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from sts_callback.config import NO_SAE
from sts_callback.errors import SaeError


@dataclass(frozen=True)
class SaeEntry:
    """One pre-trained SAE, as far as it is known without downloading it."""

    release: str
    """Name of its SAELens release, without a slash."""
    sae_id: str
    """Its name within the release. May contain slashes."""
    model: str
    """The model it was trained on: a Hugging Face id or a TransformerLens alias."""
    hook_name: str | None
    """TransformerLens name of its hook point. None for transcoders, and if only the SAE's own config says."""
    layer: int | None
    """Index of its decoder layer. None for SAEs of the embedding."""
    width: str | None
    """Number of features in the registry's short form, such as "16k" or "1m". None if the registry does not say."""
    l0: float | None
    """Mean number of active features per token. None if the registry does not say."""
    kind: Literal["sae", "transcoder"]
    """`sae` if it reconstructs its input, `transcoder` if it predicts another activation."""
    neuronpedia_id: str | None
    """Its id on Neuronpedia, `model/source`. None if it is not there."""
    unusable: str | None = None
    """Why it is refused, as a clause on it. None if it is not."""

    @property
    def spec(self) -> str:
        """Name to pass as `sae=`: `release/sae_id`."""
        return f"{self.release}/{self.sae_id}"


# The registry has this release under gemma-2-9b; its repository, sae_lens' loader and its `-canonical` sibling say -it.
_MODEL_CORRECTIONS = {"gemma-scope-9b-it-res": "gemma-2-9b-it"}

# Where TransformerLens' alias is not the repository's name. Source: transformer_lens/supported_models.py
_ALIASES = {"gpt2": "gpt2-small", "mistral-7b-v0.1": "mistral-7b"}

# Site of an SAE by what its spec contains; the first match wins, so ids that spell a hook name come first.
# Source for the releases that do not spell it: sae_lens/loading/pretrained_sae_loaders.py
_SITES = (
    (r"hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)", r"hook_\1"),
    (r"hook_z|^gemma-scope-.*-att\b", "attn.hook_z"),
    (r"^gemma-scope-.*-mlp\b", "hook_mlp_out"),
    (r"^gemma-scope-.*-res\b|/resid_post_|^qwen-scope-|^goodfire-|^llama_scope_(?:lxr|r1_distill)", "hook_resid_post"),
)
# Why SAEs of these of SAELens' loaders are refused; tests/model/SAE_FILES.md says what becomes of all loaders.
_UNUSABLE = {
    "connor_rob_hook_z": "reads heads without the value bias, which transformers adds",
    "gemma_2_transcoder": "reads a norm before its gain, which transformers does not give",
    "temporal": "encodes sequences, not tokens",
}
_OF_EMBEDDING = "reads the embedding, before the first layer"
_LAYER = re.compile(r"(?:blocks\.|layer_?|^l)(\d+)")
_WIDTH = re.compile(r"[-_]w?-?(\d+k|(?<=width_)\d+m)(?![a-z0-9])")  # a bare "-270m" is a model size


def _registry_file() -> Path:
    spec = importlib.util.find_spec("sae_lens")
    file = Path(spec.origin).with_name("pretrained_saes.yaml") if spec and spec.origin else None
    if file is None or not file.is_file():
        raise SaeError(
            "sae: SAELens' registry of pre-trained SAEs cannot be read: sae_lens is not installed, or without its "
            "pretrained_saes.yaml; run `pip install --upgrade sae-lens`."
        )
    return file


def _hook_name(spec: str, layer: int | None) -> str | None:
    if layer is None:
        return "hook_embed" if "/embedding/" in spec else None
    for pattern, site in _SITES:
        if match := re.search(pattern, spec):
            return f"blocks.{layer}.{match.expand(site)}"
    return None


def _entry(release: str, fields: dict[str, Any], sae: dict[str, Any]) -> SaeEntry:
    sae_id, neuronpedia_id = sae["id"], sae.get("neuronpedia")
    spec = f"{release}/{sae_id}"
    in_id = _LAYER.search(sae_id)
    layer = int(in_id[1]) if in_id else None
    width = _WIDTH.search(f"{spec} {neuronpedia_id} {fields['repo_id']}")
    transcoder = "transcoder" in f"{release} {fields.get('conversion_func')}"
    in_path = re.search(r"average_l0_(\d+)", str(sae["path"]))  # "canonical" entries state their l0 only there
    l0 = sae.get("l0", in_path[1] if in_path else None)
    hook_name = None if transcoder else _hook_name(spec, layer)
    return SaeEntry(
        release=release,
        sae_id=sae_id,
        model=_MODEL_CORRECTIONS.get(release, fields["model"]),
        hook_name=hook_name,
        layer=layer,
        width=width[1] if width else None,
        l0=None if l0 is None else float(l0),
        kind="transcoder" if transcoder else "sae",
        neuronpedia_id=neuronpedia_id,
        unusable=_OF_EMBEDDING if hook_name == "hook_embed" else _UNUSABLE.get(fields.get("conversion_func", "")),
    )


@lru_cache(maxsize=1)
def _read() -> tuple[dict[str, dict[str, SaeEntry]], dict[str, SaeEntry]]:
    """All SAEs by release and id, and by repository and path."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be built without libyaml
    content = yaml.load(_registry_file().read_text(encoding="utf-8"), Loader=loader)
    by_name: dict[str, dict[str, SaeEntry]] = {release: {} for release in content}
    by_place: dict[str, SaeEntry] = {}
    for release, fields in content.items():
        for sae in fields["saes"]:
            entry = by_name[release][sae["id"]] = _entry(release, fields, sae)
            by_place.setdefault(f"{fields['repo_id']}/{sae['path']}", entry)
    return by_name, by_place


def _releases() -> dict[str, dict[str, SaeEntry]]:
    return _read()[0]


def base_name(model_id: str) -> str:
    """A model's name in lower case, without organisation or folder."""
    return model_id.rstrip("/").rsplit("/", maxsplit=1)[-1].lower()


def _model_key(model_id: str) -> str:
    """A model's base name, the same for every name that hubs give it."""
    name = base_name(model_id)
    return _ALIASES.get(name, name.removeprefix("meta-"))  # Meta-Llama-3.1-8B was renamed Llama-3.1-8B


def saes_for(model_id: str) -> tuple[SaeEntry, ...]:
    """Find the pre-trained SAEs of a model.

    Args:
        model_id: Hugging Face id, folder named like it or TransformerLens alias; organisation and case do not matter.

    Returns:
        Its SAEs and transcoders in the registry's order; empty if there are none.

    Raises:
        SaeError: if sae_lens is not installed.
    """
    key = _model_key(model_id)
    return tuple(sae for saes in _releases().values() for sae in saes.values() if _model_key(sae.model) == key)


def base_of(model_id: str) -> str | None:
    """Find the registered model whose name, with something after it, is a model's: of gemma-3-270m-ours, gemma-3-270m.

    Args:
        model_id: as for `saes_for`.

    Returns:
        The longest such name as the registry has it; None if there is none.

    Raises:
        SaeError: if sae_lens is not installed.
    """
    key = _model_key(model_id)
    models = {sae.model for saes in _releases().values() for sae in saes.values()}
    bases = [model for model in models if key.startswith(f"{_model_key(model)}-")]
    return max(bases, key=lambda model: (len(_model_key(model)), model), default=None)


def ways_without(model_id: str | None = None) -> str:
    """Say what one can give as `sae=` where nothing was given or nothing is known.

    Args:
        model_id: as for `saes_for`; None if it is not known yet.

    Raises:
        SaeError: if sae_lens is not installed.
    """
    if model_id and (known := saes_for(model_id)):
        third = f'"auto" takes one of the {len(known)} that `sts-callback saes --model {model_id}` lists'
    else:
        base = base_of(model_id) if model_id else None
        whose = f"its base model, if that is {base}" if base else "its base model"
        third = f"take one of {whose}: `sts-callback saes --model {base or 'ID'}` lists them"
    return (
        f'There are three ways: "{NO_SAE}" reads raw activations, without an SAE; `sts-callback sae train --model '
        f"{model_id or 'ID'} --train FILE --out DIR` trains one; or {third}."
    )


def find(spec: str) -> SaeEntry | None:
    """Look up one SAE by its exact name.

    Args:
        spec: `release/sae_id`, or the hub repository and the path in it that the registry has for one.

    Returns:
        The SAE, or None if the registry does not hold it.

    Raises:
        SaeError: if sae_lens is not installed.
    """
    by_name, by_place = _read()
    release, _, sae_id = spec.partition("/")
    return by_name.get(release, {}).get(sae_id) or by_place.get(spec)


def near_names(spec: str, n: int = 5) -> tuple[str, ...]:
    """Find the existing names that are most like a misspelt one.

    Args:
        spec: `release/sae_id`; either part may be wrong.
        n: the most names to return, at least 1.

    Returns:
        Up to `n` specs, the most similar first; empty if no release has a similar name.

    Raises:
        SaeError: if sae_lens is not installed.
    """
    release, _, sae_id = spec.partition("/")
    releases = _releases()
    near_releases = [release] if release in releases else difflib.get_close_matches(release, releases, n=3)
    near = [f"{r}/{i}" for r in near_releases for i in difflib.get_close_matches(sae_id, releases[r], n=n, cutoff=0.0)]
    return tuple(difflib.get_close_matches(spec, near, n=n, cutoff=0.0))


def off_depth(layer: int, n_layers: int) -> int:
    """How far a layer is from two thirds of the depth, in thirds of a layer: the nearest one is read where none is named."""
    return abs(3 * layer - 2 * n_layers)


def best_for(model_id: str, n_layers: int) -> SaeEntry:
    """Choose the SAE that `sae="auto"` means.

    It is an SAE on the residual stream after a layer. Its layer is nearest to two thirds of the depth; then its width is
    nearest to 16k, by ratio; then its l0 is nearest to 50. What the registry does not say counts as farthest. Of equal
    ones the first in alphabetical order is taken, so the choice is always the same.

    Args:
        model_id: as for `saes_for`.
        n_layers: number of decoder layers of the model.

    Returns:
        The chosen SAE.

    Raises:
        SaeError: if the registry holds none for this model, or sae_lens is not installed.
    """

    def distance(sae: SaeEntry) -> tuple[float, float, float, str]:
        layer = math.inf if sae.layer is None else off_depth(sae.layer, n_layers)
        thousands = float(sae.width[:-1]) * (1000 if sae.width[-1] == "m" else 1) if sae.width else math.inf
        l0 = math.inf if sae.l0 is None else abs(sae.l0 - 50)
        return layer, abs(math.log2(thousands / 16)), l0, sae.spec

    registered = saes_for(model_id)
    # "_step_" marks SAEs saved in the middle of their own training, the first of them untrained.
    usable = [
        sae
        for sae in registered
        if (sae.hook_name or "").endswith(".hook_resid_post") and "_step_" not in sae.sae_id and not sae.unusable
    ]
    if not usable:
        others = f"Take one by its name: `sts-callback saes --model {model_id}` lists them."
        raise SaeError(
            f'sae: "auto" needs an SAE on the residual stream after a layer of {model_id!r}, and SAELens lists none '
            f"among its {len(registered)} for this model. {others if registered else ways_without(model_id)}"
        )
    return min(usable, key=distance)


def why_best(entry: SaeEntry, n_layers: int) -> str:
    """Say in one line why `best_for` chose an SAE for a model of this depth."""
    width, l0 = entry.width or "not stated", "not stated" if entry.l0 is None else f"{entry.l0:.0f}"
    return (
        f'sae: "auto" takes {entry.spec}: an SAE on the residual stream after layer {entry.layer} of {n_layers}, nearest to two '
        f"thirds of the depth; of that layer's the width nearest to 16k (it is {width}), then the L0 nearest to 50 (it is {l0})."
    )
