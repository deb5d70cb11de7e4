"""Rows that cannot be used are left out and counted by reason; endless sources, failing templates, tokenizers of all kinds."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from pairs import read_pairs
from sts_callback import STSCallback
from sts_callback.config import ProbeConfig
from sts_callback.data import reader
from sts_callback.data.chat import text_tokenizer
from sts_callback.data.counts import RowsRead
from sts_callback.data.pairs import Row
from sts_callback.data.probes import ProbeSet, make_probe_set, make_row_set, uses_chat_template
from sts_callback.data.reader import STREAM_ROWS, RowReader, read_rows
from sts_callback.data.tokens import bos_tokens
from sts_callback.errors import ConfigError, DataError
from sts_callback.measure.monitor import Monitor
from sts_callback.measure.step_zero import StepZeroReference
from sts_callback.report.terminal.rows import rows_doubts, rows_table
from tiny import bos_tokenizer, rotated_sae, rows, tiny_model, tiny_tokenizer

CONFIG = ProbeConfig(n_queries=6, n_draws=2, n_features=8, n_domain_demonstrations=2)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + (m['content'] or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def tokenizer_with(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def said(row: dict[str, str], system: str | None = None) -> dict[str, Any]:
    begin = [{"role": "system", "content": system}] if system else []
    return {"messages": [*begin, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}


GOOD = [said(row) for row in rows(20)]


def made(some: Any, tokenizer: Any = None, **options: Any) -> ProbeSet:
    tokenizer = tokenizer or tokenizer_with()
    given = {"n_demonstrations": 2, "field": "train_data", **options}
    return make_probe_set("train", read_rows(some, "train_data"), tokenizer, CONFIG, **given)


def counted(odd: Row, tokenizer: Any = None) -> dict[str, int]:
    """Reasons with which one row is left out."""
    found = RowReader(tokenizer or tokenizer_with(), "train_data")
    assert list(found.examples([(0, odd)])) == []
    return dict(found.left_out)


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ODD: dict[str, tuple[Row, str]] = {
    "question alone": ({"messages": [USER]}, "nothing answers it"),
    "no message": ({"messages": []}, "nothing answers it"),
    "answer without content": ({"messages": [USER, {"role": "assistant", "content": None}]}, "its answer is empty"),
    "a message without role": ({"messages": [{"content": "q"}, ASSISTANT]}, "messages with role and content"),
    "a message that is a text": ({"messages": ["q", "a"]}, "messages with role and content"),
    "an image among the parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, ASSISTANT]},
        "content of type image",
    ),
    "audio among the parts": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "data": "x"}]}, ASSISTANT]},
        "content of type input_audio",
    ),
    "an image column": ({"prompt": "q", "completion": "a", "image": "1.png"}, "it holds image"),
    "videos beside tokens": ({"input_ids": [5, 6], "labels": [-100, 6], "videos": ["v.mp4"]}, "it holds videos"),
    "pixels beside tokens": ({"input_ids": [5, 6], "labels": [-100, 6], "pixel_values": np.ones((3, 2, 2))}, "it holds pixel"),
    "rejected": ({"prompt": "q", "completion": "a", "label": False}, "column label is false"),
    "rejected, numpy": ({"prompt": "q", "completion": "a", "label": np.bool_(False)}, "column label is false"),
    "nothing trained on": ({"input_ids": [5, 6], "labels": [-100, -100]}, "is trained on"),
    "padding alone": ({"input_ids": [0, 0], "attention_mask": [0, 0]}, "padding only"),
    "tools that are no JSON": ({"messages": [USER, ASSISTANT], "tools": "weather(city)"}, "tools: got 'weather"),
    "numbers": ({"prompt": 1, "completion": 2}, "allowed are texts"),
    "a text in place of a row": ("q", "a row is 'q'"),  # type: ignore[dict-item]
    "no columns": ({}, "fit no format"),
    "a text for token ids": ({"input_ids": "abc"}, "input_ids holds 'abc'; allowed are token ids"),
    "a token below 0": ({"input_ids": [5, -100], "labels": [-100, 6]}, "input_ids holds [5, -100]; allowed are token ids"),
    "half a token": ({"prompt_ids": [5, 0.5], "completion_ids": [6]}, "prompt_ids holds [5, 0.5]; allowed are token ids"),
    "lengths in words": ({"input_ids": [5, 6], "seq_lengths": "abc"}, "a row cannot be read (TypeError"),
    "numbers to prefer": ({"chosen": 5, "rejected": 6}, "a row cannot be read (TypeError"),
}


@pytest.mark.parametrize(("odd", "reason"), list(ODD.values()), ids=list(ODD))
def test_one_odd_row_is_left_out_and_counted(odd: Row, reason: str) -> None:
    (found,) = counted(odd)
    assert reason in found
    for place in (1, 5, 20):
        some = [*GOOD[:place], odd, *GOOD[place:]]
        read = make_probe_set("train", some, tokenizer_with(), ProbeConfig(n_queries=15), n_demonstrations=5, field="t").read
        assert read is not None and (read.n_read, read.n_used, read.left_out) == (21, 20, {found: 1})


def test_what_was_left_out_is_told_when_too_few_remain() -> None:
    with pytest.raises(DataError, match=r"^train_data: 3 usable rows, but .*Left out of 8 rows read: 3 x its ans.*; 2 x it hol"):
        made([*GOOD[:3], *[{"prompt": "q", "completion": ""}] * 3, *[{"prompt": "q", "completion": "a", "image": "x"}] * 2])


def test_of_a_thousand_reasons_the_first_are_told() -> None:
    with pytest.raises(DataError) as raised:
        made([*GOOD[:3], *[{"prompt": i, "completion": i} for i in range(1000)]])
    assert str(raised.value).count("allowed are texts") == 5
    assert str(raised.value).endswith("995 x other reasons.")


FAILING = {
    "a template that refuses": "{{ raise_exception('roles must alternate') }}",
    "a template with a mistake": "{{ messages[0]['content'] + 1 }}",
    "a template that is none": "{% for m in messages %}",
    "a template that divides by zero": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("template", list(FAILING.values()), ids=list(FAILING))
def test_a_template_that_fails_is_an_error_of_the_data_that_names_the_row(template: str) -> None:
    tokenizer = tokenizer_with(template)
    with pytest.raises(
        DataError, match=r"^train_data: the chat template fails \(.*The first such row that was read is number 0\.$"
    ):
        read_pairs(GOOD, tokenizer, "train_data")
    with pytest.raises(DataError, match="the chat template fails"):
        made(GOOD, tokenizer)


def test_a_template_that_fails_at_one_row_leaves_it_out() -> None:
    strict = "{% if messages[0]['content'] == 'q' %}{{ raise_exception('no q') }}{% endif %}" + CHATML
    assert len(made([*GOOD, {"messages": [USER, ASSISTANT]}], tokenizer_with(strict)).queries) == 6


# What a row may hold


def prompt_of(row: Row, tokenizer: Any = None) -> str:
    (pair,) = read_pairs([row], tokenizer or tokenizer_with(), "train_data")
    return str(pair.prompt)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "system": "Be kind."},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "Be kind."},
        {"prompt": [USER], "completion": [ASSISTANT], "system": "Be kind."},
        {"conversations": [{"from": "system", "value": "Be kind."}, USER, ASSISTANT], "system": "Be kind."},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [USER], "system": "Be kind."},
    ],
)
def test_a_system_prompt_in_a_column_of_its_own_stands_first_and_once(row: Row) -> None:
    assert prompt_of(row).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq")
    assert prompt_of(row).count("Be kind.") == 1


@pytest.mark.parametrize("system", [None, "", "  "])
def test_no_system_prompt_is_none(system: str | None) -> None:
    assert prompt_of({"messages": [USER, ASSISTANT], "system": system}) == prompt_of({"messages": [USER, ASSISTANT]})


@pytest.mark.parametrize("label", [0, 1, 2, None, "negative", 0.0])
def test_a_label_of_another_meaning_is_not_read_and_said(label: object) -> None:
    plain = [{**row, "label": label} for row in rows(20)]
    found = made(plain)
    assert found.queries == made(rows(20)).queries
    assert found.read is not None and found.read.unread == ("label",)


def test_a_call_of_a_tool_is_an_answer() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
    (pair,) = read_pairs([{"messages": [USER, call, {"role": "tool", "content": "rain"}, ASSISTANT]}], tokenizer_with(), "t")
    assert pair.answer == "<call>weather<|im_end|>\n"
    assert pair.rest == "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_reasoning_reaches_the_template(field: str) -> None:
    thinking = CHATML.replace("(m['content'] or '')", "('<think>' + (m.reasoning_content or '') + '</think>') + m['content']")
    (pair,) = read_pairs([{"messages": [USER, {**ASSISTANT, field: "hm"}]}], tokenizer_with(thinking), "t")
    assert pair.answer == "<think>hm</think>a<|im_end|>\n"


PARTS_ONLY = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.mark.parametrize("template", [CHATML, PARTS_ONLY, CHATML.replace("(m['content'] or '')", "m['content'] | string")])
def test_texts_and_parts_come_to_the_same(template: str) -> None:
    tokenizer = tokenizer_with(template)
    in_parts = {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (USER, ASSISTANT)]}
    assert read_pairs([in_parts], tokenizer, "t") == read_pairs([{"messages": [USER, ASSISTANT]}], tokenizer, "t")
    assert "q" in prompt_of(in_parts, tokenizer) and "'type'" not in prompt_of(in_parts, tokenizer)


@pytest.mark.parametrize("as_rows", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_rows_of_arrays_are_rows_of_lists(as_rows: Any) -> None:
    plain = [{"input_ids": [40 + i, 41, 42, 43], "completion_mask": [0, 0, 1, 1], "label": None} for i in range(9)]
    arrays = [{name: value and as_rows(value) for name, value in row.items()} for row in plain]
    assert made(arrays).queries == made(plain).queries
    assert made(arrays).fingerprint == made(plain).fingerprint


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_formatted_data_sets_are_plain_ones(form: str) -> None:
    data = Dataset.from_list(GOOD)
    assert made(data.with_format(form)) == made(data)


class LazyFrame:
    """As polars', of which nothing can be had before it is collected."""

    __module__ = "polars.lazyframe.frame"

    @property
    def columns(self) -> list[str]:
        raise AssertionError("polars warns that this is expensive")


