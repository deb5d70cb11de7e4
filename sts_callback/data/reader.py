"""Read rows from any source as pairs of prompt and answer. Rows that cannot be used are left out and counted.

`data.formats` reads rows that hold text, `data.tokens` rows that a trainer has tokenised. If a row has both, its tokens are what
is trained on. If they do not show where the answer begins, the text does.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_callback.data.chat import ChatTemplate
from sts_callback.data.formats import FORMATS, Words, in_words, is_empty, reference
from sts_callback.data.pairs import NoExampleError, Pair, Row, TextPair
from sts_callback.data.tokens import aligned, bos_tokens, preference_pair, special_ids, token_pairs
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | Path | Iterable[Row]
"""A JSON-lines file (`.jsonl`, `.jsonl.gz`) or JSON list (`.json`), a `datasets.Dataset`, a list of rows, or a stream of them."""

STREAM_ROWS = 2000
"""Rows that are read of a stream. Our choice: many times what probes need, and read in seconds."""
MOST_READ = 20_000
"""The most rows that are searched for usable ones. Our choice."""
_FILES = "JSON lines (.jsonl, .jsonl.gz) or a JSON list (.json)"
_SOURCES = "a file, a datasets.Dataset or a list of rows"
_FROM_TABLES = {
    "pandas": "give datasets.Dataset.from_pandas(table)",
    "polars": "give datasets.Dataset.from_polars(table)",
    "pyarrow": "give table.to_pylist()",
}
_MEDIA = ("image", "images", "audio", "audios", "video", "videos", "pixel_values", "input_features")
_IDS = ("input_ids", "prompt_ids", "chosen_ids")
_OF_TRAINERS = {
    *_IDS,
    *("labels", "attention_mask", "completion_mask", "assistant_masks", "seq_lengths", "position_ids", "seq_idx"),
    *("cu_seqlens", "cu_seq_lens_q", "rejected_ids", "completion_ids", "KL_completion_ids", "token_type_ids"),
}


class StreamSample(list[Row]):
    """The first rows of a stream, which replace the stream."""


@dataclass(frozen=True)
class Example:
    """One example from a row."""

    pair: Pair
    written: str
    """The source text as JSON, or the token ids if there is no text. It does not change with time or versions."""


def read_rows(source: Source, field: str) -> Sequence[Row]:
    """Read the rows of a file, data set or list; of a stream, the first `STREAM_ROWS`.

    Args:
        source: where the rows are.
        field: what to call the source in errors, such as `domains['law']`.

    Raises:
        DataError: if the file is missing, is not JSON, or holds no rows.

    """
    _require_source(source, field)
    rows: Sequence[Row]
    if isinstance(source, (str, Path)):
        rows = _read_file(Path(source), field)
    elif is_sequence(source):
        rows = _unformatted(source)
    else:
        rows = StreamSample(islice(_unformatted(source), STREAM_ROWS))
    if len(rows) == 0:
        raise DataError(f"{field}: there are no rows in {_shown(source)}; give at least a few dozen.")
    first = _first(rows)
    if isinstance(first, Mapping) or _are_packed(first):
        return rows
    seen = "" if first is None else f" (the first is {first!r:.80})"
    raise DataError(f"{field}: {_shown(source)} has no rows with columns{seen}; allowed are {_SOURCES}.")


def held(source: Source, field: str) -> Source:
    """Read an iterator now, as it can be read only once. Any other source is returned as it is if it can hold rows."""
    _require_source(source, field)
    return read_rows(source, field) if isinstance(source, Iterator) else source


def _require_source(source: Any, field: str) -> None:
    """Refuse a source that cannot hold rows. Nothing is read yet."""
    kind = type(source)
    if hasattr(kind, "columns"):  # indexed by a number, a table gives a column, or a table of one row
        library = kind.__module__.partition(".")[0]
        remedy = _FROM_TABLES.get(library, "make a list of rows of it")
        raise DataError(f"{field}: got a {kind.__name__} of {library}; allowed are {_SOURCES}: {remedy}.")
    is_source = isinstance(source, (str, Path, Iterable)) or is_sequence(source)
    is_unnamed = isinstance(source, str) and not source
    if not is_source or is_unnamed or isinstance(source, Mapping):  # a DatasetDict is a mapping of splits
        raise DataError(f"{field}: got {type(source).__name__}; allowed are {_SOURCES}.")


def is_sequence(source: Any) -> bool:
    """Whether a source can be indexed by row number. A stream cannot."""
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _are_packed(row: Any) -> bool:
    """Whether it is a list of rows, which is how ms-swift packs them."""
    return isinstance(row, list) and bool(row) and all(isinstance(one, Mapping) for one in row)


def _first(rows: Sequence[Row]) -> Any:
    try:
        return rows[0]
    except (LookupError, TypeError):  # rows have other indices, or none
        return None


def _unformatted(source: Any) -> Any:
    """A data set that gives plain lists, whatever its format. One with a transform is kept: it makes its own rows."""
    form = getattr(source, "format", None)
    if isinstance(form, Mapping) and form.get("type") not in (None, "python", "custom"):
        return source.with_format(None)
    return source


def _shown(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _read_file(path: Path, field: str) -> list[Row]:
    if not os.path.isfile(path):  # false also for a name that is too long
        raise DataError(f"{field}: there is no file {path}; give {_FILES}.")
    try:
        return _parsed_file(path, field)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{field}: {path} cannot be read as UTF-8 text, nor by .gz as such compressed ({error}); give {_FILES}."
        ) from error


def _parsed_file(path: Path, field: str) -> list[Row]:
    encoding = "utf-8-sig"  # some programs write a byte order mark first
    with gzip.open(path, "rt", encoding=encoding) if path.suffix == ".gz" else path.open(encoding=encoding) as lines:
        if path.suffix == ".json":
            text = lines.read()
            try:
                rows = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{field}: {path} is not a JSON list ({error}); JSON lines go by .jsonl.") from error
        else:
            rows = []
            for number, line in enumerate(lines, 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{field}: {path}, line {number} is not JSON ({error}); give {_FILES}.") from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        other = next(row for row in rows if not isinstance(row, Mapping)) if isinstance(rows, list) else rows
        raise DataError(f"{field}: {path} must hold one JSON object a row with columns {FORMATS}; it holds {other!r:.80}.")
    return rows


def are_prompts_only(source: Source) -> bool:
    """Whether rows are prompts for a policy, without reference answers. The first row decides."""
    row: Row = {} if isinstance(source, (str, Path)) else next(iter(source), {})
    answered = {"completion", "chosen", "messages", "conversations", "text", "input_ids", "prompt_ids"}
    return "prompt" in row and answered.isdisjoint(row) and reference(row) is None


class RowReader:
    """Read rows one by one and count those that are left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, field: str, *, as_chat: bool = False) -> None:
        """Start with no row read.

        Args:
            tokenizer: the user's; not altered.
            field: what to call the rows in errors, such as `domains['law']`.
            as_chat: whether plain prompts and answers are put into the chat template.

        """
        self._tokenizer, self._field, self._as_chat = tokenizer, field, as_chat
        self.n_read = 0
        self.left_out: Counter[str] = Counter()
        """Number of rows that could not be used, by reason."""
        self.error: DataError | None = None
        """The error of the first row whose format is wrong."""
        self.n_plain, self.n_in_part = 0, 0
        """Number of rows that have a form of their own in chat templates and were asked as plain text: without a template, or in
        one that leaves out part of that form."""
        self._columns: set[str] = set()
        self._read_columns: set[str] = set()

    @property
    def unread(self) -> tuple[str, ...]:
        """Columns that are not used."""
        return tuple(sorted(self._columns - self._read_columns))

    def examples(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Example]:
        """Yield the examples in numbered rows. No more rows are read than the caller takes."""
        each: Iterator[tuple[int, Any]] = ((i, one) for i, row in rows for one in (row if _are_packed(row) else [row]))
        for number, row in islice(each, MOST_READ):
            self.n_read += 1
            try:
                found = self._read(row)
            except (NoExampleError, DataError) as error:
                self.left_out[str(error)] += 1
                if isinstance(error, DataError) and self.error is None:
                    self.error = DataError(f"{self._field}: {error} The first such row that was read is number {number}.")
                continue
            yield from found

    def _read(self, row: Row) -> list[Example]:
        try:
            return self._examples(row)
        except (NoExampleError, DataError):
            raise
        except Exception as error:  # values may be of any type
            raise DataError(f"a row cannot be read ({error!r:.100}): {row!r:.200}; allowed are {FORMATS}.") from error

    @cached_property
    def _bos(self) -> tuple[int, ...]:
        return bos_tokens(self._tokenizer)

    @cached_property
    def _special(self) -> frozenset[int]:
        return special_ids(self._tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    def _examples(self, raw: Row) -> list[Example]:
        if not isinstance(raw, Mapping):
            raise DataError(f"a row is {raw!r:.100}; allowed are columns {FORMATS}.")
        self._columns |= set(raw)
        for name in _MEDIA:
            if not is_empty(raw.get(name)):
                raise NoExampleError(f"it holds {name}, which we do not read (column {name})")
        row = {name: plain for name, value in raw.items() if (plain := _plain(value)) is not None}
        if all(name not in row for name in _IDS):
            words = in_words(row)
            self._read_columns |= words.columns
            return [Example(_told(self._rendered(words)), words.written(as_chat=self._as_chat))]
        self._read_columns |= _OF_TRAINERS
        pairs = token_pairs(row, self._tokenizer, self._bos, self._special) if "input_ids" in row else [preference_pair(row)]
        said = self._in_words(row)
        if said is None or len(pairs) > 1:
            return [Example(_told(pair), json.dumps([pair.prompt, pair.answer])) for pair in pairs]
        words, text = said
        (pair,) = pairs
        is_untold = pair.answer is None or ("prompt_ids" not in row and "input_ids" not in row)  # a reward trainer has two
        if is_untold:
            pair = aligned(pair.prompt + (pair.answer or ()), text, self._tokenizer, self._bos, self._special) or pair
        return [Example(_told(pair), words.written(as_chat=False))]

    def _in_words(self, row: dict[str, Any]) -> tuple[Words, TextPair] | None:
        """The text of a tokenised row, if the trainer has kept it beside the tokens."""
        try:
            words = in_words({name: value for name, value in row.items() if name not in _OF_TRAINERS})
            text = self._rendered(words, as_chat=False)
        except (NoExampleError, DataError):
            return None
        self._read_columns |= words.columns
        return words, text

    def _rendered(self, words: Words, *, as_chat: bool | None = None) -> TextPair:
        """Render a row as the trainer would."""
        prompt, answer = words.prompt, words.answer
        if isinstance(prompt, str) and isinstance(answer, str):
            if not (self._as_chat if as_chat is None else as_chat) or self._template.marker in prompt:
                self.n_plain += words.chat is not None
                return TextPair(prompt, answer)
            if words.chat is not None:
                return self._in_own_form(words.chat, prompt.strip(), answer.strip())
            prompt, answer = [{"role": "user", "content": prompt.strip()}], [{"role": "assistant", "content": answer.strip()}]
        if isinstance(prompt, str):
            return TextPair(prompt, None)
        assert isinstance(answer, list)
        return self._template.pair(prompt, answer, words.rest, words.options)

    def _in_own_form(self, chat: Words, prompt: str, answer: str) -> TextPair:
        """Render a plain row as it says that it is asked in a chat template, or as text where the template cannot."""
        assert isinstance(chat.prompt, list) and isinstance(chat.answer, list)
        pair = self._template.whole_pair(chat.prompt, chat.answer, chat.options)
        if pair is None:
            self.n_in_part += 1
            pair = self._template.text_pair(prompt, answer, {**chat.options, "tools": None})
        return pair


def _told(pair: Pair) -> Pair:
    """Return the pair, if neither prompt nor answer is empty."""
    if not pair.prompt:
        raise NoExampleError("its prompt is empty")
    if pair.answer is not None and not pair.answer:
        raise NoExampleError("its answer is empty")
    return pair


def _plain(value: Any) -> Any:
    """Convert tensors, arrays and series to lists. Null fields of a message are dropped."""
    if isinstance(value, Mapping):
        return {key: plain for key, one in value.items() if (plain := _plain(one)) is not None}
    if isinstance(value, (list, tuple)):
        return list(value) if value and type(value[0]) is int else [_plain(one) for one in value]
    for method in ("tolist", "to_list"):  # of tensors, arrays and scalars; of series of polars
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    return value
