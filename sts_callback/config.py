"""Settings: frozen, validated when made, the same for the Python API and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from sts_callback.errors import ConfigError

ChatTemplateUse = Literal["auto", "always", "never"]
CHAT_TEMPLATE: tuple[ChatTemplateUse, ...] = get_args(ChatTemplateUse)


def _require(ok: bool, where: str, value: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{where}: got {value!r}; allowed is {allowed}.")


@dataclass(frozen=True)
class ProbeConfig:
    """How texts become probes and what is counted in them."""

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
    """Longest query and longest answer, in tokens each; what is longer is cut, and the cut counted."""
    max_norm_multiple: float = 3.0
    """Tokens count if their activation norm is below this multiple of the median (see `metrics.tokens`)."""
    batch_tokens: int = 1024
    """Tokens in one forward, padding included."""
    seed: int = 0
    """Draws demonstrations and queries."""
    chat_template: ChatTemplateUse = "auto"
    """Whether plain prompts and answers are put into the model's chat template: those of domains if the training data use it, all
    of them, or none."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be measured with."""
        _require(self.n_queries >= 4, "n_queries", self.n_queries, "4 or more")
        for name in ("n_train_demonstrations", "n_domain_demonstrations", "n_features"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.n_draws >= 2, "n_draws", self.n_draws, "2 or more: one draw says nothing about another")
        _require(self.max_tokens >= 8, "max_tokens", self.max_tokens, "8 or more")
        _require(self.max_norm_multiple > 1, "max_norm_multiple", self.max_norm_multiple, "above 1")
        _require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "1 or more")
        _require(self.chat_template in CHAT_TEMPLATE, "chat_template", self.chat_template, " or ".join(CHAT_TEMPLATE))


DEFAULT_BUDGET = 0.1
"""Nats per token that a protected domain's answers may lose. Our choice: perplexity up by a tenth is what a reader notices."""

ROWS_READ, ROWS_SHOWN = 2000, 10
"""Training rows that `blame` reads and shows. Our choice: reading as many short rows takes about as long as a forecast."""

SCALES = 0.25, 0.5, 0.75, 1.0
"""Shares of an adapter's own scale that `dial` tries. Our choice."""

MAX_REPLAY, MAX_REPEATS = 0.5, 4.0
"""Of a mixture, the largest share that is no training data (our choice), and how often a row may come (four times is about as
good as new rows: Muennighoff et al., NeurIPS 2023, arXiv 2305.16264)."""


@dataclass(frozen=True)
class PolicyConfig:
    """When movement becomes a verdict."""

    budgets: Mapping[str, float] = field(default_factory=dict)
    """Protected domains, and the rise of answer NLL each may suffer, in nats per token."""
    min_drift: float = 0.05
    """A domain moves if its squared feature drift is at least this share of its squared feature activity at step 0."""
    patience: int = 1
    """Successive checks that a threat must hold before it alarms. One was chosen on the validation's development half; in the
    other, 1 of 94 domains without harm alarmed, and of 146 with it 78 did instead of 53 (examples/validation/RESULTS.md)."""
    alpha: float = 0.01
    """Of one check without any change, the chance that some protected domain's NLL passes the test of a rise, if each query's
    change is as likely up as down. Real changes are skewed, a small rise within the budget is a rise too, and the checks of a run
    add up: `examples/false_alarms.py` has what becomes of it."""
    max_unseen: float = 0.5
    """Where more than this share of a change lies outside the SAE, a domain is not covered."""
    max_masked_share: float = 0.05
    """With more than this share of tokens left out as attention sinks, a domain's score cannot be trusted."""

    def __reduce__(self) -> tuple[Any, ...]:
        """How a process sends it to another: read-only mappings cannot be pickled."""
        return type(self), (dict(self.budgets), *list(vars(self).values())[1:])

    def __post_init__(self) -> None:
        """Freeze the budgets and refuse thresholds that could never, or would always, be met."""
        for name, budget in self.budgets.items():
            _require(budget > 0, f"protect[{name!r}]", budget, "a budget above 0, in nats per token")
        object.__setattr__(self, "budgets", MappingProxyType(dict(self.budgets)))
        _require(self.min_drift > 0, "min_drift", self.min_drift, "above 0")
        _require(self.patience >= 1, "patience", self.patience, "1 or more")
        # A permutation p-value is at least one over the number of permutations, here 10,000, and Holm multiplies it.
        lowest = max(1, len(self.budgets)) / 10_000
        _require(lowest <= self.alpha < 1, "alpha", self.alpha, f"from {lowest:g} (with {len(self.budgets)} domains) to under 1")
        _require(0 < self.max_unseen <= 1, "max_unseen", self.max_unseen, "above 0, up to 1")
        _require(0 < self.max_masked_share <= 1, "max_masked_share", self.max_masked_share, "between 0 and 1")