class DataFrame(LazyFrame):
    """As polars': a row by its number is a table again, which prints itself over many lines."""

    __module__ = LazyFrame.__module__

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> DataFrame:
        return self

    def __repr__(self) -> str:
        return "shape: (9, 2)\n+--------+"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (lambda: Dataset.from_list(rows(9)).to_pandas(), r"a DataFrame of pandas; .*Dataset\.from_pandas\(table\)\.$"),
        (lambda: Dataset.from_list(rows(9)).data.table, r"a Table of pyarrow; .*table\.to_pylist\(\)\.$"),
        (DataFrame, r"a DataFrame of polars; .*Dataset\.from_polars\(table\)\.$"),
        (LazyFrame, r"a LazyFrame of polars; .*Dataset\.from_polars\(table\)\.$"),
    ],
    ids=["pandas", "pyarrow", "polars", "lazy polars"],
)
def test_a_table_is_refused_with_what_to_do(table: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"^train_data: got {said}"):
        read_rows(table(), "train_data")


def test_what_a_refused_table_is_to_be_made_into_is_read() -> None:
    table = Dataset.from_list(GOOD).data.table
    assert made(table.to_pylist()) == made(Dataset.from_pandas(table.to_pandas())) == made(GOOD)


# Sources without end


def endless() -> Iterator[Row]:
    for i in itertools.count():
        yield rows(1, seed=i)[0]


