"""What a rehearsal lets expect of the end of its run: by runs of the validation that ship with the package, and by the ledger.

Only runs of a model of the same size count: nothing is known yet of how one size foretells another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sts_callback.metrics.calibration import Pair, fit
from sts_callback.records import DriftSnapshot, Estimate
from sts_callback.records.rehearsal import TENFOLD, Rehearsal
from sts_callback.runs.ledger import Entry

SHIPPED = Path(__file__).with_name("rehearsed.json")
"""Pairs of the validation's first round, written by `examples/validate_second.py calibrate`."""
_SAME_SIZE = 1.1
"""Largest ratio of the numbers of parameters, adapters among them, of models of one size. Our choice: models come in
larger steps."""


def expected_changes(rehearsal: Rehearsal, entries: Sequence[Entry]) -> Mapping[str, Estimate]:
    """What is expected of each domain at the end of a run.

    Args:
        rehearsal: of the run.
        entries: of past runs, of any model.

    Returns:
        By name, the change of the NLL in nats per token, with the interval that holds a single domain of a new run in about 95 %;
        empty where no runs of a model of this size are known, or too few.

    """
    if not rehearsal.doses:
        return {}
    own, at_multiple = rehearsal.doses[0], rehearsal.tenfold
    pairs = [*_shipped(rehearsal.n_parameters), *_of_ledger(entries, rehearsal.n_parameters)]
    calibration = fit(pairs, two_doses=at_multiple is not None)
    if calibration is None:
        return {}
    return {
        name: Estimate(
            *calibration.expected(_change(own.check, name), math.nan if at_multiple is None else _change(at_multiple, name))
        )
        for name in own.check.domains
    }


def _shipped(n_parameters: int) -> list[Pair]:
    content = json.loads(SHIPPED.read_text(encoding="utf-8"))
    if not _is_same_size(n_parameters, content["n_parameters"]):
        return []
    return [Pair(group, own, math.nan if multiple is None else multiple, end) for group, own, multiple, end in content["pairs"]]


def _of_ledger(entries: Sequence[Entry], n_parameters: int) -> list[Pair]:
    pairs = []
    for entry in entries:
        if not (entry.multiples and _is_same_size(n_parameters, entry.n_parameters)):
            continue
        for domain in entry.domains.values():
            by_multiple = dict(zip(entry.multiples, domain.rehearsed, strict=False))
            own, multiple = by_multiple.get(1.0, math.nan), by_multiple.get(TENFOLD, math.nan)
            pairs.append(Pair(entry.identity.probes, own, multiple, domain.nll_change.value))
    return pairs


def _is_same_size(one: int, other: int) -> bool:
    return min(one, other) > 0 and max(one, other) / min(one, other) <= _SAME_SIZE


def _change(check: DriftSnapshot, name: str) -> float:
    return check.domains[name].nll_change.value
