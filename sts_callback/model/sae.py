"""Sparse autoencoders as encoders of activations. No other module imports SAELens."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from sts_callback.config import NO_SAE, require, whole
from sts_callback.errors import ConfigError, SaeError
from sts_callback.model import registry
from sts_callback.model.quality import require_quality
from sts_callback.model.sae_files import downloaded, place_of, reader_of, remedy, tensors_only
from sts_callback.model.sae_products import decoded, encoded, feature_gradient

if TYPE_CHECKING:
    from sae_lens import SAE

SaeSource: TypeAlias = "str | Path | SAE[Any]"
"""SAELens `release/sae_id`, a folder of a hub repository or of this machine, an `SAE` object, `"auto"`, or `"none"`,
see `model.encoder`."""

logger = logging.getLogger(__name__)


_WEIGHTS = ("W_enc", "b_enc", "threshold", "b_gate", "r_mag", "b_mag", "b_dec", "W_dec")
_METADATA: dict[str, type | tuple[type, ...]] = {  # the metadata of an SAE that is used
    "hf_hook_name": str,
    "hook_name": str,
    "model_from_pretrained_kwargs": Mapping,
    "l0": (int, float),
    "model_name": str,
    "neuronpedia_id": str,
}
# The configuration that changes an answer.
_ENCODES = ("d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "k", "rescale_acts_by_decoder_norm")


class Reconstruction(NamedTuple):
    """Activations, encoded by an SAE."""

    acts: torch.Tensor
    """Feature activations, `(n_tokens, d_sae)`, float32."""
    x: torch.Tensor
    """The input as the SAE sees it, `(n_tokens, d_in)`, float32."""
    left: torch.Tensor
    """Reconstruction error, `(n_tokens, d_in)`. NaN for a transcoder."""


@dataclass(frozen=True)
class SaeEncoder:
    """An SAE with what one needs to use it correctly: its hook point, its input's preparation and its identity."""

    name: str
    """`release/sae_id`, or the folder's name."""
    hook_name: str
    """The hook point that it was trained on."""
    sae: SAE[Any]
    """The SAE in float32, frozen. It is not the user's own object."""
    fingerprint: str
    """SHA-256 of its weights and of the configuration that changes an answer."""
    centred: bool = False
    """Whether it expects the activations of a LayerNorm model without their mean over `d_in` (TransformerLens' default)."""
    nominal_l0: float | None = None
    """Active features per token, as its authors state."""
    trained_on: str | None = None
    """The model that it was trained on, as its authors state."""
    neuronpedia_id: str | None = None
    """Its id on Neuronpedia, `model/source`."""

    @property
    def d_in(self) -> int:
        """Width of the activations that it reads."""
        return int(self.sae.cfg.d_in)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.sae.cfg.d_sae)

    @property
    def device(self) -> torch.device:
        """Where its weights are, and what it gives."""
        return self.sae.device  # type: ignore[no-any-return]

    @property
    def n_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(p.numel() * p.element_size() for p in self.sae.parameters())

    @property
    def architecture(self) -> str:
        """Its architecture, by SAELens' name."""
        return str(self.sae.cfg.architecture())

    @property
    def needs_scale(self) -> bool:
        """Whether it was trained on rescaled activations and the scale is not yet folded into its weights."""
        return bool(self.sae.cfg.normalize_activations == "expected_average_only_in")

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Compute feature activations in float32, also under autocast.

        Args:
            x: activations at the hook point, `(n_tokens, d_in)`, any float dtype and device.

        Returns:
            `(n_tokens, d_sae)`, float32, on the SAE's device.

        """
        x = self._prepared(x)
        with torch.autocast(x.device.type, enabled=False):
            return encoded(self.sae, x)

    @property
    def reconstructs(self) -> bool:
        """Whether it reconstructs what it reads. A transcoder predicts another activation."""
        stated = self.sae.cfg.metadata
        return "transcoder" not in self.architecture and stated.get("hook_name_out") in (None, stated.get("hook_name"))

    @torch.no_grad()
    def reconstruct(self, x: torch.Tensor) -> Reconstruction:
        """Compute feature activations and reconstruction errors in float32.

        Args:
            x: activations at the hook point, `(n_tokens, d_in)`, any float dtype and device.

        """
        x = self._prepared(x)
        with torch.autocast(x.device.type, enabled=False):
            acts = encoded(self.sae, x)
            left = x - decoded(self.sae, acts) if self.reconstructs else torch.full_like(x, float("nan"))
        return Reconstruction(acts, x, left)

    @torch.no_grad()
    def feature_gradient(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Turn a gradient with respect to activations into one with respect to feature activations.

        The gradient of an inactive feature is 0: a small change of its input leaves it inactive. Active ones may be negative.

        Args:
            x: activations at the hook point, `(n_tokens, d_in)`.
            gradient: gradient of a loss with respect to `x`, `(n_tokens, d_in)`.

        Returns:
            `(n_tokens, d_sae)`, float32.

        """
        x = self._prepared(x)
        with torch.autocast(x.device.type, enabled=False):
            return feature_gradient(self.sae, x, gradient.to(x))

    def _prepared(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.sae.device, torch.float32)
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    def scaled(self, mean_norm: float) -> SaeEncoder:
        """Fold the scale of its training data into its weights. The scale is estimated as sqrt(d_in) over the mean norm."""
        sae = copy.deepcopy(self.sae)
        sae.fold_activation_norm_scaling_factor(self.d_in**0.5 / mean_norm)
        return replace(self, sae=sae)

    def to(self, device: torch.device) -> SaeEncoder:
        """Move to another device."""
        return replace(self, sae=self.sae.to(device))


