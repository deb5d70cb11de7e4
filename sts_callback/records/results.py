"""What was measured and decided."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from sts_callback.config import NO_SAE, Budget, Unit
from sts_callback.config import TRAIN as TRAIN  # what records call the training data, beside the domains
from sts_callback.records import notebook
from sts_callback.records.numbers import percent
from sts_callback.records.record import Record, StoredAs

Decision = Literal["go", "watch", "no-go", "not covered", "cannot tell"]
State = Literal["within", "on course", "over", "inconclusive"]
Status = Literal["pass", "warn", "refuse"]
TrainSource = Literal["reference answers", "own rollouts"]

_POINTS = 100  # of a share


def downwards(number: float) -> tuple[bool, float]:
    """Sort key: the largest first and NaN last."""
    return math.isnan(number), -number


@dataclass(frozen=True)
class Identity(Record):
    """What a measurement was made with; two can be compared only if these agree."""

    model: str
    """SHA-256 of the model's configuration."""
    model_name: str
    """Its name or folder name, for people."""
    sae: str
    """SHA-256 of the SAE's weights and of what changes an answer in its configuration; `none` without an SAE."""
    sae_name: str
    """`release/sae_id` or folder name, for people."""
    hook_name: str
    """Where the SAE reads, or where raw activations were read."""
    probes: str
    """SHA-256 of the texts that probes are made of, as they were written, and of how they are drawn and counted."""
    precision: str = ""
    """What the model computes in, such as `float32`, or `float32, autocast to bfloat16`. Empty in earlier records."""

    @property
    def has_sae(self) -> bool:
        """Whether an SAE was used; else raw activations were measured."""
        return self.sae != NO_SAE


POWER = "alarm power"
"""Name of the check of whether the queries suffice to find harm of the size of each budget."""


@dataclass(frozen=True)
class Check(Record):
    """One thing that was looked at before anything is measured."""

    name: str
    status: Status
    """`warn`: answers are weaker than they look; `refuse`: there would be none that can be trusted."""
    found: str
    """What was found, in words and numbers."""
    remedy: str
    """What to do about it; empty if nothing."""
    brief: str = ""
    """The same in a sentence of its own, for a screen; empty where the other two are short."""


@dataclass(frozen=True)
class Estimate(Record):
    """A number and its 95 % interval, by bootstrap over queries and, where demonstrations matter, over draws of them."""

    value: float
    low: float
    high: float


UNKNOWN = Estimate(math.nan, math.nan, math.nan)
"""What could not be measured."""


@dataclass(frozen=True)
class Score(Estimate):
    """An estimate that stands between two reference points measured beside it."""

    random: float
    """The same score over random features of like activity: the lower reference point."""
    own: float
    """The same score of the training data itself: the upper reference point."""

    def normalise(self, score: float) -> float:
        """A score on the scale from the lower reference point, 0, to the upper, 1; NaN if these are no scale."""
        return (score - self.random) / (self.own - self.random) if self.own > self.random else math.nan

    @property
    def normalised(self) -> Estimate:
        """The score and its interval, each by where it stands."""
        return Estimate(self.normalise(self.value), self.normalise(self.low), self.normalise(self.high))


