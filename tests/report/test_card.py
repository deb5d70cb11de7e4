"""The section for a model card: what it tells and what it never does, and how it gets into cards, pushed ones included."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from guest.runs import PROBES, TINY_DOMAINS
from logs import EMPTY, check, verdict, whole_run, words, written
from pages import blocks, page
from samples import domain_forecast, forecast
from sts_callback import STSCallback, add_to_card
from sts_callback.errors import DataError
from sts_callback.records import Verdict
from sts_callback.records.run import Logged
from sts_callback.report.card import BEGIN, END, card_section, put_into
from sts_callback.runs.directory import RunDirectory
from tiny import rotated_sae, rows, tiny_arguments, tiny_model, tiny_tokenizer, tokenised


@pytest.fixture
def section_of(tmp_path: Path) -> Callable[[Logged], str]:
    """The section that a run's folder gives."""

    def made(logged: Logged) -> str:
        log = RunDirectory(tmp_path / "sts")
        written(log, logged)
        return card_section(log)

    return made


def table(section: str) -> dict[str, list[str]]:
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert {len(row) for row in cells} == {6}
    return {row[0]: row[1:] for row in cells}


def test_a_run_is_told_with_forecast_and_outcome_side_by_side(section_of: Callable[[Logged], str]) -> None:
    section = section_of(whole_run())
    assert section.startswith(f"{BEGIN}\n") and section.endswith(f"\n{END}")
    assert "After 30 steps of training: **no-go**" in section
    assert "The rehearsal before training had said: **go**." in section
    assert "The forecast before training had said: **go**." in section_of(whole_run(rehearsal_verdict=None))
    assert "- `law`: why law is no-go." in section
    rows_of = table(section)
    assert rows_of["`law`"][:4] == ["0.10", "75%", "50.0%", "+0.05"]
    assert rows_of["`code`"][0] == "0.20"
    assert "Change that the SAE cannot express, so that nothing said of movement sees it: `law` 25%, `code` 25%." in section
    assert "surely above half the budget (one-sided t test over queries), at one check" in section
    assert "may err in 5.0% of runs, over all protected domains and 6 planned checks together, of which 3 were made." in section
    assert "Of the 3 features that training moved most on its own data, the forecast had named 2." in section
    assert "`tiny-sae` at `blocks.2.hook_resid_post`" in section
    assert re.search(r"weights .*step 30\b", section)
    assert "1 check was skipped" in section and "2 failures" in section


def test_a_forecast_alone_is_told_as_such(section_of: Callable[[Logged], str]) -> None:
    section = section_of(whole_run(checks=(), postponed=(), faults=()))
    assert re.search(r"Before training.*\*\*go\*\*", section)
    assert table(section)["`law`"] == ["0.10", "75%", "\u2013", "+0.05", "\u2013"]
    assert "no promise of none" in section
    assert "failure" not in section and "skipped" not in section
    assert re.search(r"\b[Cc]ut\b.*\b3 texts", section)


def test_checks_alone_are_told_too(section_of: Callable[[Logged], str]) -> None:
    section = section_of(whole_run(forecast=None, forecast_verdict=None, rehearsal_verdict=None, settings=None))
    assert table(section)["`law`"][:4] == ["\u2013", "\u2013", "50.0%", "\u2013"]
    assert "30 steps" in section and "**no-go**" in section and "**go**" not in section


def test_an_alarm_that_has_ended_is_not_hidden(section_of: Callable[[Logged], str]) -> None:
    checks = (check(10, verdict("no-go", "law", step=10)), check(20, verdict("go", step=20)))
    assert re.search(r"[Aa]larm .*`law` .*step 10\b", section_of(whole_run(checks=checks)))


def test_where_nothing_is_protected_nothing_is_judged(section_of: Callable[[Logged], str]) -> None:
    section = section_of(whole_run(checks=(), forecast_verdict=verdict("go", about=()), rehearsal_verdict=None))
    assert "No domain was protected, so nothing was judged." in section
    assert "**go**" not in section


def test_no_link_no_text_of_the_user_and_no_path(section_of: Callable[[Logged], str], tmp_path: Path) -> None:
    section = section_of(whole_run(top_examples=(words(7, token="SECRET", link="https://example.org/7"),)))
    assert not re.search(r"https?:|www\.|\]\(|<http|example\.org", section)
    for told in ("SECRET", "court", "Traceback", "gone", str(tmp_path)):
        assert told not in section


@pytest.mark.parametrize("name", ["a|b", "`x`", "two\nlines", "https://example.org", "<b>", END, "**", "[x](y)", "|"])
def test_names_are_no_markup(name: str, section_of: Callable[[Logged], str]) -> None:
    logged = Logged(
        **vars(EMPTY)
        | {
            "forecast": forecast(domain_forecast(name)),
            "forecast_verdict": Verdict("no-go", (name,), {name: "moves."}, 0),
        }
    )
    section = section_of(logged)
    assert len(table(section)) == 3  # titles, the line below them, one row
    outside = re.sub(r"`[^`\n]*`", "", section)
    assert outside.count("`") == 0
    assert len(name) < 3 or name not in outside.replace(END, "", 1)
    assert (section.count(BEGIN), section.count(END)) == (1, 1)


@pytest.mark.parametrize("logged", [EMPTY, Logged(**vars(EMPTY) | {"faults": whole_run().faults})])
def test_nothing_to_tell_is_said(logged: Logged, section_of: Callable[[Logged], str]) -> None:
    with pytest.raises(DataError, match=r"neither a forecast nor a check .* output_dir"):
        section_of(logged)


