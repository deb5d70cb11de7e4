"""The page as a browser gets it: every part there, nothing from outside, whole whatever the run was like."""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from logs import EMPTY, SETTINGS, blamed, check, verdict, whole_run, words, written
from reading import Page
from samples import IDENTITY, domain_drift, domain_forecast, estimate, forecast, rehearsal, snapshot
from sts_callback.cli import parser
from sts_callback.config import PolicyConfig
from sts_callback.errors import DataError
from sts_callback.records import Check, Decision, Snippet, TokenAccuracy
from sts_callback.records.rehearsal import Trial, Trials
from sts_callback.records.run import Fault, Given, JudgedCheck, Logged, Postponed
from sts_callback.report.data import ReportData, build
from sts_callback.report.html.page import page, write_report
from sts_callback.runs.directory import RunDirectory

NAN = math.nan
SECTIONS = (
    "forecast",
    "rehearsal",
    "drift",
    "overlap",
    "features",
    "blame",
    "blind-spots",
    "left-out",
    "cost",
    "faults",
    "reproduce",
)
NASTY = [
    "<script>alert(1)</script>",
    "</style></title><img src=x onerror=alert(1)>",
    "\"quoted\" 'twice' & more",
    "\u05de\u05e9\u05e4\u05d8 \u0642\u0627\u0646\u0648\u0646",
    "\U0001f9d1\u200d\u2696\ufe0f law",
    "half a character \ud83d and \0",
    "x" * 5000,
    "",
]


def made(logged: Logged) -> Page:
    return Page(page(build(logged)))


def many(n_domains: int, n_checks: int) -> Logged:
    """A large run, with numbers that differ."""
    names = [f"domain {i}" for i in range(n_domains)]
    checks = []
    for step in range(1, n_checks + 1):
        domains = []
        for i, name in enumerate(names):
            size = 0.3 + 0.2 * math.sin(step / 7 + i)
            change = estimate(size - 0.3, size - 0.5, size - 0.1)
            domains.append(domain_drift(name, relative_drift=estimate(size, size / 2, size * 2), nll_change=change))
        judged = verdict("no-go" if step % 3 else "watch", *names[:3], step=step, about=tuple(names))
        checks.append(JudgedCheck(snapshot(step, *domains), judged, None))
    snippets = {
        name: tuple(Snippet("some text before " * 3, " token", " and after" * 3, 1.0) for _ in range(3)) for name in names
    }
    return whole_run(
        settings=dataclasses.replace(SETTINGS, policy=PolicyConfig(dict.fromkeys(names, 0.1))),
        forecast=forecast(*(domain_forecast(name, sts_net=0.3) for name in names), features=tuple(range(100))),
        forecast_verdict=verdict("go", about=tuple(names)),
        checks=tuple(checks),
        top_examples=tuple(words(j, snippets=snippets) for j in range(300)),
        postponed=tuple(Postponed(step, "too dear " * 20) for step in range(500)),
        faults=tuple(Fault(step, "drift check", f"Error({step})", "Traceback " * 5000) for step in range(100)),
    )


def commands(source: str) -> list[list[str]]:
    """Those of a page, as a shell reads them."""
    found = re.findall(r'<code class="command">(.*?)</code>', source)
    return [shlex.split(html.unescape(re.sub("<.*?>", "", one))) for one in found]


@pytest.mark.parametrize("decision", ["go", "no-go"])
def test_the_pages_commands_name_the_runs_folder_and_what_it_was_given(decision: Decision) -> None:
    given = Given("models/base", "saes/my layer", "train.jsonl", {"law": "law's.jsonl"}, learning_rate=1e-3, lora_r=8)
    settings = dataclasses.replace(SETTINGS, given=given)
    judged = (check(30, verdict(decision, *(["law"] if decision == "no-go" else []), step=30)),)
    source = page(build(whole_run(settings=settings, checks=judged, blame=None), Path("runs/my first")))
    told = commands(source)
    blame = next(words for words in reversed(told) if words[1] == "blame")
    read = parser().parse_args(blame[1:])
    assert (read.model, read.sae, read.train, read.run_dir) == (
        "models/base",
        "saes/my layer",
        "train.jsonl",
        Path("runs/my first"),
    )
    assert read.protect == (["law"] if decision == "no-go" else ["law", "code=0.2"]) and read.domain == ["law=law's.jsonl"]
    assert told[-1] == ["sts-callback", "report", "runs/my first"]
    assert "OUTPUT_DIR" not in source and "..." not in Page(source).section("blame")