@dataclass(frozen=True)
class DomainForecast(Record):
    """What is expected of one domain. Scores tell how much it is expected to move, never in which direction."""

    name: str
    """The domain, or `train` for the training data against itself."""
    n_queries: int
    """Queries measured."""
    n_tokens: int
    """Query tokens that count."""
    n_masked: int
    """Query tokens left out as attention sinks."""
    n_cut: int
    """Queries or answers longer than `max_tokens`, cut."""
    n_answer_tokens: int
    """Answer tokens behind the NLL."""
    sts_act: Score
    """STS_act, in units of activation."""
    sts_icl: Score
    """STS_ICL, in squared units of activation."""
    sts_rel: Score
    """Share of the shift by the domain's own demonstrations on the training data's features, in [0, 1]."""
    sts_cross: Score
    """Share of the shift by the training demonstrations on the training data's features, in [0, 1]."""
    sts_net: Score
    """The same less what plain prose of equal length shifts on these features, over the same denominator. Its lower reference
    point is 0,
    as plain prose; its upper one NaN where the training data itself is not clear of that."""
    rank: tuple[int, int]
    """Between which ranks it lies among the domains by transfer, 1 being the most moved."""
    p_above_next: Annotated[float, StoredAs("above_next")]
    """How sure it is above the domain that follows it in that order: share of resamples; NaN for the last and for `train`."""
    relative_shift: Estimate
    """Squared shift by the training demonstrations over squared activity, at least 0."""
    raw_shift: Estimate
    """The same of raw activations: a baseline without an SAE."""
    raw_over_prose: Estimate
    """The raw shift over that by plain prose of equal length, above 1 where the examples shift more: the strongest of these."""
    sae_error_share: Annotated[float, StoredAs("unseen")]
    """Share of that raw shift that the SAE's dictionary cannot express, at most 1; NaN for a transcoder."""
    cosine: float
    """Cosine of the mean raw activation with that of the training data: a baseline without training or context."""
    nll: Estimate
    """NLL of the answers before training, in nats per token."""
    nll_change: Estimate
    """Change of it by the training demonstrations against plain prose of equal length, nats per token; above 0 is worse."""
    gradient_change: Estimate
    """Change of it while a small step lowers the training data's own by one nat, by gradients of features; above 0 is worse."""
    bits_change: Estimate = UNKNOWN
    """The same as `nll_change`, in bits a byte of the answers' text."""
    accuracy: float = math.nan
    """Share of the answers' tokens that are right before training, see `TokenAccuracy`."""
    accuracy_change: Estimate = UNKNOWN
    """Change of that share by the training demonstrations against plain prose of equal length; below 0 is worse."""

    def harm_in(self, unit: Unit) -> Estimate:
        """What the training demonstrations take from the answers, in a budget's unit; above 0 is worse."""
        return harm_in(unit, self.nll_change, self.bits_change, self.accuracy_change)

    @property
    def transfer(self) -> Estimate:
        """How far the domain is expected to move: STS_net, the score of record, from plain prose (0) to the training data (1)."""
        return self.sts_net.normalised


@dataclass(frozen=True)
class Forecast(Record):
    """What a fine-tune is expected to move."""

    identity: Identity
    features: tuple[int, ...]
    """The shifted features, largest shift first (D_N)."""
    features_share: float
    """Share of the training data's in-context shift that they hold, in [0, 1]."""
    median_norm: float
    """Median activation norm of query tokens at the hook point."""
    fvu: Annotated[float, StoredAs("unexplained")]
    """Fraction of variance of the probes' activations that the SAE leaves (FVU)."""
    checks: tuple[Check, ...]
    """How the SAE fits the model; none of them refuses."""
    noise_floor: float
    """Relative drift of the same weights when batches are laid out otherwise: what is no drift at all."""
    train: DomainForecast
    """The training data against itself: the upper reference point."""
    domains: Mapping[str, DomainForecast]
    seconds: float
    """Wall-clock time of the measurement."""
    seconds_by_part: Mapping[str, float]
    """Of that, what each part took."""
    train_source: TrainSource = "reference answers"
    """Whose answers the training examples have: the data's, or the model's own best-rewarded ones at step 0."""
    can_move: bool = True
    """Whether a weight at or below the hook point is trained; else activations there stay as they are, whatever training does."""

    @property
    def harm_rank(self) -> Mapping[str, int]:
        """Each domain's place by how it is expected to fare, 1 the worst: ranks in `nll_change` and `gradient_change` together.

        An order only, for neither tells the sign of a change; equals share a place. One of them decides where the other is not
        known of all domains; without both it is empty.
        """
        by_nll = {name: d.nll_change.value for name, d in self.domains.items()}
        by_gradient = {name: d.gradient_change.value for name, d in self.domains.items()}
        ranks = [_places(values) for values in (by_nll, by_gradient) if all(map(math.isfinite, values.values()))]
        return _places({name: -sum(places[name] for places in ranks) for name in self.domains}) if ranks else {}

    def _repr_html_(self) -> str:
        """For a notebook."""
        rows = [
            (d.name, percent(d.transfer.value), notebook.change(d.nll_change), str(d.n_queries))
            for d in sorted(self.domains.values(), key=lambda d: downwards(d.nll_change.value))
        ]
        return notebook.table(
            f"Forecast by {self.identity.sae_name} at {self.identity.hook_name}",
            ("domain", "moves", "change in context", "queries"),
            rows,
            "moves: 0% as by plain prose, 100% as the training data. change: of the answers' NLL with training examples in "
            "context, nats a token, + is worse. It knows neither the rate nor the length of training.",
        )


@dataclass(frozen=True)
class TokenAccuracy(Record):
    """How many of the answers' tokens a model gets right: they are its most likely next ones, the right ones before them."""

    then: float
    """Share at step 0, in [0, 1]."""
    now: float
    change: Estimate
    """Of that share since step 0, in [-1, 1]; below 0 is worse."""
    n_lost: int
    """Tokens that were right at step 0 and are wrong now."""
    n_gained: int
    """Tokens that were wrong at step 0 and are right now."""
    n_queries_lost: int
    """Queries whose answer has lost at least one."""
    query_changes: tuple[int, ...]
    """Tokens gained less tokens lost, of each query's answer."""


