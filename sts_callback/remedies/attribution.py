"""Find the training rows that activate a protected domain's features.

One pass up to the SAE's layer shows where features are active. That says where to look first. It does not prove a cause.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sts_callback.config import ROWS_READ, ROWS_SHOWN, require, require_protected, whole
from sts_callback.data.pairs import Row
from sts_callback.data.starter import names_in
from sts_callback.errors import CannotTell, ConfigError
from sts_callback.measure.accumulators import MaxActivations
from sts_callback.measure.monitor import Monitor
from sts_callback.measure.top_examples import snippet
from sts_callback.metrics.attribution import contributions, limit_of_scores, mean_and_interval, roots
from sts_callback.records import Estimate, Snippet
from sts_callback.records.remedies import AttributedRow, Attribution, DomainAttribution, SourceAttribution
from sts_callback.runs.files import write_whole

MOST_LEFT_OUT = 0.1
"""Largest share of the read rows to leave out. Leaving out more would make another data set."""
MOST_FEATURES = 1000
"""Number of features that a domain activates most. Our choice: as many as a dozen queries activate in a small SAE."""


def blame(
    monitor: Monitor,
    rows: Sequence[Row],
    protected: Sequence[str],
    *,
    n_rows: int = ROWS_READ,
    n_top: int = ROWS_SHOWN,
) -> Attribution:
    """Rank training rows by how much they activate protected domains' features.

    Each row, prompt and answer, and the domain are compared by how they differ from an average row (`metrics.attribution`), on
    the features that the domain activates most. The features of the forecast would not work: most of the training data shift
    them, and a few rows of another kind do not activate them.

    Args:
        monitor: made with the untrained model, the training data and the protected domains.
        rows: the training data, see `data.reader`.
        protected: names of domains that the monitor measures.
        n_rows: the most rows to read. If there are more, the settings' seed draws a sample.
        n_top: number of rows to name for each domain.

    Raises:
        ConfigError: if no domain is protected, the monitor does not measure one, or a number is below 1.
        CannotTell: if the SAE does not fit, a domain activates nothing or only what an average row does, or no row has a
            token that counts.

    """
    require_possible(protected, n_rows, n_top)
    for name in protected:
        require(name in monitor.domains, "protect", name, f"one that the monitor measures, {sorted(monitor.domains)}")
    started = time.monotonic()
    domains = {name: _Domain.of(name, fired) for name, fired in monitor.read_domains(protected).items()}
    read = _read(monitor, sorted({j for domain in domains.values() for j in domain.features}), rows, n_rows)
    found: dict[str, DomainAttribution] = {}
    excess = torch.zeros(len(read.numbers), dtype=torch.float64)
    for name in protected:
        found[name], scores = _blamed(domains[name], read, n_top)
        excess = torch.maximum(excess, scores / found[name].threshold)
    worst = excess.argsort(descending=True, stable=True)[: int(MOST_LEFT_OUT * len(excess))].tolist()
    return Attribution(
        identity=monitor.identity,
        n_rows=len(rows),
        n_read=len(read.numbers),
        n_cut=read.n_cut,
        domains=found,
        left_out=tuple(sorted(read.numbers[i] for i in worst if excess[i] > 1)),
        seconds=time.monotonic() - started,
    )


def require_possible(protected: Sequence[str], n_rows: int, n_top: int) -> None:
    """Refuse what is wrong without a model. Arguments and errors are those of `blame`."""
    require_protected(names_in(protected))
    for option, value in (("rows", n_rows), ("top", n_top)):
        whole(value, option, "1 or more", least=1)


@dataclass(frozen=True)
class _Domain:
    """The features that a protected domain activates."""

    name: str
    features: list[int]
    """Indices of the features that it activates most, ascending."""
    query_activity: torch.Tensor
    """Their mean activation over each query's tokens, `(n_queries, n_features)`."""
    activity: torch.Tensor
    """Their mean activation over all tokens, `(n_features,)`."""

    @classmethod
    def of(cls, name: str, fired: MaxActivations) -> _Domain:
        """Select the features from the activations of its queries."""
        counted = fired.n_tokens > 0
        sums, n_tokens = fired.activity[counted].double(), fired.n_tokens[counted]
        activity = sums.sum(dim=0) / n_tokens.sum()
        if not bool(activity.sum() > 0):
            raise CannotTell(
                f"{name}: none of its {len(counted)} queries activates a feature; ask the doctor about SAE and probes."
            )
        features = activity.topk(min(MOST_FEATURES, int((activity > 0).sum()))).indices.sort().values
        return cls(name, features.tolist(), sums[:, features] / n_tokens.unsqueeze(1), activity[features])


@dataclass(frozen=True)
class _Read:
    """Training rows that have tokens that count."""

    features: list[int]
    """Indices of the features that were read."""
    numbers: list[int]
    """Indices of the rows in the training data."""
    of_source: Mapping[str, list[int]]
    """Positions in `numbers` of the rows of each source that rows name."""
    mean_activity: torch.Tensor
    """Mean activation of each feature over a row's tokens, `(n_rows, n_features)`."""
    peak: Callable[[int, int], Snippet]
    """Make a snippet of where a row activates a feature most. Arguments are positions in the fields above."""
    n_cut: int
    """Number of rows that were too long and were cut."""


