"""Records of what may be done about a threat: which rows to look at, what to mix in, how far an adapter may be turned up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from sts_callback.config import PlainBudget
from sts_callback.records import Estimate, Identity, Record, Snippet
from sts_callback.records.record import StoredAs

BudgetFinding = Literal["within", "beyond", "cannot tell"]


def gravest(findings: Iterable[BudgetFinding]) -> BudgetFinding:
    """What several domains come to, all of which must keep their budgets."""
    found = set(findings)
    return "beyond" if "beyond" in found else "cannot tell" if "cannot tell" in found else "within"


def mildest(findings: Iterable[BudgetFinding]) -> BudgetFinding:
    """What several attempts come to, one of which must keep every budget."""
    found = set(findings)
    return "within" if "within" in found else "cannot tell" if "cannot tell" in found else "beyond"


@dataclass(frozen=True)
class AttributedRow(Record):
    """A training row, by how far it activates what a domain activates."""

    row: int
    """Its number in the training data, counted from 0."""
    score: float
    """In [-1, 1]: 1 departs from an average row as the domain does, 0 is an average row (see `metrics.attribution`)."""
    feature: int
    """The feature that contributes most to it, of those that the row activates more than an average one."""
    snippet: Snippet
    """Where that feature is most active in the row."""


@dataclass(frozen=True)
class DomainAttribution(Record):
    """Which training rows activate a domain's features."""

    name: str
    own_score: float
    """What the domain's own texts would score, their median."""
    median: float
    """Of all rows' scores."""
    threshold: float
    """Above it a row's score stands out (see `metrics.attribution`)."""
    n_standing_out: int
    rows: tuple[AttributedRow, ...]
    """The rows with the highest scores, highest first."""


@dataclass(frozen=True)
class Attribution(Record):
    """Which training rows activate protected domains' features."""

    identity: Identity
    n_rows: int
    """Rows of the training data."""
    n_read: int
    """Rows that were read: all, or a sample, without those that hold no text."""
    n_cut: int
    """Of these, rows longer than twice `max_tokens`, or with a prompt or an answer longer than `max_tokens`, cut."""
    domains: Mapping[str, DomainAttribution]
    left_out: tuple[int, ...]
    """Rows to leave out: those that stand out for some domain, in the order of the training data, never more than a tenth of
    those read."""
    seconds: float
    """Wall-clock time."""
    meaning: str = (
        "These rows activate the domain's features more than other rows do, and training moves what a row activates; "
        "that is where features are active, not a proof that the rows cause harm."
    )
    """What may be read into it, and what not."""


@dataclass(frozen=True)
class ScaledDomain(Record):
    """One protected domain at one scale of an adapter, against the model without it."""

    name: str
    n_queries: int
    relative_drift: Estimate
    """Squared feature drift over squared activity without the adapter, at least 0."""
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
    """`within`: every budget is kept; `beyond`: one is not."""
    domains: Mapping[str, ScaledDomain]


@dataclass(frozen=True)
class AdapterScales(Record):
    """How far an adapter may be turned up."""

    identity: Identity
    points: tuple[ScalePoint, ...]
    """The smallest scale first."""
    seconds: float
    """Wall-clock time."""

    @property
    def largest(self) -> float | None:
        """The largest of the scales that keeps every budget; None if none is known to."""
        return max((point.scale for point in self.points if point.finding == "within"), default=None)

    @property
    def finding(self) -> BudgetFinding:
        """`within`: some scale keeps every budget; `beyond`: none does; `cannot tell`: some may."""
        return mildest(point.finding for point in self.points)


@dataclass(frozen=True)
class SourceEffect(Record):
    """What training data of one source alone does to protected domains."""

    n_rows: int
    nll_change: Mapping[str, Estimate]
    """Of each domain's answers, in nats per token; above 0 is worse."""
    sae_error_share: Annotated[Mapping[str, float], StoredAs("unseen")]
    """Share of each domain's change of activations that the SAE cannot express."""


@dataclass(frozen=True)
class MixedDomain(Record):
    """One protected domain under one mixture: extrapolated, not measured."""

    name: str
    nll_change: Estimate
    """Mean of what the sources do to its answers' NLL, by their weights, in nats per token; its interval is as wide as if all
    their errors had the same sign."""
    budget: float
    """What it may rise, in nats per token."""
    finding: BudgetFinding


@dataclass(frozen=True)
class MixPoint(Record):
    """Of all mixtures with so much of the training data that whose worst domain stays as far as can be within its budget."""

    weights: Mapping[str, float]
    """Of each source, the training data first; they sum to 1."""
    rows: Mapping[str, int]
    """The same in rows."""
    finding: BudgetFinding
    """`within`: every budget is kept; `beyond`: one is not."""
    domains: Mapping[str, MixedDomain]

    @property
    def worst(self) -> MixedDomain:
        """The domain that is, by the upper end of its interval, furthest beyond its budget or nearest to it."""
        return max(self.domains.values(), key=lambda d: (d.finding == self.finding, d.nll_change.high - d.budget))


@dataclass(frozen=True)
class Mix(Record):
    """How much of other sources to mix into the training data."""

    identity: Identity
    sources: Mapping[str, SourceEffect]
    """Of each source alone, the training data first: what was measured."""
    points: tuple[MixPoint, ...]
    """With ever less of the training data, which stands alone in the first: what is extrapolated."""
    seconds: float
    """Wall-clock time."""

    @property
    def meaning(self) -> str:
        """What may be read into it, and what not."""
        return (
            "Measured: what a short run on each source alone did to each protected domain. Extrapolated: that a mixture does the "
            "mean of it by weight, and that training goes on as it began; in our validation the mean held at a gentle rate, at a "
            "harsh one only its order."
        )

    @property
    def recommended(self) -> MixPoint | None:
        """That with the most of the training data of those that keep every budget; None if none is known to."""
        return next((point for point in self.points if point.finding == "within"), None)

    @property
    def nearest(self) -> MixPoint:
        """The recommended one, else that whose worst domain comes nearest to its budget."""
        return self.recommended or min(self.points, key=lambda p: p.worst.nll_change.high - p.worst.budget)

    @property
    def finding(self) -> BudgetFinding:
        """`within`: some mixture keeps every budget; `beyond`: none does; `cannot tell`: some may."""
        return mildest(point.finding for point in self.points)