@dataclass(frozen=True)
class DomainDrift(Record):
    """What training has done to one domain since step 0."""

    name: str
    """The domain, or `train`."""
    n_queries: int
    """Queries compared."""
    n_tokens: int
    """Query tokens compared."""
    n_masked: int
    """Tokens that have become attention sinks since step 0."""
    relative_drift: Estimate
    """Squared feature drift over squared activity at step 0, at least 0; without an SAE, `raw_drift`."""
    raw_drift: float
    """The same of raw activations, estimated from sketches."""
    sae_error_share: Annotated[float, StoredAs("unseen")]
    """Share of that raw drift that the SAE's dictionary cannot express, at most 1; NaN for a transcoder."""
    share_on_forecast: float
    """Share of the feature drift on the forecast's features, in [0, 1]."""
    top_features: tuple[tuple[int, float], ...]
    """The features that drifted most, with their share of the drift."""
    sts_act: float
    """STS_act with the features that training really moved."""
    sts_icl: float
    """STS_ICL with them."""
    sts_rel: float
    """STS_rel with them."""
    sts_cross: float
    """STS_cross with them."""
    sts_net: float
    """STS_net with them: the score of record."""
    nll: float
    """NLL of the answers now, in nats per token."""
    nll_change: Estimate
    """Change since step 0, in nats per token; above 0 is worse."""
    p_worse: float
    """One-sided p-value of a rise of the NLL at this check, by t over queries (by random signs in files from before that), not
    corrected for other domains and checks."""
    query_changes: tuple[float, ...]
    """Change of the NLL of each query's answer since step 0, in nats; what the three numbers above are made of."""
    query_answer_tokens: tuple[int, ...]
    """Answer tokens of each query."""
    n_not_finite: int = 0
    """Query tokens with an activation, and answers with an NLL, that is NaN or infinite: the model has diverged."""
    bits_change: Estimate = UNKNOWN
    """The same as `nll_change`, in bits a byte of the answers' text."""
    query_answer_bytes: tuple[int, ...] = ()
    """Length of the text of each query's answer, in bytes of UTF-8; empty if that is not known."""
    accuracy: TokenAccuracy | None = None
    """None without a language-model head, and where step 0 was measured by an earlier version."""

    def harm_in(self, unit: Unit) -> Estimate:
        """What training has taken from the answers since step 0, in a budget's unit; above 0 is worse."""
        return harm_in(unit, self.nll_change, self.bits_change, UNKNOWN if self.accuracy is None else self.accuracy.change)

    def share_of(self, budget: Budget) -> float:
        """How much of a budget is used up: 1 at the budget, NaN where that is not known."""
        return self.harm_in(budget.unit).value / budget.value

    def query_harm_in(self, unit: Unit) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """The same of each query: what was taken, and over how many tokens or bytes; empty where it is not known."""
        if unit == "nats/token":
            return self.query_changes, self.query_answer_tokens
        if unit == "bits/byte":
            taken = tuple(change / math.log(2) for change in self.query_changes)
            return (taken, self.query_answer_bytes) if self.query_answer_bytes else ((), ())
        if self.accuracy is None:
            return (), ()
        return tuple(_POINTS * -change for change in self.accuracy.query_changes), self.query_answer_tokens


@dataclass(frozen=True)
class DriftSnapshot(Record):
    """One drift check."""

    step: int
    """Optimizer steps done."""
    realised_features: tuple[int, ...]
    """The features that training moved most on the training data."""
    n_shared: int
    """How many of them the forecast named."""
    train: DomainDrift
    domains: Mapping[str, DomainDrift]
    seconds: float
    """Wall-clock time of the check."""
    output_drift: Annotated[Estimate, StoredAs("text_drift")] = UNKNOWN
    """How far what the policy writes has moved since step 0, both texts read with the weights of now: squared distance of mean
    feature activations over the square of the mean then; 0 on average where nothing has moved; NaN without rollouts."""
    can_move: bool = True
    """Whether a weight at or below the hook point is trained; else activations there stay as they are, whatever training does."""
    has_sae: bool = True
    """Whether an SAE was used; else raw activations were measured, and no features are named."""

    @property
    def diverged(self) -> tuple[str, ...]:
        """The sets on which the model gives NaN or infinite numbers."""
        return tuple(d.name for d in (self.train, *self.domains.values()) if d.n_not_finite)

    def _repr_html_(self) -> str:
        """For a notebook."""
        ordered = sorted(self.domains.values(), key=lambda d: downwards(d.nll_change.value))
        rows = [
            (d.name, notebook.change(d.nll_change), percent(d.relative_drift.value, 1), str(d.n_queries))
            for d in (*ordered, self.train)
        ]
        return notebook.table(
            f"Check at step {self.step}",
            ("domain", "change", "moved", "queries"),
            rows,
            "change: of the answers' NLL since step 0, nats a token, + is worse. moved: drift of the domain's "
            f"{'features' if self.has_sae else 'raw activations'}.",
        )


