"""How a model takes answers, from the logits that predict their tokens: NLL, and which tokens it would have written itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sts_callback.data.probes import Query


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
        """Put together what `read_tokens` gives of these queries."""
        n = torch.tensor([len(q.answer) for q in queries])
        owner = torch.repeat_interleave(torch.arange(len(queries)), n)
        place = torch.arange(len(owner)) - (n.cumsum(0) - n)[owner]
        made = cls.unread(queries)
        made.nll.index_add_(0, owner, losses.cpu())
        made.right[owner, place] = right.cpu()
        return made

    def put(self, places: Sequence[int] | slice, some: Answers) -> None:
        """Write those of some of the queries to their places."""
        self.nll[places] = some.nll
        self.right[places, : some.right.shape[1]] = some.right


def read_tokens(logits: torch.Tensor, queries: Sequence[Query]) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of each answer token, and whether it is the most likely one; in pieces, so that float32 copies of logits stay small.

    Args:
        logits: at the positions before the answers' tokens, `(n_answer_tokens, vocab)`.
        queries: whose answers they are.

    Returns:
        Nats, and booleans, both `(n_answer_tokens,)`. Of equal logits the first is the most likely one, as in greedy decoding;
        where logits are not finite, no token is right.

    """
    targets = torch.tensor([token for q in queries for token in q.answer], device=logits.device)
    pieces = [_read_piece(*piece) for piece in zip(torch.split(logits, 64), torch.split(targets, 64), strict=True)]
    losses, right = zip(*pieces, strict=True)
    return torch.cat(losses), torch.cat(right)


def _read_piece(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits.float()
    losses = nn.functional.cross_entropy(wide, targets, reduction="none")
    return losses, (wide.detach().argmax(dim=-1) == targets) & losses.detach().isfinite()


def _longest(queries: Sequence[Query]) -> int:
    return max(len(q.answer) for q in queries)
