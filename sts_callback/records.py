"""What was measured and decided: frozen, plain Python, JSON both ways.

NaN, a score that could not be had, is written as null. Unknown keys and other schema versions are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

SCHEMA_VERSION = 1

Decision = Literal["go", "watch", "no-go", "cannot tell"]
R = TypeVar("R", bound="Record")


@dataclass(frozen=True)
class Record:
    """A record that can be written as JSON and read back."""

    def to_json(self) -> str:
        """One line of strict JSON with its schema version."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **_plain(self)}, allow_nan=False)

    @classmethod
    def from_json(cls: type[R], text: str) -> R:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is another schema version or has unknown or missing keys.

        """
        content = json.loads(text)
        version = content.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version: got {version!r}; this version reads {SCHEMA_VERSION}.")
        made: R = _typed(content, cls)
        return made


@dataclass(frozen=True)
class Identity(Record):
    """What a measurement was made with; two can be compared only if these agree."""

    model: str
    """SHA-256 of the model's configuration."""
    model_name: str
    """Its name or folder name, for people."""
    sae: str
    """SHA-256 of the SAE's encoder."""
    sae_name: str
    """`release/sae_id` or folder name, for people."""
    hook_name: str
    """Where the SAE reads."""
    probes: str
    """SHA-256 of all probe tokens and of how they are counted."""


@dataclass(frozen=True)
class DomainForecast(Record):
    """What is expected of one domain. Scores tell how much it will move, never in which direction."""

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
    sts_act: float
    """STS_act, in units of activation."""
    sts_icl: float
    """STS_ICL, in squared units of activation."""
    sts_rel: float
    """Share of the shift by the domain's own demonstrations on the training data's features, in [0, 1]."""
    sts_cross: float
    """Share of the shift by the training demonstrations on the training data's features, in [0, 1]."""
    relative_shift: float
    """Squared shift by the training demonstrations over squared activity, at least 0."""
    nll: float
    """NLL of the answers before training, in nats per token."""
    nll_change: float
    """Change of it with the training demonstrations in context, in nats per token; above 0 is worse."""
    nll_change_se: float
    """Its standard error over queries."""


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
    unexplained: float
    """Fraction of variance of the probes' activations that the SAE leaves (FVU)."""
    train: DomainForecast
    """The training data against itself: the upper anchor."""
    domains: Mapping[str, DomainForecast]
    seconds: float
    """Wall-clock time of the measurement."""

    def transfer(self, domain: DomainForecast) -> float:
        """STS_cross of a domain over that of the training data itself: at least 0; NaN if nothing shifts."""
        return domain.sts_cross / self.train.sts_cross if self.train.sts_cross else math.nan


@dataclass(frozen=True)
class DomainDrift(Record):
    """What training has done to one domain since step 0."""

    name: str
    """The domain, or `train`."""
    n_tokens: int
    """Query tokens compared."""
    n_masked: int
    """Tokens that have become attention sinks since step 0."""
    relative_drift: float
    """Squared feature drift over squared activity at step 0, at least 0."""
    share_on_forecast: float
    """Share of the drift on the forecast's features, in [0, 1]."""
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
    nll: float
    """NLL of the answers now, in nats per token."""
    nll_change: float
    """Change since step 0, in nats per token; above 0 is worse."""
    nll_change_se: float
    """Its standard error over queries."""


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


@dataclass(frozen=True)
class Verdict(Record):
    """A decision with its reasons."""

    decision: Decision
    """`go`: no protected domain is threatened; `watch`: one is, not yet for long enough to alarm; `no-go`: alarm."""
    threatened: tuple[str, ...]
    """Protected domains that it is about."""
    reasons: Mapping[str, str]
    """Why, a sentence for each protected domain."""
    step: int
    """Optimizer steps done; 0 for a forecast."""

    @property
    def explanation(self) -> str:
        """The reasons that matter in one text: of the threatened domains if there are any, else of all."""
        return " ".join(f"{name}: {reason}" for name, reason in self.reasons.items() if name in (self.threatened or self.reasons))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _typed(value: Any, kind: Any) -> Any:
    """Give plain JSON back the types that the annotation `kind` names."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if set(value) != set(hints):
            raise ValueError(f"{kind.__name__}: keys differ: {sorted(set(value) ^ set(hints))}.")
        return kind(**{name: _typed(value[name], hint) for name, hint in hints.items()})
    if origin is tuple:
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_typed(item, hint) for item, hint in zip(value, inner, strict=True))
    if origin in (Mapping, typing.get_origin(Mapping[str, int])):
        return types.MappingProxyType({name: _typed(item, arguments[1]) for name, item in value.items()})
    if kind is float:
        return float("nan") if value is None else float(value)
    return value