@pytest.mark.parametrize(
    "stream", [lambda: IterableDataset.from_generator(endless), endless], ids=["IterableDataset", "generator"]
)
def test_of_a_stream_the_first_rows_are_read_and_that_is_said(stream: Any) -> None:
    found = made(stream())
    assert found == made(stream())  # by seed
    assert found.read is not None and found.read.n_rows == STREAM_ROWS
    assert "its first 2,000 rows" in found.read.notes[0]


def test_a_short_stream_is_read_to_its_end() -> None:
    assert made(iter(rows(20))).queries == made(rows(20)).queries


def test_what_can_be_read_once_is_read_when_it_is_given() -> None:
    domain, train_data = endless(), iter(rows(20))
    STSCallback(sae=rotated_sae(), protect=["near"], domains={"near": domain}, train_data=train_data)
    assert next(domain) == rows(1, seed=STREAM_ROWS)[0]
    assert next(train_data, None) is None


def test_the_search_for_usable_rows_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MOST_READ", 50)
    with pytest.raises(DataError, match="Left out of 50 rows read: 50 x its answer is empty"):
        made([{"prompt": "q", "completion": ""}] * 1000)


# Tokenizers


def test_what_stands_in_front_is_what_the_tokenizer_puts_there() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.bos_token_id == 1 and bos_tokens(tokenizer) == ()
    assert bos_tokens(bos_tokenizer()) == (1,)