def _read(monitor: Monitor, features: list[int], rows: Sequence[Row], n_rows: int) -> _Read:
    """Run a sample of rows up to the SAE's layer."""
    chosen = sorted(random.Random(f"{monitor.config.seed}/rows").sample(range(len(rows)), min(n_rows, len(rows))))
    texts, used, peaks = monitor.read_rows([rows[i] for i in chosen], features)
    counted = (peaks.n_tokens > 0).nonzero()[:, 0]  # a row may consist of sinks and special tokens only
    if not len(counted):
        raise CannotTell(
            f"train_data: none of the {len(used)} rows read holds a token that is no attention sink; read more rows."
        )

    def peak(row: int, feature: int) -> Snippet:
        text = int(counted[row])
        query = texts.queries[text]
        column = list(itertools.compress(itertools.count(), query.counts))[int(peaks.place[text, feature])]
        return snippet(query.query, column, float(peaks.highest[text, feature]), monitor.tokenizer)

    mean_activity = peaks.activity[counted].double() / peaks.n_tokens[counted].unsqueeze(1)
    numbers = [chosen[used[i]] for i in counted.tolist()]
    return _Read(features, numbers, _by_source([rows[i] for i in numbers]), mean_activity, peak, texts.n_cut)


def _by_source(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Which rows are of which source, by their column `source`. Rows without a name in it are of none."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        name = row.get("source") if isinstance(row, Mapping) else None  # packed rows are lists
        if name and isinstance(name, str):
            found.setdefault(name, []).append(place)
    return found


def _blamed(domain: _Domain, read: _Read, n_top: int) -> tuple[DomainAttribution, torch.Tensor]:
    """Compare rows with one domain. Returns the result and the scores of all rows, `(n_rows,)`."""
    columns = torch.searchsorted(torch.tensor(read.features), torch.tensor(domain.features)).tolist()
    activity = read.mean_activity[:, columns]
    fired = roots(activity)
    average = fired.mean(dim=0)
    parts, own_parts = (contributions(x, domain.activity, average) for x in (activity, domain.query_activity))
    scores = parts.sum(dim=1)
    if not bool(scores.isfinite().all()):
        raise CannotTell(
            f"{domain.name}: its texts activate just what an average training row does; by these no row can be told apart."
        )
    own_score = float(own_parts.sum(dim=1).quantile(0.5))
    limit = limit_of_scores(scores, own_score)
    strongest = parts.where(fired > average, -math.inf).argmax(dim=1)
    top = [(i, columns[int(strongest[i])]) for i in scores.argsort(descending=True, stable=True)[:n_top].tolist()]
    made = DomainAttribution(
        name=domain.name,
        own_score=own_score,
        median=float(scores.quantile(0.5)),
        threshold=limit,
        n_standing_out=int((scores > limit).sum()),
        rows=tuple(AttributedRow(read.numbers[i], float(scores[i]), read.features[j], read.peak(i, j)) for i, j in top),
        sources=_sources(read.of_source, scores, limit),
    )
    return made, scores


def _sources(of_source: Mapping[str, list[int]], scores: torch.Tensor, limit: float) -> tuple[SourceAttribution, ...]:
    """Sum up the scores of each source's rows."""
    made = []
    for name, places in of_source.items():
        own = scores[places]
        made.append(SourceAttribution(name, len(own), Estimate(*mean_and_interval(own)), int((own > limit).sum())))
    return tuple(sorted(made, key=lambda one: math.inf if one.has_few_rows else -one.score.value))


def filter_files(train_file: str, out: str) -> tuple[Path, Path]:
    """Name the files for `write_filtered`: the rows that stay and the indices of those left out.

    Args:
        train_file: the training data.
        out: file for the rows that stay. It must end in `.jsonl`. The indices go beside it.

    Raises:
        ConfigError: if the name ends otherwise or is that of the training data, or its folder does not exist.

    """
    kept = Path(out)
    if kept.suffix != ".jsonl" or not kept.parent.is_dir() or kept.resolve() == Path(train_file).resolve():
        raise ConfigError(
            f"out: got {out!r}; allowed is a name ending in .jsonl, in a folder that is there, other than the training data's."
        )
    return kept, kept.with_suffix(".left_out.json")


def write_filtered(found: Attribution, rows: Sequence[Row], kept: Path, left_out: Path) -> None:
    """Write the training data without the rows to leave out, and the indices of these rows as a JSON list. Writes are atomic.

    Args:
        found: says which rows to leave out.
        rows: all training data.
        kept: file for the rows that stay, as JSON lines in their order. Rows that were not read stay.
        left_out: file for the indices, from 0 as for `datasets.Dataset.select`.

    """
    gone = set(found.left_out)
    write_whole(kept, "".join(json.dumps(row, ensure_ascii=False) + "\n" for i, row in enumerate(rows) if i not in gone))
    write_whole(left_out, json.dumps(found.left_out) + "\n")