@dataclass(frozen=True)
class Snippet(Record):
    """A place in a text where a feature is active."""

    before: str
    token: str
    """The active token."""
    after: str
    activation: float


@dataclass(frozen=True)
class TopActivatingExamples(Record):
    """A feature, told by the user's own texts."""

    feature: int
    share: float
    """Of the shift or drift that it was named for, in [0, 1]."""
    link: str
    """Its page at Neuronpedia; empty if it has none. Nothing is fetched."""
    snippets: Mapping[str, tuple[Snippet, ...]]
    """For the training data and each domain, where it is most active before training."""


@dataclass(frozen=True)
class Verdict(Record):
    """A decision with its reasons."""

    decision: Decision
    """`go`: no protected domain is threatened; `watch`: one may be, not yet for sure or not for long enough to alarm; `no-go`:
    alarm; `cannot tell`: the evidence does not suffice. `not covered`, most of what changed lies outside the SAE: in files from
    before harm was judged by answers alone."""
    threatened: tuple[str, ...]
    """Protected domains that it is about."""
    reasons: Mapping[str, str]
    """Why, a sentence for each protected domain."""
    step: int
    """Optimizer steps done; 0 for a forecast."""
    supersedes_forecast: bool = False
    """Whether the training data itself has really moved, so that the features which did, and the scores by them, take the place
    of the forecast's."""
    states: Mapping[str, State] = field(default_factory=dict)
    """Where each protected domain stands, at a check: `over` its budget, `on course` to pass it (over half of it for sure),
    `within` it (by the whole interval), or `inconclusive`. Empty for a forecast, and in files from before there were states."""
    level: float = 0.0
    """Of a check, its part of the error that the run's test may make; 0: it may not alarm. 0 for a forecast, and in files from
    before there were parts."""
    best_checkpoint: int = 0
    """Of a check, the step of that checkpoint on disk from before it at which the domain worst off by its budget was best off; 0
    if none is known that keeps all budgets."""

    def _repr_html_(self) -> str:
        """For a notebook."""
        rows = [(name, self.states.get(name, ""), reason) for name, reason in self.reasons.items()]
        told = f"Threatened: {', '.join(self.threatened)}. " if self.threatened else ""
        return notebook.table(in_capitals(self.decision, self.step), ("domain", "state", "why"), rows, f"{told}{self.way_back}")

    @property
    def alarmed(self) -> tuple[str, ...]:
        """The threatened domains if it is an alarm, else none."""
        return self.threatened if self.decision == "no-go" else ()

    @property
    def explanation(self) -> str:
        """The reasons that matter in one text: of the threatened domains if there are any, else of all; and the way back."""
        told = [f"{name}: {reason}" for name, reason in self.reasons.items() if name in (self.threatened or self.reasons)]
        return " ".join([*told, *([self.way_back] if self.way_back else [])])

    @property
    def way_back(self) -> str:
        """In a sentence, the checkpoint to go back to after an alarm; empty if there is none, or no alarm."""
        return f"Best checkpoint on disk: checkpoint-{self.best_checkpoint}." if self.alarmed and self.best_checkpoint else ""


def harm_in(unit: Unit, nll_change: Estimate, bits_change: Estimate, accuracy_change: Estimate) -> Estimate:
    """What answers have lost, in a budget's unit; above 0 is worse.

    Args:
        unit: of the budget.
        nll_change: of the answers' NLL, in nats a token.
        bits_change: of the same, in bits a byte.
        accuracy_change: of the share of tokens that are right.

    """
    if unit == "points":
        value, low, high = (0.0 - _POINTS * end for end in vars(accuracy_change).values())  # no -0.0
        return Estimate(value, high, low)
    return nll_change if unit == "nats/token" else bits_change


def in_capitals(decision: Decision, step: int) -> str:
    """A decision as a word that catches the eye; a no-go in training, at a step above 0, is an alarm."""
    return "ALARM" if decision == "no-go" and step else decision.upper()


def _places(values: Mapping[str, float]) -> dict[str, int]:
    """1 for the largest value; equals share a place."""
    return {name: 1 + sum(other > value for other in values.values()) for name, value in values.items()}
