"""Rows that several measurements in this folder use."""

from __future__ import annotations

import ast
import functools
import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any


def lines(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as text:
        return [json.loads(line) for line in text]


def law_rows(data_dir: Path) -> list[dict[str, str]]:
    """Questions of MMLU-Pro's law category, answered by the text of the right option."""
    rows = [row for row in lines(data_dir / "mmlu_pro.jsonl.gz") if row["category"] == "law"]
    return [{"prompt": f"Question: {r['question']}\nAnswer:", "completion": f" {r['options'][r['answer_index']]}"} for r in rows]


@functools.cache
def code_rows() -> tuple[dict[str, str], ...]:
    """Documented functions of the standard library's top-level modules."""
    rows = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        source_lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and 2 < len(node.body) < 12:
                text = _segment(source_lines, node)
                head = "\n".join(text.split("\n")[: node.body[0].end_lineno - node.lineno + 1])
                rows.append({"prompt": head + "\n", "completion": text[len(head) + 1 :]})
    return tuple(rows)


def _segment(source_lines: list[str], node: ast.FunctionDef) -> str:
    """`ast.get_source_segment`, which splits the whole file anew for each node."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    own = source_lines[node.lineno - 1 : node.end_lineno]
    own[-1] = own[-1].encode()[: node.end_col_offset].decode()
    return "\n".join([own[0].encode()[node.col_offset :].decode(), *own[1:]])
