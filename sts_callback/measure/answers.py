"""NLL of answers, from the logits that predict their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sts_callback.data.probes import Query


def losses_of(logits: torch.Tensor, queries: Sequence[Query]) -> torch.Tensor:
    """NLL of each answer token, `(n_answer_tokens,)`; in pieces, so that the float32 copy of the logits stays small."""
    targets = torch.tensor([token for q in queries for token in q.answer], device=logits.device)
    return torch.cat(
        [
            nn.functional.cross_entropy(some.float(), target, reduction="none")
            for some, target in zip(torch.split(logits, 64), torch.split(targets, 64), strict=True)
        ]
    )


def by_query(losses: torch.Tensor, queries: Sequence[Query]) -> torch.Tensor:
    """Losses of answer tokens, `(n_answer_tokens,)`, summed for each query, `(len(queries),)`."""
    answered_by = torch.repeat_interleave(torch.arange(len(queries)), torch.tensor([len(q.answer) for q in queries]))
    return torch.zeros(len(queries)).index_add_(0, answered_by, losses.cpu())