def require_saes(given: Any) -> list[SaeSource]:
    """Return one SAE or several as a list. Nothing is loaded or looked up yet.

    Args:
        given: what the user gave.

    Raises:
        ConfigError: if there is none.
        SaeError: if one cannot be a source.

    """
    saes = list(given) if isinstance(given, (list, tuple)) else [given]
    if not saes or any(sae is None for sae in saes):
        raise ConfigError(f"sae: got none. {registry.ways_without()}")
    for sae in saes:
        is_name = isinstance(sae, (str, Path)) and sae != ""
        if not (is_name or hasattr(getattr(sae, "cfg", None), "metadata")):
            raise SaeError(
                f"sae: got {sae!r:.80}; allowed are a SAELens release/sae_id, a folder, a sae_lens.SAE, 'auto', or 'none'."
            )
    return saes


def require_layer(saes: list[SaeSource], layer: Any) -> list[SaeSource]:
    """Put the layer into the source that says that raw activations are to be read.

    Args:
        saes: as `require_saes` gives them.
        layer: index of the layer, from 0; None is left to `model.encoder`.

    Raises:
        ConfigError: if it is no layer, or no source lacks one.

    """
    if layer is None:
        return saes
    layer = whole(layer, "layer", "the index of a layer, from 0", least=0)
    require(NO_SAE in saes, "layer", layer, f'none unless sae="{NO_SAE}": an SAE says itself which layer it reads')
    return [f"{NO_SAE}:{layer}" if sae == NO_SAE else sae for sae in saes]


