"""Parts of all sections: headings, paragraphs, tables that scroll in their own box, names, decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sts_callback.records import TRAIN, Decision, Estimate, in_capitals
from sts_callback.report import formatting
from sts_callback.report.advice import Advice
from sts_callback.report.html.markup import Html, join, shortened, tag
from sts_callback.report.summary import Standing

_LONGEST_NAME = 60
_BADGES: dict[Decision, str] = {
    "go": "good",
    "watch": "warn",
    "no-go": "bad",
    "not covered": "unsure",
    "cannot tell": "unsure",
}

SIGNS: dict[Standing, str] = {"": "", "within": "\u25cb", "on course": "\u25d0", "over": "\u25cf", "cannot tell": "?"}
"""How a domain stands against its budget, as a shape: an empty, a half and a full circle."""
STANDINGS: dict[Standing, str] = {"": "", "within": "good", "on course": "warn", "over": "bad", "cannot tell": "unsure"}
"""Its colour, as a class of the style sheet."""


def command(advice: Advice) -> Html:
    """A command that breaks its lines between its parts alone."""
    return tag("code", *(join(tag("span", part), " ") for part in advice.parts), class_="command")


def section(anchor: str, title: str, *children: str) -> Html:
    """A section with its heading. The list at the top links to it."""
    return tag("section", tag("h2", title), *children, id=anchor)


def say(*text: str) -> Html:
    """A paragraph that says what is shown and what it means."""
    return tag("p", *text, class_="say")


def more(title: str, *children: str) -> Html:
    """Content that is unfolded on demand."""
    return tag("details", tag("summary", title), *children)


def domain(name: str) -> Html:
    """The name of a domain. A name in a right-to-left script does not reverse the text beside it."""
    return tag("bdi", shortened(name, _LONGEST_NAME), class_="name")


def named(names: Iterable[str]) -> Html:
    """Names of domains, one after another."""
    return Html(", ".join(domain(name) for name in names))


def badge(decision: Decision, step: int) -> Html:
    """A decision as a word in its colour."""
    return tag("span", in_capitals(decision, step), class_=f"badge {_BADGES[decision]}")


def table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, cls: str = "numbers", groups: Sequence[tuple[str, int]] = ()
) -> Html:
    """A table in its own box. The first column names the row.

    Args:
        titles: titles of the columns.
        rows: cells of the rows.
        cls: `numbers`, aligned to the right, or `words`.
        groups: titles over several columns, each with the number of columns.

    """
    over = tag("tr", *(tag("th", title, colspan=str(n), scope="colgroup") for title, n in groups), class_="groups")
    head = tag("tr", *(tag("th", title, scope="col") for title in titles))
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    made = tag("table", tag("thead", *([over] if groups else []), head), tag("tbody", *body), class_=cls)
    return tag("div", made, class_="scroll", **scrolled("table"))


def scrolled(what: str) -> dict[str, str]:
    """Attributes of a box that scrolls, so that a keyboard reaches it and a screen reader says what it is."""
    return {"tabindex": "0", "role": "group", "aria_label": what}


def meanings(*pairs: tuple[str, str]) -> Html:
    """Explain words in a table or chart."""
    return tag("dl", *(join(tag("dt", word), tag("dd", meaning)) for word, meaning in pairs))


def beyond(value: float, threshold: float, shown: str) -> Html:
    """A number with a sign if it reaches a threshold that is known."""
    return tag("strong", "\u25b2 ", shown) if math.isfinite(value) and value >= threshold else join(shown)


def with_interval(estimate: Estimate, form: formatting.Form) -> Html:
    """A number and its interval in smaller type."""
    ends = formatting.interval(estimate, form)
    return join(form(estimate.value), *([tag("small", f" {ends}")] if ends else []))


def name_row(name: str, protected: Iterable[str]) -> Html:
    """A domain's name with a note if it is protected or the training data."""
    role = " protected" if name in protected else " the training data" if name == TRAIN else ""
    return join(domain(name), *([tag("small", role)] if role else []))
