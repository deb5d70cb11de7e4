"""`docs/api.md` is that of this source, has every public name, and explains what a caller gives."""

from __future__ import annotations

import ast

import pytest

import api_page
import sts_callback
from pages import page


def test_it_is_up_to_date() -> None:
    assert api_page.page() == page("docs/api.md"), "python tests/api_page.py writes it"


def test_it_has_every_public_name() -> None:
    written = page("docs/api.md")
    assert [f"\n## `{name}`\n" in written for name in sts_callback.__all__] == [True] * len(sts_callback.__all__)
    assert "### `Verdict`\n" in written  # what is given, and the kinds of arguments, are found from the signatures
    assert '\n- `OnError = Literal["warn", "raise"]`\n' in written
    assert "\n- `NoGo(StsError, RuntimeError)`: " in written


@pytest.mark.parametrize("found", api_page.public(), ids=lambda found: found.name)
def test_every_argument_is_explained(found: api_page.Found) -> None:
    functions = [found.node] if isinstance(found.node, ast.FunctionDef) else []
    if isinstance(found.node, ast.ClassDef):
        functions = [*api_page.makers(found.node), *api_page.members(found.node)]
        assert [shown for shown, told in api_page.fields(found.node) if not told] == []
    for function in functions:
        told = api_page.sections(ast.get_docstring(function)).get("Args", "")
        assert [name for name, _ in api_page.explained(told)] == api_page.arguments(function), function.name


def test_what_is_read_of_a_source() -> None:
    source = '''
class Kept(Record):
    """A thing."""

    share: Annotated[float, StoredAs("part")] = 0.5
    """How much
    of it."""

    def of(self, one: int, *, many: "str" = "a") -> "Kept":
        """Make it.

        Args:
            one: the first,
                told in two lines.
            many: the rest.

        Returns:
            Another.

        """
'''
    (kept,) = ast.parse(source).body
    assert isinstance(kept, ast.ClassDef)
    assert "".join(api_page.told_of_class(kept)) == (
        "A thing.\n- `share: float = 0.5`: How much of it.\n#### `Kept.of`\n"
        '```python\ndef of(self, one: int, *, many: "str" = "a") -> "Kept": ...\n```\n'
        "Make it.\n- `one`: the first, told in two lines.\n- `many`: the rest.\n**Returns** Another.\n"
    )
