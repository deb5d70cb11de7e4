"""From rows of any source to pairs of prompt and answer; rows that cannot be used are left out and counted.

What rows say in words is read by `data.formats`, what a trainer has made of them by `data.tokens`. Where a row has both,
its tokens are what is trained on, and its words tell where the answer begins if the tokens do not.
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
from sts_callback.data.tokens import aligned, bos_tokens, preference_pair, token_pairs
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = str | Path | Iterable[Row]
"""A JSON-lines file (`.jsonl`, `.jsonl.gz`) or JSON list (`.json`), a `datasets.Dataset`, a list of rows, or a stream of them."""

STREAM_ROWS = 2000
"""Rows of a stream that stand for it. Our choice: many times what probes need, and read in seconds."""
MOST_READ = 20_000
"""Rows that are looked at in search of usable ones, at most. Our choice."""
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
    """The first rows of a stream, in its place."""


@dataclass(frozen=True)
class Example:
    """One example of a row."""

    pair: Pair
    written: str
    """What a person wrote, or else the row's token ids, as JSON: it is the same at another time and in another version."""


def read_rows(source: Source, field: str) -> Sequence[Row]:
    """The rows of a file, data set or list; of a stream, the first `STREAM_ROWS`.

    Args:
        source: where they are.
        field: what to call it in errors, such as `domains['law']`.

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
    if isinstance(first, Mapping):
        return rows
    seen = "" if first is None else f" (the first is {first!r:.80})"
    raise DataError(f"{field}: {_shown(source)} has no rows with columns{seen}; allowed are {_SOURCES}.")


def held(source: Source, field: str) -> Source:
    """An iterator's rows, as it can be read only once; any other source as it is, if it can hold rows."""
    _require_source(source, field)
    return read_rows(source, field) if isinstance(source, Iterator) else source


def _require_source(source: Any, field: str) -> None:
    """Refuse what can hold no rows; nothing is read yet."""
    kind = type(source)
    if hasattr(kind, "columns"):  # by number a table gives columns, or tables of one row
        library = kind.__module__.partition(".")[0]
        remedy = _FROM_TABLES.get(library, "make a list of rows of it")
        raise DataError(f"{field}: got a {kind.__name__} of {library}; allowed are {_SOURCES}: {remedy}.")
    is_source = isinstance(source, (str, Path, Iterable)) or is_sequence(source)
    is_unnamed = isinstance(source, str) and not source
    if not is_source or is_unnamed or isinstance(source, Mapping):  # a DatasetDict is a mapping, of splits
        raise DataError(f"{field}: got {type(source).__name__}; allowed are {_SOURCES}.")


def is_sequence(source: Any) -> bool:
    """Whether rows can be taken from it by number; a stream has none."""
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _first(rows: Sequence[Row]) -> Any:
    try:
        return rows[0]
    except (LookupError, TypeError):  # it numbers them otherwise, or not at all
        return None


def _unformatted(source: Any) -> Any:
    """A data set with its rows as plain lists, whatever form they are to have; one with a transform has rows of its own."""
    form = getattr(source, "format", None)
    if isinstance(form, Mapping) and form.get("type") not in (None, "python", "custom"):
        return source.with_format(None)
    return source


def _shown(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _read_file(path: Path, field: str) -> list[Row]:
    if not os.path.isfile(path):  # which a name that is too long is not either
        raise DataError(f"{field}: there is no file {path}; give {_FILES}.")
    try:
        return _parsed_file(path, field)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{field}: {path} cannot be read as UTF-8 text, nor by .gz as such compressed ({error}); give {_FILES}."
        ) from error


def _parsed_file(path: Path, field: str) -> list[Row]:
    encoding = "utf-8-sig"  # some programs begin a file with a mark
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
    """Whether rows are prompts for a policy to answer, without reference answers; the first one tells."""
    row: Row = {} if isinstance(source, (str, Path)) else next(iter(source), {})
    answered = {"completion", "chosen", "messages", "conversations", "text", "input_ids", "prompt_ids"}
    return "prompt" in row and answered.isdisjoint(row) and reference(row) is None


