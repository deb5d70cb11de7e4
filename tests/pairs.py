"""All pairs that rows hold, read at once."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from sts_callback.data.pairs import Pair, Row
from sts_callback.data.reader import RowReader


def read_pairs(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, field: str) -> list[Pair]:
    """Turn rows into pairs; rows that hold none are left out.

    Raises:
        DataError: if none is left, and one has columns that fit no format, or a conversation and no chat template for it.

    """
    reader = RowReader(tokenizer, field)
    pairs = [example.pair for example in reader.examples(enumerate(rows))]
    if not pairs and reader.error is not None:
        raise reader.error
    return pairs