def test_without_ranked_rows_the_page_says_how_to_have_them_and_what_is_left_open() -> None:
    told = made(whole_run(blame=None)).section("blame")
    assert "No training rows were ranked. To have them here: sts-callback blame --model MODEL --sae SAE --train FILE " in told
    assert (
        "Replace MODEL by the model's folder or hub id, SAE by the SAE's folder or name and FILE by a file of your rows, as"
        in told
    )


def test_a_whole_run_has_every_part_with_its_numbers() -> None:
    read = made(whole_run())
    assert [read.section(anchor) != "" for anchor in SECTIONS] == [True] * len(SECTIONS)
    assert re.search(r"ALARM .*step 30\b.*\blaw\b", read.text)
    assert read.text.index("why law is no-go.") < read.text.index("Forecast: what training will move")
    assert "75%" in read.section("forecast")
    assert "alarm at step 30" in read.section("drift") and "watch at step 20" in read.section("drift")
    assert "steps 10" not in read.section("drift")
    assert "2 of the 3 features" in read.section("overlap") and "step 30 on" in read.section("overlap")
    assert "41 \u25b2 0.75 7" in read.section("blame") and "3 0.25 3" in read.section("blame")
    assert re.search(r"\b400 rows read 1\b", read.section("blame"))
    assert "opinions 390 +0.25 +0.12 to +0.38 1" in read.section("blame")
    assert "too few rows read for a mean: notes (4)." in read.section("blame")
    assert re.search(r"Feature 7 .*\b1 of the forecast's.*\b1 of those that moved", read.section("features"))
    assert "take another SAE" in read.section("blind-spots")
    assert "\u25b2 62%" in read.section("blind-spots")
    assert "overhead of 2.4%" in read.section(
        "cost"
    ) and "Allowed: 1.0%, in which the last check is not counted." in read.section("cost")
    assert "skipped 1 time" in read.section("cost")
    assert "2 times, from step 5 to 6" in read.section("faults")
    for part in ("tiny-llama", "s" * 64, "max_norm_multiple", "0.2 nats a token", "2.9.0"):
        assert part in read.section("reproduce")


def test_a_rehearsal_is_told_dose_by_dose() -> None:
    law = domain_drift("law", nll_change=estimate(0.25, 0.125, 0.375), sts_net=0.625)
    doses = snapshot(5, law, domain_drift("code")), snapshot(10, domain_drift("law", nll_change=1.5), domain_drift("code"))
    judged = verdict("no-go", "law", states={"law": "over", "code": "within"})
    read = made(whole_run(rehearsal=rehearsal(*doses), rehearsal_verdict=judged))
    section = read.section("rehearsal")
    assert "Before the first of 60 steps, the trainer took 5 steps at a rate of 0.001" in section
    assert "5 steps at a rate of 0.004, 4.0 times that, followed." in section
    assert "law protected over \N{EN DASH} +0.25 +0.12 to +0.38 1.0% 0.625 +1.50" in section
    assert "code protected within \N{EN DASH} 0.00" in section
    assert "NO-GO" in section and "why law is no-go." in section
    assert "Of the 3 features that the first 5 steps moved most on the training data, the forecast had named 2" in section
    assert "The rehearsal took 12 s, once, before training: 10 steps, and 5.0 s of that for 2 checks." in read.section("cost")
    before = made(whole_run(rehearsal=rehearsal(*doses), rehearsal_verdict=judged, checks=()))
    assert "NO-GO Training is expected to make law worse." in before.text
    assert "In context, without any step, the forecast said: go." in before.text


