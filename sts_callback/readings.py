"""What a pass over a probe set leaves: sums per query, from which means, and any resampling over queries, follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from sts_callback.metrics.sparse import SparseActs

BARE = "bare"
"""The context without demonstrations."""


@dataclass(frozen=True)
class Reference:
    """What the untuned model's activations look like; thresholds of later visits hang on it."""

    median_norm: float
    """Median activation norm of query tokens at the hook point."""
    mean_norm: float
    """Mean activation norm of the ordinary ones among them."""


@dataclass(frozen=True)
class Fit:
    """How well an SAE fits the activations that it reads, over ordinary query tokens."""

    n_tokens: int
    unexplained: float
    """Fraction of their variance that the reconstruction leaves (FVU); NaN for a transcoder."""
    l0: float
    """Active features a token."""
    silent: float
    """Share of the features that no token activates."""


@dataclass(frozen=True)
class Shift:
    """Squared differences that a context makes, summed over the tokens of each query."""

    features: torch.Tensor
    """Of feature activations, `(n_queries, d_sae)`."""
    raw: torch.Tensor
    """Of activations at the hook point, `(n_queries,)`."""
    unseen: torch.Tensor
    """Of what the dictionary leaves of these, `(n_queries,)`; NaN for a transcoder."""


@dataclass(frozen=True)
class Reading:
    """Sums per query of one set without context, and of what contexts change."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_queries,)`, int64."""
    n_masked: int
    """Query tokens left out as attention sinks."""
    activity: torch.Tensor
    """Feature activations, `(n_queries, d_sae)`."""
    energy: torch.Tensor
    """Squared feature activations, summed over features, `(n_queries,)`."""
    raw: torch.Tensor
    """Activations at the hook point, `(n_queries, d_in)`."""
    raw_energy: torch.Tensor
    """Their squared norms, `(n_queries,)`."""
    shifts: Mapping[str, Shift]
    """By the name of a context."""
    n_answer: torch.Tensor
    """Answer tokens, `(n_queries,)`, int64."""
    nll: Mapping[str, torch.Tensor]
    """By the name of a context with answers, `BARE` among them: NLL of the answer in nats, `(n_queries,)`."""
    gradients: torch.Tensor | None
    """Of the answers' NLL without context by feature activations, summed over the tokens of each query and its answer,
    `(n_queries, d_sae)`, in nats per unit of activation; None where they were not asked for or cannot be had."""
    counted: torch.Tensor
    """Which candidate tokens count, query by query, `(n_candidates,)` booleans."""
    acts: SparseActs
    """Feature activations of the tokens that count."""
    sketches: torch.Tensor
    """Of the same tokens' activations and of what the dictionary leaves, `(n_counted, 2, sketch.WIDTH)`."""

    @property
    def bare_nll(self) -> torch.Tensor:
        """NLL of the answers without context in nats, `(n_queries,)`; NaN without a language-model head."""
        return self.nll.get(BARE, torch.full((len(self.n_tokens),), math.nan))


@dataclass(frozen=True)
class Peaks:
    """How strongly each text of a set fires some features, and where most."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_texts,)`, int64."""
    activity: torch.Tensor
    """Activations summed over them, `(n_texts, n_features)`."""
    highest: torch.Tensor
    """The largest of them, `(n_texts, n_features)`."""
    place: torch.Tensor
    """The token that has it, numbered from 0 among the text's candidates, `(n_texts, n_features)`, int64."""


class StepZero(Protocol):
    """What a drift check compares with: a `Reading`, or what a baseline keeps of one."""

    @property
    def counted(self) -> torch.Tensor:
        """See `Reading`."""

    @property
    def acts(self) -> SparseActs:
        """See `Reading`."""

    @property
    def sketches(self) -> torch.Tensor:
        """See `Reading`."""


@dataclass(frozen=True)
class DriftReading:
    """Sums per query of one set against step 0."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_queries,)`, int64."""
    n_masked: int
    """Tokens that counted at step 0 and are attention sinks now."""
    shift: Shift
    """Squared differences to step 0; raw and unseen ones estimated from sketches."""
    nll: torch.Tensor | None
    """NLL of the answers in nats, `(n_queries,)`; None without a language-model head."""
