"""Random projections: squared distances of wide activations from a few numbers a token, so that step 0 can be kept."""

from __future__ import annotations

import torch

WIDTH = 64
"""Numbers a vector is kept as; its squared length is then known to sqrt(2 / 64), 18 %, that of a sum over many to less."""
_SEED = 20260302  # any, but always the same: a resumed run projects as the first session did


def sketch(x: torch.Tensor) -> torch.Tensor:
    """Project vectors so that squared distances are kept in expectation.

    Args:
        x: `(n_tokens, d)`.

    Returns:
        `(n_tokens, WIDTH)`, float32, on the same device. Equal vectors have equal sketches; the sketch of a difference is the
        difference of the sketches.

    Source: W. B. Johnson and J. Lindenstrauss, 1984; here with Gaussian entries.

    """
    generator = torch.Generator().manual_seed(_SEED)
    projection = torch.randn(x.shape[1], WIDTH, generator=generator) / WIDTH**0.5
    projected: torch.Tensor = x.float() @ projection.to(x.device)
    return projected
