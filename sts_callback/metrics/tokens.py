"""Which tokens count."""

from __future__ import annotations

import torch


def is_ordinary(norms: torch.Tensor, median_norm: float, multiple: float) -> torch.Tensor:
    """Tell ordinary tokens from attention sinks by the norm of their residual stream.

    About 1 % of tokens carry massive activations, 5 to 100 times the median norm, that hold no content. With them in, every text
    shifts the same features and the score is noise.

    Args:
        norms: Euclidean norms of the activations at the hook point, `(n_tokens,)`.
        median_norm: median norm over a reference sample of the same model and hook point.
        multiple: tokens count if their norm is below this multiple of the median.

    Returns:
        `(n_tokens,)` booleans, true where the token counts.

    """
    return norms < multiple * median_norm
