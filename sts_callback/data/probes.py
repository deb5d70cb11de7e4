"""Turn texts into tokens, once: a prefix of demonstrations, and for each query a suffix that holds the query and its answer.

Queries form groups of equal size. Each group has its own demonstrations, which shows how much a number depends on the draw of
demonstrations. A query has the same tokens with and without demonstrations before it, so activations can be subtracted token by
token. The user's tokenizer is never altered: it gets one text at a time and neither pads nor truncates.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sts_callback.config import TRAIN, ProbeConfig
from sts_callback.data.chat import ChatTemplate
from sts_callback.data.counts import RowsRead, told
from sts_callback.data.pairs import Pair, Row, TextPair
from sts_callback.data.reader import STREAM_ROWS, Example, RowReader, StreamSample
from sts_callback.data.tokens import added_bytes, bos_tokens, n_common, pair_ids, special_ids, text_ids, without_bos
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FEWEST_QUERIES = 4
"""The fewest queries that a probe set may have."""
_FILLER_TEXT = Path(__file__).parent / "filler.txt"


@dataclass(frozen=True)
class Query:
    """One probe: the tokens of a query and of its answer, without BOS."""

    query: tuple[int, ...]
    answer: tuple[int, ...]
    counts: tuple[bool, ...]
    """Whether each query token counts. Special tokens do not."""
    answer_bytes: int | None = None
    """Length of the answer's text, in bytes of UTF-8; None if that is not known, as in files of earlier versions."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of the query, then of the answer."""
        return self.query + self.answer


