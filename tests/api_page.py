"""Writes `docs/api.md` from the source: `python tests/api_page.py`. Nothing of the package is imported to read it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
INTRODUCTION = """# What does each name of the package take and give?

For everyone who writes code against it: every name that `import sts_callback` offers, with its signature, arguments and errors;
then the records that these give, the types in their signatures, and all errors. `python tests/api_page.py` writes this page.
"""
WIDTH = 100  # of a signature on one line
_SECTION = re.compile(r"^(Args|Returns|Raises|Example|Source):$", re.MULTILINE)
Definition = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign


@dataclass(frozen=True)
class Found:
    """A definition, where it stands, and the text after it that says what an assignment is for."""

    module: str
    node: Definition
    comment: str = ""

    @property
    def name(self) -> str:
        """As it is defined there."""
        return _target(self.node) or ""


def _target(node: ast.stmt) -> str | None:
    """The name that a statement defines."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return None


def _with_comments(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """Each statement, and the text that stands alone right after it."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        match after:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node, inspect.cleandoc(text)
            case _:
                yield node, ""


@cache
def _tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def definition(module: str, name: str) -> Found | None:
    """Where a name that a module uses is defined in the package; None if it is not."""
    for node, comment in _with_comments(_tree(module).body):
        if _target(node) == name and isinstance(node, Definition):
            return Found(module, node, comment)
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sts_callback"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(node.module or "", alias.name)
    return None


def public() -> list[Found]:
    """What `sts_callback` offers, in its order."""
    home = next(n.value for n in _tree("sts_callback").body if _target(n) == "_HOME" and isinstance(n, ast.Assign))
    named = [definition(f"sts_callback.{module}", name) for name, module in ast.literal_eval(home).items()]
    return [found for found in named if found is not None]


def members(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Public methods and properties; a trainer's events are its own affair."""
    functions = (n for n in node.body if isinstance(n, ast.FunctionDef))
    return [n for n in functions if not n.name.startswith(("_", "on_"))]


def makers(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Its `__init__`, if it has one of its own."""
    return [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]


def is_property(node: ast.FunctionDef) -> bool:
    """Whether it is read without a call."""
    return any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)


def arguments(node: ast.FunctionDef) -> list[str]:
    """Names of what a caller gives."""
    return [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]


def sections(docstring: str | None) -> dict[str, str]:
    """A Google docstring by its sections; what stands before them is under an empty name."""
    text, *found = _SECTION.split(inspect.cleandoc(docstring or ""))
    return {"": text.strip()} | {name: inspect.cleandoc(part) for name, part in zip(found[::2], found[1::2], strict=True)}


def explained(section: str) -> list[tuple[str, str]]:
    """Entries `name: text` of a section, whose further lines stand further in."""
    entries = re.findall(r"^(\w[\w, ]*): (.*(?:\n +.*)*)", section, re.MULTILINE)
    return [(name, " ".join(text.split())) for name, text in entries]


def _signature(node: ast.FunctionDef, indent: str = "") -> str:
    """As Python, one argument a line where it is long."""
    args, parts = node.args, list[str]()
    n_required = len(args.args) - len(args.defaults)
    for i, arg in enumerate(args.args):
        parts.append(_argument(arg, args.defaults[i - n_required] if i >= n_required else None))
    if args.kwonlyargs:
        parts.append("*")
        parts += [_argument(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    marks = "".join(f"{indent}@{_python(d)}\n" for d in node.decorator_list)
    ends = f" -> {_python(node.returns)}: ..." if node.returns else ": ..."
    line = f"{indent}def {node.name}({', '.join(parts)}){ends}"
    if len(line) > WIDTH:
        inner = "".join(f"{indent}    {part},\n" for part in parts)
        line = f"{indent}def {node.name}(\n{inner}{indent}){ends}"
    return marks + line


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    told = f"{arg.arg}: {_python(arg.annotation)}" if arg.annotation else arg.arg
    if default is None:
        return told
    return f"{told} = {_python(default)}" if arg.annotation else f"{told}={_python(default)}"


def _python(node: ast.AST | None) -> str:
    """As source, with the quotes that the source has."""
    return "" if node is None else ast.unparse(node).replace("'", '"')


def _listed(entries: Iterable[tuple[str, str]]) -> str:
    """What is Python in each, and what it is."""
    return "".join(f"- `{shown}`" + (f": {' '.join(text.split())}" if text else "") + "\n" for shown, text in entries)


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _documented(docstring: str | None) -> Iterator[str]:
    """A docstring as Markdown."""
    parts = sections(docstring)
    yield parts[""] + "\n"
    if "Args" in parts:
        yield "".join(f"- `{name}`: {text}\n" for name, text in explained(parts["Args"]))
    if "Returns" in parts:
        yield f"**Returns** {parts['Returns']}\n"
    if "Raises" in parts:
        told = [f"`{names.replace(', ', '`, `')}` {text}" for names, text in explained(parts["Raises"])]
        yield f"**Raises** {' '.join(told)}\n"
    if "Example" in parts:
        lines = (re.sub(r"^(>>>|\.\.\.) ?|  # doctest: .*$", "", line) for line in parts["Example"].splitlines())
        yield _code("\n".join(lines))


def _plain(kind: ast.expr) -> ast.expr:
    """An annotation without notes beside it, such as a record's key in JSON."""
    match kind:
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[plain, *_])):
            return plain
    return kind