class RowReader:
    """Reads rows one by one, and keeps count of those that it leaves out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, field: str, *, as_chat: bool = False) -> None:
        """Begin at nothing read.

        Args:
            tokenizer: the user's; not altered.
            field: what to call the rows in errors, such as `domains['law']`.
            as_chat: whether plain prompts and answers are asked and answered in the chat template.

        """
        self._tokenizer, self._field, self._as_chat = tokenizer, field, as_chat
        self.n_read = 0
        self.left_out: Counter[str] = Counter()
        """Rows, by the reason why they could not be used."""
        self.error: DataError | None = None
        """Of the first row whose form is wrong."""
        self._columns: set[str] = set()
        self._read_columns: set[str] = set()

    @property
    def unread(self) -> tuple[str, ...]:
        """Columns that say nothing to us."""
        return tuple(sorted(self._columns - self._read_columns))

    def examples(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Example]:
        """The examples in rows, which come with their numbers; not more rows are read than are asked for."""
        for number, row in islice(rows, MOST_READ):
            self.n_read += 1
            try:
                found = self._read(row)
            except (NoExampleError, DataError) as error:
                self.left_out[str(error)] += 1
                if isinstance(error, DataError) and self.error is None:
                    self.error = DataError(f"{self._field}: {error} The first such row is number {number}.")
                continue
            yield from found

    def _read(self, row: Row) -> list[Example]:
        try:
            return self._examples(row)
        except (NoExampleError, DataError):
            raise
        except Exception as error:  # of values of all kinds
            raise DataError(f"a row cannot be read ({error!r:.100}): {row!r:.200}; allowed are {FORMATS}.") from error

    @cached_property
    def _bos(self) -> tuple[int, ...]:
        return bos_tokens(self._tokenizer)

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
        pairs = token_pairs(row, self._tokenizer, self._bos) if "input_ids" in row else [preference_pair(row)]
        said = self._in_words(row)
        if said is None or len(pairs) > 1:
            return [Example(_told(pair), json.dumps([pair.prompt, pair.answer])) for pair in pairs]
        words, text = said
        (pair,) = pairs
        is_untold = pair.answer is None or ("prompt_ids" not in row and "input_ids" not in row)  # a reward trainer's two answers
        if is_untold:
            pair = aligned(pair.prompt + (pair.answer or ()), text, self._tokenizer, self._bos) or pair
        return [Example(_told(pair), words.written(as_chat=False))]

    def _in_words(self, row: dict[str, Any]) -> tuple[Words, TextPair] | None:
        """What a tokenised row says in words, if a trainer has left them beside its tokens."""
        try:
            words = in_words({name: value for name, value in row.items() if name not in _OF_TRAINERS})
            text = self._rendered(words, as_chat=False)
        except (NoExampleError, DataError):
            return None
        self._read_columns |= words.columns
        return words, text

    def _rendered(self, words: Words, *, as_chat: bool | None = None) -> TextPair:
        """As the trainer would render it."""
        prompt, answer = words.prompt, words.answer
        if isinstance(prompt, str) and isinstance(answer, str):
            if not (self._as_chat if as_chat is None else as_chat) or self._template.marker in prompt:
                return TextPair(prompt, answer)
            prompt, answer = [{"role": "user", "content": prompt.strip()}], [{"role": "assistant", "content": answer.strip()}]
        if isinstance(prompt, str):
            return TextPair(prompt, None)
        assert isinstance(answer, list)
        return self._template.pair(prompt, answer, words.rest, words.options)


def _told(pair: Pair) -> Pair:
    """The pair, if there is something in it."""
    if not pair.prompt:
        raise NoExampleError("its prompt is empty")
    if pair.answer is not None and not pair.answer:
        raise NoExampleError("its answer is empty")
    return pair


def _plain(value: Any) -> Any:
    """Tensors, arrays and series as lists; what is null in a message is as if it were not there."""
    if isinstance(value, Mapping):
        return {key: plain for key, one in value.items() if (plain := _plain(one)) is not None}
    if isinstance(value, (list, tuple)):
        return list(value) if value and type(value[0]) is int else [_plain(one) for one in value]
    for method in ("tolist", "to_list"):  # of tensors, arrays and scalars; of polars' series
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    return value
