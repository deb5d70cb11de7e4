"""Render conversations with the model's chat template."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sts_callback.data.pairs import TextPair
from sts_callback.data.tokens import n_common
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

Message = Mapping[str, Any]
_WORD = "zqxj"  # no template contains it


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """Get a processor's tokenizer, with the processor's chat template if it has one. A tokenizer is returned as it is."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(processing_class, "tokenizer", None)
    if isinstance(processing_class, PreTrainedTokenizerBase) or tokenizer is None:  # some tokenizers contain another one
        return processing_class  # type: ignore[return-value]
    found: PreTrainedTokenizerBase = tokenizer
    if template := getattr(processing_class, "chat_template", None):
        found = copy.copy(found)  # the user's tokenizer stays as it is
        found.chat_template = template
    return found


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Find the template.

        Raises:
            DataError: if there is none.

        """
        from transformers import PreTrainedTokenizerBase

        self._tokenizer = tokenizer
        self.source = getattr(tokenizer, "chat_template", None)
        if not self.source:
            kind = type(tokenizer)
            if kind.apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
                raise DataError(
                    f"the rows are conversations, and {kind.__name__} has no chat template but renders them by itself, which "
                    "cannot be split into prompt and answer; give rows that it has tokenised (input_ids with labels, -100 before "
                    "the answer), or plain prompt and completion columns."
                )
            raise DataError(
                "the rows are conversations, but the tokenizer has no chat template; set tokenizer.chat_template (or the "
                "processor's), or give plain prompt and completion columns."
            )

    def pair(
        self, prompt: Sequence[Message], answer: Sequence[Message], rest: Sequence[Message], options: Mapping[str, Any]
    ) -> TextPair:
        """Render prompt, answer and later turns as trainers do. The answer is what follows the rendered prompt.

        Raises:
            DataError: if the template fails.

        """
        asked, whole = self._rendered(prompt, options, add_generation_prompt=True), self._rendered([*prompt, *answer], options)
        n = n_common(asked, whole)
        full = self._rendered([*prompt, *answer, *rest], options) if rest else whole
        return TextPair(asked[:n], whole[n:], full[len(whole) :] if full.startswith(whole) else "")

    def whole_pair(self, prompt: Sequence[Message], answer: Sequence[Message], options: Mapping[str, Any]) -> TextPair | None:
        """As `pair`; None if the template fails, or leaves out reasoning, a tool or part of a call."""
        try:
            pair = self.pair(prompt, answer, (), options)
        except DataError:
            return None
        tools = [tool["function"]["name"] for tool in options.get("tools") or ()]
        said = [text for message in answer for text in _said(message)]
        is_whole = all(name in pair.prompt for name in tools) and all(text in (pair.answer or "") for text in said)
        return pair if is_whole else None

    def text_pair(self, prompt: str, answer: str, options: Mapping[str, Any]) -> TextPair:
        """Ask a plain text. The answer stays whole where the template would cut its reasoning off, then without the turn's end.

        Raises:
            DataError: if the template fails.

        """
        asked = [{"role": "user", "content": prompt}]
        pair = self.pair(asked, [{"role": "assistant", "content": answer}], (), options)
        if answer in (pair.answer or ""):
            return pair
        opened = self._rendered(asked, options, add_generation_prompt=True)
        n = next(n for n in range(len(answer), -1, -1) if opened.endswith(answer[:n]))  # the template begins the reasoning itself
        return TextPair(opened, answer[n:])

    @cached_property
    def marker(self) -> str:
        """What the template puts between a question and its answer. It shows whether the template has rendered a text."""
        question, answer = [{"role": "user", "content": _WORD}], [{"role": "assistant", "content": _WORD}]
        pair = self.pair(question, answer, (), {})
        return pair.prompt.partition(_WORD)[2].strip()

    def _rendered(self, messages: Sequence[Message], options: Mapping[str, Any], **more: Any) -> str:
        shaped = [{**m, "content": self._shaped(m["content"])} if m.get("content") is not None else m for m in messages]
        return self._applied(shaped, **options, **more)

    def _shaped(self, content: Any) -> Any:
        """Convert content to the form that the template reads: one text, or parts."""
        if isinstance(content, str):
            return content if self._reads_text else [{"type": "text", "text": content}]
        return content if self._reads_parts else "".join(part["text"] for part in content)

    @cached_property
    def _reads_text(self) -> bool:
        try:
            return _WORD in self._applied([{"role": "user", "content": _WORD}])
        except DataError:  # it needs more than a question; a row that it refuses is reported with the row
            return True

    @cached_property
    def _reads_parts(self) -> bool:
        try:
            parts = self._applied([{"role": "user", "content": [{"type": "text", "text": _WORD}]}])
            return not self._reads_text or parts == self._applied([{"role": "user", "content": _WORD}])
        except DataError:
            return False

    def _applied(self, messages: Sequence[Message], **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options))
        except Exception as error:  # a template is a program and can fail in any way
            raise DataError(f"the chat template fails ({type(error).__name__}: {error!s:.150}).") from error


def _said(message: Message) -> Iterator[str]:
    """What must stand in a rendered answer: texts, and the names in calls, whose values a template may write in its own way."""
    yield from (message[name] for name in ("reasoning_content", "content") if message.get(name))
    for call in message.get("tool_calls", ()):
        yield from (call["function"]["name"], *call["function"]["arguments"])
