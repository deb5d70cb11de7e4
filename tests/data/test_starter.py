"""The shipped domains, and how names find them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sts_callback.config import DEFAULT_BUDGET
from sts_callback.data.reader import Source
from sts_callback.data.starter import choose_domains, starter_domains
from sts_callback.errors import ConfigError

SHIPPED = starter_domains()


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED[name].read_text(encoding="utf-8").splitlines()]


def test_protected_names_are_found_among_the_shipped_ones() -> None:
    assert choose_domains(["law", "code"], None) == (
        {"law": SHIPPED["law"], "code": SHIPPED["code"]},
        {"law": DEFAULT_BUDGET, "code": DEFAULT_BUDGET},
    )


def test_budgets_are_taken_as_given() -> None:
    assert choose_domains({"law": 0.05, "code": 0.5}, None)[1] == {"law": 0.05, "code": 0.5}


def test_own_domains_come_first_and_outrank_shipped_ones() -> None:
    own: dict[str, Source] = {"notes": "notes.jsonl", "law": [{"text": "Our law."}]}
    chosen, budgets = choose_domains(["code", "law"], own)
    assert list(chosen.items()) == [("notes", "notes.jsonl"), ("law", [{"text": "Our law."}]), ("code", SHIPPED["code"])]
    assert list(budgets) == ["code", "law"]
    assert list(own) == ["notes", "law"]  # the user's own mapping is as it was


def test_own_domains_may_go_unprotected() -> None:
    assert choose_domains([], {"notes": "notes.jsonl"}) == ({"notes": "notes.jsonl"}, {})


@pytest.mark.parametrize(("name", "near"), [("phisics", "physics"), ("translations", "translation"), ("note", "notes")])
def test_a_near_name_is_suggested(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"^protect: '{name}' is no domain; did you mean '{near}'\? Known are biology, "):
        choose_domains([name], {"notes": "notes.jsonl"})


def test_a_name_near_to_none_lists_all_and_says_how_to_add_one() -> None:
    known = ", ".join(sorted(SHIPPED))
    remedy = r"add your own with domains=\{'zzz': FILE\}\.$"
    with pytest.raises(ConfigError, match=rf"^protect: 'zzz' is no domain\. Known are {known}; {remedy}"):
        choose_domains({"law": 0.1, "zzz": 0.1}, None)


@pytest.mark.parametrize("protect", ["all", ["all"], {"all": DEFAULT_BUDGET}])
def test_all_stands_for_every_shipped_domain(protect: str | list[str] | dict[str, float]) -> None:
    chosen, budgets = choose_domains(protect, None)
    assert chosen == SHIPPED
    assert budgets == dict.fromkeys(SHIPPED, DEFAULT_BUDGET)


def test_a_name_beside_all_keeps_its_own_budget() -> None:
    own: dict[str, Source] = {"notes": "notes.jsonl"}
    chosen, budgets = choose_domains({"all": 0.2, "law": 0.05, "notes": 0.3}, own)
    assert set(chosen) == {*SHIPPED, "notes"}
    assert budgets == {**dict.fromkeys(SHIPPED, 0.2), "law": 0.05, "notes": 0.3}


def test_a_domain_of_ones_own_may_be_called_all() -> None:
    assert choose_domains(["all"], {"all": "notes.jsonl"}) == ({"all": "notes.jsonl"}, {"all": DEFAULT_BUDGET})


def test_a_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^protect: got 'law'; allowed is a list of names, such as \['law'\]"):
        choose_domains("law", None)


@pytest.mark.parametrize("domains", [None, {}])
def test_nothing_to_measure_is_refused(domains: dict[str, Path] | None) -> None:
    with pytest.raises(ConfigError, match=r"^protect: nothing to measure; name a domain to protect"):
        choose_domains([], domains)


CATEGORIES = (  # of MMLU-Pro
    "biology business chemistry computer_science economics engineering health history law math other philosophy physics "
    "psychology"
)
ENDS = {
    "chinese": "\n回答：",  # noqa: RUF001
    "german": "\nAntwort:",
    "safety": "\nAssistant:",
    "spanish": "\nRespuesta:",
    "translation": "\nFrench:",
}
PROMPTS = {"chinese": (15, 200), "long_documents": (1200, 2400)}
COMPLETIONS = {"chinese": (25, 300)}
N_WORDS = 12  # in a row, more than set phrases have


def test_the_shipped_domains_are_those_that_the_readme_names() -> None:
    others = "code everyday safety translation chinese german spanish long_documents"
    assert sorted(SHIPPED) == sorted([*CATEGORIES.split(), *others.split()])
    assert all(file.is_file() and file.stem == name for name, file in SHIPPED.items())


@pytest.mark.parametrize("name", SHIPPED)
def test_each_domain_has_enough_rows_for_demonstrations_and_queries(name: str) -> None:
    assert len(rows_of(name)) >= 60


@pytest.mark.parametrize("name", SHIPPED)
def test_each_row_is_a_prompt_that_asks_and_a_completion_that_answers(name: str) -> None:
    for row in rows_of(name):
        assert set(row) == {"prompt", "completion"}, row
        assert row["prompt"].endswith(ENDS.get(name, "\nAnswer:")), row
        assert row["completion"].startswith(" "), row
        assert row["completion"] == " " + row["completion"].strip(), row
        assert "\r" not in row["prompt"] + row["completion"], row


@pytest.mark.parametrize("name", SHIPPED)
def test_lengths_are_those_of_a_question_and_of_a_short_answer(name: str) -> None:
    (fewest, most), (shortest, longest) = PROMPTS.get(name, (40, 400)), COMPLETIONS.get(name, (20, 600))
    for row in rows_of(name):
        assert fewest <= len(row["prompt"]) <= most, row
        assert shortest <= len(row["completion"]) <= longest, row


def test_no_prompt_and_no_completion_occurs_twice_anywhere() -> None:
    for column in ("prompt", "completion"):
        texts = Counter(" ".join(row[column].lower().split()) for name in SHIPPED for row in rows_of(name))
        assert [text for text, n in texts.items() if n > 1] == []
        assert len(texts) >= len(SHIPPED) * 60


def test_no_two_domains_share_a_passage() -> None:
    seen: dict[tuple[str, ...], str] = {}
    for name in SHIPPED:
        for row in rows_of(name):
            for text in row.values():
                words = text.lower().split()
                for start in range(len(words) - N_WORDS + 1):
                    assert seen.setdefault(tuple(words[start : start + N_WORDS]), name) == name, row
