"""Runs as the ledger keeps them, with numbers open to change: what tests of the ledger and of hindsight learn from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from samples import IDENTITY, domain_drift, domain_forecast, forecast, snapshot
from sts_callback.records import Forecast
from sts_callback.runs.ledger import Entry

Numbers = tuple[float, float, float, float, float]
"""Of a domain: transfer, relative shift, NLL change in context; relative drift, NLL change of the outcome."""


def forecast_of(domains: Mapping[str, tuple[float, ...]], data: str = "p", **identity: Any) -> Forecast:
    """A forecast on some training data; of each domain the first three numbers count."""
    made = [
        domain_forecast(name, sts_net=transfer, relative_shift=shift, nll_change=change)
        for name, (transfer, shift, change, *_) in domains.items()
    ]
    return forecast(*made, identity=dataclasses.replace(IDENTITY, probes=data, **identity))


def run(domains: Mapping[str, Numbers], data: str = "p", number: int = 0, **identity: Any) -> Entry:
    """A finished run; runs on the same data are told apart by a number."""
    before = dataclasses.replace(forecast_of(domains, data, **identity), seconds=float(number))
    after = [domain_drift(name, relative_drift=drift, nll_change=change) for name, (*_, drift, change) in domains.items()]
    return Entry.of(before, snapshot(40, *after))


def lawful_runs(n: int, n_domains: int = 4, **identity: Any) -> list[Entry]:
    """Runs without noise: drift is 2 exp(transfer) times the root of the shift, the NLL rises by twice as much as in context."""
    runs = []
    for i in range(n):
        domains = {}
        for j in range(n_domains):
            transfer, shift, change = 0.1 + 0.13 * ((3 * i + 5 * j) % 7), 0.01 * (1 + (2 * i + 3 * j) % 5), 0.01 * (j - i)
            domains[f"domain{j}"] = transfer, shift, change, 2 * math.exp(transfer) * shift**0.5, 0.05 + 2 * change
        runs.append(run(domains, data=f"data{i}", **identity))
    return runs
