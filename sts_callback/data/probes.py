"""Texts become token batches, once: prefixes of demonstrations, and a suffix per query with its answer.

Queries stand in groups of equal size, and each group has demonstrations of its own, so that what the draw of demonstrations does
to a number can be told. A query is the same tokens with and without demonstrations before it, so that activations can be
subtracted token by token. The user's tokenizer is never altered: one text at a time, no padding, no truncation by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sts_callback.config import ProbeConfig
from sts_callback.data.reader import Pair, Row, TextPair, read_pairs
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FEWEST_QUERIES = 4
"""That a probe set must have."""
_FILLER_TEXT = Path(__file__).parent / "filler.txt"


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
    demo_sets: tuple[tuple[int, ...], ...]
    """For each group, the tokens of the answered examples that go in its context, without BOS, each ended by a blank line."""
    n_cut: int
    """Queries or answers that were longer than `max_tokens`."""

    def group(self, index: int) -> int:
        """The group that a query stands in; for training demonstrations the same number in every set means the same draw."""
        return index % len(self.demo_sets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that is measured on."""
        content = [self.name, [(q.query, q.answer, q.counts) for q in self.queries], self.demo_sets]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What stands before everything else: BOS, where the model has one."""
    return () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)


def make_probe_set(
    name: str,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: ProbeConfig,
    *,
    n_demonstrations: int,
    field: str,
) -> ProbeSet:
    """Draw queries from rows and demonstrations for each group of them, seeded; no query stands among its own demonstrations.

    Args:
        name: the domain's name, or `train`.
        rows: in any format of `domains.reader`.
        tokenizer: the user's; not altered.
        config: numbers, limits and seed.
        n_demonstrations: answered examples to put in each context.
        field: what to call the rows in errors.

    Raises:
        DataError: with fewer usable rows than demonstrations and 4 queries need.

    """
    draw = random.Random(f"{config.seed}/{name}")
    order = list(range(len(rows)))
    draw.shuffle(order)
    wanted = config.n_queries + n_demonstrations * config.n_draws
    # ProbeStats stops as soon as enough usable rows are there: a training set may have millions.
    pairs: list[Pair] = []
    for start in range(0, len(order), wanted):
        pairs += read_pairs((rows[i] for i in order[start : start + wanted]), tokenizer, field)
        if len(pairs) >= wanted:
            break
    if len(pairs) < n_demonstrations + FEWEST_QUERIES:
        raise DataError(
            f"{field}: {len(pairs)} usable rows, but {n_demonstrations} demonstrations and at least {FEWEST_QUERIES} queries "
            "are needed; add rows or ask for fewer demonstrations."
        )
    with _untouched(tokenizer):
        encoded = [_encode(pair, tokenizer, config.max_tokens) for pair in pairs[:wanted]]
        separator = tuple(tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    n_queries = min(config.n_queries, len(encoded) - n_demonstrations)
    asked = [i for i, (query, _) in enumerate(encoded) if any(query.counts)][:n_queries]
    if len(asked) < FEWEST_QUERIES:
        raise DataError(
            f"{field}: {len(asked) + n_demonstrations} usable rows, but {n_demonstrations} demonstrations and at least "
            f"{FEWEST_QUERIES} queries are needed; of the others no token of the prompt counts (it is empty or holds special "
            "tokens only)."
        )
    n_draws = min(config.n_draws, len(asked) // 2)
    draws = []
    for group in range(n_draws):
        own = set(asked[group::n_draws])
        texts = {encoded[i][0] for i in own}
        others = [i for i in range(len(encoded)) if i not in own]
        unlike = [i for i in others if encoded[i][0] not in texts]  # a copy in another row would give the answer away
        shown = draw.sample(unlike if len(unlike) >= n_demonstrations else others, n_demonstrations)
        draws.append(tuple(token for i in shown for token in (*encoded[i][0].tokens, *separator)))
    return ProbeSet(name, tuple(encoded[i][0] for i in asked), tuple(draws), sum(cut for _, cut in encoded))


def make_completion_set(
    name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ProbeConfig, *, field: str
) -> ProbeSet:
    """Completions as what counts, each behind its prompt, which does not; without answers and demonstrations.

    Args:
        name: of the set.
        rows: as for `make_probe_set`; the first of them are taken, as many as there are queries in a probe set.
        tokenizer: the user's; not altered.
        config: numbers and limits.
        field: what to call the rows in errors.

    """
    pairs = read_pairs(rows, tokenizer, field)[: config.n_queries]
    special = set(tokenizer.all_special_ids)
    with _untouched(tokenizer):
        encoded = [_encode(pair, tokenizer, config.max_tokens)[0] for pair in pairs]
    counts = [(False,) * len(q.query) + tuple(token not in special for token in q.answer) for q in encoded]
    return ProbeSet(name, tuple(Query(q.tokens, (), c) for q, c in zip(encoded, counts, strict=True)), ((),), 0)


def make_row_set(
    name: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ProbeConfig, *, field: str
) -> tuple[ProbeSet, tuple[int, ...]]:
    """Whole rows, prompt and answer, of which all tokens count but special ones; without answers to be read and demonstrations.

    Args:
        name: of the set.
        rows: as for `make_probe_set`.
        tokenizer: the user's; not altered.
        config: limits.
        field: what to call the rows in errors.

    Returns:
        The set, and for each of its texts which of the rows it is: rows without text are left out.

    Raises:
        DataError: if none holds text.

    """
    special = set(tokenizer.all_special_ids)
    texts: list[Query] = []
    numbers: list[int] = []
    n_cut = 0
    with _untouched(tokenizer):
        for number, row in enumerate(rows):
            for pair in read_pairs([row], tokenizer, field):
                encoded, cut = _encode(pair, tokenizer, config.max_tokens)
                texts.append(Query(encoded.tokens, (), tuple(token not in special for token in encoded.tokens)))
                numbers.append(number)
                n_cut += cut
    if not texts:
        raise DataError(f"{field}: none of the {len(rows)} rows read holds text.")
    return ProbeSet(name, tuple(texts), ((),), n_cut), tuple(numbers)


def filler_tokens(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> tuple[int, ...]:
    """Plain prose without question or answer, to stand in a context in place of demonstrations.

    Args:
        tokenizer: the user's; not altered.
        n_tokens: how many tokens; the text starts again where it ends.

    """
    with _untouched(tokenizer):
        ids = tokenizer(_FILLER_TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return tuple(itertools.islice(itertools.cycle(ids), n_tokens))


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
    longest_context = max((len(draw) for s in sets if s.name == "train" for draw in s.demo_sets), default=0)
    for s in sets:
        length = 1 + max(longest_context, *map(len, s.demo_sets)) + max(len(q.tokens) for q in s.queries)
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


def segments(probes: ProbeSet, batch_tokens: int) -> Iterator[range]:
    """Cut a set into runs of queries, each with about a batch for every group, so that memory does not grow with the set."""
    start, n_tokens = 0, 0
    for i, query in enumerate(probes.queries):
        n_tokens += len(query.tokens)
        if i > start and n_tokens > batch_tokens * len(probes.demo_sets):
            yield range(start, i)
            start, n_tokens = i, len(query.tokens)
    yield range(start, len(probes.queries))


def batches(
    queries: Sequence[Query], members: Sequence[int], batch_tokens: int, vocab_size: int, n_prefix: int
) -> Iterator[list[int]]:
    """Indices of queries in batches of like length, the same at every visit.

    A batch has at most `batch_tokens` padded tokens, at most as many answer tokens as 256 MiB of float32 logits hold, and at most
    16 times `batch_tokens` keys together with those of the prefix, which each of its rows attends to.

    Args:
        queries: of a set.
        members: indices of those that are wanted.
        batch_tokens: see `ProbeConfig`.
        vocab_size: of the model.
        n_prefix: tokens that stand before each.

    """
    most_answer_tokens, most_keys = 2**28 // (4 * vocab_size), 16 * batch_tokens
    order = sorted(members, key=lambda i: (len(queries[i].tokens), i))
    batch: list[int] = []
    n_answer = 0
    for i in order:
        n_rows, length = len(batch) + 1, len(queries[i].tokens)
        full = n_rows * length > batch_tokens or n_rows * (n_prefix + length) > most_keys
        if batch and (full or n_answer + len(queries[i].answer) > most_answer_tokens):
            yield batch
            batch, n_answer = [], 0
        batch.append(i)
        n_answer += len(queries[i].answer)
    if batch:
        yield batch


class Candidates:
    """Where the candidate tokens of each query stand in one long row, query by query."""

    def __init__(self, queries: Sequence[Query]) -> None:
        n = torch.tensor([sum(q.counts) for q in queries])
        self.owner = torch.repeat_interleave(torch.arange(len(queries)), n)
        """The query of each, `(n_candidates,)`."""
        self._ends = n.cumsum(0)
        self._starts = self._ends - n

    def of(self, batch: Sequence[int]) -> torch.Tensor:
        """Places of the tokens of some queries, in the order in which a batch of them gives them."""
        return torch.cat([torch.arange(int(self._starts[i]), int(self._ends[i])) for i in batch])


def candidate_rows(acts: torch.Tensor, queries: Sequence[Query]) -> torch.Tensor:
    """Of a batch of queries, the tokens that count.

    Args:
        acts: `(n_rows, n_suffix, d)`, right-padded.
        queries: one for each row.

    Returns:
        `(n_candidates, d)`, query by query.

    """
    rows = torch.tensor([row for row, q in enumerate(queries) for counts in q.counts if counts])
    columns = torch.tensor([column for q in queries for column, counts in enumerate(q.counts) if counts])
    return acts[rows.to(acts.device), columns.to(acts.device)]


def answer_positions(queries: Sequence[Query]) -> torch.Tensor:
    """Positions whose logits predict an answer token, `(n_rows, n_suffix)` booleans: position p predicts token p + 1."""
    select = torch.zeros(len(queries), max(len(q.tokens) for q in queries), dtype=torch.bool)
    for row, q in enumerate(queries):
        select[row, len(q.query) - 1 : len(q.tokens) - 1] = True
    return select
