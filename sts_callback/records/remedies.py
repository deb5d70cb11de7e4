"""Records of remedies: training rows to look at, data to mix in, scales of an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from sts_callback.config import PlainBudget
from sts_callback.records import Estimate, Identity, Record, Snippet
from sts_callback.records.record import StoredAs

BudgetFinding = Literal["within", "beyond", "cannot tell"]


def gravest(findings: Iterable[BudgetFinding]) -> BudgetFinding:
    """Combine the findings of several domains, all of which must keep their budgets."""
    found = set(findings)
    return "beyond" if "beyond" in found else "cannot tell" if "cannot tell" in found else "within"


def mildest(findings: Iterable[BudgetFinding]) -> BudgetFinding:
    """Combine the findings of several attempts, one of which must keep every budget."""
    found = set(findings)
    return "within" if "within" in found else "cannot tell" if "cannot tell" in found else "beyond"


@dataclass(frozen=True)
class AttributedRow(Record):
    """A training row, scored by how much it activates the features of a domain."""

    row: int
    """Index of the row in the training data, from 0."""
    score: float
    """In [-1, 1]: 1 is like the domain, 0 like an average row (see `metrics.attribution`)."""
    feature: int
    """The feature that adds most to the score, among those that the row activates more than an average row."""
    snippet: Snippet
    """The place in the row where that feature is most active."""


@dataclass(frozen=True)
class SourceAttribution(Record):
    """How much the rows of one training source activate a domain's features."""

    name: str
    """What the rows have in their column `source`."""
    n_read: int
    """Number of its rows that were read."""
    score: Estimate
    """Mean score of these rows, the interval by Student's t over rows. NaN if there are too few (see `metrics.attribution`)."""
    n_standing_out: int

    @property
    def has_few_rows(self) -> bool:
        """Whether too few were read for a mean."""
        return math.isnan(self.score.value)


@dataclass(frozen=True)
class DomainAttribution(Record):
    """Which training rows activate a domain's features."""

    name: str
    own_score: float
    """Median score of the domain's own texts."""
    median: float
    """Median score of all rows."""
    threshold: float
    """A row with a higher score stands out (see `metrics.attribution`)."""
    n_standing_out: int
    rows: tuple[AttributedRow, ...]
    """The rows with the highest scores, highest first."""
    sources: tuple[SourceAttribution, ...] = ()
    """The training sources, if rows name any: the highest mean score first, those with too few rows last."""


@dataclass(frozen=True)
class Attribution(Record):
    """Which training rows activate protected domains' features."""

    identity: Identity
    n_rows: int
    """Number of rows in the training data."""
    n_read: int
    """Number of rows that were read: all or a sample, without rows that hold no text."""
    n_cut: int
    """Number of these that were cut: longer than twice `max_tokens`, or a prompt or answer longer than `max_tokens`."""
    domains: Mapping[str, DomainAttribution]
    left_out: tuple[int, ...]
    """Rows to leave out: those that stand out for some domain, in the order of the training data. At most a tenth of the rows
    that were read."""
    seconds: float
    """Wall-clock time in seconds."""
    meaning: str = (
        "These rows activate the domain's features more than other rows do, and training moves what a row activates; "
        "that is where features are active, not a proof that the rows cause harm."
    )
    """What this result means, and what it does not."""


@dataclass(frozen=True)
class ScaledDomain(Record):
    """One protected domain at one scale of an adapter, compared with the model without it."""

    name: str
    n_queries: int
    relative_drift: Estimate
    """Squared feature drift divided by squared activity without the adapter, at least 0."""
    nll_change: Estimate
    """Change of the answers' NLL, in nats per token; above 0 is worse."""
    harm: Estimate
    """What its answers have lost, in the budget's unit; above 0 is worse."""
    budget: PlainBudget
    """What they may lose."""
    finding: BudgetFinding
    """`within`: its interval lies under the budget; `beyond`: the change reaches the budget, and the interval lies above 0."""


