"""What rows say in words: every format that TRL takes, and ShareGPT's, as a prompt, its first answer and what follows.

Formats (TRL's names): language modelling (`text`, `messages`), prompt-completion, preference with explicit or implicit prompt
(`chosen` counts), unpaired preference (rows with a true `label` count), each plain or conversational; and ShareGPT's
`conversations` with `system` and `tools`. To a prompt alone, as reinforcement learning has it, a text under `solution` or
`answer` is the reference answer. Of several turns the first that answers something is the answer: one example a row, so that
examples do not know of one another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

from sts_callback.data.pairs import NoExampleError, Row
from sts_callback.data.tokens import n_common
from sts_callback.errors import DataError

FORMATS = "text; messages; prompt + completion; prompt + chosen + rejected; chosen + rejected; prompt + completion + label"
_REFERENCES = ("solution", "answer")  # a worked solution before a bare result, where a row has both
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Words:
    """A prompt and its answer as a person wrote them, plain or as messages."""

    columns: frozenset[str]
    """That were read."""
    prompt: str | Messages
    answer: str | Messages | None
    """None if the prompt is one running text."""
    rest: Messages
    """Later turns."""
    options: Mapping[str, Any]
    """For the chat template."""

    def written(self, *, as_chat: bool) -> str:
        """All of it as JSON."""
        content = [self.prompt, self.answer, self.rest, self.options, as_chat]
        return json.dumps(content, sort_keys=True, default=str, ensure_ascii=False)


def in_words(row: Row) -> Words:
    """What a row says.

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
        if row.get("label") is False:  # a number or a name is a column of another meaning
            raise NoExampleError("its answer is rejected (column label is false)")
        is_label = isinstance(row.get("label"), bool)
        return _words(row, {"prompt", "completion", *(["label"] if is_label else [])}, row["prompt"], row["completion"])
    if {"prompt", "chosen"} <= set(row) and isinstance(row["prompt"], str) == isinstance(row["chosen"], str):
        return _words(row, {"prompt", "chosen", "rejected"}, row["prompt"], row["chosen"])
    if {"chosen", "rejected"} <= set(row):
        chosen, rejected = row["chosen"], row["rejected"]
        n = n_common(chosen, rejected) if chosen and rejected else 0
        if isinstance(chosen, str) and n and chosen[n - 1] == " ":  # the blank goes with the answer, as TRL cuts it
            n -= 1
        return _words(row, {"chosen", "rejected"}, chosen[:n], chosen[n:])
    if "text" in row:
        return _words(row, {"text"}, row["text"], None)
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
    """The reference answer of a prompt, if it is a text; numbers, test cases and the like answer nobody."""
    return next((row[name] for name in _REFERENCES if row.get(name) and isinstance(row[name], str)), None)


def is_empty(value: Any) -> bool:
    """Whether there is nothing in a column."""
    return value is None or (isinstance(value, Sized) and len(value) == 0)


def _words(row: Row, columns: set[str], prompt: Any, answer: Any, rest: Messages | None = None) -> Words:
    """Plain or conversational, checked."""
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
    """As chat templates take them; none is not an empty list, for which some print their instructions."""
    try:
        return (json.loads(tools) if isinstance(tools, str) and tools else tools) or None
    except json.JSONDecodeError as error:
        raise DataError(f"tools: got {tools!r:.100}, which is not JSON ({error}); give a list of functions.") from error


def _system(row: Row) -> Messages:
    """ShareGPT's system prompt, which stands in a column of its own."""
    system = row.get("system")
    return [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []


def _messages(turns: list[Any]) -> Messages:
    """Messages with the names that chat templates know."""
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
    """Where the first answer to somebody stands."""
    for i, message in enumerate(turns):
        others = {before["role"] for before in turns[:i]} - {"system", "developer", "assistant"}
        if message["role"] == "assistant" and others:
            return i
    raise DataError("a conversation has no assistant message after a user's; nothing answers it")
