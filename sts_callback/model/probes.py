"""Texts become token batches, once: a shared prefix of demonstrations, and a suffix per query with its answer.

A query is the same tokens with and without demonstrations before it, so that activations can be subtracted token by token.
The user's tokenizer is never altered: one text at a time, no padding, no truncation by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sts_callback.config import ProbeConfig
from sts_callback.domains.reader import Pair, Row, TextPair, read_pairs
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Query:
    """One probe: the query's tokens and its answer's, without BOS."""

    query: tuple[int, ...]
    answer: tuple[int, ...]
    counts: tuple[bool, ...]
    """For each query token, whether it counts (special tokens do not)."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Query and answer."""
        return self.query + self.answer


@dataclass(frozen=True)
class ProbeSet:
    """The probes of the training data or of one domain."""

    name: str
    queries: tuple[Query, ...]
    demonstrations: tuple[int, ...]
    """Tokens of the answered examples that go in context, without BOS, separated as `probes` does."""
    n_cut: int
    """Queries or answers that were longer than `max_tokens`."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that is measured on."""
        content = [self.name, [(q.query, q.answer, q.counts) for q in self.queries], self.demonstrations]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def prefix_tokens(tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[int] = ()) -> tuple[int, ...]:
    """What stands before a query: BOS where the model has one, then the demonstrations."""
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return bos + tuple(demonstrations)


def make_probe_set(
    name: str,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: ProbeConfig,
    *,
    n_demonstrations: int,
    field: str,
) -> ProbeSet:
    """Draw demonstrations and queries from rows, disjoint and seeded.

    Args:
        name: the domain's name, or `train`.
        rows: in any format of `domains.reader`.
        tokenizer: the user's; not altered.
        config: numbers, limits and seed.
        n_demonstrations: answered examples to put in context.
        field: what to call the rows in errors.

    Raises:
        DataError: with fewer usable rows than demonstrations and 4 queries need.

    """
    order = list(range(len(rows)))
    random.Random(f"{config.seed}/{name}").shuffle(order)
    wanted = n_demonstrations + config.n_queries
    # Reading stops as soon as enough usable rows are there: a training set may have millions.
    pairs: list[Pair] = []
    for start in range(0, len(order), wanted):
        pairs += read_pairs((rows[i] for i in order[start : start + wanted]), tokenizer, field)
        if len(pairs) >= wanted:
            break
    if len(pairs) < n_demonstrations + 4:
        raise DataError(
            f"{field}: {len(pairs)} usable rows, but {n_demonstrations} demonstrations and at least 4 queries are needed; "
            "add rows or ask for fewer demonstrations."
        )
    with _untouched(tokenizer):
        encoded = [_encode(pair, tokenizer, config.max_tokens) for pair in pairs[:wanted]]
        separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    demonstrations: list[int] = []
    for query, _ in encoded[:n_demonstrations]:
        demonstrations += [*query.tokens, *separator]
    queries = [query for query, _ in encoded[n_demonstrations:] if any(query.counts)]
    if len(queries) < 4:
        raise DataError(
            f"{field}: {len(queries) + n_demonstrations} usable rows, but {n_demonstrations} demonstrations and at least 4 "
            "queries are needed; of the others no token of the prompt counts (it is empty or holds special tokens only)."
        )
    return ProbeSet(name, tuple(queries), tuple(demonstrations), sum(cut for _, cut in encoded))


@contextlib.contextmanager
def _untouched(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Put back the padding and truncation that the backend was left with: every plain call clears them."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    padding, truncation = getattr(backend, "padding", None), getattr(backend, "truncation", None)
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def check_lengths(sets: Sequence[ProbeSet], max_positions: int | None) -> None:
    """Refuse probes that the model has no positions for.

    Raises:
        DataError: naming the set, the length and the limit.

    """
    longest_context = max(len(s.demonstrations) for s in sets if s.name == "train")
    for s in sets:
        length = 1 + max(longest_context, len(s.demonstrations)) + max(len(q.tokens) for q in s.queries)
        if max_positions is not None and length > max_positions:
            raise DataError(
                f"{s.name}: demonstrations, query and answer take {length} tokens, but the model has {max_positions} positions; "
                "lower max_tokens or the number of demonstrations."
            )


def _encode(pair: Pair, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[Query, bool]:
    """Tokens of a pair without BOS, and whether something was cut."""
    if isinstance(pair, TextPair):
        prompt, answer = _tokenise(pair, tokenizer)
    else:
        prompt, answer = pair.prompt, pair.answer
    if answer is None:  # one running text: its first half asks, its second half answers
        middle = (len(prompt) + 1) // 2
        prompt, answer = prompt[:middle], prompt[middle:]
    if prompt and prompt[0] == tokenizer.bos_token_id:
        prompt = prompt[1:]
    special = set(tokenizer.all_special_ids)
    cut = len(prompt) > max_tokens or len(answer) > max_tokens
    prompt, answer = prompt[-max_tokens:], answer[:max_tokens]  # the end of a prompt is what is asked
    return Query(prompt, answer, tuple(token not in special for token in prompt)), cut


def _tokenise(pair: TextPair, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Prompt and answer ids; the boundary is their common prefix, as TRL draws it."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompt = ids(pair.prompt)
    if pair.answer is None:
        return prompt, None
    whole = ids(pair.prompt + pair.answer)
    n_common = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
    return whole[:n_common], whole[n_common:]


def batches(queries: Sequence[Query], config: ProbeConfig, vocab_size: int) -> Iterator[list[int]]:
    """Indices of queries in batches of like length, the same at every visit.

    A batch has at most `batch_tokens` padded tokens, and at most as many answer tokens as 256 MiB of float32 logits hold.
    """
    most_answer_tokens = 2**28 // (4 * vocab_size)
    order = sorted(range(len(queries)), key=lambda i: (len(queries[i].tokens), i))
    batch: list[int] = []
    n_answer = 0
    for i in order:
        full = (len(batch) + 1) * len(queries[i].tokens) > config.batch_tokens
        if batch and (full or n_answer + len(queries[i].answer) > most_answer_tokens):
            yield batch
            batch, n_answer = [], 0
        batch.append(i)
        n_answer += len(queries[i].answer)
    if batch:
        yield batch
