"""The same rows in every form that trainers hand on, packed or padded, under many templates, are the same queries and answers."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from sts_callback.config import ProbeConfig
from sts_callback.data.pairs import Row
from sts_callback.data.probes import ProbeSet, make_probe_set
from sts_callback.data.reader import read_rows
from tiny import bos_tokenizer, rows, tiny_arguments, tiny_model, tiny_tokenizer

N_ROWS, N_DEMONSTRATIONS = 12, 2
ROWS = rows(N_ROWS, "poems")
ROWS = [{**row, "completion": row["completion"] + "y" * i} for i, row in enumerate(ROWS)]  # of several lengths
EVERYTHING = ProbeConfig(n_queries=N_ROWS - N_DEMONSTRATIONS, n_draws=2, max_tokens=400)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "plain": None,
    "ChatML": CHATML,
    "Llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m['role'] + '<|/h|>\\n\\n' + m['content'] | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}"
    ),
    "Mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "thinking": CHATML.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}"),
    "dated": "{{ 'Today: ' + strftime_now('%Y') + '\\n' }}" + CHATML,
}


@functools.cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = bos_tokenizer() if template in ("Llama", "Mistral") else tiny_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def said(row: dict[str, str]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [{"role": "user", "content": row["prompt"]}], [{"role": "assistant", "content": row["completion"]}]


def in_words(template: str) -> list[Row]:
    """Prompt and completion, plain, with the end that a trainer puts, or as messages."""
    if template == "plain":
        return [{"prompt": row["prompt"], "completion": row["completion"] + "<eos>"} for row in ROWS]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in map(said, ROWS)]


def in_tokens(template: str) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer ids as a trainer makes them, written here once more: a text's own start, then text or template."""
    tokenizer = tokenizer_of(template)
    made = []
    for row in in_words(template):
        if template == "plain":
            asked, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        else:
            asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        n = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        made.append((whole[:n], whole[n:]))
    return made


def probes(some: Any, template: str, n_demonstrations: int = N_DEMONSTRATIONS) -> ProbeSet:
    found = read_rows(some, "train")
    return make_probe_set("train", found, tokenizer_of(template), EVERYTHING, n_demonstrations=n_demonstrations, field="train")


def asked(found: ProbeSet) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(query.query, query.answer) for query in found.queries}