def fields(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Of a dataclass: each field as Python, and what it is."""
    for statement, comment in _with_comments(node.body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        name, kind, default = statement.target.id, _plain(statement.annotation), _python(statement.value)
        if isinstance(statement.value, ast.Call):  # of `field`
            options = {k.arg: k.value for k in statement.value.keywords}
            empty = {"list": "[]", "dict": "{}"}
            default = empty[_python(options["default_factory"])] if "default_factory" in options else _python(options["default"])
            comment = ast.literal_eval(options["metadata"])["help"] if "metadata" in options else comment
        if not name.startswith("_"):
            yield f"{name}: {_python(kind)}" + (f" = {default}" if default else ""), comment


def told_of_class(node: ast.ClassDef) -> Iterator[str]:
    """Its docstring, fields, properties and methods as Markdown."""
    for made in makers(node):
        bases = f"({', '.join(map(_python, node.bases))})" if node.bases else ""
        yield _code(f"class {node.name}{bases}:\n{_signature(made, '    ')}")
    for one in (node, *makers(node)):
        yield from _documented(ast.get_docstring(one))
    if shown := _listed(fields(node)):
        bases = [name for name in map(_python, node.bases) if name != "Record"]
        yield (f"Beside those of `{', '.join(bases)}`:\n\n" if bases else "") + shown
    if properties := [n for n in members(node) if is_property(n)]:
        yield "Properties:\n"
        yield _listed((f"{n.name}: {_python(n.returns)}", ast.get_docstring(n) or "") for n in properties)
    for method in members(node):
        if not is_property(method):
            yield f"#### `{node.name}.{method.name}`\n"
            yield _code(_signature(method))
            yield from _documented(ast.get_docstring(method))


def _kinds(node: Definition) -> Iterator[ast.AST | None]:
    """The annotations of a definition, of its public members and of its fields; of another name for a type, that type."""
    match node:
        case ast.FunctionDef():
            yield from (node.returns, *(a.annotation for a in (*node.args.args, *node.args.kwonlyargs)))
        case ast.ClassDef():
            for function in (*members(node), *makers(node)):
                yield from _kinds(function)
            yield from (*node.bases, *(_plain(n.annotation) for n in node.body if isinstance(n, ast.AnnAssign)))
        case ast.Assign() | ast.AnnAssign():
            yield ast.parse(_type_text(node))


def _type_text(node: ast.Assign | ast.AnnAssign) -> str:
    """What a name for a type stands for, also where it is quoted."""
    return str(node.value.value) if isinstance(node.value, ast.Constant) else _python(node.value)


def _is_told(found: Found) -> bool:
    """Whether it is a record, or a name for a type."""
    if isinstance(found.node, ast.ClassDef):
        return found.module.startswith("sts_callback.records")
    return isinstance(found.node, ast.Assign | ast.AnnAssign) and not found.name.isupper()


def reached(start: list[Found]) -> list[Found]:
    """Records and types that signatures name, and those that these name in turn, by name."""
    seen, waiting = dict[str, Found](), list(start)
    while waiting:
        one = waiting.pop()
        names = {n.id for kind in _kinds(one.node) if kind is not None for n in ast.walk(kind) if isinstance(n, ast.Name)}
        for name in names - set(seen):
            found = definition(one.module, name)
            if found is not None and _is_told(found):
                seen[name] = found
                waiting.append(found)
    return [seen[name] for name in sorted(seen)]


def _section(mark: str, node: Definition) -> Iterator[str]:
    yield f"{mark} `{_target(node)}`\n"
    if isinstance(node, ast.ClassDef):
        yield from told_of_class(node)
    elif isinstance(node, ast.FunctionDef):
        yield from (_code(_signature(node)), *_documented(ast.get_docstring(node)))


def page() -> str:
    """All of it."""
    named = public()
    found = reached(named)
    parts = [INTRODUCTION, *(part for one in named for part in _section("##", one.node))]
    parts.append("## What they give\n\nFrozen records of `sts_callback.records`. NaN is what could not be measured.\n")
    parts += [part for one in found if isinstance(one.node, ast.ClassDef) for part in _section("###", one.node)]
    types = ((one, one.node) for one in found if isinstance(one.node, ast.Assign | ast.AnnAssign))
    parts.append("## Types in signatures\n")
    parts.append(_listed((f"{one.name} = {_type_text(node)}", one.comment) for one, node in types))
    errors = [node for node in _tree("sts_callback.errors").body if isinstance(node, ast.ClassDef)]
    parts.append("## Errors\n\nOf `sts_callback.errors`. Messages name the field, the value, what is allowed and the remedy.\n")
    parts.append(_listed((f"{e.name}({', '.join(map(_python, e.bases))})", ast.get_docstring(e) or "") for e in errors))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
