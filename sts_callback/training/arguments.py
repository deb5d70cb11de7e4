"""All settings of a callback: as its runs read them; and flat, for `HfArgumentParser`, YAML files and frameworks with trainers.

The flat names begin with `sts_`, so that the settings can stand beside those of other dataclasses on a command line, or in the
framework's own YAML file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

import yaml

from sts_callback.config import (
    DEFAULT_BUDGET,
    Budget,
    ChatTemplateUse,
    PlainBudget,
    PolicyConfig,
    ProbeConfig,
    finite,
    require,
    require_once,
)
from sts_callback.errors import ConfigError
from sts_callback.records import Verdict

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sts_callback.data.reader import Source
    from sts_callback.model.sae import SaeSource

CheckOn = Literal["save", "evaluate"] | int
NamedAction = Literal["warn", "checkpoint", "stop"]
Action = NamedAction | Callable[[Verdict], object]
OnForecast = Literal["warn", "refuse"]
OnForecastError = Literal["raise", "train unwatched"]
OnError = Literal["warn", "raise"]
Rehearse = Literal["auto"] | bool

VARIABLE = "STS_CALLBACK_CONFIG"
"""Environment variable that names the YAML file which `STSCallback()` reads."""
DEFAULT_FILE = "sts.yaml"
"""What it reads, in the working directory, where that is not set."""


@dataclass(frozen=True)
class Settings:
    """What the arguments of an `STSCallback`, whose meaning stands there, come to."""

    saes: Sequence[SaeSource]
    """At least one."""
    domains: Mapping[str, Source]
    """The user's own and those that ship with the package."""
    train_data: Source | None
    check_on: CheckOn
    action: Action
    on_forecast: OnForecast
    on_forecast_error: OnForecastError
    on_error: OnError
    rehearse: Rehearse
    max_overhead: float
    """From 1 on there is no limit."""
    probes: ProbeConfig
    ledger: str | Path | None
    """File that keeps finished runs; None: that of the environment, if any."""
    policy: PolicyConfig
    """With the budgets of the protected domains."""