@dataclass(frozen=True)
class ProbeSet:
    """The probes of the training data or of one domain."""

    name: str
    queries: tuple[Query, ...]
    demo_sets: tuple[tuple[int, ...], ...]
    """For each group, the tokens of its demonstrations, without BOS. A blank line ends each demonstration."""
    n_cut: int
    """Number of queries or answers that were longer than `max_tokens` and were cut."""
    written: str = ""
    """SHA-256 of the source: rows, how they were drawn, and the chat template. Empty if that is not known."""
    read: RowsRead | None = field(default=None, compare=False)
    """What came of the rows that it was drawn from."""

    @property
    def answer_bytes(self) -> tuple[int, ...]:
        """Of each query; empty if they are not known of all."""
        known = tuple(q.answer_bytes for q in self.queries if q.answer_bytes is not None)
        return known if len(known) == len(self.queries) else ()

    def group(self, index: int) -> int:
        """The group of a query. The same number means the same draw of training demonstrations in every set."""
        return index % len(self.demo_sets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the source if it is known, else of the tokens: templates may render a row differently each day."""
        content = [self.name, self.written or [[(q.query, q.answer, q.counts) for q in self.queries], self.demo_sets]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def make_probe_set(
    name: str,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: ProbeConfig,
    *,
    n_demonstrations: int,
    field: str,
    as_chat: bool = False,
) -> ProbeSet:
    """Draw queries from rows, and demonstrations for each group of queries, by seed. No query is among its own demonstrations.

    Args:
        name: the domain's name, or `train`.
        rows: in any format of `data.reader`.
        tokenizer: the user's; not altered.
        config: numbers, limits and seed.
        n_demonstrations: number of answered examples in each context.
        field: what to call the rows in errors.
        as_chat: whether plain prompts and answers are put into the chat template.

    Raises:
        DataError: if there are fewer usable rows than the demonstrations and 4 queries need.

    """
    draw = random.Random(f"{config.seed}/{name}")
    order = list(range(len(rows)))
    draw.shuffle(order)
    wanted = config.n_queries + n_demonstrations * config.n_draws
    reader = RowReader(tokenizer, field, as_chat=as_chat)
    # Reading stops once there are enough usable rows: a training set may have millions.
    examples = list(itertools.islice(reader.examples((i, rows[i]) for i in order), min(wanted, sys.maxsize)))
    if not examples and reader.error is not None:
        raise reader.error
    needed = (
        f"usable rows, but {n_demonstrations} demonstrations and at least {FEWEST_QUERIES} queries are needed; add rows or ask "
        "for fewer demonstrations."
    )
    if len(examples) < n_demonstrations + FEWEST_QUERIES:
        why = f" Left out of {reader.n_read} rows read: {told(reader.left_out)}." if reader.left_out else ""
        raise DataError(f"{field}: {len(examples)} {needed}{why}")
    encode = _Encoder(tokenizer, config.max_tokens)
    cut = encode.cut([encode(e.pair) for e in examples])
    encoded = cut.queries
    separator = text_ids("\n\n", tokenizer)
    n_queries = min(config.n_queries, len(encoded) - n_demonstrations)
    asked = [i for i, query in enumerate(encoded) if any(query.counts)][:n_queries]
    if len(asked) < FEWEST_QUERIES:
        raise DataError(
            f"{field}: {len(asked) + n_demonstrations} {needed} Of the others no token of the prompt counts (it is empty or "
            "holds special tokens only)."
        )
    n_draws = min(config.n_draws, len(asked) // 2)
    shown = []
    for group in range(n_draws):
        own = set(asked[group::n_draws])
        texts = {encoded[i] for i in own}
        others = [i for i in range(len(encoded)) if i not in own]
        unlike = [i for i in others if encoded[i] not in texts]  # a copy of the query elsewhere would give away its answer
        shown.append(draw.sample(unlike if len(unlike) >= n_demonstrations else others, n_demonstrations))
    notes = []
    if isinstance(rows, StreamSample):
        notes.append(f"a stream, for which its first {len(rows):,} rows stand (at most {STREAM_ROWS:,})")
    if as_chat:
        notes.append("plain rows are asked in the chat template, as the training data are (chat_template='never' leaves them)")
    glued = [e.pair for e in examples if isinstance(e.pair, TextPair) and e.pair.is_glued]
    if 2 * len(glued) > len(examples):
        seam = f"{glued[0].prompt[-12:]}{(glued[0].answer or '')[:12]}"
        notes.append(f"answers follow their prompts without a space, as in {seam!r}, and are asked so; begin them with one")
    if reader.n_plain:
        notes.append("asked as plain text, as the training data are, not in the form of a chat template (chat_template='always')")
    if reader.n_in_part:
        notes.append(
            f"the chat template leaves out reasoning, tools or calls of {reader.n_in_part} of {reader.n_read} rows; they are "
            "asked as plain text in it, which may not be the form that the model knows"
        )
    queries = [encoded[i] for i in asked]
    drawn: list[object] = [asked, shown, config.max_tokens]
    if not all(all(q.counts) for q in queries):
        drawn.append("marks and openings left out")  # earlier versions counted most of them
    if cut.keeps_opening:
        drawn.append("openings kept")  # earlier versions cut them off
    return ProbeSet(
        name,
        tuple(replace(q, answer_bytes=added_bytes(q.query, q.answer, tokenizer)) for q in queries),
        tuple(tuple(token for i in one for token in (*encoded[i].tokens, *separator)) for one in shown),
        cut.n_cut,
        _written(examples, drawn, tokenizer),
        RowsRead(name, len(rows), reader.n_read, len(examples), cut.n_cut, dict(reader.left_out), reader.unread, tuple(notes)),
    )


@dataclass(frozen=True)
class _Tokens:
    """Tokens of an example, without BOS: of its prompt both ends, as far as `max_tokens` may ever keep them."""

    start: tuple[int, ...]
    """The first tokens of the prompt."""
    n_before: int
    """Number of tokens of the prompt before `end`."""
    end: tuple[int, ...]
    """The last tokens of the prompt, where the question is. They overlap with `start` if the prompt is short."""
    answer: tuple[int, ...]
    is_answer_cut: bool


@dataclass(frozen=True)
class _Cut:
    """Examples as they are asked."""

    queries: tuple[Query, ...]
    n_cut: int
    """Number of those that were cut."""
    keeps_opening: bool
    """Whether a prompt longer than `max_tokens` has kept what the chat template puts before all."""


def _opening(examples: Sequence[_Tokens], special: frozenset[int]) -> tuple[int, ...]:
    """What a chat template puts before all prompts, system prompt included; nothing if it is as long as `max_tokens`, or longer.

    It says nothing of any prompt, so it does not count, and in models without BOS its first tokens are attention sinks. A prompt
    that is cut keeps it: without it the model would read the middle of a conversation.
    """
    starts = [one.start for one in examples]
    opening = functools.reduce(lambda one, other: one[: n_common(one, other)], starts) if starts else ()
    return () if special.isdisjoint(opening) or opening in starts else opening


def _written(examples: Sequence[Example], drawn: object, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the source. How the tokenizer splits the first texts shows whether the vocabulary is the same."""
    source = getattr(tokenizer, "chat_template", None)
    texts = [json.dumps(source), *(example.written for example in examples)]
    content = [texts, [text_ids(text[:1000], tokenizer) for text in texts], drawn]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def uses_chat_template(train: ProbeSet, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether most training examples were rendered by the tokenizer's chat template: by what stands before their answers.

    Args:
        train: the training data's probes.
        tokenizer: the user's; not altered.

    """
    try:
        marker = ChatTemplate(tokenizer).marker
    except DataError:  # there is no template, or it cannot render a plain question
        return False
    n_marked = sum(marker in str(tokenizer.decode(list(q.tokens))) for q in train.queries)
    return bool(marker) and 2 * n_marked > len(train.queries)


def make_completion_set(
    name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ProbeConfig, *, field: str
) -> ProbeSet:
    """Make a set in which completions count and the prompts before them do not. It has neither answers nor demonstrations.

    Args:
        name: of the set.
        rows: as for `make_probe_set`; as many of the first rows are used as a probe set has queries.
        tokenizer: the user's; not altered.
        config: numbers and limits.
        field: what to call the rows in errors.

    """
    examples = RowReader(tokenizer, field).examples(enumerate(rows))
    encode = _Encoder(tokenizer, config.max_tokens)
    encoded = encode.cut([encode(e.pair) for e in itertools.islice(examples, min(config.n_queries, sys.maxsize))]).queries
    counts = [(False,) * len(q.query) + tuple(token not in encode.special for token in q.answer) for q in encoded]
    return ProbeSet(name, tuple(Query(q.tokens, (), c) for q, c in zip(encoded, counts, strict=True)), ((),), 0)


def make_row_set(
    name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ProbeConfig, *, field: str
) -> tuple[ProbeSet, tuple[int, ...]]:
    """Make a set of whole rows, prompt and answer. All tokens but special ones count. It has neither answers nor demonstrations.

    Args:
        name: of the set.
        rows: as for `make_probe_set`.
        tokenizer: the user's; not altered.
        config: limits.
        field: what to call the rows in errors.

    Returns:
        The set, and for each of its texts the index of its row: rows without text are left out.

    Raises:
        DataError: if no row holds text.

    """
    encode = _Encoder(tokenizer, config.max_tokens)
    reader = RowReader(tokenizer, field)
    read: list[_Tokens] = []
    numbers: list[int] = []
    for number, row in enumerate(rows):
        for example in reader.examples([(number, row)]):
            read.append(encode(example.pair, with_rest=True))
            numbers.append(number)
    if not read:
        raise DataError(f"{field}: none of the {len(rows)} rows read holds text: {told(reader.left_out)}.")
    cut = encode.cut(read)
    queries = tuple(Query(q.tokens, (), tuple(token not in encode.special for token in q.tokens)) for q in cut.queries)
    return ProbeSet(name, queries, ((),), cut.n_cut), tuple(numbers)


def filler_tokens(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> tuple[int, ...]:
    """Tokens of plain prose without question or answer, which replace demonstrations in a context.

    Args:
        tokenizer: the user's; not altered.
        n_tokens: number of tokens; the text repeats if it is shorter.

    """
    ids = text_ids(_FILLER_TEXT.read_text(encoding="utf-8"), tokenizer)
    return tuple(itertools.islice(itertools.cycle(ids), n_tokens))


def check_lengths(sets: Sequence[ProbeSet], max_positions: int | None, n_bos: int = 1) -> None:
    """Refuse probes that are longer than the model's positions.

    Args:
        sets: the probe sets.
        max_positions: number of positions of the model, if known.
        n_bos: number of tokens before everything else.

    Raises:
        DataError: naming the set, the length and the limit.

    """
    longest_context = max((len(draw) for s in sets if s.name == TRAIN for draw in s.demo_sets), default=0)
    for s in sets:
        length = n_bos + max(longest_context, *map(len, s.demo_sets)) + max(len(q.tokens) for q in s.queries)
        if max_positions is not None and length > max_positions:
            raise DataError(
                f"{s.name}: demonstrations, query and answer take {length} tokens, but the model has {max_positions} positions; "
                "lower max_tokens or the number of demonstrations."
            )


def check_tokens(sets: Sequence[ProbeSet], vocab_size: int | None) -> None:
    """Refuse probes whose tokens are not in the model's vocabulary.

    Args:
        sets: the probe sets.
        vocab_size: number of tokens of the model, if known.

    Raises:
        DataError: naming the set, the token and the limit.

    """
    for s in sets:
        highest = max(itertools.chain(*s.demo_sets, *(q.tokens for q in s.queries)), default=0)
        if vocab_size is not None and highest >= vocab_size:
            raise DataError(
                f"{s.name}: token {highest} is not among the model's {vocab_size}; give the model's own tokenizer, and rows that "
                "hold text or were tokenised by it."
            )


class _Encoder:
    """Tokenise pairs, without BOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._bos, self.special = bos_tokens(tokenizer), special_ids(tokenizer)

    def __call__(self, pair: Pair, *, with_rest: bool = False) -> _Tokens:
        """Tokenise a pair, with the rest of the conversation if asked for."""
        if isinstance(pair, TextPair):
            prompt, answer, rest = pair_ids(pair, self._tokenizer)
        else:
            prompt, answer, rest = pair.prompt, pair.answer, pair.rest
        prompt, most = without_bos(prompt, self._bos), self._max_tokens
        if answer is None:  # one running text: the first half is the query, the second half its answer
            middle = (len(prompt) + 1) // 2
            prompt, answer = prompt[:middle], prompt[middle:]
        answer = (*answer, *rest) if with_rest else answer
        return _Tokens(prompt[:most], max(len(prompt) - most, 0), prompt[-most:], answer[:most], len(answer) > most)

    def cut(self, examples: Sequence[_Tokens]) -> _Cut:
        """Keep of each prompt the opening that all share and the end, and of each answer the beginning."""
        opening = _opening(examples, self.special)

        def query(example: _Tokens) -> Query:
            prompt = example.start[: min(example.n_before, len(opening))] + example.end
            counts = (i >= len(opening) and token not in self.special for i, token in enumerate(prompt))
            return Query(prompt, example.answer, tuple(counts))

        return _Cut(
            tuple(map(query, examples)),
            sum(one.n_before > len(opening) or one.is_answer_cut for one in examples),
            bool(opening) and any(one.n_before for one in examples),
        )
