"""Read rows that hold text, in every format that TRL takes, in ShareGPT's and in Alpaca's: prompt, first answer and later turns.

Formats (TRL's names): language modelling (`text`, `messages`), prompt-completion, preference with explicit or implicit prompt
(`chosen` is the answer), unpaired preference (rows whose `label` is true), each plain or conversational; ShareGPT's
`conversations` with `system` and `tools`; and Alpaca's `instruction`, `input` and `output` with `system` and `history`, which
are read as a conversation, as the frameworks that take them train on them. A plain row may say in a column `chat`, itself a row
with `messages`, how it is asked in a chat template: so do the shipped domains of reasoning and of calls, for which templates
have a form of their own. Where a row has only a prompt, as in reinforcement learning, the text in `solution` or `answer` is the
reference answer. If a conversation has several turns, the first one that answers a user is the answer. Each row gives one
example, so that examples are independent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

from sts_callback.data.pairs import NoExampleError, Row
from sts_callback.data.tokens import n_common
from sts_callback.errors import DataError

FORMATS = (
    "text; messages or conversations; prompt + completion (+ label); prompt + answer or solution; prompt + chosen + rejected; "
    "chosen + rejected; instruction (+ input) + output"
)
_REFERENCES = ("solution", "answer")  # a worked solution before a bare result, where a row has both
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Words:
    """A prompt and its answer as someone wrote them, as plain text or as messages."""

    columns: frozenset[str]
    """Columns that were read."""
    prompt: str | Messages
    answer: str | Messages | None
    """None if the row is one running text, which is then the prompt."""
    rest: Messages
    """Later turns."""
    options: Mapping[str, Any]
    """Options for the chat template."""
    chat: Words | None = None
    """How a plain row is asked in a chat template, if it says so."""

    def written(self, *, as_chat: bool) -> str:
        """Everything as JSON."""
        content = [self.prompt, self.answer, self.rest, self.options, as_chat]
        content += [] if self.chat is None else [self.chat.written(as_chat=True)]
        return json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)


def in_words(row: Row) -> Words:
    """Read a row.

    Args:
        row: its columns as plain values, without those that are null.

    Raises:
        NoExampleError: if it holds no answer, or a rejected one.
        DataError: if its columns fit no format.

    """
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list):
            turns = _messages(row[name])
            first = _first_answer(turns)
            return _words(row, {name}, turns[:first], turns[first : first + 1], turns[first + 1 :])
    if {"prompt", "completion"} <= set(row):
        if row.get("label") is False:  # if `label` is a number or a text, the column means something else
            raise NoExampleError("its answer is rejected (column label is false)")
        is_label = isinstance(row.get("label"), bool)
        found = _words(row, {"prompt", "completion", *(["label"] if is_label else [])}, row["prompt"], row["completion"])
        chat = row.get("chat")
        if isinstance(found.prompt, str) and isinstance(chat, Mapping) and "messages" in chat:
            return replace(found, columns=found.columns | {"chat"}, chat=in_words(chat))
        return found
    if {"prompt", "chosen"} <= set(row) and isinstance(row["prompt"], str) == isinstance(row["chosen"], str):
        return _words(row, {"prompt", "chosen", "rejected"}, row["prompt"], row["chosen"])
    if {"chosen", "rejected"} <= set(row):
        chosen, rejected = row["chosen"], row["rejected"]
        n = n_common(chosen, rejected) if chosen and rejected else 0
        if isinstance(chosen, str) and n and chosen[n - 1] == " ":  # the space belongs to the answer, as in TRL
            n -= 1
        return _words(row, {"chosen", "rejected"}, chosen[:n], chosen[n:])
    if "text" in row:
        return _words(row, {"text"}, row["text"], None)  # where Alpaca's rows have it too, it is the text that TRL trains on
    if {"instruction", "output"} <= set(row):
        return _words(row, {"instruction", "input", "output", "history"}, *_alpaca(row))
    if "prompt" in row and (answer := reference(row)) is not None:
        is_text = isinstance(row["prompt"], str)
        given = {next(name for name in _REFERENCES if row.get(name) == answer)}
        return _words(row, {"prompt", *given}, row["prompt"], answer if is_text else [{"role": "assistant", "content": answer}])
    if "prompt" in row:
        raise DataError(
            f"the rows have prompts but no answers (columns {sorted(row)}); add a completion column with a "
            "reference answer. With GRPO and RLOO, reward_funcs=callback.tap(reward_funcs) takes the model's own best."
        )
    raise DataError(f"columns {sorted(row)} fit no format; allowed are {FORMATS}.")


def reference(row: Row) -> str | None:
    """The reference answer to a prompt, if it is a text. Numbers, test cases and the like are no answers."""
    return next((row[name] for name in _REFERENCES if row.get(name) and isinstance(row[name], str)), None)


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing."""
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def _words(row: Row, columns: set[str], prompt: Any, answer: Any, rest: Messages | None = None) -> Words:
    """Check the row's content, plain or conversational."""
    if isinstance(prompt, str) and (answer is None or isinstance(answer, str)):
        return Words(frozenset(columns), prompt, answer, [], {})
    if not (isinstance(prompt, list) and isinstance(answer, list)):
        used = [one for one in (prompt, answer) if one is not None]
        raise DataError(f"a row holds {used!r:.200}; allowed are texts, or lists of messages.")
    prompt, answer = _messages(prompt), _messages(answer)
    if prompt and prompt[0]["role"] != "system":
        prompt = [*_system(row), *prompt]
    if not any(value for message in answer for name, value in message.items() if name != "role"):
        raise NoExampleError("its answer is empty")
    if not prompt:
        raise NoExampleError("its prompt is empty")
    options = {**row.get("chat_template_kwargs", {}), "tools": _tools(row.get("tools"))}
    return Words(frozenset({*columns, "system", "tools", "chat_template_kwargs"}), prompt, answer, rest or [], options)


