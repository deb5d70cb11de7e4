"""Settings: frozen, validated when made, the same for the Python API and the command line."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from sts_callback.errors import ConfigError

ChatTemplateUse = Literal["auto", "always", "never"]
CHAT_TEMPLATE: tuple[ChatTemplateUse, ...] = get_args(ChatTemplateUse)

Unit = Literal["nats/token", "bits/byte", "points"]
"""Of a budget: NLL over the answers' tokens, NLL over the bytes of their text, or percentage points of their token accuracy."""
PlainBudget: TypeAlias = float | str
"""A number of nats a token, or a text with another unit."""

NO_SAE = "none"
"""As `sae=`: raw activations are read, without an SAE. As `Identity.sae`: they were."""

N_LOOKS = 10
"""Checks that share the error of a run where nobody says how many there are: as many as after 1, 2, 5, 10, ... 1,000 steps."""

TRAIN = "train"
"""Name of the training data's probe set, which no domain may have."""
_TOO_LONG = 300  # characters of a value that are shown in full


def require(ok: bool, where: str, value: object, allowed: str) -> None:
    """Refuse a value.

    Args:
        ok: whether it is allowed.
        where: the setting's name.
        value: as it was given.
        allowed: what would have been.

    Raises:
        ConfigError: if it is not allowed.

    """
    if not ok:
        shown = repr(value)
        raise ConfigError(f"{where}: got {shown if len(shown) < _TOO_LONG else f'{shown[:_TOO_LONG]}...'}; allowed is {allowed}.")


def whole(value: Any, where: str, allowed: str = "a whole number", least: int | None = None) -> int:
    """A whole number, also one of NumPy or torch, as Python's own; yes and no are none.

    Args:
        value: as it was given.
        where: the setting's name.
        allowed: in words.
        least: that it may be.

    Raises:
        ConfigError: if it is none or too low.

    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        number = None
    require(number is not None and (least is None or number >= least), where, value, allowed)
    return int(number)  # type: ignore[arg-type]  # it was required


def finite(value: Any, where: str, allowed: str = "a finite number") -> float:
    """A finite number, also one of NumPy or torch, as Python's own; a text, yes and no are none.

    Args:
        value: as it was given.
        where: the setting's name.
        allowed: in words.

    Raises:
        ConfigError: if it is none.

    """
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    require(math.isfinite(number), where, value, allowed)
    return number


def require_once(names: Iterable[str], where: str) -> None:
    """Refuse a name that comes twice: one of the two would be lost.

    Args:
        names: as they were given.
        where: the setting's name.

    Raises:
        ConfigError: with the name.

    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{where}: got {name!r} twice; give each name once.")
        seen.add(name)


def require_protected(names: Collection[str]) -> None:
    """Refuse to go without a protected domain where all is about them.

    Args:
        names: of protected domains.

    Raises:
        ConfigError: if there is none.

    """
    if not names:
        raise ConfigError("protect: got none; name at least one domain that must not suffer.")


def _plain_numbers(settings: Any) -> None:
    """Turn what stands in number fields into Python's own kind, which can be compared and written; refuse what is no number."""
    for f in fields(settings):
        if f.type in ("int", "float"):
            made = (whole if f.type == "int" else finite)(getattr(settings, f.name), f.name)
            object.__setattr__(settings, f.name, made)


