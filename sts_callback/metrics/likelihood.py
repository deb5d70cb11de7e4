"""Change of the answers' likelihood: the signed companion of every score."""

from __future__ import annotations

import torch


def mean_per_token(nll: torch.Tensor, n_answer: torch.Tensor) -> float:
    """Mean negative log-likelihood of an answer token.

    Args:
        nll: sums per query in nats, `(n_queries,)`.
        n_answer: answer tokens of each query, `(n_queries,)`.

    Returns:
        Nats per token; larger is worse.

    """
    return float(nll.double().sum() / n_answer.sum())


def change_per_token(after: torch.Tensor, before: torch.Tensor, n_answer: torch.Tensor) -> tuple[float, float]:
    """Change of the mean negative log-likelihood, and its standard error over queries.

    Tokens of one answer are not independent, so the error is that of a ratio of sums over queries (linearised).

    Args:
        after: sums per query in nats, `(n_queries,)`.
        before: the same before.
        n_answer: answer tokens of each query, `(n_queries,)`.

    Returns:
        Change in nats per token, above 0 is worse; and its standard error, NaN with fewer than two queries.

    Source: W. G. Cochran, Sampling Techniques, 3rd edition, section 6.4.

    """
    change, n = (after - before).double(), n_answer.double()
    mean = change.sum() / n.sum()
    left = (change - mean * n).square().sum() * len(n) / (len(n) - 1) if len(n) > 1 else torch.tensor(float("nan"))
    return float(mean), float(left.sqrt() / n.sum())