def _tools(tools: Any) -> Any:
    """Tools as chat templates take them. None is not the same as an empty list, for which some templates print instructions."""
    try:
        return (json.loads(tools) if isinstance(tools, str) and tools else tools) or None
    except json.JSONDecodeError as error:
        raise DataError(f"tools: got {tools!r:.100}, which is not JSON ({error}); give a list of functions.") from error


def _alpaca(row: Row) -> tuple[Messages, Messages]:
    """Prompt and answer of an Alpaca row. Earlier turns stand in `history`, as pairs."""
    earlier, asked, answer = row.get("history") or [], [row["instruction"], row.get("input")], row["output"]
    are_pairs = isinstance(earlier, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in earlier)
    said = [*(text for turn in earlier for text in turn), *asked, answer] if are_pairs else [earlier]
    if not (are_pairs and all(text is None or isinstance(text, str) for text in said)):
        raise DataError(
            f"a row of instruction, input and output holds {said!r:.200}; allowed are texts, in history pairs of them."
        )
    if not answer:
        raise NoExampleError("its answer is empty")
    question = "\n".join(text for text in asked if text)
    if not question:
        raise NoExampleError("its prompt is empty")
    turns = [*earlier, [question, answer]]
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    return messages[:-1], messages[-1:]


def _system(row: Row) -> Messages:
    """ShareGPT's system prompt, which has its own column."""
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def _messages(turns: list[Any]) -> Messages:
    """Convert messages to the field names that chat templates know."""
    made = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(role := turn.get("role", turn.get("from")), str):
            raise DataError(f"a conversation holds {turn!r:.100}; allowed are messages with role and content.")
        content = turn.get("content", turn.get("value"))
        for part in content if isinstance(content, list) else ():
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise NoExampleError(f"a message holds content of type {kind}, which we do not read: only text is")
        others = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
        made.append({"role": _SHAREGPT_ROLES.get(role, role), **({} if content is None else {"content": content}), **others})
    return made


def _first_answer(turns: Messages) -> int:
    """Index of the first message that answers a user."""
    for i, message in enumerate(turns):
        others = {before["role"] for before in turns[:i]} - {"system", "developer", "assistant"}
        if message["role"] == "assistant" and others:
            return i
    raise DataError("a conversation has no assistant message after a user's; nothing answers it")