@functools.cache
def wanted(template: str) -> frozenset[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All examples, by two draws of which each leaves out some for demonstrations."""
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    some = in_words(template)
    for begin in (0, N_DEMONSTRATIONS):
        found |= asked(probes(some[begin:] + some[:begin], template))
    assert len(found) == N_ROWS
    return frozenset(found)


# What trainers and frameworks hand on, imitated by hand


Form = Callable[[Sequence[tuple[list[int], list[int]]]], list[Row]]


def labelled(pairs: Sequence[tuple[list[int], list[int]]]) -> list[Row]:
    return [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in pairs]


def padded(pairs: Sequence[tuple[list[int], list[int]]], side: str, mask: bool = True, pad: int = 0) -> list[Row]:
    longest, made = max(len(p + a) for p, a in pairs) + 3, []
    for p, a in pairs:
        n = longest - len(p + a)

        def both(values: list[int], filler: int, n: int = n) -> list[int]:
            return [filler] * n + values if side == "left" else values + [filler] * n

        row = {"input_ids": both(p + a, pad), "labels": both([-100] * len(p) + a, -100)}
        made.append({**row, **({"attention_mask": both([1] * len(p + a), 0)} if mask else {})})
    return made  # type: ignore[return-value]


def packed(pairs: Sequence[tuple[list[int], list[int]]], told_by: str, n: int = 3, n_pad: int = 0) -> list[Row]:
    made: list[Row] = []
    for begin in range(0, len(pairs), n):
        texts = labelled(pairs[begin : begin + n])
        lengths = [len(text["input_ids"]) for text in texts]
        ids = [token for text in texts for token in text["input_ids"]] + [0] * n_pad
        labels = [token for text in texts for token in text["labels"]] + [-100] * n_pad
        columns: dict[str, list[int]] = {
            "seq_lengths": lengths,
            "position_ids": [i for length in lengths for i in range(length)] + [0] * n_pad,
            "attention_mask": [i for i, length in enumerate(lengths, 1) for _ in range(length)] + [0] * n_pad,
            "seq_idx": [i for i, length in enumerate(lengths) for _ in range(length)] + [len(lengths)] * n_pad,
            "cu_seqlens": [sum(lengths[:i]) for i in range(len(lengths) + 1)],
        }
        made.append({"input_ids": ids, "labels": labels, told_by: columns[told_by]})
    return made


def masked(pairs: Sequence[tuple[list[int], list[int]]], name: str) -> list[Row]:
    return [{"input_ids": p + a, name: [0] * len(p) + [1] * len(a)} for p, a in pairs]


FORMS: dict[str, Form] = {
    "labels": labelled,
    "completion mask": lambda pairs: masked(pairs, "completion_mask"),
    "assistant masks": lambda pairs: masked(pairs, "assistant_masks"),
    "both masks": lambda pairs: [
        {**row, "assistant_masks": [1] * len(row["completion_mask"])} for row in masked(pairs, "completion_mask")
    ],
    "padded right": lambda pairs: padded(pairs, "right"),
    "padded left": lambda pairs: padded(pairs, "left"),
    "padded right, no mask": lambda pairs: padded(pairs, "right", mask=False),
    "padded left, no mask": lambda pairs: padded(pairs, "left", mask=False),
    "padded with EOS": lambda pairs: padded(pairs, "right", pad=2),
    "packed, seq_lengths": lambda pairs: packed(pairs, "seq_lengths"),
    "packed, position_ids": lambda pairs: packed(pairs, "position_ids"),
    "packed, position_ids, padded": lambda pairs: packed(pairs, "position_ids", n_pad=5),
    "packed, numbered mask": lambda pairs: packed(pairs, "attention_mask"),
    "packed, numbered mask, padded": lambda pairs: packed(pairs, "attention_mask", n_pad=5),
    "packed, seq_idx": lambda pairs: packed(pairs, "seq_idx"),
    "packed, cu_seqlens": lambda pairs: packed(pairs, "cu_seqlens", n_pad=5),
    "packed, rows of rows": lambda pairs: [labelled(pairs[i : i + 3]) for i in range(0, len(pairs), 3)],  # type: ignore[misc]
    "torch": lambda pairs: Dataset.from_list(padded(pairs, "right")).with_format("torch"),  # type: ignore[arg-type]
    "numpy": lambda pairs: Dataset.from_list(packed(pairs, "seq_lengths")).with_format("numpy"),  # type: ignore[arg-type]
    "pandas": lambda pairs: Dataset.from_list(labelled(pairs)).with_format("pandas"),  # type: ignore[arg-type]
    "rows of tensors": lambda pairs: [{k: torch.tensor([v]) for k, v in row.items()} for row in labelled(pairs)],
    "DPO": lambda pairs: [{"prompt_ids": p, "chosen_ids": a, "rejected_ids": [5]} for p, a in pairs],
    "KTO": lambda pairs: [{"prompt_ids": p, "completion_ids": a, "label": True} for p, a in pairs],
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_the_rows_that_they_were_made_of(form: str, template: str) -> None:
    found = probes(FORMS[form](in_tokens(template)), template)
    assert asked(found) <= wanted(template)
    assert len(asked(found)) == N_ROWS - N_DEMONSTRATIONS


def unmasked(template: str) -> list[Row]:
    """Trained on from beginning to end, with what the row says in words beside its tokens."""
    return [
        {"input_ids": p + a, "labels": p + a, **words}
        for (p, a), words in zip(in_tokens(template), in_words(template), strict=True)
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_words_beside_tokens_tell_where_the_answer_begins(template: str) -> None:
    assert asked(probes(unmasked(template), template)) <= wanted(template)
    framed = [  # by a framework that puts a frame of its own around the same words
        {**row, "input_ids": [40, 41, *row["input_ids"]], "labels": [40, 41, *row["labels"]]} for row in unmasked(template)
    ]
    answers = {answer for _, answer in wanted(template)}
    assert {query.answer for query in probes(framed, template).queries} <= answers


CONVERSATIONS: dict[str, Callable[[list[Any], list[Any]], Row]] = {
    "messages": lambda p, a: {"messages": p + a},
    "messages with nulls": lambda p, a: {"messages": [{**m, "tool_calls": None, "name": None} for m in p + a]},
    "messages in parts": lambda p, a: {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in p + a]},
    "ShareGPT": lambda p, a: {
        "conversations": [{"from": "human", "value": p[0]["content"]}, {"from": "gpt", "value": a[0]["content"]}]
    },
    "preference": lambda p, a: {"prompt": p, "chosen": a, "rejected": [{"role": "assistant", "content": "No."}]},
    "implicit preference": lambda p, a: {"chosen": p + a, "rejected": [*p, {"role": "assistant", "content": "No."}]},
    "UltraFeedback": lambda p, a: {
        "prompt": p[0]["content"],
        "chosen": p + a,
        "rejected": [*p, {"role": "assistant", "content": "No."}],
    },
    "unpaired preference": lambda p, a: {"prompt": p, "completion": a, "label": True},
    "prompt and solution": lambda p, a: {"prompt": p, "solution": a[0]["content"]},
    "tools that are none": lambda p, a: {"messages": p + a, "tools": "[]"},
}


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_are_prompts_and_completions(form: str, template: str) -> None:
    some = [CONVERSATIONS[form](*said(row)) for row in ROWS]
    assert asked(probes(some, template)) <= wanted(template)
    assert asked(probes(json.loads(json.dumps(some)), template)) == asked(probes(some, template))


# What real trainers make of them


def sft(words: list[Row], template: str, out: Path, **options: Any) -> Dataset:
    arguments = SFTConfig(**tiny_arguments(out), **{"max_length": 400, "shuffle_dataset": False, **options})
    made = SFTTrainer(tiny_model(), arguments, train_dataset=Dataset.from_list([*words]), processing_class=tokenizer_of(template))
    return made.train_dataset


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"completion_only_loss": False},
        {"packing": True, "padding_free": False},
        {"packing": True, "packing_strategy": "bfd_split", "max_length": 300},
    ],
    ids=["plain", "full loss", "packed", "packed, split"],
)
@pytest.mark.parametrize("template", ["plain", "ChatML", "Mistral"])
def test_what_sft_trains_on(template: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = sft(in_words(template), template, tmp_path, **options)
    assert asked(probes(data, template)) <= wanted(template)


@pytest.mark.parametrize("template", ["plain", "ChatML", "Mistral"])
def test_rows_that_packing_has_cut_anywhere(template: str, tmp_path: Path) -> None:
    data = sft(in_words(template) * 3, template, tmp_path, packing=True, packing_strategy="wrapped", max_length=190)
    for query, answer in asked(probes(data, template)):  # a prompt may lack its beginning, an answer its end
        whole = query + answer  # what holds nothing but the end of an answer cannot be told from running text
        assert any(
            (q[-len(query) :] == query and a[: len(answer)] == answer) or a[-len(whole) :] == whole for q, a in wanted(template)
        )


@pytest.mark.parametrize("template", ["ChatML", "thinking"])
def test_what_sft_trains_on_of_conversations(template: str, tmp_path: Path) -> None:
    turns = [p + a for p, a in map(said, ROWS)]
    data = sft([{"messages": one} for one in turns], template, tmp_path)
    assert asked(probes(data, template)) <= wanted(template)
    longer: list[Row] = [{"messages": one + other} for one, other in itertools.pairwise(turns)]
    data = sft(longer, template, tmp_path, max_length=1000)  # of several turns, the first is the answer
    assert asked(probes(data, template)) <= wanted(template)


@pytest.mark.parametrize("template", ["plain", "ChatML"])
def test_what_preference_trainers_train_on(template: str, tmp_path: Path) -> None:
    tokenizer, words = tokenizer_of(template), in_words(template)
    no: Any = "No.<eos>" if template == "plain" else [{"role": "assistant", "content": "No."}]
    pairs = Dataset.from_list([{"prompt": w["prompt"], "chosen": w["completion"], "rejected": no} for w in words])
    labelled_rows = Dataset.from_list([{**w, "label": i % 2 == 0} for i, w in enumerate([w for w in words for _ in "ab"])])
    tiny_model().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    arguments = tiny_arguments(tmp_path)
    dpo = DPOTrainer(model, args=DPOConfig(**arguments), train_dataset=pairs, processing_class=tokenizer)
    assert asked(probes(dpo.train_dataset, template)) <= wanted(template)
    kto = KTOTrainer(model, args=KTOConfig(**arguments), train_dataset=labelled_rows, processing_class=tokenizer)
    assert asked(probes(kto.train_dataset, template)) <= wanted(template)
    assert probes(kto.train_dataset, template).read.left_out == {"its answer is rejected (column label)": 12}  # type: ignore[union-attr]
    implicit = Dataset.from_list([{"chosen": w["prompt"] + w["completion"], "rejected": w["prompt"] + no} for w in words])
    reward = RewardTrainer(_judge(), args=RewardConfig(**arguments), train_dataset=implicit, processing_class=tokenizer)
    if template != "plain":  # of texts, nobody tells how much the two answers share
        assert asked(probes(reward.train_dataset, template)) <= wanted(template)


def _judge() -> Any:
    from transformers import LlamaForSequenceClassification

    config = tiny_model().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)
