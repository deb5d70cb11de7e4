"""A page read back: strict about what is open and closed, so that a test sees what a browser would have to mend."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

VOID = {"meta", "br"}


class Page(HTMLParser):
    """All texts, attributes and elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.texts, self.attributes, self.elements = text, [], [], []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """What can be read, on one line."""
        return " ".join(" ".join(self.texts).split())

    def section(self, anchor: str) -> str:
        """What can be read in one section."""
        found = re.search(rf'<section id="{anchor}">.*?</section>', self.source, re.DOTALL)
        assert found, anchor
        return Page(found[0]).text

    @property
    def pictures(self) -> list[ET.Element]:
        return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)]