@dataclass(frozen=True)
class ProbeConfig:
    """How texts become probes and what is counted in them.

    Raises:
        ConfigError: if a value cannot be measured with.

    """

    n_queries: int = 32
    """Queries drawn from the training data and from each domain."""
    n_train_demonstrations: int = 2
    """Answered training examples put in each context (t in the paper)."""
    n_domain_demonstrations: int = 5
    """Answered examples of a domain put in context for its own score (m in the paper)."""
    n_draws: int = 8
    """Draws of demonstrations, each for a group of queries; fewer where there would be less than two queries for one."""
    n_features: int = 100
    """Size of the set of shifted features (N in the paper)."""
    max_tokens: int = 512
    """Longest query and longest answer, in tokens each; what is longer is cut, and the cut counted. What a chat template puts
    before all prompts is kept, as long as it is shorter than this, and not counted here."""
    max_norm_multiple: float = 3.0
    """Tokens count if their activation norm is below this multiple of the median (see `metrics.sums`)."""
    batch_tokens: int = 1024
    """Tokens in one forward, padding included."""
    seed: int = 0
    """Draws demonstrations and queries."""
    chat_template: ChatTemplateUse = "auto"
    """Whether plain prompts and answers are put into the model's chat template: those of domains if the training data use it, all
    of them, or none."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be measured with."""
        _plain_numbers(self)
        require(self.n_queries >= 4, "n_queries", self.n_queries, "4 or more")
        for name in ("n_train_demonstrations", "n_domain_demonstrations", "n_features"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.n_draws >= 2, "n_draws", self.n_draws, "2 or more: one draw says nothing about another")
        require(self.max_tokens >= 8, "max_tokens", self.max_tokens, "8 or more")
        require(self.max_norm_multiple > 1, "max_norm_multiple", self.max_norm_multiple, "above 1")
        require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.chat_template in CHAT_TEMPLATE, "chat_template", self.chat_template, " or ".join(CHAT_TEMPLATE))

    @property
    def unusual_numbers(self) -> dict[str, int]:
        """Those of `PROBE_NUMBERS` that are not the default, by name."""
        usual = {f.name: f.default for f in fields(self)}
        return {name: n for name in PROBE_NUMBERS if (n := getattr(self, name)) != usual[name]}


PROBE_NUMBERS = ("n_queries", "n_draws", "n_features", "max_tokens", "seed")
"""Fields of `ProbeConfig` that commands have options for."""

DIGITS: Mapping[Unit, int] = {"nats/token": 2, "bits/byte": 3, "points": 1}
"""That are shown of a number in each unit: what a budget of usual size is a few times of."""
_SPELLINGS: Mapping[Unit, str] = {
    "nats/token": r"|nats?((/| per | an? )token)?",
    "bits/byte": r"bits?(/| per | an? )byte|bpb",
    "points": r"points?|pts?|pp|(percentage )?points?( of( token)? accuracy)?",
}
_BUDGETS = (
    "a budget above 0: a number of nats a token such as 0.1, or a text with another unit such as '0.05 bits/byte' or '2 points' "
    "(of token accuracy, up to 100)"
)


@dataclass(frozen=True)
class Budget:
    """What a protected domain's answers may lose."""

    value: float
    unit: Unit = "nats/token"

    @classmethod
    def of(cls, given: Any, where: str = "budget") -> Budget:
        """Read a budget.

        Args:
            given: a number of nats a token, or a text of a number with a unit or without.
            where: the setting's name.

        Raises:
            ConfigError: if it is something else, not above 0, or more points than there are.

        """
        unit: Unit | None = "nats/token"
        if isinstance(given, str):
            text = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*(.*?)\s*", given, re.IGNORECASE)
            number, spelled = (float(text[1]), text[2]) if text else (math.nan, "")
            unit = next((u for u, form in _SPELLINGS.items() if re.fullmatch(form, spelled, re.IGNORECASE)), None)
        else:
            number = finite(given, where, _BUDGETS)
        require(unit is not None and 0 < number < math.inf, where, given, _BUDGETS)
        require(unit != "points" or number <= 100, where, given, _BUDGETS)
        return cls(number, unit)  # type: ignore[arg-type]  # it was required

    @property
    def plain(self) -> PlainBudget:
        """As settings and JSON have it: a bare number is one of nats a token."""
        return self.value if self.unit == "nats/token" else f"{repr(self.value).removesuffix('.0')} {self.unit}"


def limits_of(budgets: Mapping[str, PlainBudget]) -> dict[str, Budget]:
    """Budgets with their units, by domain.

    Args:
        budgets: as settings and JSON have them.

    """
    return {name: Budget.of(budget) for name, budget in budgets.items()}


DEFAULT_BUDGET = 0.1
"""Nats a token that a protected domain's answers may lose. Our choice: perplexity up by a tenth is what a reader notices."""

