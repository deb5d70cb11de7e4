"""Rows of any format to pieces of text in tokens: what an SAE is trained on, and what it is measured on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sts_callback.config import TRAIN, ProbeConfig
from sts_callback.data.counts import RowsRead, told
from sts_callback.data.pairs import Pair, Row, TextPair
from sts_callback.data.probes import make_row_set, uses_chat_template
from sts_callback.data.reader import RowReader
from sts_callback.data.tokens import bos_tokens, pair_ids, special_ids, without_bos
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[int, ...]

CONTEXT = 256
"""Tokens of a context, with what stands before every text. Our choice: long enough for most rows, and quick."""
_SHORTEST_REST = 8  # tokens; what is left of a long text and shorter is dropped
_HELD_OUT, _MOST_HELD_OUT = 0.05, 32_000  # share of each source's rows that only measures, and tokens of it that suffice
_N_SEEN = 64  # rows of the training data that tell whether they are conversations
_COPY = "it is a copy of another"


@dataclass(frozen=True)
class Pieces:
    """Texts in tokens, each behind the same beginning."""

    training: tuple[Piece, ...]
    """In random order."""
    held_out: tuple[Piece, ...]
    """Of rows none of which is among the others."""
    bos: Piece
    """What stands before each."""
    special: frozenset[int]
    """Tokens that do not count."""
    reads: tuple[RowsRead, ...]
    """What came of the rows."""


def read_pieces(sources: Mapping[str, Sequence[Row]], tokenizer: PreTrainedTokenizerBase, n_tokens: int, seed: int) -> Pieces:
    """Draw rows from all sources, from each about as many tokens as long as it has any.

    A small source is so not lost beside a large one. Plain prompts and answers are put into the chat template if the
    training data (source `train`) are.

    Args:
        sources: rows by name.
        tokenizer: the model's; not altered.
        n_tokens: to train on; reading stops there.
        seed: of the draw.

    Raises:
        DataError: if no row of a source can be used, or all texts together are too few to hold any back.

    """
    as_chat = TRAIN in sources and _is_chat(sources[TRAIN], tokenizer)
    seen: set[Piece] = set()
    drawn = {name: _Source(name, rows, tokenizer, seed, seen, as_chat=as_chat) for name, rows in sources.items()}
    held_out = [piece for source in drawn.values() for piece in source.held_out(_MOST_HELD_OUT // len(drawn))]
    training: list[Piece] = []
    left, n_drawn = dict(drawn), dict.fromkeys(drawn, 0)
    while left and sum(n_drawn.values()) < n_tokens:
        name = min(left, key=lambda name: n_drawn[name])
        pieces = next(left[name].texts, None)
        if pieces is None:
            del left[name]
            continue
        training += pieces
        n_drawn[name] += sum(map(len, pieces))
    for source in drawn.values():
        source.require_texts()
    if not training or not held_out:
        raise DataError(f"train: {len(seen)} texts are too few to train an SAE on some and measure it on others; give more.")
    random.Random(f"{seed}/order").shuffle(training)
    return Pieces(
        tuple(training),
        tuple(held_out),
        bos_tokens(tokenizer),
        special_ids(tokenizer),
        tuple(source.read for source in drawn.values()),
    )


def _is_chat(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether rows are rendered by the chat template, or were; rows that cannot be read are told of later."""
    try:
        some, _ = make_row_set(TRAIN, [rows[i] for i in range(min(len(rows), _N_SEEN))], tokenizer, ProbeConfig(), field="train")
    except DataError:
        return False
    return uses_chat_template(some, tokenizer)


class _Source:
    """Rows of one source in random order, as pieces."""

    def __init__(
        self, name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, seed: int, seen: set[Piece], *, as_chat: bool
    ) -> None:
        self._name, self._rows, self._tokenizer, self._seen = name, rows, tokenizer, seen
        self._bos = bos_tokens(tokenizer)
        self._reader = RowReader(tokenizer, name, as_chat=as_chat)
        self._order = list(range(len(rows)))
        random.Random(f"{seed}/{name}").shuffle(self._order)
        self._n_used = self._n_copies = 0
        self._n_held_out = max(1, round(_HELD_OUT * len(rows)))
        self.texts = self._texts(self._order[self._n_held_out :])
        """Of the rows that are trained on, each as pieces."""

    def held_out(self, n_tokens: int) -> Iterator[Piece]:
        """Pieces of the rows that only measure, until there are enough."""
        for pieces in self._texts(self._order[: self._n_held_out]):
            yield from pieces
            n_tokens -= sum(map(len, pieces))
            if n_tokens <= 0:
                return

    def require_texts(self) -> None:
        """Refuse a source of which nothing could be used."""
        if self._n_used:
            return
        if self._reader.error is not None:
            raise self._reader.error
        raise DataError(f"{self._name}: none of {self._reader.n_read} rows holds text: {told(self._reader.left_out)}.")

    @property
    def read(self) -> RowsRead:
        """What came of its rows."""
        left_out = {**self._reader.left_out, **({_COPY: self._n_copies} if self._n_copies else {})}
        return RowsRead(self._name, len(self._rows), self._reader.n_read, self._n_used, 0, left_out, self._reader.unread, ())

    def _texts(self, order: Sequence[int]) -> Iterator[list[Piece]]:
        for number in order:
            for example in self._reader.examples([(number, self._rows[number])]):
                ids = self._ids(example.pair)
                if ids in self._seen:
                    self._n_copies += 1
                    continue
                self._seen.add(ids)
                self._n_used += 1
                yield list(_cut(ids, CONTEXT - len(self._bos)))

    def _ids(self, pair: Pair) -> Piece:
        prompt, answer, rest = pair_ids(pair, self._tokenizer) if isinstance(pair, TextPair) else _parts(pair)
        return (*without_bos(prompt, self._bos), *(answer or ()), *rest)


def _parts(pair: Pair) -> tuple[Piece, Piece | None, Piece]:
    return pair.prompt, pair.answer, pair.rest  # type: ignore[return-value]  # of a pair in tokens


def _cut(ids: Piece, n: int) -> Iterator[Piece]:
    for start in range(0, len(ids), n):
        piece = ids[start : start + n]
        if start == 0 or len(piece) >= _SHORTEST_REST:
            yield piece