def test_what_was_said_in_context_is_not_called_the_verdict_where_there_was_a_rehearsal() -> None:
    doses = [snapshot(5, domain_drift("law"), domain_drift("code"))]
    told = whole_run(rehearsal=rehearsal(*doses), rehearsal_verdict=verdict("no-go", "law"))
    assert "Verdict in context: GO" in made(told).section("forecast")
    assert "Verdict before training: GO" in made(whole_run(rehearsal=None, rehearsal_verdict=None)).section("forecast")


def test_every_line_of_a_picture_has_its_colour_in_the_key() -> None:
    check_of_law = snapshot(5, domain_drift("law"))
    some = tuple(Trial(1e-3, replay, rehearsal(check_of_law), verdict("go")) for replay in ({}, {"cases": 0.1}, {"cases": 0.2}))
    source = page(build(whole_run(trials=Trials(IDENTITY, "LoRA of rank 16", some, {"law": 0.1}, 1.0))))
    kinds = set(re.findall(r'class="key (\w+)"', source))
    assert kinds == {"harm", "dashed", "movement", "second"}
    assert all(re.search(rf"\.key\.{kind} \{{ color:", source) for kind in kinds)


def test_where_there_was_no_rehearsal_the_reason_stands() -> None:
    read = made(whole_run(rehearsal=rehearsal(skipped="its model is sharded."), rehearsal_verdict=None))
    assert "The run was not rehearsed: its model is sharded." in read.section("rehearsal")
    assert "The run was not rehearsed: its model is sharded." in read.text[: read.text.index("Forecast: what training")]
    assert "rehears" not in read.section("cost")
    assert "No rehearsal can be read" in made(whole_run(rehearsal=None, rehearsal_verdict=None)).section("rehearsal")


@pytest.mark.parametrize("names", [("law",), ("law", "code")])
def test_an_order_is_told_only_where_there_are_several_domains(names: tuple[str, ...]) -> None:
    section = made(whole_run(forecast=forecast(*map(domain_forecast, names)))).section("forecast")
    assert all(
        (part in section) == (len(names) > 1) for part in (" rank ", " above next ", "1 the worst", "orders domains;", "others.")
    )
    assert "transfer 95% " in section


def test_a_p_value_says_that_it_is_not_the_test_of_the_state() -> None:
    section = made(whole_run()).section("drift")
    assert "of any rise of NLL, above 0" in section and "Its test is another: against half the budget" in section


def test_movement_and_harm_stand_apart() -> None:
    read = made(whole_run())
    top = read.text[: read.text.index("Forecast: what training will move")]
    assert top.index(" now ") < top.index(" moved ") < top.index(" budget ")
    assert read.section("forecast").count("Does it get worse?") == 2
    assert read.section("drift").count("Worse: NLL change") == read.section("drift").count("Moved: drift") == 3


def standing(law: str, code: str) -> tuple[JudgedCheck, ...]:
    """Checks at which law went over its budget."""
    states: list[dict[str, Any]] = [{"law": state, "code": code} for state in ("within", "on course", law)]
    return tuple(
        check(step, verdict("no-go" if state["law"] != "within" else "go", "law", step=step, states=state))
        for step, state in zip((10, 20, 30), states, strict=True)
    )


def test_how_a_domain_stands_is_a_shape_and_a_word_beside_its_budget() -> None:
    read = made(whole_run(checks=standing("over", "inconclusive")))
    top = read.text[: read.text.index("Forecast: what training will move")]
    assert "law protected 0.00 [0.00, 0.00] 12.5% \u25cf over 0.10" in top
    assert "code protected 0.00 [0.00, 0.00] 12.5% ? cannot tell" in top
    unknown = made(whole_run(settings=None, blame=None))
    assert re.findall("[\u25b2\u25cf] [0-9]", unknown.text) == []
    assert "none is drawn" in unknown.section("drift")
    assert 'class="level threshold"' not in unknown.source


