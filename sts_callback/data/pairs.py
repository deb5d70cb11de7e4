"""An example: a prompt and its answer, as texts or as token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TextPair:
    """A prompt and its answer as texts. `answer` is None if the row is one running text."""

    prompt: str
    answer: str | None
    rest: str = field(default="", compare=False)
    """Later turns of the same conversation."""

    @property
    def is_glued(self) -> bool:
        """Whether the answer begins in the middle of a word or sentence, since nothing separates it from the prompt."""
        before, after = self.prompt[-1:], (self.answer or "")[:1]
        return before.isascii() and (before.isalnum() or before in tuple(".,:;?!")) and after.isascii() and after.isalnum()


@dataclass(frozen=True)
class TokenPair:
    """A prompt and its answer as token ids. `answer` is None if the row is one running text."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None
    rest: tuple[int, ...] = field(default=(), compare=False)
    """What follows: later turns, or tokens that are not trained on."""


Pair = TextPair | TokenPair


class NoExampleError(Exception):
    """A row of a known format holds no example; the message says why."""