@dataclass
class STSArguments:
    """Settings of an `STSCallback`; what each means stands there and in `ProbeConfig` and `PolicyConfig`."""

    # HfArgumentParser knows `Optional[X]` and `list`, and no other union.
    sts_sae: list[str] = field(
        default_factory=list, metadata={"help": "SAELens release/sae_id, a folder, auto, or none (none:12, of layer 12); several"}
    )
    sts_protect: list[str] = field(
        default_factory=list,
        metadata={"help": "domains, each as NAME or NAME=BUDGET: 0.1 nats a token, '0.05 bits/byte' or 2points"},
    )
    sts_domains: list[str] = field(default_factory=list, metadata={"help": "own domains, each as NAME=FILE"})
    sts_train_data: Optional[str] = field(default=None, metadata={"help": "training examples with answers, a file"})  # noqa: UP045
    sts_check_on: str = field(default="save", metadata={"help": "save, evaluate, or a number of steps"})
    sts_action: NamedAction = field(default="warn", metadata={"help": "on an alarm"})
    sts_on_forecast: OnForecast = field(default="warn", metadata={"help": "if the forecast says no-go"})
    sts_on_forecast_error: OnForecastError = field(
        default="raise", metadata={"help": "if there can be no forecast, or no comparison with step 0 after a resume"}
    )
    sts_on_error: OnError = field(default="warn", metadata={"help": "if a measurement fails during training"})
    sts_rehearse: str = field(default="auto", metadata={"help": "a few steps before the first: auto, true or false"})
    sts_max_overhead: Optional[float] = field(default=0.01, metadata={"help": "share of training time for checks"})  # noqa: UP045
    sts_ledger: Optional[str] = field(default=None, metadata={"help": "file that keeps finished runs, to learn from"})  # noqa: UP045
    sts_n_queries: int = field(default=ProbeConfig.n_queries, metadata={"help": "queries of each set"})
    sts_n_draws: int = field(default=ProbeConfig.n_draws, metadata={"help": "draws of demonstrations"})
    sts_n_features: int = field(default=ProbeConfig.n_features, metadata={"help": "shifted features"})
    sts_max_tokens: int = field(default=ProbeConfig.max_tokens, metadata={"help": "longest query and longest answer"})
    sts_batch_tokens: int = field(default=ProbeConfig.batch_tokens, metadata={"help": "tokens in one forward"})
    sts_seed: int = field(default=ProbeConfig.seed, metadata={"help": "of demonstrations and queries"})
    sts_chat_template: ChatTemplateUse = field(
        default=ProbeConfig.chat_template, metadata={"help": "put plain rows of domains into the model's chat template"}
    )
    sts_alpha: float = field(default=PolicyConfig.alpha, metadata={"help": "chance of a false alarm in a whole run"})
    sts_patience: int = field(default=PolicyConfig.patience, metadata={"help": "checks that a threat must hold"})

    def options(self) -> dict[str, Any]:
        """Arguments for `STSCallback`.

        Raises:
            ConfigError: if a setting cannot be read.

        """
        probes = ("n_queries", "n_draws", "n_features", "max_tokens", "batch_tokens", "seed", "chat_template")
        return {
            "sae": list(self.sts_sae) if isinstance(self.sts_sae, (list, tuple)) else [self.sts_sae],
            "protect": budgets_in(self.sts_protect, "sts_protect"),
            "domains": named(self.sts_domains, "sts_domains", "NAME=FILE"),
            "train_data": self.sts_train_data,
            "check_on": int(self.sts_check_on) if str(self.sts_check_on).isdecimal() else self.sts_check_on,
            "action": self.sts_action,
            "on_forecast": self.sts_on_forecast,
            "on_forecast_error": self.sts_on_forecast_error,
            "on_error": self.sts_on_error,
            "rehearse": {"true": True, "false": False}.get(str(self.sts_rehearse).lower(), self.sts_rehearse),
            "max_overhead": None
            if self.sts_max_overhead is None
            else number(self.sts_max_overhead, "sts_max_overhead", "a share above 0, up to 1, or nothing for no limit"),
            "ledger": self.sts_ledger,
            "probes": ProbeConfig(**{name: getattr(self, f"sts_{name}") for name in probes}),
            "policy": PolicyConfig(
                alpha=number(self.sts_alpha, "sts_alpha", "a number between 0 and 1"), patience=self.sts_patience
            ),
        }

    @classmethod
    def from_yaml(cls, file: str | Path) -> STSArguments:
        """Read a file; keys that do not begin with `sts_` are somebody else's.

        Args:
            file: YAML.

        Raises:
            ConfigError: if it cannot be read or has an unknown key of ours.

        """
        try:
            text = Path(file).read_text(encoding="utf-8")
            content, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{VARIABLE}: {file} cannot be read ({error}); give a YAML file with keys such as sts_sae."
            ) from error
        if not isinstance(content, Mapping):
            raise ConfigError(f"{VARIABLE}: {file} holds no settings; give lines such as 'sts_protect: [law, code]'.")
        require_once(_keys_of_ours(node), str(file))
        ours = {key: value for key, value in content.items() if str(key).startswith("sts_")}
        known = [f.name for f in dataclasses.fields(cls)]
        for key in ours:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}."
                raise ConfigError(f"{file}: {key} is no setting; {hint}")
        return cls(**ours)

    @classmethod
    def of_environment(cls) -> STSArguments:
        """What stands in the file that the environment names, or else in `sts.yaml`.

        Raises:
            ConfigError: if there is none, or it cannot be read.

        """
        file = os.environ.get(VARIABLE) or DEFAULT_FILE
        if VARIABLE not in os.environ and not Path(file).is_file():
            raise ConfigError(
                "sae: got none; give STSCallback(sae=..., protect=[...]), where sae='none' reads raw activations, or write "
                f"the settings to {DEFAULT_FILE} in the working directory or to a file that the environment variable "
                f"{VARIABLE} names."
            )
        return cls.from_yaml(file)


