"""What a pass over a probe set leaves: sums per query, from which means, and any resampling over queries, follow.

Each running sum stands beside the frozen result that it gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sts_callback.measure.answers import Answers
from sts_callback.measure.sae_reader import SAEReader
from sts_callback.metrics.copies import sent
from sts_callback.metrics.sums import SKETCH_WIDTH, QuerySums, SparseActs, sketch
from sts_callback.model.sae import Reconstruction, SaeEncoder

ZERO_SHOT = "zero-shot"
"""The context without demonstrations."""


@dataclass(frozen=True)
class Shift:
    """Squared differences that a context makes, summed over the tokens of each query."""

    features: torch.Tensor
    """Of feature activations, `(n_queries, d_sae)`."""
    raw: torch.Tensor
    """Of activations at the hook point, `(n_queries,)`."""
    sae_error: torch.Tensor
    """Of what the dictionary leaves of these, `(n_queries,)`; NaN for a transcoder and without an SAE."""

    @property
    def total(self) -> torch.Tensor:
        """Of all features together, or without an SAE of raw activations, `(n_queries,)`."""
        return self.features.sum(dim=1) if self.features.shape[1] else self.raw


class _ShiftSums:
    """Running sums of squared differences."""

    def __init__(self, n_queries: int, d_sae: int, device: torch.device) -> None:
        self._sums = [QuerySums(n_queries, width, device) for width in (d_sae, 1, 1)]

    def add(self, differences: tuple[torch.Tensor, ...], owner: torch.Tensor) -> None:
        for sums, values in zip(self._sums, differences, strict=True):
            sums.add(values.unsqueeze(1) if values.dim() == 1 else values, owner)

    @property
    def result(self) -> Shift:
        features, raw, sae_error = (sums.result for sums in self._sums)
        return Shift(features, raw[:, 0], sae_error[:, 0])


def _differences(one: Reconstruction, other: Reconstruction) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared ones; the activations of `one` are used up for them."""
    return (
        one.acts.sub_(other.acts).square_(),
        (one.x - other.x).square().sum(dim=1),
        (one.left - other.left).square().sum(dim=1),
    )


