"""Token ids of texts, and of rows that a trainer has tokenised, padded, masked or packed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

from sts_callback.data.pairs import NoExampleError, Row, TextPair, TokenPair
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
_IGNORED = -100  # PyTorch's loss, and so every trainer, ignores this label


@contextlib.contextmanager
def untouched(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Restore the backend's padding and truncation on exit: every plain call clears them."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    padding, truncation = getattr(backend, "padding", None), getattr(backend, "truncation", None)
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Token ids of a text, without special tokens."""
    with untouched(tokenizer):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The tokens that the tokenizer itself puts before a text: often BOS, sometimes several or none, whatever `bos_token` is."""
    with untouched(tokenizer):
        whole = tuple(tokenizer("a")["input_ids"])
    bare = text_ids("a", tokenizer)
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), ())


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that stand for no text.

    Beside BOS, EOS and padding these are the marks of a chat template, which many tokenizers keep among their added tokens only.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids).union(i for i, token in added.items() if token.special)


def without_bos(ids: Ids, bos: Ids) -> Ids:
    """Remove the tokens that the tokenizer puts before a text."""
    return ids[len(bos) :] if ids[: len(bos)] == bos else ids


def pair_ids(pair: TextPair, tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids | None, Ids]:
    """Token ids of prompt, answer and rest. Boundaries are common prefixes, as in TRL."""
    prompt = text_ids(pair.prompt, tokenizer)
    if pair.answer is None:
        return prompt, None, ()
    whole = text_ids(pair.prompt + pair.answer, tokenizer)
    n = n_common(prompt, whole)
    if not pair.rest:
        return whole[:n], whole[n:], ()
    full = text_ids(pair.prompt + pair.answer + pair.rest, tokenizer)
    end = n_common(whole, full)
    return full[:n], full[n:end], full[end:]


def added_bytes(prompt: Ids, answer: Ids, tokenizer: PreTrainedTokenizerBase) -> int:
    """By how many bytes of UTF-8 an answer makes the text of its prompt longer: many tokenizers drop the space before a text."""

    def n_bytes(ids: Ids) -> int:
        known = [token for token in ids if token < len(tokenizer)]  # rows that were tokenised may hold others
        text = tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(str(text).encode("utf-8", "surrogatepass"))

    return n_bytes(prompt + answer) - n_bytes(prompt)


def n_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning of two sequences."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def token_pairs(row: Row, tokenizer: PreTrainedTokenizerBase, bos: Ids, special: frozenset[int]) -> list[TokenPair]:
    """The examples in a row of `input_ids`, without padding. A packed row holds several. The first answer trained on counts.

    Args:
        row: its columns as plain lists.
        tokenizer: the user's; not altered.
        bos: see `bos_tokens`.
        special: see `special_ids`.

    Raises:
        NoExampleError: if no token is trained on.
        DataError: if a column does not hold token ids.

    """
    found = [_pair(ids, trained, bos, special) for ids, trained in _texts(row, tokenizer)]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        raise NoExampleError("no token after a prompt is trained on (by labels or masks)" if found else "it is padding only")
    return pairs


def preference_pair(row: Row) -> TokenPair:
    """The example in a row of a preference trainer: `prompt_ids` with `chosen_ids` or `completion_ids`, or only two answers.

    Raises:
        NoExampleError: if the row holds no answer, or a rejected one.
        DataError: if a column does not hold token ids.

    """
    if "prompt_ids" not in row:  # a reward trainer's row: both answers still follow their prompt
        chosen, rejected = _ids(row, "chosen_ids"), _ids(row, "rejected_ids")
        n = n_common(chosen, rejected)
        return TokenPair(chosen[:n], chosen[n:]) if n else TokenPair(chosen, None)
    if "chosen_ids" not in row and not row.get("label", True):  # a trainer made these columns, so `label` means what it says
        raise NoExampleError("its answer is rejected (column label)")
    return TokenPair(_ids(row, "prompt_ids"), _ids(row, "chosen_ids") or _ids(row, "completion_ids"))


def aligned(
    whole: Ids, pair: TextPair, tokenizer: PreTrainedTokenizerBase, bos: Ids, special: frozenset[int]
) -> TokenPair | None:
    """Split a tokenised row into prompt and answer by the text of the row. None if the tokens are not those of the text.

    Args:
        whole: all tokens of the row.
        pair: the row's prompt and answer.
        tokenizer: the user's; not altered.
        bos: see `bos_tokens`.
        special: see `special_ids`.

    """
    prompt, answer, rest = pair_ids(pair, tokenizer)
    if not answer:
        return None
    ids, prompt = without_bos(whole, bos), without_bos(prompt, bos)
    read = (*prompt, *answer)
    if n_common(ids, read) == min(len(ids), len(read)) and len(ids) > len(prompt):
        start, end = len(prompt), len(read)
        if ids[end : end + 1] == (tokenizer.eos_token_id,) and special.issuperset(ids[end:]):
            end += 1  # the end of a plain answer is learnt with it
    elif ids[: len(prompt)] == prompt:  # some templates render a turn differently once others follow
        return TokenPair(prompt, answer, rest)
    else:  # the prompt is rendered differently: another date, another template, or its beginning is cut
        tail = _stripped((*answer, *rest), special)
        start = len(_stripped(ids, special)) - len(tail)
        if start <= 0 or ids[start : start + len(tail)] != tail:
            return None
        end = start + len(answer) if rest else len(ids)
    return TokenPair(ids[:start], ids[start:end], ids[end:])


def _stripped(ids: Ids, special: frozenset[int]) -> Ids:
    end = len(ids)
    while end and ids[end - 1] in special:
        end -= 1
    return ids[:end]


def _pair(ids: Ids, trained: Sequence[bool] | None, bos: Ids, special: frozenset[int]) -> TokenPair | None:
    """The first answer trained on and what comes before it. A text trained on from its beginning is one running text."""
    spans, at = [], 0
    for is_trained, group in groupby([True] * len(ids) if trained is None else trained):
        n = len(list(group))
        spans += [(at, at + n)] if is_trained else []
        at += n
    if not spans:
        return None
    first, begin = spans[0], 0
    if not without_bos(ids[: first[0]], bos):  # no prompt before it
        if special.issuperset(ids[first[1] :]):
            return TokenPair(ids[first[0] : first[1]], None)
        if len(spans) == 1:
            return None
        begin, first = first[1], spans[1]  # packing has cut off the beginning of its row
    start, end = first
    return TokenPair(ids[begin:start], ids[start:end], ids[end:])


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Ids, list[bool] | None]]:
    """Yield the texts in a row, each with the mask of tokens that are trained on, if the row has one."""
    ids = _ids(row, "input_ids")
    n = len(ids)

    def column(name: str) -> list[Any] | None:
        """The values of a column, if it has one for each token."""
        values = _flat(row.get(name))
        return values if isinstance(values, list) and len(values) == n and not any(isinstance(v, list) for v in values) else None

    mask, labels = column("attention_mask"), column("labels")
    masks = [one for one in (column("completion_mask"), column("assistant_masks")) if one is not None]
    trained = None
    if labels is not None:
        trained = [label != _IGNORED for label in labels]
    elif masks:
        trained = [all(bits) for bits in zip(*masks, strict=True)]
    starts = {0, n}
    for numbers in (mask if mask and max(mask) > 1 else None, column("seq_idx")):  # both may number the texts of a packed row
        starts |= {i for i in range(1, n) if numbers is not None and numbers[i] != numbers[i - 1]}
    lengths = _flat(row.get("seq_lengths"))
    if lengths and sum(lengths) <= n:
        starts |= set(accumulate(lengths))
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        starts |= {end for end in _flat(row.get(name) or []) if 0 <= end <= n}
    if (positions := column("position_ids")) is not None:
        starts |= {i for i in range(1, n) if positions[i] <= positions[i - 1]}
    bounds, mask = sorted(starts), mask or _no_padding(ids, tokenizer)
    for start, end in pairwise(bounds):
        kept = [i for i in range(start, end) if mask[i]]
        if kept:
            yield tuple(ids[i] for i in kept), None if trained is None else [trained[i] for i in kept]


def _no_padding(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Make a mask that leaves out padding at both ends. If EOS is the padding token, one EOS stays."""
    pad, n = tokenizer.pad_token_id, len(ids)
    first = next((i for i in range(n) if ids[i] != pad), n)
    end = next((i for i in range(n, first, -1) if ids[i - 1] != pad), first)
    return [first <= i < end + (pad == tokenizer.eos_token_id) for i in range(n)]


def _ids(row: Row, name: str) -> Ids:
    """Token ids of a column. Empty if the column is missing.

    Raises:
        DataError: if the column holds something else.

    """
    ids = _flat(row.get(name, []))
    if not (isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)):
        raise DataError(f"{name} holds {ids!r:.100}; allowed are token ids, whole numbers from 0.")
    return tuple(ids)


def _flat(values: Any) -> Any:
    """Unwrap a batch of one row."""
    return values[0] if isinstance(values, list) and len(values) == 1 and isinstance(values[0], list) else values