ROWS_READ, ROWS_SHOWN = 2000, 10
"""Training rows that `blame` reads and shows. Our choice: reading as many short rows takes about as long as a forecast."""

SCALES = 0.25, 0.5, 0.75, 1.0
"""Shares of an adapter's own scale that `dial` tries. Our choice."""

MAX_REPLAY, MAX_REPEATS = 0.5, 4.0
"""Of a mixture, the largest share that is no training data (our choice), and how often a row may come (four times is about as
good as new rows: Muennighoff et al., NeurIPS 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class PolicyConfig:
    """When movement becomes a verdict.

    Raises:
        ConfigError: if a budget cannot be read, or a threshold could never, or would always, be met.

    """

    budgets: Mapping[str, PlainBudget] = field(default_factory=dict)
    """Protected domains, and what each one's answers may lose: a number of nats a token, or a text with its unit."""
    min_drift: float = 0.05
    """A domain moves if its squared feature drift is at least this share of its squared feature activity at step 0."""
    patience: int = 1
    """Successive checks that a threat must hold before it alarms."""
    alpha: float = 0.05
    """Of a whole run, the chance that some protected domain alarms though none has got worse by half its budget. It is spent in
    equal parts over the planned checks, and a check takes those of skipped ones too; `examples/false_alarms.py` has what becomes
    of it on real changes."""
    max_unseen: float = 0.5
    """Where more than this share of a change lies outside the SAE, a verdict says so beside what it says of movement."""
    max_masked_share: float = 0.05
    """With more than this share of tokens left out as attention sinks, what is said of a domain's movement cannot be trusted."""

    @property
    def limits(self) -> dict[str, Budget]:
        """The budgets with their units."""
        return limits_of(self.budgets)

    def __reduce__(self) -> tuple[Any, ...]:
        """How a process sends it to another: read-only mappings cannot be pickled."""
        return type(self), (dict(self.budgets), *list(vars(self).values())[1:])

    def __post_init__(self) -> None:
        """Freeze the budgets and refuse thresholds that could never, or would always, be met."""
        require(isinstance(self.budgets, Mapping), "protect", self.budgets, "a mapping of domains to budgets")
        budgets = {name: Budget.of(budget, f"protect[{name!r}]").plain for name, budget in self.budgets.items()}
        object.__setattr__(self, "budgets", MappingProxyType(budgets))
        _plain_numbers(self)
        require(self.min_drift > 0, "min_drift", self.min_drift, "above 0")
        require(self.patience >= 1, "patience", self.patience, "1 or more")
        require(0 < self.alpha < 1, "alpha", self.alpha, "above 0, under 1")
        require(0 < self.max_unseen <= 1, "max_unseen", self.max_unseen, "above 0, up to 1")
        require(0 < self.max_masked_share <= 1, "max_masked_share", self.max_masked_share, "between 0 and 1")


@dataclass(frozen=True)
class SaeConfig:
    """What SAE to train, and on how much."""

    batch: ClassVar[int] = 512
    """Tokens in a step of training."""

    hook_name: str | None = None
    """A TransformerLens hook name, a module path, or a share of the depth such as `0.5`; None: after two thirds of the layers, as
    `sae="auto"` has it."""
    d_sae: int | None = None
    """Number of features; None: the power of two that is at most eight times the width of the activations."""
    l0: float = 48.0
    """Mean number of active features a token."""
    n_tokens: int = 500_000
    """Tokens whose activations are read; fewer if the texts hold fewer."""
    n_passes: float = 4.0
    """How often training goes through them."""
    seed: int = 0
    """Of all that is drawn."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        _plain_numbers(self)
        if self.d_sae is not None:
            whole(self.d_sae, "d_sae", "16 or more", least=16)
        require(self.l0 >= 1, "l0", self.l0, "1 or more")
        require(self.n_tokens >= self.batch, "tokens", self.n_tokens, f"{self.batch} or more: those of a step of training")
        require(self.n_passes > 0, "passes", self.n_passes, "above 0")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
