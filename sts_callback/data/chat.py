"""Conversations as the model's chat template renders them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sts_callback.data.pairs import TextPair
from sts_callback.data.tokens import n_common
from sts_callback.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

Message = Mapping[str, Any]
_WORD = "zqxj"  # stands in no template


def text_tokenizer(processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """A processor's tokenizer, with the processor's chat template if that has one; a tokenizer is handed back as it is."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(processing_class, "tokenizer", None)
    if isinstance(processing_class, PreTrainedTokenizerBase) or tokenizer is None:  # some tokenizers hold another one, too
        return processing_class  # type: ignore[return-value]
    found: PreTrainedTokenizerBase = tokenizer
    if template := getattr(processing_class, "chat_template", None):
        found = copy.copy(found)  # the user's own is not altered
        found.chat_template = template
    return found


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Look for it.

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
        """Prompt, answer and later turns, as trainers render them: the answer is what the prompt alone does not begin with.

        Raises:
            DataError: if the template fails.

        """
        asked, whole = self._rendered(prompt, options, add_generation_prompt=True), self._rendered([*prompt, *answer], options)
        n = n_common(asked, whole)
        full = self._rendered([*prompt, *answer, *rest], options) if rest else whole
        return TextPair(asked[:n], whole[n:], full[len(whole) :] if full.startswith(whole) else "")

    @cached_property
    def marker(self) -> str:
        """What it puts between a question and its answer: by this, texts that it has rendered are known."""
        question, answer = [{"role": "user", "content": _WORD}], [{"role": "assistant", "content": _WORD}]
        pair = self.pair(question, answer, (), {})
        return pair.prompt.partition(_WORD)[2].strip()

    def _rendered(self, messages: Sequence[Message], options: Mapping[str, Any], **more: Any) -> str:
        shaped = [{**m, "content": self._shaped(m["content"])} if m.get("content") is not None else m for m in messages]
        return self._applied(shaped, **options, **more)

    def _shaped(self, content: Any) -> Any:
        """Text in the form that the template reads: one text, or parts."""
        if isinstance(content, str):
            return content if self._reads_text else [{"type": "text", "text": content}]
        return content if self._reads_parts else "".join(part["text"] for part in content)

    @cached_property
    def _reads_text(self) -> bool:
        try:
            return _WORD in self._applied([{"role": "user", "content": _WORD}])
        except DataError:  # it wants more than a question: what is wrong with a row will be told with the row
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
        except Exception as error:  # a template is a program of its own, and may fail in any way
            raise DataError(f"the chat template fails ({type(error).__name__}: {error!s:.150}).") from error
