"""Lay probes out for a model: segments, batches of queries of like length, and where in them the tokens are that are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from sts_callback.data.probes import ProbeSet, Query
from sts_callback.metrics.copies import sent


def segments(probes: ProbeSet, batch_tokens: int) -> Iterator[range]:
    """Split a set into runs of queries with about one batch for each group, so that memory does not grow with the set."""
    start, n_tokens = 0, 0
    for i, query in enumerate(probes.queries):
        n_tokens += len(query.tokens)
        if i > start and n_tokens > batch_tokens * len(probes.demo_sets):
            yield range(start, i)
            start, n_tokens = i, len(query.tokens)
    yield range(start, len(probes.queries))


def batches(
    queries: Sequence[Query], members: Sequence[int], batch_tokens: int, vocab_size: int | None, n_prefix: int
) -> Iterator[list[int]]:
    """Sort queries into batches of similar length, the same ones every time.

    A batch is full at `batch_tokens` padded tokens, or at 16 times as many keys, with those of the prefix, to which every row
    attends. Where the model makes logits whole, it is also full at those that fit into 256 MiB of float32: if one row needs the
    logits at a position, they are computed for every row.

    Args:
        queries: the queries of a set.
        members: indices of the queries to batch.
        batch_tokens: see `ProbeConfig`.
        vocab_size: number of tokens of the model, if it makes logits whole; else None.
        n_prefix: number of tokens before each query.

    """
    most_logits, most_keys = math.inf if vocab_size is None else 2**28 // (4 * vocab_size), 16 * batch_tokens
    order = sorted(members, key=lambda i: (len(queries[i].tokens), i))
    batch: list[int] = []
    for i in order:
        n_rows, length = len(batch) + 1, len(queries[i].tokens)
        places = length - min(len(queries[j].query) for j in (*batch, i))
        full = n_rows * length > batch_tokens or n_rows * (n_prefix + length) > most_keys or n_rows * places > most_logits
        if batch and full:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Candidates:
    """Where each query's candidate tokens are when all queries form one long row."""

    def __init__(self, queries: Sequence[Query]) -> None:
        n = torch.tensor([sum(q.counts) for q in queries])
        self.owner = torch.repeat_interleave(torch.arange(len(queries)), n)
        """The query of each candidate token, `(n_candidates,)`."""
        self._ends = n.cumsum(0)
        self._starts = self._ends - n

    def of(self, batch: Sequence[int]) -> torch.Tensor:
        """Positions of the tokens of some queries, in the order in which a batch returns them."""
        return torch.cat([torch.arange(int(self._starts[i]), int(self._ends[i])) for i in batch])


def candidate_rows(acts: torch.Tensor, queries: Sequence[Query]) -> torch.Tensor:
    """Select the tokens that count from a batch of queries.

    Args:
        acts: `(n_rows, n_suffix, d)`, right-padded.
        queries: the query of each row.

    Returns:
        `(n_candidates, d)`, query by query.

    """
    rows = torch.tensor([row for row, q in enumerate(queries) for counts in q.counts if counts])
    columns = torch.tensor([column for q in queries for column, counts in enumerate(q.counts) if counts])
    places = sent(torch.stack([rows, columns]), acts.device)
    return acts[places[0], places[1]]


def answer_positions(queries: Sequence[Query]) -> torch.Tensor:
    """Mark the positions whose logits predict an answer token, `(n_rows, n_suffix)`: position p predicts token p + 1."""
    select = torch.zeros(len(queries), max(len(q.tokens) for q in queries), dtype=torch.bool)
    for row, q in enumerate(queries):
        select[row, len(q.query) - 1 : len(q.tokens) - 1] = True
    return select
