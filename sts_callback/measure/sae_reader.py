"""An SAE at its hook point: which tokens count there, and how well the SAE fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sts_callback.errors import ModelError, SaeError
from sts_callback.metrics.sums import is_not_outlier
from sts_callback.model.encoder import Encoder
from sts_callback.model.hooks import HookPoint
from sts_callback.model.sae import SaeEncoder

# Activations that are encoded at once: few enough to reuse the same memory, enough for a fast matrix product.
_CHUNK_ELEMENTS, _FEWEST_TOKENS = 2**22, 256


@dataclass(frozen=True)
class Reference:
    """Norms of the untuned model's activations. Thresholds of later checks depend on them."""

    median_norm: float
    """Median activation norm of query tokens at the hook point."""
    mean_norm: float
    """Mean activation norm of the query tokens that are no outliers."""


@dataclass(frozen=True)
class Fit:
    """How well an SAE fits the activations of query tokens that are no outliers."""

    n_tokens: int
    fvu: float
    """Fraction of variance unexplained (FVU). NaN for a transcoder and without an SAE."""
    l0: float
    """Active features per token (L0)."""
    dead_fraction: float
    """Share of features that no token activates. NaN without an SAE."""


class SAEReader:
    """An SAE, its hook point and, after `calibrate` or `adopt`, the reference norms there."""

    def __init__(self, encoder: Encoder, point: HookPoint, max_norm_multiple: float) -> None:
        self.encoder, self.point = encoder, point
        self.reference: Reference
        self._max_norm_multiple = max_norm_multiple

    def calibrate(self, x: torch.Tensor) -> Fit:
        """Set the reference and measure how the SAE fits.

        Args:
            x: a sample of activations at the hook point, `(n_tokens, d_in)`.

        Raises:
            ModelError: if the model gives NaN or infinite numbers.
            SaeError: if the SAE has another width than the model.

        """
        if not bool(x.isfinite().all()):
            raise ModelError(
                f"model: activations at {self.encoder.hook_name} are NaN or infinite before training; look at its weights, or "
                "load it in float32 or bfloat16 in place of float16."
            )
        if x.shape[1] != self.encoder.d_in:
            raise SaeError(
                f"sae: {self.encoder.name} reads activations of width {self.encoder.d_in}, but {self.encoder.hook_name} of this "
                f"model has width {x.shape[1]}; take an SAE that was trained on this model."
            )
        x, median_norm = self._without_sinks(x.float())
        self.adopt(Reference(median_norm, x.norm(dim=1).mean().item()))
        return self._fit(x)

    def adopt(self, reference: Reference) -> None:
        """Use the reference of an earlier session."""
        self.reference = reference
        if isinstance(self.encoder, SaeEncoder) and self.encoder.needs_scale:
            self.encoder = self.encoder.scaled(reference.mean_norm)

    def fvu(self, x: torch.Tensor) -> float:
        """Fraction of variance unexplained (FVU) of any activations, `(n_tokens, d_in)`, without attention sinks."""
        return self._fit(self._without_sinks(x.float())[0]).fvu

    def not_outlier(self, x: torch.Tensor) -> torch.Tensor:
        """Mark the tokens of `(n_tokens, d_in)` that are no attention sinks by the norms of step 0, `(n_tokens,)` booleans."""
        return self._is_below(x, self.reference.median_norm)

    def not_outlier_now(self, x: torch.Tensor) -> torch.Tensor:
        """The same after training, by current norms: training may rescale the whole residual stream."""
        return self._is_below(x, x.float().norm(dim=1).median().clamp_min(self.reference.median_norm))

    def chunks(self, n_tokens: int) -> Iterator[slice]:
        """Slices of tokens to encode at once."""
        size = max(_FEWEST_TOKENS, _CHUNK_ELEMENTS // (self.encoder.d_sae or self.encoder.d_in))
        return (slice(start, start + size) for start in range(0, n_tokens, size))

    def _without_sinks(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Drop the outliers of a sample of tokens by its own median norm. Returns that norm too."""
        median_norm = x.norm(dim=1).median().item()
        return x[self._is_below(x, median_norm)], median_norm

    def _is_below(self, x: torch.Tensor, median_norm: float | torch.Tensor) -> torch.Tensor:
        norms = x.float().norm(dim=1)
        of_reference = median_norm if isinstance(median_norm, torch.Tensor) else norms.new_full((), median_norm)
        return is_not_outlier(norms, of_reference, self._max_norm_multiple)  # rounded alike, whatever the median is from

    def _fit(self, x: torch.Tensor) -> Fit:
        left, n_active = 0.0, 0
        ever, seen = torch.zeros(self.encoder.d_sae, dtype=torch.bool, device=self.encoder.device), []
        for chunk in self.chunks(len(x)):
            found = self.encoder.reconstruct(x[chunk])
            left += _sum_of_squares(found.left)
            n_active += int(found.acts.count_nonzero())
            ever |= found.acts.any(dim=0)
            seen.append(found.x)
        whole = torch.cat(seen)
        return Fit(
            n_tokens=len(x),
            fvu=left / _sum_of_squares(whole - whole.mean(dim=0)),
            l0=n_active / len(x),
            dead_fraction=int((~ever).sum()) / (len(ever) or math.nan),
        )


def _sum_of_squares(x: torch.Tensor) -> float:
    """Of the rows in float32 on their device, of all in float64 on the CPU: Apple's GPU has none."""
    return float(x.square().sum(dim=1).cpu().double().sum())
