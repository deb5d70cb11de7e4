"""Running sums per query: what is kept of a stream of token activations, whatever its length."""

from __future__ import annotations

import torch


class QuerySums:
    """Adds up rows of tokens by the query they belong to, on their device; only reading it out waits for a GPU."""

    def __init__(self, n_queries: int, n_columns: int, device: torch.device) -> None:
        self._sums = torch.zeros(n_queries, n_columns, device=device)

    def add(self, values: torch.Tensor, query_index: torch.Tensor) -> None:
        """Add token rows.

        Args:
            values: `(n_tokens, n_columns)`, cast to float32.
            query_index: the query of each token, `(n_tokens,)`.

        """
        self._sums.index_add_(0, query_index, values.float())

    @property
    def result(self) -> torch.Tensor:
        """Sums, `(n_queries, n_columns)`, float32 on the CPU."""
        return self._sums.cpu()


def token_mean(sums: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
    """Mean over all tokens of all queries; NaN where no token counts.

    Args:
        sums: per query, `(n_queries, n_columns)` or `(n_queries,)`.
        n_tokens: tokens of each query, `(n_queries,)`.

    Returns:
        `(n_columns,)` or a scalar, float64.

    """
    return sums.double().sum(dim=0) / n_tokens.sum().double()
