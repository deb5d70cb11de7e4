"""The shipped domains, and how names find them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trl

from sts_callback.config import DEFAULT_BUDGET, ProbeConfig
from sts_callback.data.pairs import TextPair
from sts_callback.data.probes import make_probe_set
from sts_callback.data.reader import RowReader, Source
from sts_callback.data.starter import choose_domains, starter_domains
from sts_callback.errors import ConfigError
from tiny import tiny_tokenizer

SHIPPED = starter_domains()


def rows_of(name: str) -> list[dict[str, Any]]:
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
    remedy = r"add your own with domains=\{'zzz': FILE\}, in a shell with --domain zzz=FILE\.$"
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
    "tool_calls": "\nCall:",
    "translation": "\nFrench:",
}
PROMPTS = {"chinese": (15, 200), "long_documents": (1200, 2400), "tool_calls": (200, 1200)}
COMPLETIONS = {"chinese": (25, 300)}
CHATS = ("thinking", "tool_calls")  # templates have a form of their own for these
N_WORDS = 12  # in a row, more than set phrases have


def test_the_shipped_domains_are_those_that_the_readme_names() -> None:
    others = "code everyday safety translation chinese german spanish long_documents thinking tool_calls"
    assert sorted(SHIPPED) == sorted([*CATEGORIES.split(), *others.split()])
    assert all(file.is_file() and file.stem == name for name, file in SHIPPED.items())


@pytest.mark.parametrize("name", SHIPPED)
def test_each_domain_has_enough_rows_for_demonstrations_and_queries(name: str) -> None:
    assert len(rows_of(name)) >= 60


@pytest.mark.parametrize("name", SHIPPED)
def test_each_row_is_a_prompt_that_asks_and_a_completion_that_answers(name: str) -> None:
    for row in rows_of(name):
        assert set(row) == {"prompt", "completion", *(["chat"] if name in CHATS else [])}, row
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
            for column in ("prompt", "completion"):
                words = row[column].lower().split()
                for start in range(len(words) - N_WORDS + 1):
                    assert seen.setdefault(tuple(words[start : start + N_WORDS]), name) == name, row


def test_reasoning_is_the_same_as_text_and_in_a_chat() -> None:
    for row in rows_of("thinking"):
        question, answer = row["chat"]["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert row["prompt"] == f"Question: {question['content']}\nAnswer:"
        assert row["completion"] == f" <think>\n{answer['reasoning_content']}\n</think>\n\n{answer['content']}"
        assert answer["thinking"] == answer["reasoning_content"]  # the name of it in some templates
        assert row["chat"]["chat_template_kwargs"] == {"enable_thinking": True, "thinking": True}


def call_of(row: dict[str, Any]) -> dict[str, Any]:
    """The call in a row; a ValueError if it is not one, or none of the tools in the prompt."""
    tools = json.loads(row["prompt"].removeprefix("Tools: ").partition("\nUser: ")[0])
    call: dict[str, Any] = json.loads(row["completion"])
    found = next((tool["parameters"] for tool in tools if tool["name"] == call["name"]), None)
    if found is None:
        raise ValueError(f"no tool is called {call['name']}")
    given, known = set(call["arguments"]), found["properties"]
    if not set(found["required"]) <= given <= set(known):
        raise ValueError(f"{call['name']} takes {sorted(known)}, of these surely {found['required']}, not {sorted(given)}")
    for name, value in call["arguments"].items():
        require_value(name, value, known[name])
    return call


def require_value(name: str, value: object, schema: dict[str, Any]) -> None:
    """Raise a ValueError if a value does not fit the schema of an argument."""
    kinds: dict[str, tuple[type, ...]] = {
        "string": (str,),
        "integer": (int,),
        "number": (int, float),
        "boolean": (bool,),
        "array": (list,),
        "object": (dict,),
    }
    fits = isinstance(value, kinds[schema["type"]]) and isinstance(value, bool) == (schema["type"] == "boolean")
    if not fits or value not in schema.get("enum", [value]):
        raise ValueError(f"{name} is {schema}, not {value!r}")
    for one in value if isinstance(value, list) else ():
        require_value(name, one, schema["items"])


def test_each_call_is_json_and_one_of_its_tools_with_arguments_that_fit() -> None:
    for row in rows_of("tool_calls"):
        call = call_of(row)
        question, answer = row["chat"]["messages"]
        (made,) = answer["tool_calls"]
        tools = [tool["function"] for tool in row["chat"]["tools"]]
        assert row["prompt"] == f"Tools: {json.dumps(tools)}\nUser: {question['content']}\nCall:"
        assert made["function"] == call
        assert re.fullmatch("[a-z0-9]{9}", made["id"])  # Mistral's templates take no other


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (' {"name": "set_timer", "arguments": {"seconds": 5}', "Expecting"),
        (" set_timer(seconds=5)", "Expecting"),
        (' {"name": "set_clock", "arguments": {"seconds": 5}}', "no tool is called set_clock"),
        (' {"name": "set_timer", "arguments": {"minutes": 5}}', "set_timer takes"),
        (' {"name": "set_timer", "arguments": {"seconds": 5, "loud": true}}', "set_timer takes"),
        (' {"name": "set_timer", "arguments": {"seconds": "5"}}', "seconds is"),
        (' {"name": "set_timer", "arguments": {"seconds": true}}', "seconds is"),
        (' {"name": "set_alarm", "arguments": {"time": "06:45", "days": [1]}}', "days is"),
    ],
)
def test_a_wrong_call_would_be_found(completion: str, reason: str) -> None:
    row = next(row for row in rows_of("tool_calls") if '"name": "set_timer"' in row["completion"])
    call_of(row)
    with pytest.raises(ValueError, match=reason):
        call_of({**row, "completion": completion})


def in_template(name: str, template: str | None, *, as_chat: bool = True) -> list[TextPair]:
    """All rows of a domain as they are asked with a template of TRL's, by its file."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template and (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    examples = RowReader(tokenizer, name, as_chat=as_chat).examples(enumerate(rows_of(name)))
    return [example.pair for example in examples if isinstance(example.pair, TextPair)]


TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize(
    ("template", "before", "opening", "closing"),
    [
        ("qwen3", "<|im_start|>assistant\n", "<think>\n", "\n</think>\n\n"),
        (
            "gptoss",
            "<|start|>assistant",
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<think>\n", "\n</think>\n\n"),  # knows no thinking
        ("deepseekv3", "<｜Assistant｜><think>\n", "", "\n</think>\n\n"),  # noqa: RUF001 - writes the opening itself, and cuts reasoning off
    ],
)
def test_thinking_is_asked_with_the_templates_opening(template: str, before: str, opening: str, closing: str) -> None:
    pairs = in_template("thinking", template)
    assert len(pairs) == len(rows_of("thinking"))
    for pair, row in zip(pairs, rows_of("thinking"), strict=True):
        said = row["chat"]["messages"][1]
        assert pair.prompt.endswith(before), pair
        assert pair.answer is not None and pair.answer.startswith(opening + said["thinking"] + closing + said["content"]), pair


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_thinking_is_switched_on_where_the_template_has_a_switch(switch: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + (m.reasoning_content or '' if SWITCH else '') + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ).replace("SWITCH", switch)
    reader = RowReader(tokenizer, "thinking", as_chat=True)
    for example, row in zip(reader.examples(enumerate(rows_of("thinking"))), rows_of("thinking"), strict=True):
        said = row["chat"]["messages"][1]
        assert example.pair.answer == said["reasoning_content"] + said["content"]
    assert reader.n_in_part == 0


@pytest.mark.parametrize(("template", "opening"), [("qwen3", "<tool_call>\n{"), ("llama3_1", "{")])
def test_calls_are_asked_in_the_templates_form(template: str, opening: str) -> None:
    for pair, row in zip(in_template("tool_calls", template), rows_of("tool_calls"), strict=True):
        assert pair.answer is not None and pair.answer.startswith(opening), pair
        assert json.loads(row["completion"])["name"] in pair.answer
        assert not pair.prompt.endswith("Call:") and row["chat"]["tools"][0]["function"]["description"] in pair.prompt


@pytest.mark.parametrize(("name", "template"), [("tool_calls", "llama3"), ("tool_calls", "gemma3"), ("thinking", "llama3")])
def test_a_template_without_the_form_is_asked_in_plain_text_and_that_is_said(name: str, template: str) -> None:
    for pair, row in zip(in_template(name, template), rows_of(name), strict=True):
        assert row["prompt"] in pair.prompt and (pair.answer or "").startswith(row["completion"].strip())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    made = make_probe_set(name, rows_of(name), tokenizer, ProbeConfig(), n_demonstrations=5, field=name, as_chat=True)
    assert made.read is not None
    (note,) = (note for note in made.read.notes if note.startswith("the chat template leaves out"))
    assert f"of {made.read.n_read} of {made.read.n_read} rows; they are asked as plain text in it" in note


@pytest.mark.parametrize("name", CHATS)
def test_without_a_template_rows_are_plain_text_and_that_is_said(name: str) -> None:
    expected = [TextPair(row["prompt"], row["completion"]) for row in rows_of(name)]
    assert in_template(name, None, as_chat=False) == in_template(name, "qwen3", as_chat=False) == expected
    made = make_probe_set(name, rows_of(name), tiny_tokenizer(), ProbeConfig(), n_demonstrations=5, field=name)
    assert made.read is not None and made.read.unread == ()
    (note,) = made.read.notes
    assert note.startswith("asked as plain text, as the training data are")
