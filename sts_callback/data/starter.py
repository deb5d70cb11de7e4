"""The domains that ship with the package, and the choice of domains by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sts_callback.config import DEFAULT_BUDGET, TRAIN, PlainBudget, require, require_once
from sts_callback.data.reader import Source, held
from sts_callback.errors import ConfigError

ALL = "all"
"""Means every shipped domain."""
_FOLDER = Path(__file__).parent / "domains"


def starter_domains() -> dict[str, Path]:
    """Names and files of the shipped domains."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.jsonl"))}


def choose_domains(
    protect: str | Sequence[str] | Mapping[str, PlainBudget], domains: Mapping[str, Source] | None
) -> tuple[dict[str, Source], dict[str, PlainBudget]]:
    """Find what to measure and what to protect.

    Args:
        protect: names of domains, or names with budgets; `"all"`, alone or among them, are all shipped ones.
        domains: the user's own, name to source; a protected name that is not among them is a shipped one.

    Returns:
        Sources by name, the user's own first, and the budget of each protected domain.

    Raises:
        ConfigError: if a protected name is no domain, a name occurs twice, or there is nothing to measure.
        DataError: if a domain cannot be a source, or an iterator holds no rows.

    """
    names = names_in([protect] if isinstance(protect, str) and protect == ALL else protect)
    domains = {} if domains is None else domains
    require_domains(domains)
    budgets: dict[str, PlainBudget] = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, DEFAULT_BUDGET)
    shipped = starter_domains()
    chosen = {name: held(source, f"domains[{name!r}]") for name, source in domains.items()}
    if ALL in budgets and ALL not in chosen:
        budgets = dict.fromkeys(shipped, budgets.pop(ALL)) | budgets
    for name in budgets:
        if name in shipped:
            chosen.setdefault(name, shipped[name])
        elif name not in chosen:
            known = sorted({*chosen, *shipped})
            near = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                f"protect: {name!r} is no domain{f'; did you mean {near[0]!r}?' if near else '.'} Known are {', '.join(known)}; "
                f"add your own with domains={{{name!r}: FILE}}, in a shell with --domain {name}=FILE."
            )
    if not chosen:
        raise ConfigError("protect: nothing to measure; name a domain to protect, or give your own as domains={name: FILE}.")
    return chosen, budgets


def names_in(given: Any) -> list[str] | Mapping[str, PlainBudget]:
    """Names of domains, or names with budgets.

    Args:
        given: what the user gave.

    Raises:
        ConfigError: if they are something else, or a name occurs twice.

    """
    example = given if given and isinstance(given, str) else "law"
    allowed = f"a list of names, such as [{example!r}], or names with budgets, or {ALL!r}"
    require(isinstance(given, Iterable) and not isinstance(given, str), "protect", given, allowed)
    names = given if isinstance(given, Mapping) else list(given)
    require(all(name and isinstance(name, str) for name in names), "protect", names, allowed)
    require_once(names, "protect")
    return names


def require_domains(domains: Any) -> None:
    """Refuse anything but a mapping of domains.

    Args:
        domains: name to source.

    Raises:
        ConfigError: if they are something else, or one has the training data's name.

    """
    is_named = isinstance(domains, Mapping)
    shown = list(domains) if is_named else domains  # without the rows
    is_named = is_named and all(name and isinstance(name, str) for name in domains)
    require(is_named, "domains", shown, "a mapping of names to files, data sets or rows")
    require(TRAIN not in domains, "domains", TRAIN, "another name, since the training data has this one")