def _only(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Set the rows of tokens that do not count to 0, in place, whatever is in them."""
    rows = ~counts.to(values.device)
    return values.masked_fill_(rows.unsqueeze(1) if values.dim() == 2 else rows, 0.0)


class _NotFinite:
    """Running number of tokens with a NaN or infinite activation, on the device."""

    def __init__(self) -> None:
        self._n: torch.Tensor | int = 0

    def add(self, x: torch.Tensor) -> None:
        self._n = self._n + (~x.isfinite().all(dim=1)).sum()

    @property
    def result(self) -> int:
        return int(self._n)


@dataclass(frozen=True)
class ProbeStats:
    """Sums per query of one set without context, and of what contexts change."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_queries,)`, int64."""
    n_masked: int
    """Query tokens left out as attention sinks."""
    n_not_finite: int
    """Query tokens with an activation that is NaN or infinite without context; they are left out too."""
    activity: torch.Tensor
    """Feature activations, `(n_queries, d_sae)`."""
    sq_norm: torch.Tensor
    """Squared feature activations, summed over features, `(n_queries,)`; without an SAE, `raw_sq_norm`."""
    raw: torch.Tensor
    """Activations at the hook point, `(n_queries, d_in)`."""
    raw_sq_norm: torch.Tensor
    """Their squared norms, `(n_queries,)`."""
    shifts: Mapping[str, Shift]
    """By the name of a context."""
    n_answer: torch.Tensor
    """Answer tokens, `(n_queries,)`, int64."""
    nll: Mapping[str, torch.Tensor]
    """By the name of a context with answers, `ZERO_SHOT` among them: NLL of the answer in nats, `(n_queries,)`."""
    right: Mapping[str, torch.Tensor]
    """Likewise, which answer tokens are right, see `Answers`."""
    gradients: torch.Tensor | None
    """Of the answers' NLL without context by feature activations, summed over the tokens of each query and its answer,
    `(n_queries, d_sae)`, in nats per unit of activation; None where they were not asked for or cannot be had."""
    counted: torch.Tensor
    """Which candidate tokens count, query by query, `(n_candidates,)` booleans."""
    acts: SparseActs
    """Feature activations of the tokens that count."""
    sketches: torch.Tensor
    """Of the same tokens' activations and of what the dictionary leaves, `(n_counted, 2, SKETCH_WIDTH)`."""

    @property
    def zero_shot_nll(self) -> torch.Tensor:
        """NLL of the answers without context in nats, `(n_queries,)`; NaN without a language-model head."""
        return self.nll.get(ZERO_SHOT, torch.full((len(self.n_tokens),), math.nan))


class ProbeSums:
    """Running sums of one set without context, and of what contexts change; `add` takes its tokens in order."""

    def __init__(self, sae_reader: SAEReader, n_queries: int, contexts: Sequence[str], *, with_gradients: bool) -> None:
        self._sae_reader, self._n_queries = sae_reader, n_queries
        d_sae, device = sae_reader.encoder.d_sae, sae_reader.encoder.device
        self._activity, self._raw = (QuerySums(n_queries, width, device) for width in (d_sae, sae_reader.encoder.d_in))
        self._sq_norms = QuerySums(n_queries, 2, device)
        self._shifts = {name: _ShiftSums(n_queries, d_sae, device) for name in contexts}
        self._gradients = QuerySums(n_queries, d_sae, device) if with_gradients else None
        self._n_not_finite = _NotFinite()
        self._counted: list[torch.Tensor] = []
        self._owner: list[torch.Tensor] = []
        self._acts: list[SparseActs] = []
        self._sketches: list[torch.Tensor] = []

    def add(self, found: Mapping[str, torch.Tensor], owner: torch.Tensor) -> None:
        """Add tokens of some queries, which count if they are no sinks in any context.

        Args:
            found: activations by context, `ZERO_SHOT` among them, each `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        self._n_not_finite.add(found[ZERO_SHOT])
        counted = torch.stack([self._sae_reader.not_outlier(x) for x in found.values()]).all(dim=0).cpu()
        self._counted.append(counted)
        self._owner.append(owner[counted])
        places = counted.nonzero()[:, 0]
        found = {name: x[sent(places, x.device)] for name, x in found.items()}
        for chunk in self._sae_reader.chunks(len(places)):
            to = self._owner[-1][chunk]
            here = self._sae_reader.encoder.reconstruct(found[ZERO_SHOT][chunk])
            measured = here.acts if here.acts.shape[1] else here.x
            sq_norms = torch.stack([torch.linalg.vector_norm(v, dim=1).square() for v in (measured, here.x)], dim=1)
            for sums, values in ((self._activity, here.acts), (self._raw, here.x), (self._sq_norms, sq_norms)):
                sums.add(values, to)
            self._acts.append(SparseActs.of(here.acts))
            self._sketches.append(torch.stack([sketch(here.x), sketch(here.left)], dim=1))
            for name, shift in self._shifts.items():
                shift.add(_differences(self._sae_reader.encoder.reconstruct(found[name][chunk]), here), to)

    def add_gradients(self, x: torch.Tensor, gradient: torch.Tensor, owner: torch.Tensor) -> None:
        """Add gradients of the answers' NLL at tokens of queries and answers, in any order.

        Args:
            x: activations without context, `(n_tokens, d_in)`.
            gradient: with respect to them, in nats per unit, `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        encoder = self._sae_reader.encoder
        assert self._gradients is not None
        assert isinstance(encoder, SaeEncoder)
        not_outlier = self._sae_reader.not_outlier(x)
        for chunk in self._sae_reader.chunks(len(x)):
            by_feature = encoder.feature_gradient(x[chunk], gradient[chunk])
            self._gradients.add(_only(by_feature, not_outlier[chunk]), owner[chunk])

    def result(self, answers: Mapping[str, Answers], n_answer: torch.Tensor) -> ProbeStats:
        """All of it, with the answers by context and their lengths."""
        counted, sq_norms = torch.cat(self._counted), self._sq_norms.result
        return ProbeStats(
            n_tokens=torch.bincount(torch.cat(self._owner), minlength=self._n_queries),
            n_masked=int((~counted).sum()),
            n_not_finite=self._n_not_finite.result,
            activity=self._activity.result,
            sq_norm=sq_norms[:, 0],
            raw=self._raw.result,
            raw_sq_norm=sq_norms[:, 1],
            shifts={name: sums.result for name, sums in self._shifts.items()},
            n_answer=n_answer,
            nll={name: read.nll for name, read in answers.items()},
            right={name: read.right for name, read in answers.items()},
            gradients=None if self._gradients is None else self._gradients.result,
            counted=counted,
            acts=SparseActs.cat(self._acts),
            sketches=torch.cat(self._sketches).cpu() if self._sketches else torch.zeros(0, 2, SKETCH_WIDTH),
        )


class StepZero(Protocol):
    """What a drift check compares with: a `ProbeStats`, or what a baseline keeps of one."""

    @property
    def counted(self) -> torch.Tensor:
        """See `ProbeStats`."""

    @property
    def acts(self) -> SparseActs:
        """See `ProbeStats`."""

    @property
    def sketches(self) -> torch.Tensor:
        """See `ProbeStats`."""


@dataclass(frozen=True)
class DriftStats:
    """Sums per query of one set against step 0."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_queries,)`, int64."""
    n_masked: int
    """Tokens that counted at step 0 and are attention sinks now."""
    shift: Shift
    """Squared differences to step 0; those of raw activations and of the SAE's error estimated from sketches."""
    nll: torch.Tensor | None
    """NLL of the answers in nats, `(n_queries,)`; None without a language-model head."""
    right: torch.Tensor | None
    """Which answer tokens are right, see `Answers`; None likewise."""
    n_not_finite: int
    """Tokens with an activation that is NaN or infinite; they count among the sinks."""


class DriftSums:
    """Running sums of one set against its step 0; `add` takes its tokens in order."""

    def __init__(self, sae_reader: SAEReader, n_queries: int, step_zero: StepZero) -> None:
        self._sae_reader, self._step_zero = sae_reader, step_zero
        self._shift = _ShiftSums(n_queries, sae_reader.encoder.d_sae, sae_reader.encoder.device)
        self._n_tokens = QuerySums(n_queries, 1, sae_reader.encoder.device)
        self._n_candidates, self._n_counted = 0, 0
        self._n_not_finite = _NotFinite()

    def add(self, x: torch.Tensor, owner: torch.Tensor) -> None:
        """Add tokens of some queries, those that counted at step 0 and are no sinks now.

        Args:
            x: their activations, `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        counted = self._step_zero.counted[self._n_candidates : self._n_candidates + len(x)]
        self._n_candidates += len(x)
        if not counted.any():
            return
        x, owner = x[sent(counted.nonzero()[:, 0], x.device)], owner[counted]
        self._n_not_finite.add(x)
        device, d_sae, start = self._sae_reader.encoder.device, self._sae_reader.encoder.d_sae, self._n_counted
        not_outlier = self._sae_reader.not_outlier_now(x).to(device)
        self._n_tokens.add(not_outlier.unsqueeze(1), owner)
        self._n_counted += len(x)
        for chunk in self._sae_reader.chunks(len(x)):
            now = self._sae_reader.encoder.reconstruct(x[chunk])
            rows = slice(start + chunk.start, start + chunk.start + len(now.x))
            then, then_left = sent(self._step_zero.sketches[rows], device).unbind(dim=1)
            differences = (
                now.acts.sub_(self._step_zero.acts.dense(rows.start, rows.stop, d_sae, device)).square_(),
                (sketch(now.x) - then).square().sum(dim=1),
                (sketch(now.left) - then_left).square().sum(dim=1),
            )
            self._shift.add(tuple(_only(one, not_outlier[chunk]) for one in differences), owner[chunk])

    def result(self, answers: Answers | None) -> DriftStats:
        """All of it, with the answers."""
        nll, right = (None, None) if answers is None else (answers.nll, answers.right)
        n_tokens = self._n_tokens.result[:, 0].long()
        n_masked = self._n_counted - int(n_tokens.sum())
        return DriftStats(n_tokens, n_masked, self._shift.result, nll, right, self._n_not_finite.result)


class ActivitySums:
    """Running sums of feature activations of one set, or without an SAE of raw ones, whatever they were at step 0."""

    def __init__(self, sae_reader: SAEReader, n_queries: int) -> None:
        self._sae_reader = sae_reader
        encoder = sae_reader.encoder
        self._activity = QuerySums(n_queries, encoder.d_sae or encoder.d_in, encoder.device)
        self._n_tokens = QuerySums(n_queries, 1, encoder.device)

    def add(self, x: torch.Tensor, owner: torch.Tensor) -> None:
        """Add tokens of some queries, those that are no sinks now.

        Args:
            x: their activations, `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        if len(x) == 0:
            return
        encoder = self._sae_reader.encoder
        not_outlier = self._sae_reader.not_outlier_now(x).to(encoder.device)
        self._n_tokens.add(not_outlier.unsqueeze(1), owner)
        for chunk in self._sae_reader.chunks(len(x)):
            # A copy of raw activations, as `_only` writes into what it gets.
            acts = encoder.encode(x[chunk]) if encoder.d_sae else x[chunk].to(encoder.device, torch.float32, copy=True)
            self._activity.add(_only(acts, not_outlier[chunk]), owner[chunk])

    @property
    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums, `(n_queries, d_sae)` (without an SAE `d_in`), and tokens that count, `(n_queries,)`."""
        return self._activity.result, self._n_tokens.result[:, 0].long()


@dataclass(frozen=True)
class MaxActivations:
    """How strongly each text of a set activates some features, and where most."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_texts,)`, int64."""
    activity: torch.Tensor
    """Activations summed over them, `(n_texts, n_features)`."""
    highest: torch.Tensor
    """The largest of them, `(n_texts, n_features)`."""
    place: torch.Tensor
    """The token that has it, numbered from 0 among the text's candidates, `(n_texts, n_features)`, int64."""


class MaxActivationSums:
    """Running sums of some features over texts, and where each is most active; `add` takes whole texts, token by token."""

    def __init__(self, sae_reader: SAEReader, n_texts: int, features: Sequence[int]) -> None:
        device, shape = sae_reader.encoder.device, (n_texts, len(features))
        self._sae_reader, self._features = sae_reader, torch.tensor(features, device=device)
        self._activity = QuerySums(*shape, device)
        self._n_tokens = torch.zeros(n_texts, dtype=torch.int64)
        self._highest, self._place = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor, owner: torch.Tensor) -> None:
        """Add tokens of some texts, those that are no sinks.

        Args:
            x: their activations, `(n_tokens, d_in)`.
            owner: the text of each, `(n_tokens,)`, in ascending order.

        """
        place = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        counted = self._sae_reader.not_outlier(x).cpu().nonzero()[:, 0]
        x, owner, place = x[sent(counted, x.device)], owner[counted], sent(place[counted], self._sae_reader.encoder.device)
        self._n_tokens += torch.bincount(owner, minlength=len(self._n_tokens))
        for chunk in self._sae_reader.chunks(len(x)):
            acts = self._sae_reader.encoder.encode(x[chunk])[:, self._features]
            self._activity.add(acts, owner[chunk])
            for text, n_tokens in Counter(owner[chunk].tolist()).items():
                ours, acts = acts[:n_tokens], acts[n_tokens:]
                places, place = place[:n_tokens], place[n_tokens:]
                highest, at = ours.max(dim=0)
                self._place[text] = torch.where(highest > self._highest[text], places[at], self._place[text])
                self._highest[text] = torch.maximum(highest, self._highest[text])

    @property
    def result(self) -> MaxActivations:
        """All of it, on the CPU."""
        return MaxActivations(self._n_tokens, self._activity.result, self._highest.cpu(), self._place.cpu())