def test_the_top_is_in_the_order_of_the_terminal_and_says_what_to_do_about_an_alarm() -> None:
    read = made(whole_run(checks=standing("over", "within"), best_checkpoint=10))
    parts = ["ALARM", "law is over its budget since step 20", " budget ", "against step 0", "What to do", "The reasons"]
    assert sorted(parts, key=read.text.index) == parts
    assert "Go back to OUTPUT_DIR/checkpoint-10, the best on disk." in read.text
    assert "--run-dir OUTPUT_DIR" in read.text
    assert "What to do" not in made(whole_run(checks=(check(10),))).text


def test_what_a_keyboard_reaches_says_what_it_is() -> None:
    """Boxes that scroll; links and what unfolds have their text."""
    source = made(whole_run()).source
    reached = re.findall(r"<(\w+)[^>]* tabindex=\"0\"([^>]*)>", source)
    assert {name for name, _ in reached} == {"div", "pre"}
    assert {attributes for _, attributes in reached} == {
        ' role="group" aria-label="table"',
        ' role="group" aria-label="traceback"',
    }


def test_each_check_has_a_mark_against_the_budget() -> None:
    drift = made(whole_run(checks=standing("over", "within")))
    tracks = re.findall(r'<div class="track".*?</div>', drift.source)
    assert [re.findall("[\u25cb\u25d0\u25cf?]", track) for track in tracks] == [["\u25cb", "\u25d0", "\u25cf"], ["\u25cb"] * 3]
    assert 'aria-label="law: step 10 within, step 20 on course, step 30 over"' in tracks[0]
    assert " step 10 20 30 " in drift.section("drift")
    assert "Each check against the budget" not in made(whole_run()).text  # a run from before there were states


def in_other_units() -> Logged:
    """Law has lost 4 points and risen by half a nat, code 0.06 bits a byte."""
    accuracy = TokenAccuracy(0.43, 0.39, estimate(-0.04, -0.05, -0.03), 41, 3, 17, (-2, 0))
    law = domain_drift("law", nll_change=estimate(0.5), accuracy=accuracy)
    code = domain_drift("code", nll_change=estimate(0.25), bits_change=estimate(0.06), accuracy=accuracy)
    train = domain_drift("train", accuracy=None)
    policy = PolicyConfig({"law": "2 points", "code": "0.05 bits/byte"})
    return whole_run(
        settings=dataclasses.replace(SETTINGS, policy=policy),
        checks=(JudgedCheck(snapshot(10, law, code, train=train), verdict("go", step=10), None),),
    )


def test_harm_is_told_in_the_unit_of_the_budget() -> None:
    read = made(in_other_units())
    top = read.text[: read.text.index("Forecast: what training will move")]
    assert "law protected +4.0 [+3.0, +5.0] 1.0%" in top
    assert "code protected +0.060 [+0.060, +0.060] 1.0%" in top
    assert "law 2 points code 0.05 bits/byte" in read.section("reproduce")
    in_nats = made(dataclasses.replace(in_other_units(), settings=SETTINGS)).source
    assert in_nats.count('class="level threshold"') - read.source.count('class="level threshold"') == 2  # over steps
    assert (in_nats.count('class="bar threshold"'), read.source.count('class="bar threshold"')) == (2, 0)  # before training


def test_accuracy_is_told_with_its_interval_and_its_flips_where_it_is_known() -> None:
    drift = made(in_other_units()).section("drift")
    assert "token accuracy change 95% tokens lost gained queries with a loss" in drift
    assert "law protected 43.0% to 39.0% -4.0 -5.0 to -3.0 41 3 17 of 8" in drift
    assert "tokens lost" not in made(whole_run()).section("drift")


def test_the_token_that_fires_is_marked() -> None:
    read = made(whole_run(top_examples=(words(7, token=" "),)))
    assert "before<mark>\u2423</mark> after" in read.source
    assert "It is active nowhere in code." in read.section("features")


