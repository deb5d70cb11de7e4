"""The file of past runs: what is in a line, where the file is, and what damage and failure do to it."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from past import forecast_of, run
from samples import domain_drift, domain_forecast, estimate, forecast, score, snapshot
from sts_callback.records import Forecast
from sts_callback.runs.ledger import Entry, Ledger, append, ledger_file, read

DOMAINS = {"law": (0.5, 0.1, 0.01, 0.2, 0.02), "code": (0.25, 0.2, 0.03, 0.1, 0.04)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    chosen = tmp_path / "some" / "where" / "ledger.jsonl"
    monkeypatch.setenv("STS_LEDGER", str(chosen))
    return chosen


def test_an_entry_has_forecast_and_outcome_of_each_domain() -> None:
    before = domain_forecast(
        sts_net=score(0.4, random=0.2, own=0.6), relative_shift=0.03, nll_change=0.07, gradient_change=-0.5, cosine=0.9, nll=1.5
    )
    after = domain_drift(relative_drift=estimate(0.2, 0.1, 0.3), nll_change=estimate(0.05, -0.01, 0.11))
    entry = Entry.of(forecast(before, train_source="own rollouts"), snapshot(40, after))
    (law,) = entry.domains.values()
    assert law.transfer == pytest.approx(0.5)
    assert (law.relative_shift, law.context_nll_change, law.gradient_change, law.cosine, law.nll) == (0.03, 0.07, -0.5, 0.9, 1.5)
    assert (law.relative_drift, law.nll_change) == (after.relative_drift, after.nll_change)
    assert (entry.steps, entry.train_source) == (40, "own rollouts")
    assert Entry.from_json(entry.to_json()) == entry


def test_a_line_has_numbers_names_and_fingerprints_only(file: Path) -> None:
    append(run(DOMAINS))
    content = json.loads(file.read_text())
    assert content.keys() == {
        *("schema_version", "identity", "forecast", "steps", "train_source", "domains", "n_parameters", "multiples")
    }
    texts = [value for d in content["domains"].values() for value in d.values() if isinstance(value, str)]
    assert texts == []


@pytest.mark.parametrize(
    ("chosen", "environment", "expected"),
    [
        (None, None, None),
        (None, "", None),
        (None, "a.jsonl", "a.jsonl"),
        ("b.jsonl", "a.jsonl", "b.jsonl"),
        ("b.jsonl", None, "b.jsonl"),
    ],
)
def test_none_is_kept_where_no_file_is_named(
    chosen: str | None, environment: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is None:
        monkeypatch.delenv("STS_LEDGER", raising=False)
    else:
        monkeypatch.setenv("STS_LEDGER", environment)
    assert ledger_file(chosen) == (Path(expected) if expected else None)


def test_switched_off_nothing_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STS_LEDGER", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    append(run(DOMAINS))
    assert read() == Ledger()
    assert list(tmp_path.iterdir()) == []


def test_runs_are_read_back_in_order_and_the_file_is_the_users_own(file: Path) -> None:
    assert read() == Ledger()
    runs = [run(DOMAINS, data) for data in "abc"]
    for one in runs:
        append(one)
    assert read() == Ledger(tuple(runs))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_empty_file_is_no_run(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.touch()
    assert read() == Ledger()
    append(run(DOMAINS))
    assert len(read().entries) == 1


def test_a_run_that_ends_twice_counts_once_and_the_newest_wins(file: Path) -> None:
    before = forecast_of(DOMAINS)
    resumed = Forecast.from_json(before.to_json())
    after = [domain_drift(name) for name in DOMAINS]
    append(Entry.of(before, snapshot(20, *after)))
    append(run(DOMAINS, number=1))
    append(Entry.of(resumed, snapshot(40, *after)))
    assert [entry.steps for entry in read().entries] == [40, 40]
    assert len(file.read_text().splitlines()) == 3


def test_a_forecast_is_known_again_whatever_numbers_are_made_of() -> None:
    """JSON gives a float back where a whole number was."""
    before, after = forecast(domain_forecast(), seconds=2, noise_floor=0), snapshot(40, domain_drift())
    assert Entry.of(before, after).forecast == Entry.of(Forecast.from_json(before.to_json()), after).forecast


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"null",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        run(DOMAINS).to_json()[:-30].encode(),
        run(DOMAINS).to_json().replace('"schema_version": 1', '"schema_version": 99').encode(),
        run(DOMAINS).to_json().replace('"steps"', '"leaps"').encode(),
        run(DOMAINS).to_json().replace('"tiny-llama"', "[]").encode(),
        run(DOMAINS).to_json().replace('"nll": 2.5', '"nll": {}').encode(),
    ],
)
def test_damaged_lines_are_skipped_and_counted(line: bytes, file: Path) -> None:
    first, last = run(DOMAINS, "first"), run(DOMAINS, "last")
    append(first)
    with file.open("ab") as lines:
        lines.write(line + b"\n\n")
    append(last)
    assert read() == Ledger((first, last), n_unreadable=1)


def test_a_line_that_was_cut_off_does_not_spoil_the_next(file: Path) -> None:
    first, last = run(DOMAINS, "first"), run(DOMAINS, "last")
    append(first)
    os.truncate(file, file.stat().st_size - 20)
    append(last)
    assert read() == Ledger((last,), n_unreadable=1)


def test_runs_that_end_together_do_not_mix_their_lines(file: Path) -> None:
    runs = [run(DOMAINS, f"data{i}") for i in range(100)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(append, runs))
    found = read()
    assert found.n_unreadable == 0
    assert {entry.forecast for entry in found.entries} == {entry.forecast for entry in runs}


def test_what_cannot_be_opened_is_an_os_error(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.raises(OSError):
        append(run(DOMAINS))
    with pytest.raises(OSError):
        read()


def test_half_a_line_is_a_failure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:50]))
        with pytest.raises(OSError, match="only a part"):
            append(run(DOMAINS))
    append(dataclasses.replace(run(DOMAINS), steps=7))
    assert [entry.steps for entry in read().entries] == [7]
