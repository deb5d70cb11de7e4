"""Before and after: NLL of answers, token by token, and drift of features, in one pass over the questions that are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sts_callback.data.batches import Candidates, answer_positions, batches, candidate_rows
from sts_callback.data.probes import Query
from sts_callback.measure.accumulators import ZERO_SHOT, DriftStats, DriftSums, ProbeStats, ProbeSums
from sts_callback.measure.sae_reader import SAEReader
from sts_callback.model.capture import Capture
from sts_callback.model.undisturbed import undisturbed

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Losses:
    """NLL of the answers of some questions."""

    tokens: list[list[float]]
    """Of each answer token, in nats."""

    def sums(self, skipped: int = 0) -> list[float]:
        """Of each answer, without its first tokens."""
        return [sum(answer[skipped:]) for answer in self.tokens]

    def counts(self, skipped: int = 0) -> list[int]:
        """Answer tokens behind `sums`."""
        return [len(answer[skipped:]) for answer in self.tokens]


def losses(model: nn.Module, sae_reader: SAEReader, queries: Sequence[Query], bos: Sequence[int]) -> Losses:
    """NLL alone."""
    return _pass(model, sae_reader, queries, bos)[0]


def before(model: nn.Module, sae_reader: SAEReader, queries: Sequence[Query], bos: Sequence[int]) -> tuple[Losses, ProbeStats]:
    """What the untuned model answers, and what `after` compares its features with."""
    found, x = _pass(model, sae_reader, queries, bos)
    sums = ProbeSums(sae_reader, len(queries), [], with_gradients=False)
    sums.add({ZERO_SHOT: x}, Candidates(queries).owner)
    return found, sums.result({}, torch.tensor(found.counts()))


def after(
    model: nn.Module, sae_reader: SAEReader, queries: Sequence[Query], bos: Sequence[int], step_zero: ProbeStats
) -> tuple[Losses, DriftStats]:
    """What the tuned model answers, and how far its features have moved."""
    found, x = _pass(model, sae_reader, queries, bos)
    sums = DriftSums(sae_reader, len(queries), step_zero)
    sums.add(x, Candidates(queries).owner)
    return found, sums.result(None)


def _pass(model: nn.Module, sae_reader: SAEReader, queries: Sequence[Query], bos: Sequence[int]) -> tuple[Losses, torch.Tensor]:
    """Losses, and activations of the query tokens, `(n_candidates, d_in)`, query by query."""
    candidates = Candidates(queries)
    x = torch.zeros(len(candidates.owner), sae_reader.encoder.d_in)
    tokens: list[list[float]] = [[] for _ in queries]
    with undisturbed(model):
        capture = Capture(model, [sae_reader.point])
        prefix = capture.prefix(bos, whole=True)
        for batch in batches(queries, range(len(queries)), BATCH_TOKENS, model.config.vocab_size, len(bos)):
            some = [queries[i] for i in batch]
            captured = capture.run([q.tokens for q in some], prefix, select=answer_positions(some))
            x[candidates.of(batch)] = candidate_rows(captured.activations[sae_reader.point.name], some)
            targets = torch.tensor([token for q in some for token in q.answer])
            per_token = nn.functional.cross_entropy(captured.read, targets, reduction="none")
            for i, values in zip(batch, per_token.split([len(q.answer) for q in some]), strict=True):
                tokens[i] = values.tolist()
    return Losses(tokens), x
