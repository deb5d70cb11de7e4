"""What reads the activations of a hook point: an SAE, or, with `sae="none"`, nothing but these activations themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from sts_callback.config import NO_SAE
from sts_callback.errors import SaeError
from sts_callback.model.hooks import find_layers, model_name, text_config
from sts_callback.model.registry import off_depth
from sts_callback.model.sae import Reconstruction, SaeEncoder, SaeSource, load_encoder
from sts_callback.model.sae_files import is_no_sae

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class RawActivations:
    """In an SAE's place: it reads the residual stream after a layer and has no features.

    All that is summed over features is then taken from the activations themselves: the baseline `raw` of the validation.
    """

    layer: int
    d_in: int
    """Width of the activations that it reads."""
    device: torch.device

    name = "raw activations"
    fingerprint = NO_SAE
    d_sae = 0
    n_bytes = 0
    reconstructs = False
    neuronpedia_id = None

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of the hook point."""
        return f"blocks.{self.layer}.hook_resid_post"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The activations of no features, `(n_tokens, 0)`."""
        return torch.zeros(len(x), 0, device=self.device)

    def reconstruct(self, x: torch.Tensor) -> Reconstruction:
        """The activations, `(n_tokens, d_in)`, as an encoder without features has them; no dictionary leaves anything of them."""
        x = x.to(self.device, torch.float32)
        return Reconstruction(self.encode(x), x, torch.full_like(x, float("nan")))


Encoder: TypeAlias = SaeEncoder | RawActivations


def encoder_for(sae: SaeSource, model: nn.Module) -> Encoder:
    """Load an SAE for a model, to the model's device, or read raw activations there.

    Args:
        sae: the source.
        model: to be measured.

    Raises:
        SaeError: if there is no such layer, and as `load_encoder`.

    """
    layers = find_layers(model)
    device = next(layers.parameters()).device
    if isinstance(sae, (str, Path)) and is_no_sae(str(sae)):
        return RawActivations(_layer(str(sae), len(layers)), int(text_config(model).hidden_size), device)  # type: ignore[attr-defined]
    encoder = load_encoder(sae, model_name(model), len(layers))
    return encoder.to(device)


def _layer(spec: str, n_layers: int) -> int:
    """The layer that a source names, or that which is nearest to two thirds of the depth, as `sae="auto"` has it."""
    given = spec.partition(":")[2]
    layer = int(given) if given else min(range(n_layers), key=lambda i: off_depth(i, n_layers))
    if layer >= n_layers:
        raise SaeError(f"layer: got {layer}; allowed is 0 to {n_layers - 1}, the model has {n_layers} layers.")
    return layer