def test_a_start_of_two_tokens_is_cut_as_a_whole() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    ids = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A <eos>", special_tokens=[("[gMASK]", ids[0]), ("<sop>", ids[1]), ("<eos>", 2)]
    )
    assert bos_tokens(tokenizer) == tuple(ids)
    tokenizer.chat_template = "[gMASK]<sop>" + CHATML
    found = made(GOOD, tokenizer)
    assert set(ids).isdisjoint(token for q in found.queries for token in q.tokens)
    assert set(ids).isdisjoint(token for draw in found.demo_sets for token in draw)


@pytest.mark.parametrize("bos", ["<|im_start|>", "<bos>", None])
def test_a_marker_that_the_tokenizer_does_not_put_itself_stays(bos: str | None) -> None:
    tokenizer = tokenizer_with()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token = bos
    found = made(GOOD, tokenizer)
    assert all(tokenizer.decode(q.query).count("<|im_start|>") == 2 for q in found.queries)
    assert all(tokenizer.decode(draw).count("<|im_start|>") == 4 for draw in found.demo_sets)


class RendersItself(PreTrainedTokenizerFast):
    """As mistral-common's: no template, and conversations rendered all the same; it holds another tokenizer."""

    tokenizer = object()

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def test_a_tokenizer_that_renders_conversations_by_itself_is_told_by_name() -> None:
    tokenizer = RendersItself(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert text_tokenizer(tokenizer) is tokenizer
    with pytest.raises(
        DataError, match=r"RendersItself has no chat template but renders them by itself.*give rows that it has tok"
    ):
        made(GOOD, tokenizer)
    assert len(made(rows(20), tokenizer).queries) == 6


class Processor:
    def __init__(self, own: str | None, template: str | None) -> None:
        self.tokenizer, self.chat_template = tokenizer_with(own), template


def test_the_template_is_that_of_the_object_that_has_one() -> None:
    other = CHATML.replace("im_start", "begin")
    for own, template, wanted in ((None, CHATML, CHATML), (CHATML, None, CHATML), (other, CHATML, CHATML), (None, None, None)):
        processor = Processor(own, template)
        assert text_tokenizer(processor).chat_template == wanted  # type: ignore[arg-type]
        assert processor.tokenizer.chat_template == own  # left as it is


# Another day


def test_the_fingerprint_is_of_what_a_person_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    today, tomorrow = (_made_on(day, monkeypatch, GOOD) for day in (1, 2))
    assert today.queries != tomorrow.queries
    assert today.fingerprint == tomorrow.fingerprint
    fingerprints = {
        today.fingerprint,
        _made_on(1, monkeypatch, [said(row, "Be kind.") for row in rows(20)]).fingerprint,
        made(GOOD).fingerprint,  # another template
        made(GOOD, tokenizer_with(DATED), n_demonstrations=3).fingerprint,
        made([{**row, "chat_template_kwargs": {"loud": True}} for row in GOOD], tokenizer_with(DATED)).fingerprint,
    }
    assert len(fingerprints) == 5
    marked = tokenizer_with(DATED)
    marked.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})  # the same texts, other tokens
    assert made(GOOD, marked).fingerprint not in fingerprints