SECTION = f"{BEGIN}\n\n## New\n\n{END}"
OLD = f"{BEGIN}\nold\n{END}"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\ntags: [x]\n---\n\n# Model\n", f"---\ntags: [x]\n---\n\n# Model\n\n{SECTION}\n"),
        ("# Model", f"# Model\n\n{SECTION}\n"),
        ("", f"{SECTION}\n"),
        (f"# Model\n\n{OLD}\n\n# After\n", f"# Model\n\n{SECTION}\n\n# After\n"),
        (f"{OLD}", SECTION),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_card_gets_the_section_once_and_keeps_the_rest(card: str, expected: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_bytes(card.replace("\n", ending).encode())
    is_dos = ending in card.replace("\n", ending)
    for _ in range(2):
        put_into(file, SECTION)
        assert file.read_bytes().decode() == (expected.replace("\n", ending) if is_dos else expected)
    assert [one.name for one in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("card", [BEGIN, END, f"{END}{BEGIN}", OLD + OLD, f"{BEGIN}{OLD}"])
def test_a_card_with_other_markers_is_left_alone(card: str, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(card)
    with pytest.raises(DataError, match="once each, or neither; correct it by hand"):
        put_into(file, SECTION)
    assert file.read_text() == card


def test_a_card_that_is_not_there_or_no_text_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .* a model card that exists"):
        put_into(tmp_path / "README.md", SECTION)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not text in UTF-8"):
        put_into(tmp_path / "README.md", SECTION)


def test_a_card_behind_a_link_stays_there(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Model\n")
    (tmp_path / "README.md").symlink_to("card.md")
    put_into(tmp_path / "README.md", SECTION)
    assert (tmp_path / "README.md").is_symlink()
    assert SECTION in (tmp_path / "card.md").read_text()


def of_page(base: type[Trainer]) -> type[Trainer]:
    """The page's recipe, with another trainer to begin with."""
    (recipe,) = blocks(page("docs/what-a-run-leaves.md"), "python")
    names: dict[str, Any] = {"SFTTrainer": base}
    exec(recipe, names)
    (made,) = (thing for name, thing in names.items() if isinstance(thing, type) and name != "SFTTrainer")
    return made


def made_trainer(base: type[Trainer], out: Path, callback: STSCallback, **options: Any) -> Trainer:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    shared = tiny_arguments(
        out, max_steps=4, save_strategy="steps", save_steps=2, push_to_hub=True, hub_model_id="me/m", **options
    )
    if issubclass(base, SFTTrainer):
        data = Dataset.from_list(rows(20))
        made = of_page(base)(
            model=model, args=SFTConfig(**shared), train_dataset=data, processing_class=tokenizer, callbacks=[callback]
        )
    else:
        made = of_page(base)(
            model=model,
            args=TrainingArguments(**shared),
            train_dataset=tokenised(rows(20), tokenizer),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[callback],
        )
    return made


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The card in each upload; None for one without."""
    cards: list[str | None] = []

    class Hub:
        def create_repo(self, name: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path: str, **kwargs: Any) -> Future[None]:
            card = Path(folder_path) / "README.md"
            cards.append(card.read_text(encoding="utf-8") if card.exists() else None)
            uploaded: Future[None] = Future()
            uploaded.set_result(None)
            return uploaded

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    return cards


def made_callback() -> STSCallback:
    return STSCallback(sae=rotated_sae(), protect=["near"], domains=TINY_DOMAINS, probes=PROBES, max_overhead=None)


@pytest.mark.parametrize("base", [SFTTrainer, Trainer])
def test_with_the_recipe_the_pushed_card_has_the_section(base: type[Trainer], tmp_path: Path, pushed: list[str | None]) -> None:
    trainer = made_trainer(base, tmp_path, made_callback())
    trainer.train()
    n_in_training = len(pushed)
    trainer.push_to_hub()
    assert n_in_training >= 1 and len(pushed) == n_in_training + 1
    for card in pushed[:-1]:  # the plain trainer writes a card only when all is over
        assert (card is not None and card.count(BEGIN) == 1) == (base is SFTTrainer)
    last = pushed[-1]
    assert last is not None and last.count(BEGIN) == last.count(END) == 1
    assert "After 4 steps of training" in last
    assert ModelCard(last).data.library_name == "transformers"  # the trainer's own metadata is as before


def test_without_the_recipe_it_has_none(tmp_path: Path, pushed: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "of_page", lambda base: base)
    trainer = made_trainer(SFTTrainer, tmp_path, made_callback())
    trainer.train()
    put_into(tmp_path / "README.md", card_section(RunDirectory(tmp_path / "sts")))  # what an event of a callback could do
    trainer.push_to_hub()
    assert pushed[-1] is not None and BEGIN not in pushed[-1]


def test_a_card_that_cannot_be_had_stops_nothing(
    tmp_path: Path, pushed: list[str | None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sts_callback.report.card.build", lambda logged: 1 / 0)
    trainer = made_trainer(SFTTrainer, tmp_path, made_callback())
    trainer.train()
    trainer.push_to_hub()
    assert pushed[-1] is not None and BEGIN not in pushed[-1]
    assert "no section by sts-callback: division by zero" in caplog.text


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    written(RunDirectory(tmp_path / "sts"), whole_run())
    (tmp_path / "README.md").write_text("# Model\n")
    for is_first in (False, True):
        trainer: Any = SimpleNamespace(
            is_world_process_zero=lambda is_first=is_first: is_first, args=SimpleNamespace(output_dir=str(tmp_path))
        )
        add_to_card(trainer)
        assert (BEGIN in (tmp_path / "README.md").read_text()) == is_first