def named(items: Any, field_name: str, form: str, default: object = None) -> dict[str, Any]:
    """Values by name, from a mapping or from texts `NAME=VALUE`.

    Raises:
        ConfigError: if a text has another form, or a name stands twice.

    """
    if isinstance(items, Mapping):
        return dict(items)
    found: list[tuple[str, Any]] = []
    for item in items if isinstance(items, (list, tuple)) else [items]:
        name, equals, value = item.partition("=") if isinstance(item, str) else ("", "", "")
        is_read = name and bool(equals) == bool(value) and (equals or default is not None)
        require(bool(is_read), field_name, item, form)
        found.append((name, value if equals else default))
    require_once((name for name, _ in found), field_name)
    return dict(found)


def budgets_in(items: Any, field_name: str) -> dict[str, PlainBudget]:
    """Budgets by the names of protected domains, from a mapping or from texts `NAME` or `NAME=BUDGET`.

    Raises:
        ConfigError: as `named` and `Budget.of`.

    """
    protect = named(items, field_name, "NAME or NAME=BUDGET", DEFAULT_BUDGET)
    return {name: Budget.of(budget, f"{field_name} {name}").plain for name, budget in protect.items()}


def number(value: Any, field_name: str, allowed: str) -> float:
    """A number, also as a text: YAML takes 1e-3 for one.

    Raises:
        ConfigError: if it is no finite number.

    """
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return finite(value, field_name, allowed)


def _keys_of_ours(node: Any) -> list[str]:
    """Keys of a YAML file as they stand there, and those of mappings below them: reading it keeps the last of equal ones."""
    found = []
    for key, value in node.value:
        if str(key.value).startswith("sts_"):
            inner = value.value if isinstance(value, yaml.MappingNode) else ()
            found += [key.value, *(f"{key.value}.{k.value}" for k, _ in inner)]
    return found


def require_whole_sequences(parallelism: Any) -> None:
    """Refuse to measure where each process sees only a part of every text.

    Args:
        parallelism: accelerate's `ParallelismConfig`, if there is one.

    Raises:
        ConfigError: if context or sequence parallelism is on.

    """
    sizes = {name: getattr(parallelism, name, 1) for name in ("cp_size", "sp_size")}  # the latter only in newer versions
    if max(sizes.values()) > 1:
        raise ConfigError(
            f"parallelism_config: got cp_size={sizes['cp_size']}, sp_size={sizes['sp_size']}; allowed is 1 for both, since "
            "attention is then over parts of texts and what it gives on probes is not what the model does. Forecast on one "
            "process with `sts-callback forecast` and train without the callback, or train without context and sequence "
            "parallelism."
        )


def require_kept_checkpoint(args: TrainingArguments, settings: Settings) -> None:
    """Refuse to promise an alarm's checkpoint that the trainer drops, where it may do so at the last event of training.

    Args:
        args: the trainer's.
        settings: the user's.

    Raises:
        ConfigError: if it would.

    """
    is_dropped = settings.check_on == "evaluate" and args.save_strategy == "best" and args.eval_strategy == "epoch"
    if is_dropped and settings.action in ("checkpoint", "stop"):
        raise ConfigError(
            "save_strategy: got 'best', by which the trainer drops the checkpoint that "
            f"action={settings.action!r} asks for after an evaluation at the end of an epoch; set save_strategy='epoch', "
            "eval_strategy='steps', or check_on to a number of steps."
        )


def require_one_of(field: str, value: object, names: tuple[str, ...], or_else: str = "") -> None:
    """Refuse what is none of the named choices.

    Args:
        field: the setting's name.
        value: as it was given.
        names: what is allowed.
        or_else: what is besides, in words.

    Raises:
        ConfigError: if it is none of them.

    """
    allowed = ", ".join(map(repr, names)) + (f" or {or_else}" if or_else else "")
    require(isinstance(value, str) and value in names, field, value, allowed)