@dataclass(frozen=True)
class ScalePoint(Record):
    """One scale of an adapter."""

    scale: float
    """1 is the adapter as it was trained, 0 the model without it."""
    finding: BudgetFinding
    """`within`: every budget is kept. `beyond`: one is not."""
    domains: Mapping[str, ScaledDomain]


@dataclass(frozen=True)
class AdapterScales(Record):
    """Protected domains at several scales of an adapter."""

    identity: Identity
    points: tuple[ScalePoint, ...]
    """By scale, the smallest first."""
    seconds: float
    """Wall-clock time in seconds."""

    @property
    def largest(self) -> float | None:
        """The largest scale that keeps every budget. None if no scale is known to."""
        return max((point.scale for point in self.points if point.finding == "within"), default=None)

    @property
    def finding(self) -> BudgetFinding:
        """`within`: some scale keeps every budget; `beyond`: none does; `cannot tell`: some may."""
        return mildest(point.finding for point in self.points)


@dataclass(frozen=True)
class SourceEffect(Record):
    """The effect on protected domains of training on one source alone."""

    n_rows: int
    nll_change: Mapping[str, Estimate]
    """Change of the answers' NLL of each domain, in nats per token; above 0 is worse."""
    sae_error_share: Annotated[Mapping[str, float], StoredAs("unseen")]
    """Share of each domain's change of activations that is SAE reconstruction error."""


@dataclass(frozen=True)
class MixedDomain(Record):
    """One protected domain under one mixture: extrapolated, not measured."""

    name: str
    nll_change: Estimate
    """Mean of the sources' changes of its answers' NLL, by weight, in nats per token. The interval is as wide as if the errors of
    all sources had the same sign."""
    budget: float
    """Largest rise allowed, in nats per token."""
    finding: BudgetFinding


@dataclass(frozen=True)
class MixPoint(Record):
    """The best mixture for one share of the training data: its worst domain has the most of its budget left."""

    weights: Mapping[str, float]
    """Weight of each source, the training data first. They sum to 1."""
    rows: Mapping[str, int]
    """Number of rows of each source."""
    finding: BudgetFinding
    """`within`: every budget is kept. `beyond`: one is not."""
    domains: Mapping[str, MixedDomain]

    @property
    def worst(self) -> MixedDomain:
        """The domain furthest beyond its budget, or nearest to it, by the upper end of its interval."""
        return max(self.domains.values(), key=lambda d: (d.finding == self.finding, d.nll_change.high - d.budget))


@dataclass(frozen=True)
class Mix(Record):
    """How much of other sources to mix into the training data."""

    identity: Identity
    sources: Mapping[str, SourceEffect]
    """Measured: the effect of each source alone, the training data first."""
    points: tuple[MixPoint, ...]
    """Extrapolated: mixtures with less and less training data. The first is the training data alone."""
    seconds: float
    """Wall-clock time in seconds."""

    @property
    def meaning(self) -> str:
        """What this result means, and what it does not."""
        return (
            "Measured: what a short run on each source alone did to each protected domain. Extrapolated: that a mixture does the "
            "mean of it by weight, and that training goes on as it began; in our validation the mean held at a gentle rate, at a "
            "harsh one only its order."
        )

    @property
    def recommended(self) -> MixPoint | None:
        """The mixture with the most training data that keeps every budget. None if no mixture is known to."""
        return next((point for point in self.points if point.finding == "within"), None)

    @property
    def nearest(self) -> MixPoint:
        """The recommended mixture, else the one whose worst domain is nearest to its budget."""
        return self.recommended or min(self.points, key=lambda p: p.worst.nll_change.high - p.worst.budget)

    @property
    def finding(self) -> BudgetFinding:
        """`within`: some mixture keeps every budget; `beyond`: none does; `cannot tell`: some may."""
        return mildest(point.finding for point in self.points)
