"""Rows to blame: found where they were planted, none where none were, and each number against a second computation."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from planted import KINDS, lettered_model, lettered_sae, row_of
from sts_callback.config import ProbeConfig
from sts_callback.errors import CannotTell, ConfigError, DataError
from sts_callback.measure.monitor import Monitor
from sts_callback.records.remedies import Attribution
from sts_callback.remedies.attribution import MOST_LEFT_OUT, blame, filter_files, write_filtered
from tiny import bos_tokenizer

CONFIG = ProbeConfig(n_queries=12, n_features=16, n_domain_demonstrations=2, max_tokens=64)
LOWER, UPPER = range(5), (5, 6)
N_ROWS, N_PLANTED = 100, 8
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Mixture:
    """Rows of small letters and digits, some of them planted, and what was measured of them."""

    rows: list[dict[str, str]]
    planted: frozenset[int]
    monitor: Monitor

    def blame(self, **options: Any) -> Attribution:
        return blame(self.monitor, self.rows, ["law"], **options)


@cache
def mixture(seed: int, n_planted: int = N_PLANTED, share: float = 0.9, config: ProbeConfig = CONFIG) -> Mixture:
    """Every row has a capital word here and there; planted ones have a share of them, the protected domain has nothing else."""
    draw = random.Random(seed)
    planted = frozenset(draw.sample(range(N_ROWS), n_planted))
    rows = [
        row_of(draw, tuple(draw.sample(LOWER, 3)), foreign=UPPER, share=share if i in planted else 0.02) for i in range(N_ROWS)
    ]
    law = [row_of(draw, UPPER) for _ in range(30)]
    sae = lettered_sae()
    options: dict[str, Any] = {"train_data": rows, "domains": {"law": law}, "config": config, "progress": False}
    return Mixture(rows, planted, Monitor(lettered_model(), bos_tokenizer(), sae=sae, **options))


def precision_and_recall(share: float) -> tuple[float, float]:
    """Over three mixtures."""
    n_hits = n_left_out = n_planted = 0
    for seed in range(3):
        made = mixture(seed, share=share)
        left_out = made.blame().left_out
        n_hits += len(made.planted & set(left_out))
        n_left_out += len(left_out)
        n_planted += len(made.planted)
    return n_hits / max(1, n_left_out), n_hits / n_planted


def test_planted_rows_are_found_and_hardly_any_others() -> None:
    precision, recall = precision_and_recall(share=0.9)
    assert precision >= 0.95
    assert recall >= 0.95


def test_rows_that_are_half_of_the_domains_kind_are_found_in_part() -> None:
    precision, recall = precision_and_recall(share=0.5)
    assert precision >= 0.8
    assert recall >= 0.5


@pytest.mark.parametrize("seed", range(3))
def test_nothing_stands_out_where_nothing_was_planted(seed: int) -> None:
    found = mixture(seed, n_planted=0).blame()
    assert found.left_out == ()
    assert found.domains["law"].n_standing_out == 0


def test_sources_are_compared_by_the_scores_of_their_rows() -> None:
    made = mixture(0)
    few = next(i for i in range(N_ROWS) if i not in made.planted)
    names = [{few: "one row"}.get(i, "planted" if i in made.planted or i % 9 == 0 else "other") for i in range(N_ROWS)]
    rows: list[Row] = [{**row, "source": name} for row, name in zip(made.rows, names, strict=True)]
    rows[few + 1] = {**rows[few + 1], "source": None}
    found = blame(made.monitor, rows, ["law"], n_top=N_ROWS).domains["law"]
    scores = {row.row: row.score for row in found.rows}
    assert [one.name for one in found.sources] == ["planted", "other", "one row"]
    for one in found.sources:
        own = np.array([scores[i] for i, row in enumerate(rows) if row["source"] == one.name])
        assert one.n_read == len(own)
        assert one.n_standing_out == sum(own > found.threshold)
        if one.name != "one row":
            low, high = stats.t.interval(0.95, len(own) - 1, loc=own.mean(), scale=stats.sem(own))
            assert (one.score.value, one.score.low, one.score.high) == pytest.approx((own.mean(), low, high))
    assert math.isnan(found.sources[2].score.value)
    assert found.sources[0].score.low > found.sources[1].score.high
    assert replace(found, sources=()) == blame(made.monitor, made.rows, ["law"], n_top=N_ROWS).domains["law"]


def test_scores_are_those_of_a_second_computation_without_sinks() -> None:
    made = mixture(0, config=ProbeConfig(n_queries=12, n_features=16, n_domain_demonstrations=2, max_norm_multiple=1.15))
    found = made.blame(n_top=N_ROWS).domains["law"]
    limit = 1.15 * made.monitor.forecast().median_norm
    model, sae = lettered_model(), lettered_sae()
    n_masked = 0

    def read(ids: Sequence[int]) -> torch.Tensor:
        """Activations of a text's tokens, `(n_tokens, 64)`, zero at sinks, and how many are none in the last column."""
        nonlocal n_masked
        with torch.no_grad():
            x = model(torch.tensor([[1, *ids]]), output_hidden_states=True).hidden_states[3][0, 1:]
            kept = x.norm(dim=1) < limit
            n_masked += int((~kept).sum())
            return torch.cat([torch.relu(x @ sae.W_enc) * kept.unsqueeze(1), kept.unsqueeze(1)], dim=1).double()

    texts = [bos_tokenizer()(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"] for row in made.rows]
    acts = [read(ids) for ids in texts]
    assert 0 < n_masked < sum(map(len, texts)) / 2
    law = torch.stack([read(query.query).sum(dim=0) for query in made.monitor.domains["law"].queries])
    fired = (law.sum(dim=0)[:64] > 0).nonzero()[:, 0]
    roots = torch.stack([x[:, fired].sum(dim=0) / x[:, -1].sum() for x in acts]).sqrt()
    own = (law[:, fired].sum(dim=0) / law[:, -1].sum()).sqrt() - roots.mean(dim=0)
    away = roots - roots.mean(dim=0)
    wanted = torch.cosine_similarity(away, own.unsqueeze(0))
    shown = torch.tensor([row.score for row in found.rows]).double()
    assert {row.row for row in found.rows} == set(range(N_ROWS))
    torch.testing.assert_close(shown, wanted[[row.row for row in found.rows]], rtol=1e-4, atol=1e-5)
    assert shown.tolist() == sorted(shown.tolist(), reverse=True)
    own_scores = torch.cosine_similarity((law[:, fired] / law[:, -1:]).sqrt() - roots.mean(dim=0), own.unsqueeze(0))
    assert found.own_score == pytest.approx(float(own_scores.quantile(0.5)), rel=1e-4)
    for row in found.rows[:5]:
        parts = (away[row.row] * own).where(away[row.row] > 0, -math.inf)
        assert row.feature == int(fired[int(parts.argmax())])
        activation = acts[row.row][:, row.feature]
        assert row.snippet.activation == pytest.approx(float(activation.max()), rel=1e-5)
        assert row.snippet.token == bos_tokenizer().decode([texts[row.row][int(activation.argmax())]])


def test_the_token_that_fires_is_of_the_domains_kind() -> None:
    found = mixture(0).blame().domains["law"]
    for row in found.rows[:N_PLANTED]:
        assert row.snippet.token in KINDS[row.feature]


def test_of_many_rows_a_sample_is_read_and_the_rest_stays() -> None:
    made = mixture(0)
    found, again = made.blame(n_rows=40), made.blame(n_rows=40)
    assert (found.n_rows, found.n_read) == (N_ROWS, 40)
    assert found.domains == again.domains
    assert len(found.left_out) <= MOST_LEFT_OUT * 40
    assert {row.row for row in made.blame(n_rows=40, n_top=N_ROWS).domains["law"].rows} != set(range(40))


def test_rows_keep_their_numbers_where_others_hold_no_text() -> None:
    made = mixture(0)
    rows: list[Row] = [{"prompt": "", "completion": ""}, *made.rows]
    found = blame(made.monitor, rows, ["law"])
    assert (found.n_rows, found.n_read) == (N_ROWS + 1, N_ROWS)
    assert found.left_out == tuple(i + 1 for i in made.blame().left_out)


def test_never_more_than_a_tenth_is_left_out() -> None:
    made = mixture(0)
    few = [made.rows[i] for i in sorted(made.planted)[:4]] + [row for i, row in enumerate(made.rows) if i not in made.planted][
        :26
    ]
    found = blame(made.monitor, few, ["law"])
    assert found.domains["law"].n_standing_out == 4
    assert len(found.left_out) == 3
    assert set(found.left_out) < set(range(4))


def test_what_was_cut_is_counted() -> None:
    made = mixture(0)
    long = {"prompt": "abc " * 40, "completion": " def"}
    assert blame(made.monitor, [*made.rows, long], ["law"]).n_cut == made.blame().n_cut + 1


def test_what_it_means_is_said_with_it() -> None:
    assert "not a proof" in json.loads(mixture(0).blame().to_json())["meaning"]


@pytest.mark.parametrize(
    ("protected", "options", "message"),
    [([], {}, "protect: got none"), (["law"], {"n_rows": 0}, "rows: got 0"), (["law"], {"n_top": 0}, "top: got 0")],
)
def test_what_cannot_be_asked_is_refused(protected: list[str], options: dict[str, int], message: str) -> None:
    made = mixture(0)
    with pytest.raises(ConfigError, match=message):
        blame(made.monitor, made.rows, protected, **options)


def test_a_domain_that_fires_nothing_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixture(0)
    silent = made.monitor.read_domains(["law"])["law"]
    monkeypatch.setattr(made.monitor, "read_domains", lambda names: {"law": replace(silent, activity=0 * silent.activity)})
    with pytest.raises(CannotTell, match="law: none of its 12 queries activates a feature"):
        made.blame()


def test_rows_that_are_all_the_domains_own_text_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixture(0)
    row = made.rows[0]
    made.monitor.read_domains(["law"])
    peaks = made.monitor.read_rows([row], range(64))[2]
    monkeypatch.setattr(made.monitor, "read_domains", lambda names: {"law": peaks})
    with pytest.raises(CannotTell, match="law: its texts activate just what an average training row does"):
        blame(made.monitor, [row], ["law"])


def test_rows_of_nothing_but_sinks_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mixture(0)
    made.monitor.read_domains(["law"])
    texts, used, peaks = made.monitor.read_rows(made.rows, [5])
    silent = replace(peaks, n_tokens=0 * peaks.n_tokens)
    monkeypatch.setattr(made.monitor, "read_rows", lambda rows, features: (texts, used, silent))
    with pytest.raises(CannotTell, match="none of the 100 rows read holds a token that is no attention sink"):
        made.blame()


def test_rows_without_text_are_refused() -> None:
    made = mixture(0)
    with pytest.raises(DataError, match="none of the 1 rows read holds text"):
        blame(made.monitor, [{"prompt": "", "completion": ""}], ["law"])


def test_the_rows_kept_and_the_numbers_of_the_others_are_written(tmp_path: Path) -> None:
    made = mixture(0)
    found = made.blame()
    kept, left_out = filter_files("train.jsonl", str(tmp_path / "kept.jsonl"))
    rows = [*made.rows[:-1], {**made.rows[-1], "note": "« déjà »"}]
    write_filtered(found, rows, kept, left_out)
    numbers = json.loads(left_out.read_text())
    assert numbers == list(found.left_out)
    assert [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] == [
        row for i, row in enumerate(rows) if i not in numbers
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.jsonl", "kept.left_out.json"]


@pytest.mark.parametrize("out", ["kept.jsonl.gz", "nowhere/kept.jsonl", "train.jsonl"])
def test_a_place_that_cannot_be_written_to_is_refused_beforehand(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"out: got '{out}'"):
        filter_files("./train.jsonl", out)
