"""Rows to pieces: from each source its share, nothing both trained on and measured, conversations as the template has them."""

from __future__ import annotations

from typing import Any

import pytest

from sts_callback.errors import DataError
from sts_callback.sae_training.texts import CONTEXT, Pieces, read_pieces
from tiny import bos_tokenizer, rows, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"


def texts(pieces: Pieces, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(list(piece)) for piece in (*pieces.training, *pieces.held_out)]


def poems(n: int) -> list[dict[str, str]]:
    return [{"text": f"{i} " + "roses are red, violets are blue. " * 2} for i in range(n)]


def test_a_small_source_is_not_lost_beside_a_large_one() -> None:
    tokenizer = tiny_tokenizer()
    found = read_pieces({"train": rows(2000), "poems": poems(60)}, tokenizer, 12000, 0)
    n_poems = sum("roses" in text for text in texts(found, tokenizer))
    assert n_poems == 60  # all of them: together they have fewer tokens than half
    assert 12000 <= sum(map(len, found.training)) < 12100
    train, poem = found.reads
    assert (train.n_rows, poem.n_rows, poem.n_used) == (2000, 60, 60)
    assert train.n_used == len(found.training) + len(found.held_out) - 60


def test_nothing_is_both_trained_on_and_measured_on() -> None:
    copies = [*rows(100), *rows(100), *poems(100)]
    found = read_pieces({"train": copies, "again": rows(100)}, tiny_tokenizer(), 10**6, 0)
    assert not set(found.training) & set(found.held_out)
    assert len(found.training) + len(found.held_out) == 200
    assert 10 <= len(found.held_out) <= 20  # a twentieth of 400 rows, without copies
    assert sum(n for read in found.reads for n in read.left_out.values()) == 200


def test_another_seed_draws_others_and_the_same_seed_the_same() -> None:
    def drawn(seed: int) -> Pieces:
        return read_pieces({"train": rows(300)}, tiny_tokenizer(), 2000, seed)

    assert drawn(0) == drawn(0)
    assert set(drawn(0).held_out) != set(drawn(1).held_out)


def test_long_texts_are_cut_behind_bos() -> None:
    long = [{"text": f"{i:04d}" + "x" * (2 * CONTEXT + 1)} for i in range(40)]  # BOS, 255, 255, and 7 left over
    found = read_pieces({"text": long}, bos_tokenizer(), 10**6, 0)
    assert found.bos == (1,)
    assert {len(piece) for piece in found.training} == {CONTEXT - 1}
    assert len(found.training) == 2 * 38
    assert all(1 not in piece for piece in found.training)


def test_plain_rows_are_put_into_the_template_if_the_training_data_are() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in rows(40)
    ]
    in_chat = texts(read_pieces({"train": chats, "shipped": rows(40, "poems")}, tokenizer, 10**6, 0), tokenizer)
    assert all(text.startswith("<user>") for text in in_chat)
    assert len(in_chat) == 80
    plain = texts(read_pieces({"train": rows(40), "shipped": rows(40, "poems")}, tokenizer, 10**6, 0), tokenizer)
    assert all(text.startswith("Q: ") for text in plain)


def test_rows_that_a_trainer_has_tokenised_are_read() -> None:
    tokenised = [{"input_ids": [5, 6, 7, 8, i], "labels": [-100, -100, 7, 8, i]} for i in range(10, 60)]
    found = read_pieces({"train": tokenised}, tiny_tokenizer(), 10**6, 0)
    assert all(piece[:4] == (5, 6, 7, 8) for piece in found.training)
    assert len(found.training) == 48


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ({"train": [{"text": "one"}]}, "too few"),
        ({"train": rows(30), "poems": [{"nothing": 1}]}, "poems.*fit no format"),
        ({"train": rows(30), "poems": [{"text": ""}, {"text": ""}]}, "poems: none of 2 rows.*prompt is empty"),
    ],
)
def test_texts_that_do_not_suffice_are_refused(sources: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_pieces(sources, tiny_tokenizer(), 10**6, 0)
