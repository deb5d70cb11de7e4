"""The shipped domains, and how names find them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sts_callback.config import DEFAULT_BUDGET
from sts_callback.domains.reader import Source
from sts_callback.domains.starter import choose_domains, starter_domains
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


@pytest.mark.parametrize(("name", "near"), [("medecine", "medicine"), ("translations", "translation"), ("note", "notes")])
def test_a_near_name_is_suggested(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"^protect: '{name}' is no domain; did you mean '{near}'\? Known are chemistry, "):
        choose_domains([name], {"notes": "notes.jsonl"})


def test_a_name_near_to_none_lists_all_and_says_how_to_add_one() -> None:
    known = ", ".join(sorted(SHIPPED))
    remedy = r"add your own with domains=\{'zzz': FILE\}\.$"
    with pytest.raises(ConfigError, match=rf"^protect: 'zzz' is no domain\. Known are {known}; {remedy}"):
        choose_domains({"law": 0.1, "zzz": 0.1}, None)


def test_a_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^protect: got the text 'law'; allowed is a list of names, such as \['law'\]"):
        choose_domains("law", None)


@pytest.mark.parametrize("domains", [None, {}])
def test_nothing_to_measure_is_refused(domains: dict[str, Path] | None) -> None:
    with pytest.raises(ConfigError, match=r"^protect: nothing to measure; name a domain to protect"):
        choose_domains([], domains)


def test_at_least_eight_domains_are_shipped() -> None:
    assert len(SHIPPED) >= 8
    assert all(file.is_file() and file.stem == name for name, file in SHIPPED.items())


@pytest.mark.parametrize("name", SHIPPED)
def test_each_domain_has_enough_rows_for_demonstrations_and_queries(name: str) -> None:
    assert len(rows_of(name)) >= 40


@pytest.mark.parametrize("name", SHIPPED)
def test_each_row_is_a_prompt_that_asks_and_a_completion_that_answers(name: str) -> None:
    end = "\nFrench:" if name == "translation" else "\nAnswer:"
    for row in rows_of(name):
        assert set(row) == {"prompt", "completion"}, row
        assert row["prompt"].endswith(end), row
        assert row["completion"].startswith(" "), row
        assert row["completion"] == " " + row["completion"].strip(), row
        assert "\r" not in row["prompt"] + row["completion"], row


@pytest.mark.parametrize("name", SHIPPED)
def test_lengths_are_those_of_a_question_and_of_a_short_answer(name: str) -> None:
    for row in rows_of(name):
        assert 40 <= len(row["prompt"]) <= 400, row
        assert 20 <= len(row["completion"]) <= 600, row


def test_no_prompt_and_no_completion_occurs_twice_anywhere() -> None:
    for column in ("prompt", "completion"):
        texts = Counter(" ".join(row[column].lower().split()) for name in SHIPPED for row in rows_of(name))
        assert [text for text, n in texts.items() if n > 1] == []
        assert len(texts) >= 8 * 40
