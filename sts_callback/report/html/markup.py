"""Make HTML from Python values. All but `Html` is escaped, so none of the user's text can become markup."""

from __future__ import annotations

import html
import re

_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that HTML or UTF-8 do not allow. Tokens that end within a character can contain them."""


class Html(str):
    """Text that is already HTML."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """Make an element.

    Args:
        name: its name, such as `p`.
        children: HTML, or texts, which are escaped.
        attributes: values are escaped too. A trailing underscore, as in `class_`, is dropped; any other becomes a hyphen.

    """
    named = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{named}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Join HTML and escaped texts."""
    return Html("".join(child if isinstance(child, Html) else _escaped(child) for child in children))


def shortened(text: str, longest: int) -> str:
    """Cut a text that is too long, and mark the cut with dots."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _escaped(text: str) -> str:
    return html.escape(_UNFIT.sub("\ufffd", text))
