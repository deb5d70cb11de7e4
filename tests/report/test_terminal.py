"""Text for terminals: narrow enough, complete, coloured only where it shows."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from typing import Any

import pytest

from past import forecast_of, lawful_runs, run
from samples import IDENTITY, domain_drift, domain_forecast, estimate, forecast, score, snapshot
from sts_callback.config import NO_SAE, PolicyConfig
from sts_callback.data.starter import starter_domains
from sts_callback.policy import judge_forecast
from sts_callback.records import UNKNOWN, Check, DriftSnapshot, Estimate, Forecast, Snippet, TopActivatingExamples, Verdict
from sts_callback.records.remedies import (
    AdapterScales,
    AttributedRow,
    Attribution,
    DomainAttribution,
    Mix,
    ScaledDomain,
    ScalePoint,
    SourceAttribution,
    SourceEffect,
)
from sts_callback.remedies.mixture import MixtureConstraints, search
from sts_callback.report.terminal.forecast import doctor_table, examples_lines, forecast_details, layers_table
from sts_callback.report.terminal.ledger import expectations_table, ledger_table
from sts_callback.report.terminal.remedies import adapter_scales_table, attribution_table, mix_table
from sts_callback.runs.track_record import expectations, track_records

NAMES = ("code", "everyday", "law", "health", "translation")
HARM: dict[str, Any] = {"nll_change": 0.5}
ESCAPE = "\x1b["
NAN = float("nan")


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal that runs the tests wants."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def _forecast(**law: Any) -> Forecast:
    return forecast(*(domain_forecast(n, sts_net=0.01 * i, **(law if n == "law" else {})) for i, n in enumerate(NAMES, 1)))


def _check(*names: str, step: int = 40, **law: Any) -> DriftSnapshot:
    moved = {"relative_drift": 0.3, "p_worse": 0.001}
    return snapshot(step, *(domain_drift(n, **moved, **(law if n == "law" else {})) for n in names))


def _judged(record: Forecast) -> Verdict:
    return judge_forecast(record, PolicyConfig(dict.fromkeys(record.domains, 0.1)))


def _table(text: str, last_title: str) -> list[str]:
    """The rows of the table whose titles end so."""
    lines = text.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("domain ") and line.endswith(last_title))
    rows = []
    for line in lines[head + 1 :]:
        if not re.match(r"[! ] \S", line):
            break
        rows.append(line)
    return rows


def _rows(text: str) -> list[str]:
    return _table(text, "harm")


def _rivals(text: str) -> list[str]:
    return _table(text, "unseen")


def _assert_narrow(text: str) -> None:
    assert {len(line) > 80 for line in text.splitlines()} == {False}, text


def test_every_line_fits_80_columns_and_each_table_names_each_domain_once() -> None:
    record = _forecast()
    text = forecast_details(record, _judged(record), colour=False)
    _assert_narrow(text)
    for rows in (_rows(text), _rivals(text)):
        assert sorted(row.split()[0] for row in rows) == sorted(["train", *NAMES])


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0.5, "0.5"),
        (999.4, "999"),
        (999.6, "1k"),
        (123456.789, "123k"),
        (-2.5e6, "-2.5M"),
        (1e12, "1T"),
        (NAN, "nan"),
        (float("inf"), "inf"),
    ],
)
def test_large_and_missing_numbers_keep_the_width_and_the_names(size: float, shown: str) -> None:
    record = forecast(domain_forecast("translation", sts_act=size, sts_icl=size), domain_forecast("law"))
    text = forecast_details(record, _judged(record), colour=False)
    _assert_narrow(text)
    assert sorted(row.split()[0] for row in _rows(text)) == ["law", "train", "translation"]
    (row,) = [row for row in _rivals(text) if "translation" in row]
    assert row.split()[5:7] == [shown, shown]


def test_wide_intervals_keep_the_width_and_lose_no_letter() -> None:
    wild = {
        "sts_net": score(0.5, -1, 1.5, random=0.2, own=0.21),
        "rank": (10, 12),
        "nll_change": estimate(-12.25, -113.0, 11.0),
    }
    record = forecast(domain_forecast("translation", **wild))
    text = forecast_details(record, _judged(record), colour=False)
    _assert_narrow(text)
    first_table = text.split("transfer: STS_net")[0].splitlines()[2:]
    assert "-12000% to 13000%" in text
    assert "-113.00 to +11.00" in text
    assert "".join(line[:8].strip() for line in first_table).startswith("train")
    assert "…" not in text


def test_missing_numbers_are_shown_as_such() -> None:
    missing = {
        "sts_net": score(NAN, random=NAN),
        "nll_change": NAN,
        "gradient_change": NAN,
        "sae_error_share": NAN,
        "cosine": NAN,
    }
    record = forecast(domain_forecast("law", **missing), domain_forecast("code"))
    text = forecast_details(record, _judged(record), colour=False)
    _assert_narrow(text)
    (row,) = [r for r in _rows(text) if "law" in r]
    assert " ".join(row.split()) == "! law unknown 1-1 +nan +nan to +nan +nan"


def test_an_unknown_transfer_is_explained() -> None:
    unclear = domain_forecast("train", sts_net=score(0.1, -0.1, 0.3, own=NAN))
    record = forecast(domain_forecast("law", sts_net=score(0.1, own=NAN)), train=unclear)
    text = forecast_details(record, _judged(record), colour=False)
    _assert_narrow(text)
    assert text.count("unknown") >= 3 and "nan%" not in text
    assert "Transfer is unknown" not in forecast_details(_forecast(), _judged(_forecast()), colour=False)


def test_training_data_come_first_then_the_domains_that_move_most() -> None:
    record = _forecast()
    text = forecast_details(record, _judged(record), colour=False)
    for rows in (_rows(text), _rivals(text)):
        assert [row.split()[0] for row in rows] == ["train", *NAMES[::-1]]


def test_a_domain_without_a_score_comes_last_and_moves_no_other() -> None:
    crosses = {"a": 0.1, "b": NAN, "c": 0.3, "d": 0.2}
    record = forecast(*(domain_forecast(name, sts_net=cross) for name, cross in crosses.items()))
    text = forecast_details(record, Verdict("go", (), {}, 0), colour=False)
    assert [row.split()[0] for row in _rows(text)] == ["train", "c", "d", "a", "b"]


def test_a_row_holds_the_numbers_of_its_domain() -> None:
    cross = score(0.25, 0.2, 0.5, random=0.125, own=0.625)
    law = domain_forecast("law", sts_net=cross, rank=(2, 3), nll_change=estimate(-0.25, -0.5, 0.125), gradient_change=0.75)
    record = forecast(law, domain_forecast("code"))
    text = forecast_details(record, _judged(record), colour=False)
    (row,) = [r for r in _rows(text) if "law" in r]
    assert " ".join(row.split()) == "! law 25% 15% to 75% 2-3 -0.25 -0.50 to +0.12 +0.75 1"
    (row,) = [r for r in _rivals(text) if "law" in r]
    assert " ".join(row.split()) == "law 0.250 0.250 0.000 0.250 0.5 3.25 1.25 0.50 2.50 25%"


def test_a_single_domain_has_no_place_in_an_order() -> None:
    for has_sae in (True, False):
        identity = IDENTITY if has_sae else dataclasses.replace(IDENTITY, sae=NO_SAE)
        record = forecast(domain_forecast("law", gradient_change=0.75), identity=identity)
        text = forecast_details(record, Verdict("go", (), {}, 0), colour=False)
        assert "rank" not in text and "harm:" not in text and "an order, not a sign" not in text
        several = forecast(domain_forecast("law"), domain_forecast("code"), identity=identity)
        assert "1 the worst; an order, not a sign." in forecast_details(several, Verdict("go", (), {}, 0), colour=False)
        _assert_narrow(text)


def test_the_training_data_has_no_rank() -> None:
    record = _forecast()
    row = _rows(forecast_details(record, _judged(record), colour=False))[0]
    assert " ".join(row.split()) == "train 100% 100% to 100% +0.00 +0.00 to +0.00 -1.00"


def test_below_stands_what_the_numbers_stand_on() -> None:
    record = _forecast()
    flat = " ".join(forecast_details(record, _judged(record), colour=False).split())
    assert re.search(r"\b3 features .*\b50%", flat)
    assert re.search(r"tiny-sae at blocks\.2\.hook_resid_post.* 25% of variance .*noise floor .*0e\+00.* 2 s\b", flat)


def test_a_name_too_long_for_its_column_loses_no_letter() -> None:
    name = "abcdefghijklmnopqrstuvwxyz0123456789"
    record = forecast(domain_forecast(name), domain_forecast("law", sts_net=0.01))
    text = forecast_details(record, Verdict("go", (), {}, 0), colour=False)
    _assert_narrow(text)
    for last_title in ("harm", "unseen"):
        below = re.split(rf"\n\s*domain .*{last_title}\n", text)[1].split("\n\n")[0].splitlines()
        column = below[0].index("1")  # where the numbers of the training data begin
        assert "".join(line[:column].split()[0] for line in below).startswith(f"train{name}law")


def test_the_longest_shipped_name_is_shown_in_full_when_threatened() -> None:
    name = max(starter_domains(), key=len)
    record = forecast(domain_forecast(name, sts_net=0.5, **HARM))
    assert f"! {name} " in forecast_details(record, _judged(record), colour=False)


CHECKS = (
    Check("explained variance", "pass", "93% of 260 tokens' variance", ""),
    Check("layer", "refuse", "reads layer 2 (leaves 0.67), but fits layer 1 better (leaves 0.08)", "correct hook_name " * 9),
    Check("silent features", "warn", "95% of 64", "give more [or longer] texts"),
)


def test_the_doctor_gives_each_check_a_line_and_what_to_do_below_it() -> None:
    text = doctor_table(CHECKS, colour=False)
    _assert_narrow(text)
    lines = text.splitlines()
    assert [line.split()[-1] for line in (lines[0][:28], lines[1][:28])] == ["pass", "refuse"]
    assert lines[0].startswith("explained variance ")
    assert lines[-1].split() == ["->", "give", "more", "[or", "longer]", "texts"]
    flat = " ".join(text.split())
    assert flat.count("correct hook_name") == 9
    assert flat.count("->") == 2


def test_the_doctor_is_coloured_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for show in (True, False):
        assert (ESCAPE in doctor_table(CHECKS, colour=show)) == show
        monkeypatch.setattr("sys.stdout.isatty", lambda show=show: show)
        assert (ESCAPE in doctor_table(CHECKS)) == show


def test_features_in_words_show_the_strongest_place_of_each_set() -> None:
    strong, weak = Snippet("so the\n\nhigh ", "court", " held that", 2.5), Snippet("", "law", "", 0.5)
    words = [
        TopActivatingExamples(7, 0.125, "https://x/7", {"train": (strong, weak), "law": ()}),
        TopActivatingExamples(3, 0.5, "", {}),
    ]
    text = examples_lines(words, colour=False)
    assert text.splitlines() == [
        "feature 7, 12.5%  https://x/7",
        "  train        ...so the high [court] held that",
        "feature 3, 50.0%",
    ]
    long = Snippet("a " * 90, "b" * 90, "c " * 90, 1.0)
    _assert_narrow(examples_lines([TopActivatingExamples(7, 0.1, "", {"a long name indeed": (long,)})], colour=False))


def test_several_saes_stand_side_by_side_with_their_agreement() -> None:
    one = forecast(domain_forecast("law", sts_net=0.25), domain_forecast("code", sts_net=0.5))
    other = forecast(domain_forecast("law", sts_net=0.75), domain_forecast("code", sts_net=0.125))
    text = layers_table([one, other], [1.0, -1.0], colour=False)
    _assert_narrow(text)
    lines = [line.split() for line in text.splitlines()]
    assert ["law", "25%", "75%"] in lines
    assert ["code", "50%", "12%"] in lines
    assert ["agreement", "in", "order", "1.00", "-1.00"] in lines
    assert text.count("tiny-sae at blocks.2.hook_resid_post") == 2


LONG = {"model_name": "a-model-with-a-long-name-" * 4, "sae_name": "release/" + "layer_12_width_16k_l0_small" * 3}


def test_the_ledger_is_a_table_a_group_with_movement_and_harm_apart() -> None:
    text = ledger_table(track_records([*lawful_runs(7), *lawful_runs(2, **LONG)]), colour=False)
    _assert_narrow(text)
    lines = [line.split() for line in text.splitlines()]
    movement, harm = (next(line for line in lines if line[:1] == [name]) for name in ("movement:", "harm:"))
    assert movement[:3] == ["movement:", "transfer", "28"] and movement[-1].endswith("%")
    assert harm[:5] == ["harm:", "NLL", "change", "28", "+1.00"] and harm[-1].endswith("%")
    assert "7 runs on 7 training sets" in text
    assert "tiny-llama, tiny-sae\nat blocks.2.hook_resid_post" in text
    flat = " ".join(text.split())
    assert flat.count("too few runs to judge by: 2 of the 5") == 2
    assert "nan" not in text


def test_a_ledger_of_one_run_and_of_no_known_number_is_told_plainly() -> None:
    nothing = run({"law": (NAN, NAN, NAN, NAN, NAN)})
    text = ledger_table(track_records([nothing]), colour=False)
    _assert_narrow(text)
    assert "1 run on 1 training set\n" in text
    assert "too few runs to judge by: 0 of the 5" in " ".join(text.split())
    assert "nan" not in text


@pytest.mark.parametrize("name", ["law", "a domain of a very long name indeed, which goes on and on"])
def test_expectations_are_a_row_a_domain_with_its_interval(name: str) -> None:
    expected = expectations(lawful_runs(6), forecast_of({name: (0.5, 0.04, 0.02)}))
    assert expected is not None
    text = expectations_table(expected, colour=False)
    _assert_narrow(text)
    for shown in ("65.9%", "65.9% to 65.9%", "+0.09", "+0.09 to +0.09", "6 runs on 6 training sets of this model and SAE"):
        assert shown in text
    told = r"movement: transfer off by x 1, \d+% inside; harm: NLL change off by 0\.000, \d+% inside"
    assert re.search(told, " ".join(text.split()))


def test_expectations_that_are_but_a_mean_say_so_and_missing_ones_are_left_empty() -> None:
    alike = [run({"law": (0.5, 0.1, 0.1, 0.1 * 2**i, NAN)}, f"{i}") for i in range(6)]
    expected = expectations(alike, forecast_of({"law": (0.5, 0.04, 0.02)}))
    assert expected is not None
    text = expectations_table(expected, colour=False)
    _assert_narrow(text)
    flat = " ".join(text.split())
    assert re.search("movement: .*no more than the mean of past outcomes", flat)
    assert re.search("harm: .*too few runs to judge by: 0 of the 5", flat)
    assert "nan" not in text


def test_wild_past_runs_keep_the_width() -> None:
    wild = [
        run({n: (9.0 * i, 1e-9, 50.0 * i, 1e6 ** (i % 3), -1e3 * i) for i, n in enumerate(NAMES, k)}, f"{k}") for k in range(6)
    ]
    expected = expectations(wild, forecast_of({name: (0.5, 1e9, 1e3) for name in NAMES}))
    assert expected is not None
    _assert_narrow(expectations_table(expected, colour=False))
    _assert_narrow(ledger_table(track_records(wild), colour=False))


def _blame(**changes: Any) -> Attribution:
    place = Snippet("a long text that stands before the\n", "court", " and one that stands behind it, which is long too" * 2, 3.5)
    rows = (AttributedRow(1234567, 0.75, 65535, place), AttributedRow(3, -0.25, 7, place))
    law = DomainAttribution("law", 0.75, -0.125, 0.375, 1, rows)
    given: dict[str, Any] = {"n_rows": 2_000_000, "n_read": 2000, "n_cut": 3, "domains": {"law": law}, "left_out": (1234567,)}
    return Attribution(identity=IDENTITY, seconds=1.5, **{**given, **changes})


def test_blame_shows_rows_where_they_fire_and_says_what_that_means() -> None:
    shown = attribution_table(_blame(), colour=False)
    assert max(map(len, shown.splitlines())) <= 80
    flat = " ".join(shown.split())
    assert re.search(r"1234567 0\.75 65535 \.\.\..* \[court\] and one", flat)
    for part in (
        r"1 of 2000 rows .*above 0\.38; .*-0\.12, .* 0\.75\.",
        "2000 of 2000000 rows were read",
        r"3 were cut\.",
        "not a proof",
        "To leave out: 1 row,",
    ):
        assert re.search(part, flat)


def test_blame_shows_sources_and_names_those_with_too_few_rows() -> None:
    sources = (
        SourceAttribution("opinions " * 9, 1500, Estimate(0.25, 0.125, 0.375), 40),
        SourceAttribution("word problems", 490, Estimate(-0.5, -0.625, -0.375), 0),
        *(SourceAttribution(f"few {i}", 2, UNKNOWN, 1) for i in range(7)),
    )
    law = replace(_blame().domains["law"], sources=sources)
    shown = attribution_table(_blame(domains={"law": law}), colour=False)
    assert max(map(len, shown.splitlines())) <= 80
    flat = " ".join(shown.split())
    assert re.search(
        r"by source, for law rows mean score 95 % stand out opinions .*\.\.\. 1500 \+0\.25 \+0\.12 to \+0\.38 40", flat
    )
    assert "word problems 490 -0.50 -0.62 to -0.38 0" in flat
    assert (
        "By source, too few rows read for a mean: few 0 (2), few 1 (2), few 2 (2), few 3 (2), few 4 (2) and 2 more sources."
        in flat
    )
    assert "by source" not in attribution_table(_blame(), colour=False)


def test_blame_marks_what_stands_out() -> None:
    lines = attribution_table(_blame(), colour=True).splitlines()
    marked = {
        number: next(line for line in lines if f" {number} " in line or f"{number} " in line) for number in ("1234567", "3 ")
    }
    assert ESCAPE + "31m" in marked["1234567"]
    assert ESCAPE + "31m" not in marked["3 "]


def test_blame_of_all_rows_speaks_of_no_sample() -> None:
    shown = attribution_table(_blame(n_rows=2000, n_cut=0), colour=False)
    assert "were read" not in shown
    assert "were cut" not in shown


def _dial(**findings: Any) -> AdapterScales:
    def point(scale: float, finding: Any) -> ScalePoint:
        change = estimate(0.12, -0.1, 0.3)
        law = ScaledDomain("law", 32, estimate(scale, 0.0, 2.0), change, change, 0.1, finding)
        code = ScaledDomain("code", 32, estimate(scale, 0.0, 2.0), change, estimate(1.25, -0.5, 3.0), "2 points", finding)
        return ScalePoint(scale, finding, {"law": law, "code": code})

    return AdapterScales(IDENTITY, tuple(point(float(scale[1:]) / 100, finding) for scale, finding in findings.items()), 1.5)


@pytest.mark.parametrize(
    ("findings", "answer"),
    [
        ({"s25": "within", "s50": "within", "s100": "beyond"}, "Largest scale that keeps every budget: 0.5\n  to use it"),
        ({"s100": "within"}, "Largest scale that keeps every budget: 1"),
        ({"s50": "cannot tell", "s100": "beyond"}, "Cannot tell: none"),
        ({"s50": "beyond", "s100": "beyond"}, "None of these scales keeps every budget"),
    ],
)
def test_a_dial_shows_the_curve_and_answers(findings: dict[str, Any], answer: str) -> None:
    shown = adapter_scales_table(_dial(**findings), colour=False)
    assert max(map(len, shown.splitlines())) <= 80
    assert answer in shown
    assert ("lora_alpha" in shown) == ("to use it" in answer)
    for scale, finding in findings.items():
        row = rf"law +{float(scale[1:]) / 100:g} +{float(scale[1:]):.1f}% +\+0\.12 +-0\.10 to \+0\.30 +0\.10 +{finding}"
        assert re.search(row, shown), shown
        assert re.search(rf"code .* \+1\.2 +-0\.5 to \+3\.0 +2 points +{finding}", shown), shown


def _mix(train_change: float, replay_change: float) -> Mix:
    made = {
        name: SourceEffect(n_rows, {"law": estimate(law), "code": estimate(0.0)}, {"law": 0.1, "code": 0.1})
        for name, n_rows, law in (("train", 800, train_change), ("cases", 900, replay_change))
    }
    policy = PolicyConfig(budgets={"law": 0.1, "code": 0.1})
    return Mix(IDENTITY, made, search(made, policy, MixtureConstraints()), 2.5)


@pytest.mark.parametrize(
    ("mix", "answer"),
    [
        (_mix(0.05, -0.4), "No replay is needed"),
        (_mix(0.15, -0.4), "Recommended: 720 rows of train (90%), 80 rows of cases (10%)."),
        (_mix(0.3, 0.2), "train at a lower rate. The nearest: 400 rows of train"),
        (_mix(float("nan"), 0.2), "Cannot tell: "),
    ],
    ids=["none", "some", "not enough", "unknown"],
)
def test_a_mix_shows_what_was_measured_the_curve_and_an_answer(mix: Mix, answer: str) -> None:
    shown = mix_table(mix, colour=False)
    assert max(map(len, shown.splitlines())) <= 80
    assert answer in " ".join(shown.split())
    assert len(re.findall(r"%  .*(within|beyond|cannot tell)", shown)) == len(mix.points)
    assert "Measured: what a short run" in shown and "Extrapolated: that a mixture" in " ".join(shown.split())


def test_a_mix_says_what_becomes_of_each_threatened_domain() -> None:
    shown = mix_table(_mix(0.15, -0.45), colour=False)
    assert "  law: +0.15 alone, +0.09 in this mixture" in shown
    assert "code: " not in shown
    bars = re.findall("[\u2588\u00b7]{8}", shown)
    assert bars[0].count("\u2588") == 6 and bars[-1].count("\u2588") == 0  # 1.5 of 2 budgets, and none
