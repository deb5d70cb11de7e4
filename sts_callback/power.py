"""How many queries an alarm takes: what probes can tell, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping

from sts_callback.config import N_LOOKS, PolicyConfig, ProbeConfig
from sts_callback.errors import CannotTell

ENOUGH_QUERIES = 28
"""Queries of a protected domain below which a warning is due. Our choice; `examples/false_alarms.py` has the test's power."""


def fewest_queries(policy: PolicyConfig, n_looks: int = N_LOOKS) -> int:
    """How many queries each protected domain needs for the test of harm to have any power.

    Args:
        policy: whose test is to be passed.
        n_looks: checks that share the error of the run.

    """
    return fewest_at(policy, policy.alpha / n_looks)


def fewest_at(policy: PolicyConfig, level: float) -> int:
    """The same, for one check.

    Args:
        policy: whose test is to be passed.
        level: chance of a false alarm at that check.

    """
    from sts_callback.metrics.statistics import fewest_for_t  # SciPy, which only this function takes

    return fewest_for_t(level / max(1, len(policy.budgets)))


def short_of_queries(n_queries: Mapping[str, int], policy: PolicyConfig, least: int) -> dict[str, int]:
    """Protected domains with fewer queries than that, and how many they have.

    Args:
        n_queries: of each set.
        policy: with the protected domains.
        least: how many are enough.

    """
    return {name: n_queries[name] for name in policy.budgets if name in n_queries and n_queries[name] < least}


def require_power(n_queries: Mapping[str, int], policy: PolicyConfig, n_looks: int = N_LOOKS) -> None:
    """Refuse probes with which no rise of a likely size could ever raise an alarm.

    Args:
        n_queries: of each set.
        policy: whose test is to be passed.
        n_looks: checks that share the error of the run.

    Raises:
        CannotTell: with the protected domains that have too few.

    """
    if short := short_of_queries(n_queries, policy, fewest_queries(policy, n_looks)):
        raise CannotTell(
            f"{_each(short)}; {power_needed(policy, n_looks)} Give more rows, raise ProbeConfig(n_queries=...), or protect fewer "
            "domains."
        )


def power_needed(policy: PolicyConfig, n_looks: int = N_LOOKS) -> str:
    """The same number in a sentence, with what it depends on."""
    return (
        f"an alarm for one of {len(policy.budgets)} protected domains at one of {n_looks} checks at alpha {policy.alpha:g} takes "
        f"{fewest_queries(policy, n_looks)}."
    )


def little_power(n_queries: Mapping[str, int], policy: PolicyConfig, probes: ProbeConfig) -> list[str]:
    """What to warn of where the test of harm has power, and little: sentences, none if it has enough.

    Args:
        n_queries: of each set.
        policy: with the protected domains.
        probes: by which queries were drawn.

    """
    few = short_of_queries(n_queries, policy, ENOUGH_QUERIES)
    if not few:
        return []
    told = [f"{_each(few)}; with fewer than {ENOUGH_QUERIES} an alarm comes late or never."]
    if min(few.values()) < probes.n_queries:  # for want of rows
        n = probes.n_domain_demonstrations
        told.append(f"Of a domain's rows {n} are kept as examples: give it {ENOUGH_QUERIES + n} or more.")
    return told


def _each(n_queries: Mapping[str, int]) -> str:
    return f"n_queries: {', '.join(f'{name} has {n}' for name, n in n_queries.items())}"
