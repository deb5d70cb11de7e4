"""From any dataset format that TRL accepts to pairs of prompt and answer.

Formats (TRL's names): language modelling (`text`, `messages`), prompt-completion, preference with explicit or implicit prompt
(`chosen` counts), unpaired preference (rows with a true `label` count), each plain or conversational; also ShareGPT's
`conversations`, and the tokenised columns that a trainer leaves behind. To a prompt alone, as reinforcement learning has it, a
text under `solution` or `answer` is the reference answer.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
_REFERENCES = ("solution", "answer")  # a worked solution before a bare result, where a row has both
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
Source = str | Path | Iterable[Row]
"""A JSON-lines file (`.jsonl`, `.jsonl.gz`) or JSON list (`.json`), a `datasets.Dataset`, or a list of rows."""

FORMATS = "text; messages; prompt + completion; prompt + chosen + rejected; chosen + rejected; prompt + completion + label"


@dataclass(frozen=True)
class TextPair:
    """A prompt and its answer as texts; `answer` is None where the row is one running text."""

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class TokenPair:
    """A prompt and its answer as token ids; `answer` is None where the row is one running text."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None


Pair = TextPair | TokenPair


def read_rows(source: Source, field: str) -> Sequence[Row]:
    """The rows of a file, data set or list.

    Args:
        source: where they are.
        field: what to call it in errors, such as `domains['law']`.

    Raises:
        DataError: if the file is missing, is not JSON, or holds no rows.

    """
    rows: Sequence[Row]
    if isinstance(source, (str, Path)):
        rows = _read_file(Path(source), field)
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, Mapping):
        rows = source  # type: ignore[assignment]  # a list, or a data set, which has all that is used of a sequence
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):  # a DatasetDict is one, of splits
        rows = list(source)
    else:
        raise DataError(f"{field}: got {type(source).__name__}; allowed are a file, a datasets.Dataset or a list of rows.")
    if len(rows) == 0:
        raise DataError(f"{field}: there are no rows in {_shown(source)}; give at least a few dozen.")
    return rows


def _shown(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else type(source).__name__


def _read_file(path: Path, field: str) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{field}: there is no file {path}; give JSON lines (.jsonl, .jsonl.gz) or a JSON list (.json).")
    try:
        return _parsed_file(path, field)
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"{field}: {path} cannot be read as UTF-8 text, nor by .gz as such compressed ({error!r}).") from error


def _parsed_file(path: Path, field: str) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        if path.suffix == ".json":
            try:
                rows = json.load(lines)
            except json.JSONDecodeError as error:
                raise DataError(f"{field}: {path} is not a JSON list ({error}); JSON lines go by .jsonl.") from error
        else:
            rows = []
            for number, line in enumerate(lines, 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except json.JSONDecodeError as error:
                    raise DataError(f"{field}: {path}, line {number} is not JSON ({error}).") from error
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise DataError(f"{field}: {path} must hold one JSON object a row with columns {FORMATS}.")
    return rows


def read_pairs(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, field: str) -> list[Pair]:
    """Turn rows into pairs; rows that hold no text are left out.

    Raises:
        DataError: if the columns fit no format, or a conversation meets a tokenizer without a chat template.

    """
    pairs = (_pair(row, tokenizer, field) for row in rows)
    return [pair for pair in pairs if pair is not None and pair.prompt and (pair.answer is None or pair.answer)]


def are_prompts_only(source: Source) -> bool:
    """Whether rows are prompts for a policy to answer, without reference answers; the first one tells."""
    row: Row = {} if isinstance(source, (str, Path)) else next(iter(source), {})
    answered = {"completion", "chosen", "messages", "conversations", "text", "input_ids", "prompt_ids"}
    return "prompt" in row and answered.isdisjoint(row) and _reference(row) is None


def _reference(row: Row) -> str | None:
    """The reference answer of a prompt, if it is a text; numbers, test cases and the like answer nobody."""
    return next((row[name] for name in _REFERENCES if row.get(name) and isinstance(row[name], str)), None)


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, field: str) -> Pair | None:
    if not {"input_ids", "prompt_ids", "chosen_ids"}.isdisjoint(row):
        return _tokenised(row)
    known = _normalised(row, field)
    if known is None:
        return None
    used = [known[name] for name in (("prompt", "completion") if "completion" in known else ("text",)) if known[name] is not None]
    if not (all(isinstance(value, str) for value in used) or all(isinstance(value, list) for value in used)):
        raise DataError(f"{field}: a row holds {used!r:.200}; allowed are texts, or lists of messages.")
    if "completion" not in known:
        return TextPair(known["text"], None)
    if isinstance(known["prompt"], str):
        return TextPair(known["prompt"], known["completion"])
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{field}: the rows are conversations, but the tokenizer has no chat template; set tokenizer.chat_template "
            "or give plain prompt and completion columns."
        )
    from trl.data_utils import apply_chat_template

    tools = known.get("tools")
    example: dict[str, Any] = {name: known[name] for name in ("prompt", "completion")}
    example["chat_template_kwargs"] = known.get("chat_template_kwargs") or {}
    done = apply_chat_template(example, tokenizer, json.loads(tools) if isinstance(tools, str) else tools)
    return TextPair(done["prompt"], done["completion"])


