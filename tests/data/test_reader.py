"""The reader of the user's data: every format that TRL takes, to the same pairs, and an error that helps for all others."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from pairs import read_pairs
from sts_callback.data.pairs import Row, TextPair, TokenPair
from sts_callback.data.reader import are_prompts_only, read_rows
from sts_callback.errors import DataError
from tiny import tiny_tokenizer

pytestmark = pytest.mark.versions

CHATML = (
    "{% if tools %}{{ '<|tools|>' + tools[0]['function']['name'] + '\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROWS = [{"prompt": f"Q{i}?", "completion": f" A{i}."} for i in range(3)]
PAIRS = [TextPair(f"Q{i}?", f" A{i}.") for i in range(3)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from a user and an assistant in turn."""
    return [{"role": ASSISTANT if i % 2 else USER, "content": turn} for i, turn in enumerate(turns)]


def asked(*turns: str) -> str:
    """The same as ChatML, with the generation prompt at its end."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in said(*turns)) + "<|im_start|>assistant\n"


def answered(text: str) -> str:
    return f"{text}<|im_end|>\n"


TEXT_CASES: dict[str, tuple[Row, TextPair]] = {
    "text": ({"text": "All men are mortal."}, TextPair("All men are mortal.", None)),
    "prompt and completion": ({"prompt": "1 + 1 =", "completion": " 2"}, TextPair("1 + 1 =", " 2")),
    "preference": ({"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}, TextPair("1 + 1 =", " 2")),
    "preference, implicit prompt": (
        {"chosen": "The sky is blue.", "rejected": "The sky is red."},
        TextPair("The sky is", " blue."),
    ),
    "unpaired preference": ({"prompt": "1 + 1 =", "completion": " 2", "label": True}, TextPair("1 + 1 =", " 2")),
    "prompt and completion before text": ({"prompt": "a", "completion": "b", "text": "ab"}, TextPair("a", "b")),
    "text, prompt without answer": ({"prompt": "a", "text": "ab"}, TextPair("ab", None)),
    "prompt and solution": ({"prompt": "1 + 1 =", "solution": " 2"}, TextPair("1 + 1 =", " 2")),
    "prompt and answer": ({"prompt": "1 + 1 =", "answer": " 2", "ground_truth": 2}, TextPair("1 + 1 =", " 2")),
    "solution before answer": ({"prompt": "a", "answer": "2", "solution": "1 + 1 = 2"}, TextPair("a", "1 + 1 = 2")),
    "answer where there is no solution": ({"prompt": "a", "answer": "2", "solution": None}, TextPair("a", "2")),
    "completion before solution": ({"prompt": "a", "completion": "b", "solution": "c"}, TextPair("a", "b")),
    "other columns are ignored": ({"prompt": "a", "completion": "b", "id": 7, "source": "x"}, TextPair("a", "b")),
}
CHAT_CASES: dict[str, tuple[Row, TextPair]] = {
    "conversation and solution": ({"prompt": said("Hi"), "solution": "Ho"}, TextPair(asked("Hi"), answered("Ho"))),
    "messages": ({"messages": said("Hi", "Ho")}, TextPair(asked("Hi"), answered("Ho"))),
    "messages, several turns": ({"messages": said("a", "b", "c", "d")}, TextPair(asked("a"), answered("b"))),
    "messages, last question open": ({"messages": said("a", "b", "c")}, TextPair(asked("a"), answered("b"))),
    "messages before text": ({"messages": said("Hi", "Ho"), "text": "rendered"}, TextPair(asked("Hi"), answered("Ho"))),
    "prompt and completion": (
        {"prompt": said("Hi"), "completion": [{"role": ASSISTANT, "content": "Ho"}]},
        TextPair(asked("Hi"), answered("Ho")),
    ),
    "preference": (
        {"prompt": said("Hi"), "chosen": said("Hi", "Ho")[1:], "rejected": said("Hi", "Hm")[1:]},
        TextPair(asked("Hi"), answered("Ho")),
    ),
    "preference, implicit prompt": (
        {"chosen": said("a", "b", "c", "good"), "rejected": said("a", "b", "c", "bad")},
        TextPair(asked("a", "b", "c"), answered("good")),
    ),
    "unpaired preference": (
        {"prompt": said("Hi"), "completion": said("Hi", "Ho")[1:], "label": True},
        TextPair(asked("Hi"), answered("Ho")),
    ),
    "ShareGPT": (
        {"conversations": [{"from": USER, "value": "Hi"}, {"from": ASSISTANT, "value": "Ho"}]},
        TextPair(asked("Hi"), answered("Ho")),
    ),
    "ShareGPT, its own roles": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        TextPair(asked("Hi"), answered("Ho")),
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        TextPair(asked("Add.\n1 + 1"), answered("2")),
    ),
    "Alpaca, no input": ({"instruction": "Hi", "input": "", "output": "Ho"}, TextPair(asked("Hi"), answered("Ho"))),
    "Alpaca, with all else": (
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "Be kind."},
        TextPair("<|im_start|>system\nBe kind.<|im_end|>\n" + asked("a", "b", "c"), answered("d")),
    ),
    "system message": (
        {"messages": [{"role": SYSTEM, "content": "Be kind."}, *said("Hi", "Ho")]},
        TextPair("<|im_start|>system\nBe kind.<|im_end|>\n" + asked("Hi"), answered("Ho")),
    ),
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}


def _ids(cases: dict[str, Any]) -> dict[str, Any]:
    return {"argvalues": list(cases.values()), "ids": list(cases)}


@pytest.mark.parametrize(("row", "pair"), **_ids(TEXT_CASES))
def test_plain_formats(row: Row, pair: TextPair) -> None:
    assert read_pairs([row], tiny_tokenizer(), "train") == [pair]  # none needs a chat template


@pytest.mark.parametrize(("row", "pair"), **_ids(CHAT_CASES))
def test_conversational_formats(row: Row, pair: TextPair, tokenizer: PreTrainedTokenizerFast) -> None:
    assert read_pairs([copy.deepcopy(row)], tokenizer, "train") == [pair]


@pytest.mark.parametrize(("row", "_"), **_ids(TEXT_CASES | {f"{name}, chat": case for name, case in CHAT_CASES.items()}))
def test_rows_are_left_as_they_are(row: Row, _: TextPair, tokenizer: PreTrainedTokenizerFast) -> None:
    given = copy.deepcopy(row)
    before = copy.deepcopy(row)
    with contextlib.suppress(DataError):  # another test's affair
        read_pairs([given], tokenizer, "train")
    assert given == before


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "JSON text"])
def test_tools_reach_the_chat_template(tools: object, tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = read_pairs([{"messages": said("Hi", "Ho"), "tools": tools}], tokenizer, "train")
    assert pair == TextPair("<|tools|>weather\n" + asked("Hi"), answered("Ho"))


def test_options_for_the_chat_template_reach_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% if loud %}{{ '!' }}{% endif %}" + CHATML
    quiet, loud = {"messages": said("Hi", "Ho")}, {"messages": said("Hi", "Ho"), "chat_template_kwargs": {"loud": True}}
    assert [p.prompt for p in read_pairs([quiet, loud], tokenizer, "train")] == [asked("Hi"), "!" + asked("Hi")]


def test_rejected_answers_and_rows_without_text_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Row] = [
        {"prompt": "a", "completion": "bad", "label": False},
        {"prompt": said("a"), "completion": said("a", "bad")[1:], "label": False},
        {"prompt": "", "completion": "b"},
        {"prompt": "a", "completion": ""},
        {"text": ""},
        {"text": None},
        {"instruction": "a", "output": ""},
        {"instruction": "", "input": "", "output": "b"},
        {"prompt": "a", "completion": "good", "label": True},
    ]
    assert read_pairs(rows, tokenizer, "train") == [TextPair("a", "good")]


def test_a_row_whose_answer_is_null_is_left_out_and_not_taken_for_running_text() -> None:
    rows: list[Row] = [{"prompt": "Why?", "completion": None}, {"prompt": "a", "completion": "b"}]
    assert read_pairs(rows, tiny_tokenizer(), "train") == [TextPair("a", "b")]


TOKEN_CASES: dict[str, tuple[Row, list[TokenPair]]] = {
    "labels": ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, [TokenPair((5, 6), (7, 8))]),
    "no labels": ({"input_ids": [5, 6, 7]}, [TokenPair((5, 6, 7), None)]),
    "labels on all": ({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, [TokenPair((5, 6, 7), None)]),
    "labels on none": ({"input_ids": [5, 6], "labels": [-100, -100]}, []),
    "completion mask": ({"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}, [TokenPair((5, 6), (7, 8))]),
    "assistant masks": ({"input_ids": [5, 6, 7, 8], "assistant_masks": [0, 1, 1, 0]}, [TokenPair((5,), (6, 7))]),
    "mask of nothing": ({"input_ids": [5, 6], "completion_mask": [0, 0]}, []),
    "preference": ({"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}, [TokenPair((5, 6), (7,))]),
    "implicit prompt": ({"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]}, [TokenPair((5, 6), (7,))]),
    "implicit prompt, none": ({"chosen_ids": [5, 6], "rejected_ids": [7, 8]}, [TokenPair((5, 6), None)]),
    "implicit prompt, no answer": ({"chosen_ids": [5, 6], "rejected_ids": [5, 6, 8]}, []),
    "unpaired, good": ({"prompt_ids": [5], "completion_ids": [7, 8], "label": True}, [TokenPair((5,), (7, 8))]),
    "unpaired, bad": ({"prompt_ids": [5], "completion_ids": [7, 8], "label": False}, []),
    "no label": ({"prompt_ids": [5], "completion_ids": [7, 8]}, [TokenPair((5,), (7, 8))]),
    "no answer": ({"prompt_ids": [5], "completion_ids": []}, []),
    "nothing": ({"input_ids": []}, []),
}


@pytest.mark.parametrize(("row", "pairs"), **_ids(TOKEN_CASES))
def test_tokenised_rows(row: Row, pairs: list[TokenPair]) -> None:
    assert read_pairs([row], tiny_tokenizer(), "train") == pairs


def _state(tokenizer: PreTrainedTokenizerFast) -> tuple[object, ...]:
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.padding_side,
        tokenizer.truncation_side,
        copy.deepcopy(tokenizer.init_kwargs),
    )


def test_the_tokenizer_is_left_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    before = _state(tokenizer)
    rows = [row for row, _ in (*TEXT_CASES.values(), *CHAT_CASES.values())]
    rows = [copy.deepcopy(row) for row in rows if "human" not in str(row)]
    assert len(read_pairs(rows, tokenizer, "train")) == len(rows)
    assert _state(tokenizer) == before


@pytest.mark.parametrize(
    "alter",
    [
        lambda t: t.add_tokens(["<new>"]),
        lambda t: t.add_special_tokens({"pad_token": "<eos>"}),
        lambda t: setattr(t, "chat_template", None),
        lambda t: setattr(t, "padding_side", "left"),
        lambda t: t("abc", truncation=True, max_length=2),
    ],
    ids=["token", "pad", "template", "side", "truncation"],
)
def test_the_check_on_the_tokenizer_can_fail(alter: Callable[[Any], object], tokenizer: PreTrainedTokenizerFast) -> None:
    before = _state(tokenizer)
    alter(tokenizer)
    assert _state(tokenizer) != before


# Where rows come from


def _json_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


File = Callable[[str, str], Path]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files(name: str, kind: type, file: File) -> None:
    path = file(name, json.dumps(ROWS) if name.endswith(".json") else _json_lines(ROWS))
    assert read_pairs(read_rows(kind(path), "train"), tiny_tokenizer(), "train") == PAIRS


def test_blank_lines_are_skipped_and_texts_are_utf_8(file: File) -> None:
    text = '\n{"text": "né à Liège"}\n\n   \n{"text": "日本"}'
    assert read_rows(file("rows.jsonl", text), "train") == [{"text": "né à Liège"}, {"text": "日本"}]


@pytest.mark.parametrize(
    "source",
    [Dataset.from_list(ROWS), ROWS, tuple(ROWS), (row for row in list(ROWS)), Dataset.from_list(ROWS).to_iterable_dataset()],
    ids=["Dataset", "list", "tuple", "generator", "IterableDataset"],
)
def test_rows_in_memory(source: Any) -> None:
    rows = read_rows(source, "train")
    assert len(rows) == 3
    assert rows[1] == ROWS[1]
    assert read_pairs(rows, tiny_tokenizer(), "train") == PAIRS


def test_conversations_in_a_dataset(tokenizer: PreTrainedTokenizerFast) -> None:
    shared = {"conversations": [{"from": USER, "value": "Hi"}, {"from": ASSISTANT, "value": "Ho"}]}
    for row in ({"messages": said("Hi", "Ho")}, shared):
        rows = read_rows(Dataset.from_list([row, row]), "train")
        assert read_pairs(rows, tokenizer, "train") == [TextPair(asked("Hi"), answered("Ho"))] * 2


def test_a_data_set_is_not_read_as_a_whole() -> None:
    data = Dataset.from_list(ROWS)
    assert read_rows(data, "train") is data


# What cannot be read


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^domains\['law'\]: there is no file .*law\.jsonl; give JSON lines \(.jsonl, .jsonl.gz\)"
    ):
        read_rows(tmp_path / "law.jsonl", "domains['law']")
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path, "train")  # a folder


@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz", "e.json"])
def test_empty_file(name: str, file: File) -> None:
    path = file(name, "[]" if name.endswith(".json") else "\n")
    with pytest.raises(DataError, match=rf"^train: there are no rows in .*{name}; give at least"):
        read_rows(path, "train")


@pytest.mark.parametrize(
    ("source", "kind"),
    [([], "list"), (iter([]), "list_iterator"), (Dataset.from_list([]), "Dataset")],
    ids=["list", "iterator", "Dataset"],
)
def test_no_rows_in_memory(source: Any, kind: str) -> None:
    with pytest.raises(DataError, match=rf"^train: there are no rows in {kind}; give at least"):
        read_rows(source, "train")


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_line_that_is_not_json_is_numbered(name: str, file: File) -> None:
    path = file(name, '{"text": "a"}\n\n{"text": "b"}\n{"text": \n{"text": "c"}\n')
    with pytest.raises(DataError, match=rf"^train: .*{name}, line 4 is not JSON \("):
        read_rows(path, "train")


@pytest.mark.parametrize("text", ["", "{", '{"text": "a"}\n{"text": "b"}\n'], ids=["empty", "cut", "JSON lines"])
def test_a_json_file_that_is_not_json(text: str, file: File) -> None:
    with pytest.raises(DataError, match=r"^train: .*bad\.json"):
        read_rows(file("bad.json", text), "train")


@pytest.mark.parametrize(
    ("name", "text"), [("bad.jsonl", '"a text"\n'), ("bad.jsonl", "[1]\n"), ("bad.json", '["a"]'), ("bad.json", '{"data": []}')]
)
def test_a_file_must_hold_one_object_a_row(name: str, text: str, file: File) -> None:
    with pytest.raises(DataError, match=rf"^train: .*{name} must hold one JSON object a row with columns text; messages or"):
        read_rows(file(name, text), "train")


@pytest.mark.parametrize("source", [5, None, {"prompt": ["a"], "completion": ["b"]}], ids=["number", "None", "columns"])
def test_what_holds_no_rows_is_refused(source: Any) -> None:
    kind = type(source).__name__
    with pytest.raises(DataError, match=rf"^train: got {kind}; allowed are a file, a datasets\.Dataset or a list of rows\.$"):
        read_rows(source, "train")


def _refused(rows: Sequence[Row], match: str, chat_template: str | None = CHATML) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(DataError, match=match):
        read_pairs(rows, tokenizer, "train")


def test_unknown_columns() -> None:
    _refused([{"question": "a", "reply": "b"}], r"^train: columns \['question', 'reply'\] fit no format; allowed are text; mess")


@pytest.mark.parametrize("history", [["a"], "a", [[1, 2]]])
def test_alpaca_rows_that_hold_no_texts(history: Any) -> None:
    _refused([{"instruction": "a", "output": "b", "history": history}], "allowed are texts, in history pairs of them")


def test_prompts_without_answers() -> None:
    _refused(
        [{"prompt": "a", "id": 1}], r"^train: the rows have prompts but no answers \(columns \['id', 'prompt'\]\); add a comp"
    )
    _refused([{"prompt": said("a")}], "prompts but no answers")
    _refused([{"prompt": "a", "answer": 2}], "prompts but no answers")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, True),
        ({"prompt": "a", "id": 1, "answer": 2}, True),
        ({"prompt": "a", "solution": None}, True),
        ({"prompt": "a", "solution": "b"}, False),
        ({"prompt": "a", "completion": "b"}, False),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, False),
        ({"prompt": "a", "text": "ab"}, False),
        ({"prompt": "a", "input_ids": [1]}, False),
        ({"messages": []}, False),
        ({"question": "a"}, False),
    ],
)
def test_whether_rows_are_prompts_alone(row: Row, expected: bool) -> None:
    assert are_prompts_only([row, {"text": "of no account"}]) == expected


@pytest.mark.parametrize("source", [[], "train.jsonl", Path("train.jsonl")])
def test_no_rows_are_no_prompts(source: Any) -> None:
    assert not are_prompts_only(source)


def test_rows_whose_reference_answer_is_missing_are_left_out() -> None:
    rows = [{"prompt": "a", "solution": None}, {"prompt": "b", "solution": ""}, {"prompt": "c", "solution": "d"}]
    assert read_pairs(rows, tiny_tokenizer(), "train") == [TextPair("c", "d")]


@pytest.mark.parametrize(
    "messages",
    [said("Hi"), [], said("Hi", "Ho")[1:], [{"role": SYSTEM, "content": "Be kind."}, {"role": ASSISTANT, "content": "Ho"}]],
    ids=["question only", "empty", "answer only", "system and answer"],
)
def test_a_conversation_in_which_nothing_is_answered(messages: list[dict[str, str]]) -> None:
    _refused([{"messages": messages}], "^train: a conversation has no assistant message after a user's; nothing answers it")


def test_a_conversation_without_a_chat_template() -> None:
    remedy = r"^train: the rows are conversations, but the tokenizer has no chat template; set tokenizer\.chat_template"
    _refused([{"messages": said("Hi", "Ho")}], remedy, chat_template=None)
    _refused([{"prompt": said("a"), "chosen": said("a", "b")[1:], "rejected": said("a", "c")[1:]}], remedy, chat_template=None)


def test_an_implicit_preference_without_text_is_left_out() -> None:
    rows = [{"chosen": "", "rejected": "b"}, {"chosen": "x a", "rejected": "x b"}]
    assert read_pairs(rows, tiny_tokenizer(), "train") == [TextPair("x", " a")]
