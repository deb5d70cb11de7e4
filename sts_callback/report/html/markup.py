"""HTML from Python values. Whatever is not known to be HTML is escaped, so that no text of the user's can become any."""

from __future__ import annotations

import html
import re

_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that HTML or UTF-8 do not allow; tokens cut in the middle of a character can hold them."""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element.

    Args:
        name: such as `p`.
        children: HTML, or texts, which are escaped.
        attributes: their values are escaped too. An underscore at the end, as in `class_`, is for Python's sake, one within
            stands for a hyphen.

    """
    named = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{named}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """HTML and escaped texts, one after another."""
    return Html("".join(child if isinstance(child, Html) else _escaped(child) for child in children))


def shortened(text: str, longest: int) -> str:
    """A text cut at its end if it has too many characters, with dots to say so."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _escaped(text: str) -> str:
    return html.escape(_UNFIT.sub("\ufffd", text))
