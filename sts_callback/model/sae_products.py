"""What SAELens computes, in fewer passes over `(n_tokens, d_sae)`: on a CPU these passes can take longer than the products."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import embedding_bag

from sts_callback.metrics.sums import active_entries

# SAELens' classes that encode by one product and a bias, of which they keep what is above 0 and a threshold. Not their
# training classes, which go by the same architecture and keep what is below 0 too, nor anyone's own.
_RELU = {"StandardSAE", "JumpReLUSAE"}
# These decode by one product, a bias and the inverse of the input's normalisation.
_LINEAR = {"standard", "jumprelu", "gated", "topk"}
_SPARSE = 0.05  # above this share of active features the whole product is faster


def encoded(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """`sae.encode`, to the last bit.

    Args:
        sae: a SAELens `SAE` in float32, frozen.
        x: what it reads, `(n_tokens, d_in)`, float32.

    Returns:
        Feature activations, `(n_tokens, d_sae)`. They may be written to.

    """
    kind = type(sae).__name__
    if kind not in _RELU:
        return sae.encode(x)  # type: ignore[no-any-return]
    acts: torch.Tensor = (sae.process_sae_in(x) @ sae.W_enc).add_(sae.b_enc)
    return acts.relu_() if kind == "StandardSAE" else acts.masked_fill_(acts <= sae.threshold.clamp_min(0), 0)


def decoded(sae: Any, acts: torch.Tensor) -> torch.Tensor:
    """`sae.decode`, to rounding. On a CPU only activations other than 0 are used.

    Args:
        sae: the one that has encoded the same tokens last: it keeps what undoes the normalisation of its input.
        acts: feature activations, `(n_tokens, d_sae)`.

    Returns:
        `(n_tokens, d_in)`.

    """
    by_norm = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    if acts.device.type == "cpu" and sae.cfg.architecture() in _LINEAR and not by_norm:
        entries, bounds = active_entries(acts)
        if len(entries) < _SPARSE * acts.numel():
            features, weights = entries % acts.shape[1], acts.flatten()[entries]
            summed = embedding_bag(features, sae.W_dec, bounds[:-1], mode="sum", per_sample_weights=weights)
            return sae.run_time_activation_norm_fn_out(summed + sae.b_dec)  # type: ignore[no-any-return]
    return sae.decode(acts)  # type: ignore[no-any-return]


def feature_gradient(sae: Any, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Turn a gradient with respect to what an SAE reads into one with respect to its features.

    Args:
        sae: a SAELens `SAE` in float32, frozen.
        x: what it reads, `(n_tokens, d_in)`, float32.
        gradient: of a loss with respect to `x`, `(n_tokens, d_in)`, float32.

    Returns:
        `(n_tokens, d_sae)`, 0 where a feature is inactive.

    """
    acts = encoded(sae, x).requires_grad_()
    with torch.enable_grad():
        again = decoded(sae, acts)
    (through_decoder,) = torch.autograd.grad(again, acts, gradient)
    through_features: torch.Tensor = through_decoder.masked_fill_(acts == 0, 0)
    return through_features