@pytest.mark.parametrize("text", NASTY)
def test_whatever_a_text_says_it_is_text(text: str) -> None:
    change = {"about": (text,), "step": 30}
    logged = whole_run(
        settings=dataclasses.replace(SETTINGS, policy=PolicyConfig({text: 0.1}), action=text, versions={text: text}),
        forecast=forecast(
            domain_forecast(text),
            identity=dataclasses.replace(forecast().identity, model_name=text, sae_name=text, hook_name=text),
            checks=(Check(text, "warn", text, text),),
            seconds_by_part={text: 1.0},
        ),
        forecast_verdict=verdict("no-go", text, about=(text,)),
        checks=(JudgedCheck(snapshot(30, domain_drift(text)), verdict("no-go", text, **change), None),),
        top_examples=(
            words(7, link=text, snippets={"train": (Snippet(text, text, text, 1.0),), text: (Snippet(text, text, text, 1.0),)}),
        ),
        blame=blamed(text),
        postponed=(Postponed(1, text),),
        faults=(Fault(1, text, text, text),),
        unreadable=(text,),
        rehearsal=rehearsal(snapshot(5, domain_drift(text))),
        rehearsal_verdict=verdict("no-go", text, about=(text,)),
    )
    read, plain = made(logged), made(whole_run())
    assert set(read.elements) <= set(plain.elements)
    assert {name for _, name, _ in read.attributes} <= {name for _, name, _ in plain.attributes}
    assert {tag for tag in read.elements if tag in ("script", "img", "iframe", "link", "object")} == set()
    assert read.pictures
    assert len(read.source.encode()) < 400_000


def test_nothing_is_fetched_and_no_address_stands_outside_of_text() -> None:
    read = made(whole_run(top_examples=(words(7, link="https://www.neuronpedia.org/x/7"),)))
    assert "https://www.neuronpedia.org/x/7" in read.text
    assert [a for a in read.attributes if re.search(r"//|javascript:|data:", a[2])] == []
    assert {value for tag, name, value in read.attributes if name in ("href", "src")} == {f"#{anchor}" for anchor in SECTIONS}
    style = re.search(r"<style>(.*?)</style>", read.source, re.DOTALL)
    assert style and not re.search(r"url\(|@import|//", style[1])
    assert "script" not in read.elements


def test_links_at_the_top_lead_somewhere() -> None:
    read = made(whole_run())
    anchors = {value for _, name, value in read.attributes if name == "id"}
    assert {value.removeprefix("#") for _, name, value in read.attributes if name == "href"} == anchors


def test_a_large_run_makes_a_page_under_2_mb_that_shows_first_what_matters() -> None:
    read = made(many(22, 200))
    assert len(read.source.encode()) < 2_000_000
    drift = re.search(r'<section id="drift">.*?</section>', read.source, re.DOTALL)
    assert drift
    shown, folded = drift[0].split("<details><summary>14 more domains")
    assert (shown.count("<article>"), folded.count("<article>")) == (9, 14)
    assert "Verdict over time" in folded
    assert "skipped.jsonl has 488 more" in read.section("cost")
    assert "faults.jsonl has 88 more" in read.section("faults")
    assert len(read.pictures) == 3 * 22 + 2 * 23 + 1


def unknown(record: Any) -> Any:
    """The same record with NaN for every number that can be one."""
    changes: dict[str, Any] = {}
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if isinstance(value, float):
            changes[f.name] = NAN
        elif dataclasses.is_dataclass(value):
            changes[f.name] = unknown(value)
        elif isinstance(value, dict):
            changes[f.name] = {name: unknown(v) if dataclasses.is_dataclass(v) else v for name, v in value.items()}
    return dataclasses.replace(record, **changes)


def test_a_run_in_which_nothing_could_be_measured_has_dashes() -> None:
    logged = whole_run()
    assert logged.forecast is not None
    checks = tuple(dataclasses.replace(c, snapshot=unknown(c.snapshot), time=None) for c in logged.checks)
    read = made(dataclasses.replace(logged, forecast=unknown(logged.forecast), checks=checks))
    assert not re.search(r"\bnan\b", read.text, re.IGNORECASE)
    assert "\u2013" in read.section("drift")
    assert not re.search(r'="[^"]*nan', read.source)
    assert 'class="dot' not in read.source.split('<section id="overlap">')[0]