def load_encoder(sae: SaeSource, model_id: str, n_layers: int) -> SaeEncoder:
    """Load an SAE from any source.

    Args:
        sae: the source.
        model_id: name of the model, for `"auto"`.
        n_layers: depth of the model, for `"auto"`.

    Raises:
        SaeError: if there is no such SAE (similar names are suggested), or it cannot be read or used.

    """
    require_saes(sae)
    with warnings.catch_warnings():  # SAELens registers filters, and warns of TransformerLens settings that are handled here
        warnings.simplefilter("ignore")
        if isinstance(sae, (str, Path)):
            name, loaded = _load(str(sae), model_id, n_layers)
        else:
            name = str(sae.cfg.metadata.get("sae_id") or "SAE object")
            loaded = copy.deepcopy(sae).to(dtype=torch.float32)
            loaded._setup_activation_normalization()  # its functions write to the SAE they were made for, the user's
    if any(p.is_meta or not bool(torch.isfinite(p).all()) for p in loaded.parameters()):
        raise SaeError(f"sae: weights of {name} are on the meta device, or not all finite numbers; load the SAE anew.")
    stated = _stated(name, loaded.cfg.metadata)
    hook_name = stated["hf_hook_name"] or stated["hook_name"]
    if not hook_name:
        raise SaeError(f"sae: {name} does not say which hook point it was trained on; set metadata.hook_name in its cfg.json.")
    loaded.turn_off_forward_pass_hook_z_reshaping()  # in transformers heads are flat already
    loaded.requires_grad_(False).eval()
    if not _is_per_token(loaded):
        raise SaeError(
            f"sae: {name} is a {loaded.cfg.architecture()} SAE, which does not encode a token by itself as it does among others; "
            "take another kind."
        )
    lens_options = stated["model_from_pretrained_kwargs"] or {}
    centred = bool(lens_options.get("center_writing_weights"))
    entry = registry.find(name) if "/" in name else None  # a folder is in no registry
    nominal_l0 = stated["l0"] or getattr(loaded.cfg, "k", None) or (entry.l0 if entry else None)
    return SaeEncoder(
        name,
        hook_name,
        loaded,
        _fingerprint(loaded, centred),
        centred,
        None if nominal_l0 is None else float(nominal_l0),
        (entry.model if entry else None) or stated["model_name"],  # SAELens calls the R1 distillation by its base model's name
        stated["neuronpedia_id"] or (entry.neuronpedia_id if entry else None),
    )


def _stated(name: str, metadata: Any) -> dict[str, Any]:
    """The metadata of an SAE. What is missing is None."""
    found = {}
    for key, kind in _METADATA.items():
        found[key] = value = metadata.get(key)
        if value is not None and not isinstance(value, kind):
            raise SaeError(f"sae: {name} has {value!r:.80} as metadata.{key}; correct it in its cfg.json, or leave it out there.")
    return found


def _is_per_token(sae: SAE[Any]) -> bool:
    """Whether tokens can be encoded one by one: most of a sample must give the same alone as among others.

    Not all of them have to: rounding can make an activation cross a threshold.
    """
    x = torch.randn(8, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)).to(sae.device)
    try:
        with torch.no_grad(), torch.autocast(sae.device.type, enabled=False):
            together, alone = sae.encode(x), torch.cat([sae.encode(x[i : i + 1]) for i in range(len(x))])
    except (AttributeError, RuntimeError, ValueError):
        return False
    errors = torch.linalg.vector_norm(together - alone, dim=1) / torch.linalg.vector_norm(together, dim=1).clamp_min(1e-30)
    return float(errors.median()) < 1e-4


def _load(spec: str, model_id: str, n_layers: int) -> tuple[str, SAE[Any]]:
    from sae_lens import SAE

    if spec == "auto" and not os.path.isdir(spec):
        best = registry.best_for(model_id, n_layers)
        logger.warning("%s", registry.why_best(best, n_layers))
        spec = best.spec
    place = place_of(spec)
    if place is None:
        return Path(spec).resolve().name, _from_folder(Path(spec))
    name = "/".join(place)
    try:
        if registry.find(name) is None:
            return name, _from_folder(downloaded(*place))
        with tensors_only():
            return name, SAE.from_pretrained(*place, dtype="float32")
    except SaeError:
        raise
    except Exception as error:  # SAELens, the hub's client and readers of files raise these, not all of which have a public name
        raise SaeError(f"sae: {name} could not be loaded from the hub ({error!r}); {remedy(error)}.") from error


def _from_folder(folder: Path) -> SAE[Any]:
    from sae_lens import SAE

    require_quality(folder)
    try:
        if read := reader_of(folder):
            return SAE.load_from_disk(folder, converter=lambda path, device, cfg_overrides: read(folder))
        return SAE.load_from_disk(folder, dtype="float32")
    except SaeError:
        raise
    except Exception as error:  # as above
        raise SaeError(f"sae: the folder {folder} cannot be read as an SAE ({error!r}); {remedy(error, folder)}.") from error


def _fingerprint(sae: SAE[Any], centred: bool) -> str:
    settings = [sae.cfg.architecture(), centred, *(getattr(sae.cfg, name, None) for name in _ENCODES)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, parameter in sorted(sae.named_parameters()):
        if name in _WEIGHTS:  # b_dec is subtracted from the input; W_dec gives the reconstruction error
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
