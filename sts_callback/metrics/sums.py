"""Reduce a stream of tokens: which tokens count, sums per query, and sparse activations and sketches of step 0."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from sts_callback.metrics.copies import sent

SKETCH_WIDTH = 64
"""Length of a sketch. It gives the squared length of one vector to sqrt(2 / 64), 18 %, and of a sum of many more exactly."""
_SEED = 20260302  # any seed, but always the same: a resumed run must project as the first session did


def is_not_outlier(norms: torch.Tensor, median_norm: torch.Tensor | float, multiple: float) -> torch.Tensor:
    """Mark the tokens that are no attention sinks, by the norm of their residual stream.

    About 1 % of tokens have massive activations, 5 to 100 times the median norm, without content. If they count, every text
    shifts the same features and the score is noise.

    Args:
        norms: Euclidean norms of the activations at the hook point, `(n_tokens,)`.
        median_norm: median norm of a reference sample at the same hook point of the same model.
        multiple: a token counts if its norm is below this multiple of the median.

    Returns:
        `(n_tokens,)` booleans, true if the token counts.

    """
    return norms < multiple * median_norm


class QuerySums:
    """Adds up token rows by query, on their device. Only reading the sums waits for a GPU.

    The order of additions is always the same: `index_add_` leaves it to chance on a GPU, and a product with a matrix of ones and
    zeros may be rounded to fewer bits.
    """

    def __init__(self, n_queries: int, n_columns: int, device: torch.device) -> None:
        self._sums = torch.zeros(n_queries, n_columns, device=device)

    def add(self, values: torch.Tensor, query_index: torch.Tensor) -> None:
        """Add token rows.

        Args:
            values: `(n_tokens, n_columns)`, cast to float32.
            query_index: the query of each token, `(n_tokens,)` on the CPU. Neighbours of one query are added at once.

        """
        queries, lengths = torch.unique_consecutive(query_index, return_counts=True)
        for query, rows in zip(queries.tolist(), torch.split(values, lengths.tolist()), strict=True):
            self._sums[query] += rows.float().sum(dim=0)

    @property
    def result(self) -> torch.Tensor:
        """Sums, `(n_queries, n_columns)`, float32 on the CPU."""
        return self._sums.cpu()


def token_mean(sums: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens of all queries. NaN if no token counts.

    Args:
        sums: sums of each query, `(n_queries, n_columns)` or `(n_queries,)`.
        n_tokens: number of tokens of each query, `(n_queries,)`.

    Returns:
        `(n_columns,)` or a scalar, float64.

    """
    return sums.double().sum(dim=0) / n_tokens.sum().double()


def active_entries(acts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the non-zero entries of feature activations, for whose number a GPU is waited for once.

    Args:
        acts: `(n_tokens, d_sae)`.

    Returns:
        Their places in `acts.flatten()`, `(n_nonzero,)`, and where among them each token's begin, and the last one's end,
        `(n_tokens + 1,)`.

    """
    entries = acts.flatten().nonzero()[:, 0]
    return entries, torch.searchsorted(entries, torch.arange(len(acts) + 1, device=acts.device) * acts.shape[1])


@dataclass(frozen=True)
class SparseActs:
    """Non-zero feature activations of a sequence of tokens."""

    n_active: torch.Tensor
    """Number of active features of each token, `(n_tokens,)`, int32."""
    features: torch.Tensor
    """Their indices, token by token, `(n_nonzero,)`, int32."""
    values: torch.Tensor
    """Their activations, `(n_nonzero,)`, float32."""

    @classmethod
    def of(cls, acts: torch.Tensor) -> SparseActs:
        """Keep the non-zero entries of `(n_tokens, d_sae)`, on their device, whose number a GPU is waited for once."""
        entries, bounds = active_entries(acts)
        return cls(bounds.diff().int(), (entries % acts.shape[1]).int(), acts.flatten()[entries].float())

    @classmethod
    def cat(cls, parts: list[SparseActs]) -> SparseActs:
        """Join several parts in order, on the CPU. Without parts there are no tokens."""
        if not parts:
            return cls(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
        return cls(
            torch.cat([p.n_active for p in parts]).cpu(),
            torch.cat([p.features for p in parts]).cpu(),
            torch.cat([p.values for p in parts]).cpu(),
        )

    def dense(self, start: int, stop: int, d_sae: int, device: torch.device) -> torch.Tensor:
        """Tokens `start` to `stop` as a dense tensor, `(stop - start, d_sae)`, float32."""
        ends = self.n_active.long().cumsum(0)
        first = int(ends[start - 1]) if start else 0
        last = int(ends[stop - 1]) if stop else 0
        rows = torch.repeat_interleave(torch.arange(stop - start), self.n_active[start:stop].long())
        out = torch.zeros((stop - start) * d_sae, device=device)
        out[sent(rows * d_sae + self.features[first:last].long(), device)] = sent(self.values[first:last], device)
        return out.view(stop - start, d_sae)


def sketch(x: torch.Tensor) -> torch.Tensor:
    """Project vectors to fewer dimensions. Squared distances are kept in expectation.

    Args:
        x: `(n_tokens, d)`.

    Returns:
        `(n_tokens, SKETCH_WIDTH)`, float32, on the same device. Equal vectors have equal sketches. The sketch of a difference
        is the difference of the sketches.

    Source: W. B. Johnson and J. Lindenstrauss, 1984; here with Gaussian entries.

    """
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ _projection(x.shape[1], x.device)


@functools.lru_cache(maxsize=8)
def _projection(d: int, device: torch.device) -> torch.Tensor:
    """The same of a width at every visit, `(d, SKETCH_WIDTH)`."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    drawn = torch.randn(d, SKETCH_WIDTH, generator=generator, device="cpu", dtype=torch.float32)
    return sent(drawn / SKETCH_WIDTH**0.5, device)
