"""Text for terminals: narrow enough, complete, coloured only where it shows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from samples import domain_drift, domain_forecast, forecast, snapshot
from sts_callback.config import PolicyConfig
from sts_callback.domains.starter import starter_domains
from sts_callback.policy import judge_drift, judge_forecast
from sts_callback.records import DriftSnapshot, Forecast, Verdict
from sts_callback.terminal import check_lines, forecast_table

NAMES = ("code", "everyday", "law", "medicine", "translation")
HARM: dict[str, Any] = {"nll_change": 0.5, "nll_change_se": 0.01}
ESCAPE = "\x1b["


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal that runs the tests wants."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def _forecast(**law: float) -> Forecast:
    return forecast(*(domain_forecast(n, sts_cross=0.01 * i, **(law if n == "law" else {})) for i, n in enumerate(NAMES, 1)))


def _check(*names: str, step: int = 40, **law: float) -> DriftSnapshot:
    return snapshot(step, *(domain_drift(n, relative_drift=0.3, **(law if n == "law" else {})) for n in names))


def _judged(record: Forecast) -> Verdict:
    return judge_forecast(record, PolicyConfig(dict.fromkeys(record.domains, 0.1), min_transfer=0.05))


def _rows(text: str) -> list[str]:
    """The rows of the table."""
    return [line for line in text.splitlines() if re.search(r"^[! ] \S+ .*% .* ± (\d+\.\d\d|nan)$", line)]


def _assert_narrow(text: str) -> None:
    assert {len(line) > 80 for line in text.splitlines()} == {False}, text


def test_every_line_fits_80_columns_and_names_each_domain_once() -> None:
    record = _forecast()
    text = forecast_table(record, _judged(record), colour=False)
    _assert_narrow(text)
    assert sorted(row.split()[0] for row in _rows(text)) == sorted(["train", *NAMES])


@pytest.mark.parametrize("size", [1e-9, 1e3, 123456.789, 1e12, float("nan"), float("inf")])
def test_large_and_missing_numbers_keep_the_width_and_the_names(size: float) -> None:
    record = forecast(domain_forecast("translation", sts_act=size, sts_icl=size, nll=min(size, 99.0)), domain_forecast("law"))
    text = forecast_table(record, _judged(record), colour=False)
    _assert_narrow(text)
    assert sorted(row.split()[0] for row in _rows(text)) == ["law", "train", "translation"]


def test_training_data_come_first_then_the_domains_that_move_most() -> None:
    record = _forecast()
    assert [row.split()[0] for row in _rows(forecast_table(record, _judged(record), colour=False))] == ["train", *NAMES[::-1]]


def test_a_row_holds_the_numbers_of_its_domain() -> None:
    record = forecast(domain_forecast("law", sts_cross=0.125, nll_change=-0.25, nll_change_se=0.03))
    (row,) = [r for r in _rows(forecast_table(record, _judged(record), colour=False)) if "law" in r]
    assert row.split() == ["law", "25%", "0.125", "0.250", "0.5", "3.25", "2.50", "-0.25", "±", "0.03"]


def test_a_threatened_domain_is_marked_and_its_reason_given() -> None:
    record = _forecast(**HARM)
    verdict = _judged(record)
    text = forecast_table(record, verdict, colour=False)
    assert [row.split()[:2] for row in _rows(text) if row.startswith("!")] == [["!", "law"]]
    assert "\nVerdict: NO-GO\n" in text
    assert "ALARM" not in text  # nothing has happened yet
    assert " ".join(text.split()).count("law: expected to move") == 1
    assert "code: expected" not in text


def test_without_threat_every_reason_is_given() -> None:
    record = _forecast()
    text = forecast_table(record, _judged(record), colour=False)
    assert "\nVerdict: GO\n" in text
    assert [len(re.findall(rf"^  {name}: ", text, re.MULTILINE)) for name in NAMES] == [1] * 5


def test_colour_shows_only_where_it_is_wanted() -> None:
    record = _forecast(**HARM)
    for show in (True, False):
        assert (ESCAPE in forecast_table(record, _judged(record), colour=show)) == show
        assert (ESCAPE in check_lines(_check("law", **HARM), Verdict("go", (), {}, 40), 3, colour=show)) == show


def test_colour_follows_the_terminal_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    record = _forecast()
    for show in (True, False):
        monkeypatch.setattr("sys.stdout.isatty", lambda show=show: show)
        assert (ESCAPE in forecast_table(record, _judged(record))) == show


def test_colour_changes_no_text() -> None:
    record = _forecast(**HARM)
    coloured = forecast_table(record, _judged(record), colour=True)
    bare = "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines())
    assert bare == forecast_table(record, _judged(record), colour=False)


def test_a_check_without_threat_names_each_domain_once_and_no_reason() -> None:
    check = _check(*NAMES)
    verdict = judge_drift([check], PolicyConfig({"law": 0.1}, patience=1))
    text = check_lines(check, verdict, 3, colour=False)
    _assert_narrow(text)
    flat = " ".join(text.split())
    assert flat.startswith("STS step 40: GO; drift (change of NLL) since step 0; 2 s train 30.0% (+0.00) ")
    assert flat.endswith(" the forecast named 2 of the 3 features that moved most")
    assert [len(re.findall(rf"\b{name} 30\.0%", flat)) for name in NAMES] == [1] * 5
    assert "has not moved" not in flat


def test_a_check_breaks_its_lines_between_domains_only() -> None:
    lines = check_lines(_check(*(f"domain{i}" for i in range(12))), Verdict("go", (), {}, 40), 3, colour=False).splitlines()
    assert len(lines) > 4
    assert all(re.fullmatch(r"(  \w+ \d+\.\d% \(\+0\.00\))+", line) for line in lines[1:-1])


def test_a_check_lists_what_moved_most_first() -> None:
    check = snapshot(40, *(domain_drift(n, relative_drift=d) for n, d in (("a", 0.1), ("b", 0.4), ("c", 0.2))))
    flat = " ".join(check_lines(check, Verdict("go", (), {}, 40), 3, colour=False).split())
    assert re.findall(r"(\w+) \d+\.\d% \(", flat) == ["train", "b", "c", "a"]


def test_a_threat_that_has_held_is_an_alarm_and_a_new_one_is_watched() -> None:
    checks = [_check("law", "code", step=step, **HARM) for step in (20, 40)]
    policy = PolicyConfig({"law": 0.1, "code": 0.1}, patience=2)
    watch = check_lines(checks[0], judge_drift(checks[:1], policy), 3, colour=False)
    alarm = check_lines(checks[1], judge_drift(checks, policy), 3, colour=False)
    assert watch.startswith("STS step 20: WATCH; ")
    assert "ALARM" not in watch
    assert alarm.startswith("STS step 40: ALARM; ")
    for text in (watch, alarm):
        assert "\n  law: has moved" in text
        assert "code: has" not in text
    _assert_narrow(alarm)


@pytest.mark.parametrize("name", ["my law: v2", "code[py]", "[bold]"])
def test_names_are_shown_as_they_are_whatever_they_hold(name: str) -> None:
    record = forecast(domain_forecast(name, sts_cross=0.5, **HARM))
    text = forecast_table(record, _judged(record), colour=False)
    assert f"! {name} " in text
    assert f"\n  {name}: expected to move" in text


def test_a_name_too_long_for_its_column_loses_no_letter() -> None:
    name = "abcdefghijklmnopqrstuvwxyz0123456789"
    record = forecast(domain_forecast(name), domain_forecast("law", sts_cross=0.01))
    text = forecast_table(record, _judged(record), colour=False)
    _assert_narrow(text)
    train, first, rest, law = (line.split()[0] for line in text.splitlines()[2:6])
    assert (train, first + rest, law) == ("train", name, "law")


def test_head_and_notes_fill_their_lines_and_no_more() -> None:
    record = _forecast()
    lines = forecast_table(record, _judged(record), colour=False).splitlines()
    assert lines[1].startswith("domain ")
    assert lines.index("Verdict: GO") == 2 + (1 + len(NAMES)) + 3, "\n".join(lines)  # head, titles, rows, three lines of notes


def test_the_longest_shipped_name_is_shown_in_full_when_threatened() -> None:
    name = max(starter_domains(), key=len)
    record = forecast(domain_forecast(name, sts_cross=0.5, **HARM))
    assert f"! {name} " in forecast_table(record, _judged(record), colour=False)
