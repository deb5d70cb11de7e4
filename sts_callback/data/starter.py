"""The domains that ship with the package, and how protected names find their texts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from sts_callback.config import DEFAULT_BUDGET
from sts_callback.data.reader import Source, held
from sts_callback.errors import ConfigError

ALL = "all"
"""Stands for every shipped domain."""
_FOLDER = Path(__file__).parent / "domains"


def starter_domains() -> dict[str, Path]:
    """Names of the shipped domains and their files."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.jsonl"))}


def choose_domains(
    protect: str | Sequence[str] | Mapping[str, float], domains: Mapping[str, Source] | None
) -> tuple[dict[str, Source], dict[str, float]]:
    """Find what to measure and what to protect.

    Args:
        protect: names of domains, or names with budgets in nats per token; `"all"`, alone or among them, are all shipped ones.
        domains: the user's own, name to source; a protected name that is not among them is a shipped one.

    Returns:
        Sources by name, the user's own first; and the budget of each protected domain.

    Raises:
        ConfigError: if a protected name is no domain, or nothing at all is to be measured.
        DataError: if an iterator holds no rows.

    """
    if isinstance(protect, str) and protect != ALL:
        raise ConfigError(
            f"protect: got the text {protect!r}; allowed is a list of names, such as [{protect!r}], or names with budgets, or "
            f"{ALL!r}."
        )
    names = [protect] if isinstance(protect, str) else protect
    budgets = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, DEFAULT_BUDGET)
    shipped = starter_domains()
    chosen = {name: held(source, f"domains[{name!r}]") for name, source in (domains or {}).items()}
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
                f"add your own with domains={{{name!r}: FILE}}."
            )
    if not chosen:
        raise ConfigError("protect: nothing to measure; name a domain to protect, or give your own as domains={name: FILE}.")
    return chosen, budgets
