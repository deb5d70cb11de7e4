"""Where an SAE reads, which tokens it counts there, and how well it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sts_callback.errors import ModelError, SaeError
from sts_callback.metrics.sums import is_not_outlier
from sts_callback.model.hooks import HookPoint
from sts_callback.model.sae import SaeEncoder

# Activations encoded at once: few enough for memory that is used again and again, enough tokens for a fast matrix product.
_CHUNK_ELEMENTS, _FEWEST_TOKENS = 2**22, 256


@dataclass(frozen=True)
class Reference:
    """What the untuned model's activations look like; thresholds of later visits hang on it."""

    median_norm: float
    """Median activation norm of query tokens at the hook point."""
    mean_norm: float
    """Mean activation norm of those among them that are no outliers."""


@dataclass(frozen=True)
class Fit:
    """How well an SAE fits the activations that it reads, over query tokens that are no outliers."""

    n_tokens: int
    fvu: float
    """Fraction of their variance that the reconstruction leaves (FVU); NaN for a transcoder."""
    l0: float
    """Active features a token."""
    dead_fraction: float
    """Share of the features that no token activates."""


class SAEReader:
    """An SAE, where it reads, and what is usual there, after `calibrate` or `adopt`."""

    def __init__(self, encoder: SaeEncoder, point: HookPoint, max_norm_multiple: float) -> None:
        self.encoder, self.point = encoder, point
        self.reference: Reference
        self._max_norm_multiple = max_norm_multiple

    def calibrate(self, x: torch.Tensor) -> Fit:
        """Set the reference and see how the SAE fits.

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
        """Take the reference of an earlier visit."""
        self.reference = reference
        if self.encoder.needs_scale:
            self.encoder = self.encoder.scaled(reference.mean_norm)

    def fvu(self, x: torch.Tensor) -> float:
        """Fraction of variance that the SAE would leave of activations from anywhere, `(n_tokens, d_in)`, without their sinks."""
        return self._fit(self._without_sinks(x.float())[0]).fvu

    def not_outlier(self, x: torch.Tensor) -> torch.Tensor:
        """Which of `(n_tokens, d_in)` are no attention sinks by what is usual at step 0, `(n_tokens,)` booleans."""
        return self._is_below(x, self.reference.median_norm)

    def not_outlier_now(self, x: torch.Tensor) -> torch.Tensor:
        """The same after training, which may rescale the whole stream: sinks are what stands out from what is usual now."""
        return self._is_below(x, max(self.reference.median_norm, x.float().norm(dim=1).median().item()))

    def chunks(self, n_tokens: int) -> Iterator[slice]:
        """Slices of tokens that are encoded at once."""
        size = max(_FEWEST_TOKENS, _CHUNK_ELEMENTS // self.encoder.d_sae)
        return (slice(start, start + size) for start in range(0, n_tokens, size))

    def _without_sinks(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Of a sample of tokens those that are no outliers, by its own median norm, and that norm."""
        median_norm = x.norm(dim=1).median().item()
        return x[self._is_below(x, median_norm)], median_norm

    def _is_below(self, x: torch.Tensor, median_norm: float) -> torch.Tensor:
        return is_not_outlier(x.float().norm(dim=1), median_norm, self._max_norm_multiple)

    def _fit(self, x: torch.Tensor) -> Fit:
        left, n_active = 0.0, 0
        ever, seen = torch.zeros(self.encoder.d_sae, dtype=torch.bool, device=self.encoder.sae.device), []
        for chunk in self.chunks(len(x)):
            found = self.encoder.reconstruct(x[chunk])
            active = found.acts != 0
            left += float(found.left.double().square().sum())
            n_active += int(active.sum())
            ever |= active.any(dim=0)
            seen.append(found.x)
        whole = torch.cat(seen)
        return Fit(
            n_tokens=len(x),
            fvu=left / float((whole - whole.mean(dim=0)).double().square().sum()),
            l0=n_active / len(x),
            dead_fraction=float((~ever).double().mean()),
        )
