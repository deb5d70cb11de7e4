"""Nothing that comes from outside becomes HTML."""

from __future__ import annotations

import pytest

from sts_callback.report.html.markup import Html, join, shortened, tag


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a & b", "a &amp; b"),
        ('"it\'s"', "&quot;it&#x27;s&quot;"),
        ("\u05e9\u05dc\u05d5\u05dd \U0001f600", "\u05e9\u05dc\u05d5\u05dd \U0001f600"),
        ("half \ud83d", "half \ufffd"),
        ("\0\x1b\x85", "\ufffd\ufffd\ufffd"),
        ("kept\n\tas it is", "kept\n\tas it is"),
    ],
)
def test_texts_are_escaped_as_children_and_in_attributes(text: str, written: str) -> None:
    assert tag("p", text) == f"<p>{written}</p>"
    assert tag("p", title=text) == f'<p title="{written}"></p>'
    tag("p", text).encode()


def test_html_stays_as_it_is_and_joined_with_a_plain_text_is_escaped_again() -> None:
    assert tag("p", tag("b", "x"), " < ", Html("<br>")) == "<p><b>x</b> &lt; <br></p>"
    assert join("<", tag("b")) == "&lt;<b></b>"
    assert tag("p", "x" + tag("b")) == "<p>x&lt;b&gt;&lt;/b&gt;</p>"


def test_names_of_attributes_may_be_words_of_python() -> None:
    assert tag("p", class_="a", aria_label="b", viewBox="c") == '<p class="a" aria-label="b" viewBox="c"></p>'


@pytest.mark.parametrize(("text", "cut"), [("", ""), ("abc", "abc"), ("abcd", "ab\u2026")])
def test_a_long_text_says_that_it_was_cut(text: str, cut: str) -> None:
    assert shortened(text, 3) == cut
