"""`sts.lock`: a file that fixes all that a verdict depends on beside the training data, so that verdicts can be compared."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_callback.config import NO_SAE, PolicyConfig, ProbeConfig
from sts_callback.errors import ConfigError
from sts_callback.records import Record
from sts_callback.records.run import installed_versions
from sts_callback.runs.files import write_asked

if TYPE_CHECKING:
    from sts_callback.measure.monitor import Monitor

_PACKAGES = ("torch", "transformers", "tokenizers", "sae-lens", "numpy", "scipy")
"""Packages that change numbers. `datasets`, `trl` and others only read texts; the probes' fingerprints cover them."""
_NONE = "none"


@dataclass(frozen=True)
class Lock(Record):
    """The conditions of a forecast, without the training data: those are what the forecast is to judge."""

    model: str
    """SHA-256 of the model's configuration."""
    model_weights: str
    """SHA-256 of its weights: a fine-tuned model has the same configuration as its base."""
    model_dtype: str
    """Its dtype, which may differ between GPU and CPU."""
    model_name: str
    """For people; not compared."""
    sae: str
    """SHA-256 of the first SAE, which decides."""
    sae_name: str
    """For people; not compared."""
    hook_name: str
    """Hook point of that SAE."""
    domains: Mapping[str, str]
    """SHA-256 of the probes of each domain."""
    policy: PolicyConfig
    """Budgets and thresholds."""
    probes: ProbeConfig
    """How texts become probes."""
    versions: Mapping[str, str]
    """Versions of the packages that change numbers."""


@dataclass(frozen=True)
class Difference:
    """One difference from the lock."""

    name: str
    """Its keys in the file, joined by dots."""
    locked: str
    here: str
    remedy: str
    """How to restore the locked condition."""


def lock_of(monitor: Monitor, policy: PolicyConfig) -> Lock:
    """Get the conditions of a monitor's forecast. Only the fingerprint of the weights is computed.

    Args:
        monitor: runs on one process, with its model whole.
        policy: judges the forecast.

    """
    identity, weights = monitor.identity, monitor.weights()
    return Lock(
        model=identity.model,
        model_weights=weights.fingerprint,
        model_dtype=weights.dtype,
        model_name=identity.model_name,
        sae=identity.sae,
        sae_name=identity.sae_name,
        hook_name=identity.hook_name,
        domains={name: probes.fingerprint for name, probes in monitor.domains.items()},
        policy=policy,
        probes=monitor.config,
        versions=installed_versions(_PACKAGES),
    )


def read_lock(file: Path) -> Lock:
    """Read a lock file.

    Raises:
        ConfigError: if the file does not exist or cannot be read.

    """
    if not file.exists():
        raise ConfigError(f"--lock: there is no file {file}; add --write-lock to write it, once, after a forecast.")
    try:
        return Lock.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"--lock: {file} cannot be read ({error}); restore it, or write it anew with --write-lock.") from error


def write_lock(file: Path, lock: Lock) -> None:
    """Write a lock file, whole or not at all, in lines that a review can compare.

    Raises:
        DataError: if the file cannot be written.

    """
    write_asked(file, json.dumps(lock.to_dict(), indent=2) + "\n", "--lock")


def differences(locked: Lock, here: Lock) -> tuple[Difference, ...]:
    """Find the differences between two locks, in the order of the file.

    Args:
        locked: the lock in the file.
        here: the lock of the forecast to be made.

    """
    one, other = _flat(locked), _flat(here)
    found = []
    for name in dict.fromkeys([*one, *other]):
        there, now = str(one.get(name, _NONE)), str(other.get(name, _NONE))
        # Other settings draw and cut other probes: the difference of the settings is enough.
        follows = name[0] == "domains" and _NONE not in (there, now) and locked.probes != here.probes
        if there != now and not follows:
            found.append(Difference(".".join(name), there, now, _remedy(name, there, locked)))
    return tuple(found)


def require_same(locked: Lock, here: Lock, file: Path) -> None:
    """Refuse a forecast whose verdict could not be compared with earlier ones under the lock.

    Args:
        locked: the lock in the file.
        here: the lock of the forecast to be made.
        file: the file, for the message.

    Raises:
        ConfigError: if there are differences. The message gives both values and what to do about each.

    """
    if found := differences(locked, here):
        are = "thing is" if len(found) == 1 else "things are"
        lines = [f"  {d.name}: locked {d.locked}, here {d.here}; {d.remedy}" for d in found]
        raise ConfigError(
            f"--lock: {len(found)} {are} not as in {file}, and nothing was forecast:\n"
            + "\n".join(lines)
            + "\nIf the change is meant, write the file anew with --write-lock and have it reviewed like code."
        )


def _flat(lock: Lock) -> dict[tuple[str, ...], Any]:
    """Flatten a lock to values by key. Names of domains may contain dots."""
    content = lock.to_dict()
    for for_people in ("schema_version", "model_name", "sae_name"):
        del content[for_people]

    def values(content: Mapping[str, Any], place: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
        found: dict[tuple[str, ...], Any] = {}
        for name, value in content.items():
            found |= values(value, (*place, name)) if isinstance(value, Mapping) else {(*place, name): value}
        return found

    return values(content, ())


def _remedy(name: tuple[str, ...], value: str, locked: Lock) -> str:
    match name:
        case ("model",) | ("model_weights",):
            return f"give the model that was locked, {locked.model_name}, as it was then"
        case ("model_dtype",):
            return "run on a device of the same kind (--device)"
        case ("sae",) | ("hook_name",):
            if locked.sae == NO_SAE:
                return f"give --sae {NO_SAE}:LAYER, where it read {locked.hook_name}"
            return f"give --sae {locked.sae_name}, as it was then"
        case ("policy", "budgets", domain):
            given = shlex.quote(f"{domain}={value}")  # a budget with a unit has a space
            return f"leave out --protect {domain}" if value == _NONE else f"give --protect {given}"
        case ("domains", domain) if value == _NONE:
            return f"leave out --domain {domain} and --protect {domain}"
        case ("domains", domain):
            return f"give the texts of {domain} and the tokenizer as they were then"
        case ("probes", setting) if setting in ("n_queries", "n_draws", "n_features", "max_tokens", "seed", "chat_template"):
            return f"give --{setting.replace('_', '-')} {value}"
        case ("versions", "sts-callback") | ("policy", _) | ("probes", _):
            return f"install sts-callback=={locked.versions.get('sts-callback', 'VERSION')}"
        case ("versions", package):
            return f"uninstall {package}" if value == _NONE else f"install {package}=={value}"
    raise AssertionError(name)