PARTS: dict[str, Any] = {
    "settings": None,
    "forecast": None,
    "forecast_verdict": None,
    "checks": (),
    "top_examples": (),
    "postponed": (),
    "faults": (),
}


@pytest.mark.parametrize("missing", [*itertools.combinations(PARTS, 1), *itertools.combinations(PARTS, 2), tuple(PARTS)])
def test_any_part_may_be_missing(missing: tuple[str, ...]) -> None:
    read = made(whole_run(**{part: PARTS[part] for part in missing}))
    assert all(read.section(anchor) for anchor in SECTIONS)


@pytest.mark.parametrize("part", PARTS)
def test_any_part_alone_is_enough(part: str) -> None:
    read = made(dataclasses.replace(EMPTY, **{part: getattr(whole_run(), part)}))
    assert all(read.section(anchor) for anchor in SECTIONS)


def test_a_run_of_one_check_and_no_protected_domain() -> None:
    alone = JudgedCheck(snapshot(3, domain_drift("law")), verdict("go", about=(), step=3), None)
    policy = dataclasses.replace(SETTINGS, policy=PolicyConfig())
    read = made(whole_run(settings=policy, forecast=forecast(), forecast_verdict=verdict("go", about=()), checks=(alone,)))
    assert "nothing to judge" in read.text
    assert "badge" not in read.section("drift")


def test_rollouts_have_a_picture_of_their_own() -> None:
    moved = estimate(0.25, 0.125, 0.5)
    read = made(whole_run(checks=(check(10, output_drift=moved), check(20))))
    assert "What the policy writes" in read.section("drift")
    assert "What the policy writes" not in made(whole_run()).section("drift")


def test_several_saes_have_a_table() -> None:
    assert "Transfer by each SAE" in made(whole_run(other_forecasts=(forecast(domain_forecast("law")),))).section("forecast")


def test_a_report_is_written_into_the_folder_and_agrees_with_its_json(tmp_path: Path) -> None:
    log = RunDirectory(tmp_path / "sts")
    written(log, whole_run())
    file = write_report(log)
    assert file == tmp_path / "sts" / "report.html"
    story = ReportData.from_json(file.with_suffix(".json").read_text())
    assert story.to_json() == build(log.read_all(), tmp_path).to_json()
    assert file.read_text() == page(story)
    write_report(log)
    assert not list(log.folder.glob("*.part"))


@pytest.mark.parametrize(
    "name", ["forecast.json", "settings.json", "drift.jsonl", "features.jsonl", "faults.jsonl", "skipped.jsonl"]
)
@pytest.mark.parametrize("keep", [0, 1, 0.4, -3])
def test_a_killed_run_is_told_as_far_as_it_was_written(name: str, keep: float, tmp_path: Path) -> None:
    log = RunDirectory(tmp_path / "sts")
    written(log, whole_run())
    file = log.folder / name
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    read = Page(write_report(log).read_text())
    assert all(read.section(anchor) for anchor in SECTIONS)
    if keep and name != "drift.jsonl":
        assert f"{name} cannot be read" in read.text


def test_a_run_of_another_version_is_told_why_it_cannot_be_read(tmp_path: Path) -> None:
    log = RunDirectory(tmp_path / "sts")
    written(log, whole_run(top_examples=()))
    for file in log.folder.iterdir():
        file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    assert "this version reads 1" in Page(write_report(log).read_text()).text


def test_where_there_is_nothing_to_tell_no_page_is_made(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"^report: .* holds no record of a run"):
            write_report(RunDirectory(folder))
    (tmp_path / "forecast.json").write_text("{")
    with pytest.raises(DataError, match=r"forecast.json cannot be read: cut off or damaged"):
        write_report(RunDirectory(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["forecast.json"]
