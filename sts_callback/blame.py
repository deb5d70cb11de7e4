"""Which training rows fire the features through which the training data threatens a protected domain.

It tells where features fire, by one pass up to the SAE's layer: a place to look first, not a proof of cause.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sts_callback.baseline import SetBaseline
from sts_callback.config import ROWS_READ, ROWS_SHOWN
from sts_callback.domains.reader import Row
from sts_callback.errors import CannotTell, ConfigError
from sts_callback.files import write_whole
from sts_callback.metrics.rows import contributions, limit_of_scores
from sts_callback.monitor import Monitor
from sts_callback.records import Forecast, Snippet
from sts_callback.remedies import Blame, BlamedRow, DomainBlame
from sts_callback.words import snippet

MOST_LEFT_OUT = 0.1
"""Share of the rows read that are named to be left out, at most: more is no filter but another data set."""


def blame(
    monitor: Monitor,
    rows: Sequence[Row],
    protected: Sequence[str],
    *,
    forecast: Forecast | None = None,
    n_rows: int = ROWS_READ,
    n_top: int = ROWS_SHOWN,
) -> Blame:
    """Rank training rows by how strongly they fire what threatens protected domains.

    A feature of the forecast weighs as much as the training demonstrations shift it in the domain. A row's score is the weighted
    mean of its activations, over prompt and answer, relative to those of an average row (see `metrics.rows`).

    Args:
        monitor: of the untrained model, the training data and the protected domains.
        rows: the training data, see `domains.reader`.
        protected: names of domains that the monitor measures.
        forecast: the monitor's newest by its first SAE; made here if it is not given.
        n_rows: how many rows to read; of more, a sample drawn by the settings' seed.
        n_top: how many rows to name for each domain.

    Raises:
        ConfigError: if no domain is protected or a number is below 1.
        CannotTell: if nothing of a domain shifted, or no row fires what did.

    """
    if not protected:
        raise ConfigError("protect: got none; name at least one domain that must not suffer.")
    for option, value in (("rows", n_rows), ("top", n_top)):
        if value < 1:
            raise ConfigError(f"{option}: got {value}; allowed is 1 or more.")
    forecast = forecast or monitor.forecast()
    assert monitor.baseline is not None, "the forecast is another monitor's"
    started = time.monotonic()
    read = _read(monitor, forecast, rows, n_rows)
    found: dict[str, DomainBlame] = {}
    excess = torch.zeros(len(read.numbers), dtype=torch.float64)
    for name in protected:
        found[name], scores = _domain(name, monitor.baseline.sets[name], read, n_top)
        excess = torch.maximum(excess, scores / found[name].threshold)
    worst = excess.argsort(descending=True, stable=True)[: int(MOST_LEFT_OUT * len(excess))].tolist()
    return Blame(
        identity=forecast.identity,
        n_rows=len(rows),
        n_read=len(read.numbers),
        n_cut=read.n_cut,
        domains=found,
        left_out=tuple(sorted(read.numbers[i] for i in worst if excess[i] > 1)),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Read:
    """Training rows, as far as tokens of them count."""

    features: tuple[int, ...]
    """Of the forecast."""
    numbers: list[int]
    """Of the rows, in the training data."""
    mean_activity: torch.Tensor
    """Of each feature over a row's own tokens, `(n_rows, n_features)`."""
    peak: Callable[[int, int], Snippet]
    """Where a row fires a feature most, by their places in the above."""
    n_cut: int
    """Rows that were too long."""


def _read(monitor: Monitor, forecast: Forecast, rows: Sequence[Row], n_rows: int) -> _Read:
    """Run a sample of rows up to the SAE's layer."""
    chosen = sorted(random.Random(f"{monitor.config.seed}/rows").sample(range(len(rows)), min(n_rows, len(rows))))
    texts, used, peaks = monitor.read_rows([rows[i] for i in chosen], forecast.features)
    counted = (peaks.n_tokens > 0).nonzero()[:, 0]  # a row may hold nothing but sinks and special tokens

    def peak(row: int, feature: int) -> Snippet:
        text = int(counted[row])
        query = texts.queries[text]
        column = list(itertools.compress(itertools.count(), query.counts))[int(peaks.place[text, feature])]
        return snippet(query.query, column, float(peaks.highest[text, feature]), monitor.tokenizer)

    mean_activity = peaks.activity[counted] / peaks.n_tokens[counted].unsqueeze(1)
    return _Read(forecast.features, [chosen[used[i]] for i in counted.tolist()], mean_activity, peak, texts.n_cut)


def _domain(name: str, step_zero: SetBaseline, read: _Read, n_top: int) -> tuple[DomainBlame, torch.Tensor]:
    """What rows have to do with one domain, and the scores of all, `(n_rows,)`."""
    shift, own_activity = (x[list(read.features)].double() for x in (step_zero.mean_train_shift, step_zero.mean_activity))
    weights, average = shift / shift.sum(), read.mean_activity.double().mean(dim=0)
    parts = contributions(read.mean_activity, average, weights)
    scores = parts.sum(dim=1)
    if len(scores) == 0 or not bool(scores.isfinite().all()):
        raise CannotTell(
            f"{name}: none of the {len(scores)} rows read fires a feature of the forecast that shifts in this domain; look at "
            "its forecast, or read more rows."
        )
    own_score = float(contributions(own_activity, average, weights).sum())
    strongest, limit = parts.argmax(dim=1), limit_of_scores(scores, own_score)
    rows = tuple(
        BlamedRow(
            row=read.numbers[i],
            score=float(scores[i]),
            feature=read.features[j],
            feature_share=float(parts[i, j] / scores[i]) if scores[i] > 0 else 0.0,
            snippet=read.peak(i, j),
        )
        for i, j in ((i, int(strongest[i])) for i in scores.argsort(descending=True, stable=True)[:n_top].tolist())
    )
    heaviest = weights.argsort(descending=True, stable=True).tolist()
    made = DomainBlame(
        name=name,
        weights=tuple((read.features[j], float(weights[j])) for j in heaviest),
        silent_weight=float(weights[average == 0].sum()),
        own_score=own_score,
        median=float(scores.quantile(0.5)),
        threshold=limit,
        n_standing_out=int((scores > limit).sum()),
        rows=rows,
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


def write_filtered(found: Blame, rows: Sequence[Row], kept: Path, left_out: Path) -> None:
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