def _made_on(day: int, monkeypatch: pytest.MonkeyPatch, some: Any) -> ProbeSet:
    import datetime

    from transformers.utils import chat_template_utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime(2026, 3, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    return made(some, tokenizer_with(DATED))


def test_tokens_of_step_zero_come_back(tmp_path: Any) -> None:
    from sts_callback.measure.sae_reader import Reference

    kept = made([*GOOD, {"messages": []}])
    StepZeroReference("f", Reference(1.0, 1.0), {}, {"train": kept}).save(tmp_path / "b")
    (back,) = StepZeroReference.load(tmp_path / "b", "f").probes.values()
    assert back == kept
    assert back.fingerprint == kept.fingerprint


# Plain rows in the chat template


def monitor(train: Any, template: str | None = CHATML, **options: Any) -> Monitor:
    config = ProbeConfig(n_queries=6, n_draws=2, n_features=8, n_domain_demonstrations=2, **options)
    return Monitor(
        tiny_model("llama"), tokenizer_with(template), sae=rotated_sae(), train_data=train, domains={"near": NEAR}, config=config,
        progress=False,
    )  # fmt: skip


NEAR = [{"prompt": f"Q: {i}?\nA:", "completion": f" {i}."} for i in range(20)]
SHORT = [{"prompt": f"P: {i}?\nA:", "completion": f" {i}."} for i in range(20)]
TRAIN: dict[str, tuple[Any, bool]] = {
    "plain": (SHORT, False),
    "conversations": ([said(row) for row in SHORT], True),
    "text that was rendered": (
        [{"text": tokenizer_with().apply_chat_template(said(row)["messages"], tokenize=False)} for row in SHORT],
        True,
    ),
    "tokens": (
        [dict(tokenizer_with().apply_chat_template(said(row)["messages"], return_dict=True)) for row in SHORT],
        True,
    ),
    "mostly plain": ([*SHORT, *[said(row) for row in SHORT[:2]]], False),
}


@pytest.mark.parametrize(("train", "in_chat"), list(TRAIN.values()), ids=list(TRAIN))
@pytest.mark.parametrize("use", ["auto", "always", "never"])
def test_plain_rows_of_domains_are_asked_as_the_training_data_are(
    use: str, train: Any, in_chat: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "sts_callback"):
        made_monitor = monitor(train, chat_template=use)
    found = {made_monitor.tokenizer.decode(q.tokens) for q in made_monitor.domains["near"].queries}
    wanted = in_chat if use == "auto" else use == "always"
    assert all(("<|im_start|>user\nQ:" in text) == wanted for text in found)
    assert all("A:<|im_end|>\n<|im_start|>assistant\n" in text for text in found) == wanted
    assert ("in the chat template" in caplog.text) == wanted
    notes = made_monitor.reads[1].notes
    assert bool(notes) == wanted


def test_without_a_template_there_is_none_to_use() -> None:
    assert len(monitor(SHORT, template=None).train.queries) == 6
    with pytest.raises(ConfigError, match="chat_template: got 'always', but the tokenizer has none"):
        monitor(SHORT, template=None, chat_template="always")
    assert not uses_chat_template(made(SHORT, tokenizer_with(None)), tokenizer_with(None))


# Whole rows, and what is shown


def test_whole_rows_hold_all_turns() -> None:
    turns = [*said(rows(1)[0])["messages"], {"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
    texts, numbers = make_row_set("rows", [{"messages": []}, {"messages": turns}], tokenizer_with(), CONFIG, field="train_data")
    assert numbers == (1,)
    assert tokenizer_with().decode(texts.queries[0].query) == tokenizer_with().apply_chat_template(turns, tokenize=False)


def test_the_table_tells_each_source_its_reasons_and_what_is_not_read() -> None:
    train = RowsRead("train", 12_345, 80, 72, 3, {"its answer is empty": 7, "it holds images": 1}, ("id", "label"), ())
    law = RowsRead("law", 40, 40, 40, 0, {}, (), ("a stream, for which its first 40 rows stand",))
    shown = rows_table([train, law], colour=False)
    lines = [line.split() for line in shown.splitlines()]
    assert ["train", "12,345", "80", "72", "8", "3"] in lines
    assert ["law", "40", "40", "40", "0", "0"] in lines
    for said_of_it in (
        "train: 7 left out: its answer is empty",
        "train: columns not read: id, label",
        "law: a stream, for which",
    ):
        assert said_of_it in shown
    assert max(map(len, shown.splitlines())) <= 80
    many = {f"reason {i}": 9 - i for i in range(8)}
    assert "train: 9 left out: other reasons" in rows_table([RowsRead("train", 99, 99, 9, 0, many, (), ())], colour=False)


def test_json_lines_of_rows_read_like_the_rows() -> None:
    assert made(json.loads(json.dumps(GOOD))) == made(GOOD)


def test_without_the_table_cuts_reasons_and_what_several_sources_share_are_told_once() -> None:
    note = "plain rows are asked in the chat template"
    train = RowsRead("train", 99, 80, 72, 3, {"its answer is empty": 7}, (), ())
    law, code = (RowsRead(name, 40, 40, 40, n_cut, {}, (), (note,)) for name, n_cut in (("law", 0), ("code", 5)))
    lines = [line.strip() for line in rows_doubts([train, law, code], colour=False).splitlines()]
    assert lines == [
        "rows drawn as probes, cut to max_tokens: 3 of 72 of train, 5 of 40 of code",
        "train: 7 left out: its answer is empty",
        f"law, code: {note}",
    ]
    assert rows_doubts([RowsRead("train", 99, 80, 72, 0, {}, (), ())], colour=False) == ""


@pytest.mark.parametrize(
    ("prompt", "completion", "is_glued"),
    [
        ("What notice?", "No.", True),
        ("Sum", "mary", True),
        ("Answer:", "42", True),
        ("What notice?", " No.", False),
        ("What notice? ", "No.", False),
        ("Answer:", "\nNo.", False),
        ("[/INST]", "No.", False),
        ("多少", "三", False),
        ("What notice?", "¿No?", False),
    ],
)
def test_answers_that_follow_without_a_space_are_told(prompt: str, completion: str, is_glued: bool) -> None:
    def told(rows: list[dict[str, str]]) -> list[str]:
        found = make_probe_set("law", rows, tokenizer_with(), CONFIG, n_demonstrations=2, field="domains['law']").read
        assert found is not None
        return [note for note in found.notes if "without a space" in note]

    made = [{"prompt": f"{i} {prompt}", "completion": completion} for i in range(15)]
    assert len(told(made)) == is_glued
    assert told([{"prompt": "What notice?", "completion": " No."}] * 14 + made[:1]) == []  # one of ten, or none
