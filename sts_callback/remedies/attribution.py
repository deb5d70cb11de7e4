"""Which training rows activate a protected domain's features.

It tells where features are active, by one pass up to the SAE's layer: a place to look first, not a proof of cause.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
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
from sts_callback.metrics.attribution import contributions, limit_of_scores, roots
from sts_callback.records import Snippet
from sts_callback.records.remedies import AttributedRow, Attribution, DomainAttribution
from sts_callback.runs.files import write_whole

MOST_LEFT_OUT = 0.1
"""Share of the rows read that are named to be left out, at most: more is no filter but another data set."""
MOST_FEATURES = 1000
"""Of each domain, those that it activates most. Our choice: as many as all that a dozen queries activate of a small SAE's."""


def blame(
    monitor: Monitor,
    rows: Sequence[Row],
    protected: Sequence[str],
    *,
    n_rows: int = ROWS_READ,
    n_top: int = ROWS_SHOWN,
) -> Attribution:
    """Rank training rows by how far they activate protected domains' features.

    Each row, prompt and answer, is compared with the domain by how both depart from an average row (`metrics.attribution`), on
    the features that the domain activates most. Those of the forecast would not do: they are what the bulk of the training data
    shifts, and a few rows of another kind do not activate them.

    Args:
        monitor: of the untrained model, the training data and the protected domains.
        rows: the training data, see `data.reader`.
        protected: names of domains that the monitor measures.
        n_rows: how many rows to read; of more, a sample drawn by the settings' seed.
        n_top: how many rows to name for each domain.

    Raises:
        ConfigError: if no domain is protected, the monitor does not measure one, or a number is below 1.
        CannotTell: if the SAE does not fit, a domain activates nothing or just what an average row does, or no row has a token
            that counts.

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
    """Refuse what can be told to be wrong without a model. Arguments and errors as for `blame`."""
    require_protected(names_in(protected))
    for option, value in (("rows", n_rows), ("top", n_top)):
        whole(value, option, "1 or more", least=1)


@dataclass(frozen=True)
class _Domain:
    """What a protected domain activates."""

    name: str
    features: list[int]
    """Those that it activates most, ascending."""
    query_activity: torch.Tensor
    """Their mean activation over each query's tokens, `(n_queries, n_features)`."""
    activity: torch.Tensor
    """The same over all tokens, `(n_features,)`."""

    @classmethod
    def of(cls, name: str, fired: MaxActivations) -> _Domain:
        """From what its queries activate, of all features."""
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
    """Training rows, as far as tokens of them count."""

    features: list[int]
    """Those that were looked at."""
    numbers: list[int]
    """Of the rows, in the training data."""
    mean_activity: torch.Tensor
    """Of each feature over a row's own tokens, `(n_rows, n_features)`."""
    peak: Callable[[int, int], Snippet]
    """Where a row activates a feature most, by their places in the above."""
    n_cut: int
    """Rows that were too long."""


def _read(monitor: Monitor, features: list[int], rows: Sequence[Row], n_rows: int) -> _Read:
    """Run a sample of rows up to the SAE's layer."""
    chosen = sorted(random.Random(f"{monitor.config.seed}/rows").sample(range(len(rows)), min(n_rows, len(rows))))
    texts, used, peaks = monitor.read_rows([rows[i] for i in chosen], features)
    counted = (peaks.n_tokens > 0).nonzero()[:, 0]  # a row may hold nothing but sinks and special tokens
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
    return _Read(features, [chosen[used[i]] for i in counted.tolist()], mean_activity, peak, texts.n_cut)


def _blamed(domain: _Domain, read: _Read, n_top: int) -> tuple[DomainAttribution, torch.Tensor]:
    """What rows have to do with one domain, and the scores of all, `(n_rows,)`."""
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
    )
    return made, scores


def filter_files(train_file: str, out: str) -> tuple[Path, Path]:
    """Where `write_filtered` writes the rows kept and the numbers of those left out.

    Args:
        train_file: the training data.
        out: for the rows kept, a name that ends in `.jsonl`; the numbers stand beside it.

    Raises:
        ConfigError: if the name ends otherwise, is that of the training data, or its folder is not there.

    """
    kept = Path(out)
    if kept.suffix != ".jsonl" or not kept.parent.is_dir() or kept.resolve() == Path(train_file).resolve():
        raise ConfigError(
            f"out: got {out!r}; allowed is a name ending in .jsonl, in a folder that is there, other than the training data's."
        )
    return kept, kept.with_suffix(".left_out.json")


def write_filtered(found: Attribution, rows: Sequence[Row], kept: Path, left_out: Path) -> None:
    """Write the training data without the rows to be left out, and the numbers of these as a JSON list; each whole or not at all.

    Args:
        found: which rows those are.
        rows: all of the training data.
        kept: file for the rows that stay, as JSON lines in their order; rows that were not read stay.
        left_out: file for the numbers, counted from 0 as `datasets.Dataset.select` does.

    """
    gone = set(found.left_out)
    write_whole(kept, "".join(json.dumps(row, ensure_ascii=False) + "\n" for i, row in enumerate(rows) if i not in gone))
    write_whole(left_out, json.dumps(found.left_out) + "\n")
