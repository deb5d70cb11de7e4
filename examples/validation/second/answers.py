"""What the model answers now, beside what it answered untuned: NLL, right tokens, divergence."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sts_callback.data.batches import answer_positions
from sts_callback.data.probes import Query
from sts_callback.model.undisturbed import undisturbed
from validation.lab import Lab, require_untuned
from validation.plan import rounded

BATCH_TOKENS, HEAD_TOKENS = 1024, 256
Found = dict[str, dict[str, list[float]]]
"""By set, then by kind, one number for each question."""


class Questions:
    """Sets of questions with what the untuned model makes of them."""

    def __init__(self, lab: Lab, name: str, sets: Mapping[str, Sequence[Query]]) -> None:
        """Read step 0, unless it is kept.

        Args:
            lab: with the untuned model.
            name: under which step 0 is kept.
            sets: the questions of each.

        """
        self._lab, self._sets = lab, sets

        def read() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
            require_untuned(lab.model)
            hidden = self._read(sets)
            return hidden, *_scores(lab.model, torch.cat(hidden), _targets(sets))

        self._hidden, self._nll, right = lab.kept(name, read)
        self._right = right.split([len(hidden) for hidden in self._hidden])

    def step_zero(self) -> Found:
        """NLL, right tokens and tokens of each answer of the untuned model."""
        lengths = [len(hidden) for hidden in self._hidden]
        per_answer = {
            "nll": [float(nll.sum()) for nll in self._nll.split(lengths)],
            "right": [int(right.sum()) for right in self._right],
            "n": lengths,
        }
        return _by_set(per_answer, self._sets)

    def now(self, *, most: int | None = None, with_divergence: bool = False) -> Found:
        """Of each answer the NLL in nats, right tokens, tokens that were right and are not, and the divergence, in nats.

        Args:
            most: of each set only the first.
            with_divergence: whether KL(untuned || now), summed over an answer's tokens, is wanted; it costs as much as all else.

        """
        sets = {name: queries[:most] for name, queries in self._sets.items()}
        hidden = self._read(sets)
        lengths, asked = [len(rows) for rows in hidden], _places(self._sets, most)
        nll, right = (per_token.split(lengths) for per_token in _scores(self._lab.model, torch.cat(hidden), _targets(sets)))
        per_answer: dict[str, list[float]] = {
            "nll": [float(one.sum()) for one in nll],
            "right": [int(one.sum()) for one in right],
            "lost": [int((self._right[i] & ~one).sum()) for i, one in zip(asked, right, strict=True)],
        }
        if with_divergence:
            then = torch.cat([self._hidden[i] for i in asked])
            kl = _divergence(self._lab.model, then, torch.cat(hidden)).split(lengths)
            per_answer["kl"] = [float(one.sum()) for one in kl]
        return _by_set(per_answer, sets)

    def _read(self, sets: Mapping[str, Sequence[Query]]) -> list[torch.Tensor]:
        """Last hidden states that predict the answers' tokens, `(n_answer_tokens, d_model)` for each question, set by set."""
        flat = [query for queries in sets.values() for query in queries]
        read: list[torch.Tensor] = [torch.empty(0)] * len(flat)
        with undisturbed(self._lab.model):
            for batch in _batches(flat):
                for i, hidden in zip(batch, _hidden(self._lab.model, [flat[i] for i in batch], self._lab.bos), strict=True):
                    read[i] = hidden
        return read


def _by_set(per_answer: Mapping[str, list[float]], sets: Mapping[str, Sequence[Query]]) -> Found:
    rest = {kind: iter(rounded(values)) for kind, values in per_answer.items()}
    return {name: {kind: list(itertools.islice(rest[kind], len(queries))) for kind in rest} for name, queries in sets.items()}


def _places(sets: Mapping[str, Sequence[Query]], most: int | None) -> list[int]:
    """Of the first questions of each set, where they stand among all."""
    starts = itertools.accumulate((len(queries) for queries in sets.values()), initial=0)
    return [start + i for start, queries in zip(starts, sets.values(), strict=False) for i in range(len(queries))[:most]]


def _targets(sets: Mapping[str, Sequence[Query]]) -> torch.Tensor:
    return torch.tensor([token for queries in sets.values() for query in queries for token in query.answer])


def _batches(queries: Sequence[Query]) -> list[list[int]]:
    """Places of queries in batches of like length."""
    found: list[list[int]] = [[]]
    for i in sorted(range(len(queries)), key=lambda i: (len(queries[i].tokens), i)):
        if (len(found[-1]) + 1) * len(queries[i].tokens) > BATCH_TOKENS:
            found.append([])
        found[-1].append(i)
    return found


def _hidden(model: nn.Module, queries: Sequence[Query], bos: Sequence[int]) -> list[torch.Tensor]:
    length = max(len(q.tokens) for q in queries)
    ids = torch.tensor([[*bos, *q.tokens, *[0] * (length - len(q.tokens))] for q in queries])
    real = torch.tensor([[1] * (len(bos) + len(q.tokens)) + [0] * (length - len(q.tokens)) for q in queries])
    hidden = model.model(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
    at_answers = hidden[:, len(bos) :][answer_positions(queries)]
    return [part.clone() for part in at_answers.split([len(q.answer) for q in queries])]


@torch.no_grad()
def _scores(model: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of each token, and whether it is the likeliest one."""
    nll, right = [], []
    for rows, target in zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
        logits = model.lm_head(rows)
        nll.append(logits.logsumexp(dim=1) - logits.gather(1, target[:, None])[:, 0])
        right.append(logits.argmax(dim=1) == target)
    return torch.cat(nll), torch.cat(right)


@torch.no_grad()
def _divergence(model: nn.Module, then: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """KL(then || now) of each token; the head is as it was."""
    found = []
    for pair in zip(then.split(HEAD_TOKENS), now.split(HEAD_TOKENS), strict=True):
        before, after = (model.lm_head(rows).log_softmax(dim=1) for rows in pair)
        found.append(nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(dim=1))
    return torch.cat(found)