def _normalised(raw: Row, field: str) -> dict[str, Any] | None:
    """The row with `text`, or with `prompt` and `completion`; None for a rejected one of an unpaired preference."""
    from trl.data_utils import extract_prompt, maybe_convert_to_chatml

    row: dict[str, Any] = maybe_convert_to_chatml(copy.deepcopy(dict(raw)))  # it renames in place
    for message in row.get("messages") or ():
        message["role"] = _SHAREGPT_ROLES.get(message["role"], message["role"])
    keys = set(row)
    if "messages" in keys:
        last = max((i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"), default=None)
        if not last or row["messages"][last - 1]["role"] == "system":
            raise DataError(f"{field}: a conversation has no assistant message after a user's; nothing answers it.")
        return {**row, "prompt": row["messages"][:last], "completion": [row["messages"][last]]}
    if {"prompt", "completion"} <= keys:
        return row if row.get("label", True) and row["completion"] is not None else None
    if {"chosen", "rejected"} <= keys:
        if not (row["chosen"] and row["rejected"]):
            return None
        row = row if "prompt" in keys else {**row, **extract_prompt(row)}
        return {**row, "completion": row["chosen"]}
    if "text" in keys:
        return row
    if "prompt" in keys and (reference := _reference(row)) is not None:
        is_text = isinstance(row["prompt"], str)
        return {**row, "completion": reference if is_text else [{"role": "assistant", "content": reference}]}
    if "prompt" in keys and not keys.isdisjoint(_REFERENCES) and not any(row.get(name) for name in _REFERENCES):
        return None
    if "prompt" in keys:
        raise DataError(
            f"{field}: the rows have prompts but no answers (columns {sorted(keys)}); add a completion column with a "
            "reference answer. With GRPO and RLOO, reward_funcs=callback.tap(reward_funcs) takes the model's own best."
        )
    raise DataError(f"{field}: columns {sorted(keys)} fit no format; allowed are {FORMATS}.")


def _tokenised(row: Row) -> TokenPair | None:
    """A row as a trainer tokenised it: labels or masks over `input_ids`, or the ids of preference trainers."""
    if "input_ids" in row:
        ids = _ids(row["input_ids"])
        if "labels" in row:
            answers = [label != -100 for label in row["labels"]]
        else:
            answers = [bool(m) for m in row.get("completion_mask") or row.get("assistant_masks") or [True]]
        n_prompt = answers.index(True) if True in answers else len(ids)
        return TokenPair(ids[:n_prompt], ids[n_prompt:]) if n_prompt else TokenPair(ids, None)
    if "prompt_ids" not in row:  # a reward trainer's: both answers still stand behind their prompt
        chosen, rejected = _ids(row["chosen_ids"]), _ids(row["rejected_ids"])
        n_prompt = len(list(takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))))
        return TokenPair(chosen[:n_prompt], chosen[n_prompt:]) if n_prompt else TokenPair(chosen, None)
    answer = row["chosen_ids"] if "chosen_ids" in row else row.get("completion_ids", ())
    return TokenPair(_ids(row["prompt_ids"]), _ids(answer)) if len(answer) and row.get("label", True) else None


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    """Token ids from a list or a tensor."""
    return tuple(int(value) for value in values)
