"""How a model takes answers, from the logits that predict their tokens: NLL, and which tokens it would have written itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from sts_callback.data.probes import Query
from sts_callback.metrics.copies import sent
from sts_callback.metrics.next_token import next_token


@dataclass(frozen=True)
class Answers:
    """The answers of some queries; on the CPU."""

    nll: torch.Tensor
    """In nats, `(n_queries,)`."""
    right: torch.Tensor
    """Which answer tokens are the most likely next ones, the right ones before them: `(n_queries, longest)` booleans, False
    beyond an answer's end."""

    @classmethod
    def unread(cls, queries: Sequence[Query]) -> Answers:
        """Room for those of these queries."""
        return cls(torch.zeros(len(queries)), torch.zeros(len(queries), _longest(queries), dtype=torch.bool))

    @classmethod
    def of(cls, losses: torch.Tensor, right: torch.Tensor, queries: Sequence[Query]) -> Answers:
        """Put together what a `TokenReader` gives of these queries."""
        n = torch.tensor([len(q.answer) for q in queries])
        owner = torch.repeat_interleave(torch.arange(len(queries)), n)
        place = torch.arange(len(owner)) - (n.cumsum(0) - n)[owner]
        made = cls.unread(queries)
        made.nll.index_add_(0, owner, losses)
        made.right[owner, place] = right
        return made

    @classmethod
    def each(cls, found: Sequence[torch.Tensor], queries: Sequence[Sequence[Query]]) -> list[Answers]:
        """The answers of several batches, by one copy of what `TokenReader.found` gives of each."""
        parts = torch.split(torch.cat(list(found), dim=1).cpu(), [part.shape[1] for part in found], dim=1)
        return [cls.of(part[0], part[1] > 0, some) for part, some in zip(parts, queries, strict=True)]

    def put(self, places: Sequence[int] | slice, some: Answers) -> None:
        """Write those of some of the queries to their places."""
        self.nll[places] = some.nll
        self.right[places, : some.right.shape[1]] = some.right


class TokenReader:
    """Reads the logits before the answers' tokens, piece by piece: NLL, and whether each token is the most likely one."""

    def __init__(self, queries: Sequence[Query], device: torch.device) -> None:
        """Prepare to read.

        Args:
            queries: whose answers they are.
            device: of the logits.

        """
        self._queries = queries
        self._targets = sent(torch.tensor([token for q in queries for token in q.answer]), device)
        self._right: list[torch.Tensor] = []

    def __call__(self, columns: Iterable[torch.Tensor], places: slice) -> torch.Tensor:
        """Give the NLL of tokens in nats, `(n,)`, from the logits before them: a `Read`. Pieces come in order."""
        losses, right = next_token(columns, self._targets[places])
        self._right.append(right)
        return losses

    @property
    def right(self) -> torch.Tensor:
        """Which tokens so far are the most likely ones, `(n_answer_tokens,)` booleans; see `next_token`."""
        return torch.cat(self._right)

    def found(self, losses: torch.Tensor) -> torch.Tensor:
        """What `Answers.each` needs of these queries, still on the device: losses and which tokens are right, `(2, n_tokens)`."""
        return torch.stack([losses, self.right])


def _longest(queries: Sequence[Query]) -> int:
    return max(len(q.answer) for q in queries)
