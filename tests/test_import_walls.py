"""The walls between the modules (see CONTRIBUTING.md) hold, and each check is shown to be able to fail."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"metrics", "model", "report"}
FACES = {"callback", "cli"}
TORCH_FREE = {
    "card",
    "config",
    "errors",
    "files",
    "junit",
    "ledger",
    "lock",
    "logged",
    "policy",
    "records",
    "remedies",
    "report",
    "runlog",
    "scalars",
    "settings",
    "terminal",
    "validated",
}
STATISTICS = {"hindsight", "mix"}
"""Numpy and scipy, and nothing heavier."""
HEAVY = {"torch", "transformers", "sae_lens", "trl", "scipy", "numpy"}


class Import(NamedTuple):
    name: str  # absolute and dotted; ends in the imported name for `from package import name`
    line: int
    lazy: bool  # inside a function


def imports(path: str, source: str) -> Iterator[Import]:
    """Every import in the source of the file at `path` (from the root), also by `import_module("...")`."""
    package = PurePosixPath(path).parent.parts

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=aliases):
                yield from (Import(alias.name, node.lineno, lazy) for alias in aliases)
            case ast.ImportFrom(module=module, names=aliases, level=level):
                base = [*(package[: len(package) - level + 1] if level else ()), *([module] if module else [])]
                yield from (Import(".".join([*base, alias.name]), node.lineno, lazy) for alias in aliases)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(name, node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(ast.parse(source), lazy=False)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def unit(path: str) -> str:
    """The module or sub-package directly under `sts_callback` that the file belongs to."""
    return PurePosixPath(path).with_suffix("").parts[1]


def breaches(path: str, source: str, is_breach: Callable[[Import], bool]) -> list[str]:
    return [f"{path}:{found.line} imports {found.name}" for found in imports(path, source) if is_breach(found)]


def strangers(path: str, source: str, *, units: set[str]) -> list[str]:
    """Imports from one of `units` to another."""
    forbidden = units - {unit(path)} if unit(path) in units else set()
    return breaches(path, source, lambda i: any(within(i.name, f"sts_callback.{name}") for name in forbidden))


def run_out_of_place(path: str, source: str) -> list[str]:
    """Imports of `run` by another than `callback`, and of a face by `run`."""
    forbidden = {"callback": set(), "run": FACES}.get(unit(path), {"run"})
    return breaches(path, source, lambda i: any(within(i.name, f"sts_callback.{name}") for name in forbidden))


def sae_lens_elsewhere(path: str, source: str) -> list[str]:
    allowed = path == "sts_callback/model/encoder.py"
    return breaches(path, source, lambda i: within(i.name, "sae_lens") and not allowed)


def trl_elsewhere(path: str, source: str) -> list[str]:
    allowed = unit(path) == "domains"
    return breaches(path, source, lambda i: within(i.name, "trl") and not (allowed and i.lazy))


def metrics_beyond_errors(path: str, source: str) -> list[str]:
    """Imports in `metrics` of anything of the package but itself and `errors`."""
    allowed = ("sts_callback.metrics", "sts_callback.errors")
    return breaches(
        path,
        source,
        lambda i: (
            unit(path) == "metrics" and within(i.name, "sts_callback") and not any(within(i.name, module) for module in allowed)
        ),
    )


def torch_in_torch_free(path: str, source: str) -> list[str]:
    return breaches(path, source, lambda i: unit(path) in TORCH_FREE | STATISTICS and within(i.name, "torch"))


def report_beyond_the_standard_library(path: str, source: str) -> list[str]:
    """Imports in `report` of anything but the standard library and of the package's records and their log."""
    allowed = [f"sts_callback.{name}" for name in ("report", "records", "remedies", "logged", "runlog", "errors", "validated")]
    return breaches(
        path,
        source,
        lambda i: (
            unit(path) == "report"
            and i.name.partition(".")[0] not in sys.stdlib_module_names
            and not any(within(i.name, module) for module in allowed)
        ),
    )


RULES: dict[str, Callable[[str, str], list[str]]] = {
    "layers": partial(strangers, units=LAYERS),
    "faces": partial(strangers, units=FACES),
    "run": run_out_of_place,
    "sae_lens": sae_lens_elsewhere,
    "trl": trl_elsewhere,
    "metrics": metrics_beyond_errors,
    "torch": torch_in_torch_free,
    "report": report_beyond_the_standard_library,
}


@pytest.mark.parametrize("rule", RULES)
def test_wall_holds(rule: str) -> None:
    files = sorted((ROOT / "sts_callback").rglob("*.py"))
    assert files, f"no source found under {ROOT}"
    found = [
        breach for file in files for breach in RULES[rule](file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        ("layers", "sts_callback/metrics/drift.py", "from sts_callback.model import capture"),
        ("layers", "sts_callback/metrics/drift.py", "from sts_callback import model"),
        ("layers", "sts_callback/model/capture.py", "import sts_callback.metrics.tokens as tokens"),
        ("layers", "sts_callback/model/capture.py", "from ..metrics.tokens import is_ordinary"),
        ("layers", "sts_callback/model/__init__.py", "from .. import report"),
        ("layers", "sts_callback/report/page.py", "def page():\n    from sts_callback.model.hooks import resolve"),
        ("layers", "sts_callback/report.py", "from .model.hooks import resolve"),
        ("layers", "sts_callback/report/page.py", "importlib.import_module('sts_callback.metrics')"),
        ("faces", "sts_callback/callback.py", "from sts_callback.cli import main"),
        ("faces", "sts_callback/cli/ahead.py", "if TYPE_CHECKING:\n    from ..callback import STSCallback"),
        ("run", "sts_callback/run.py", "from sts_callback.callback import STSCallback"),
        ("run", "sts_callback/run.py", "def f():\n    from . import cli"),
        ("run", "sts_callback/cli/ahead.py", "from sts_callback.run import Run"),
        ("run", "sts_callback/model/capture.py", "from .. import run"),
        ("sae_lens", "sts_callback/measure.py", "from sae_lens import SAE"),
        ("sae_lens", "sts_callback/model/capture.py", "def f():\n    import sae_lens.saes.sae"),
        ("sae_lens", "sts_callback/cli/ahead.py", "import_module('sae_lens')"),
        ("trl", "sts_callback/callback.py", "def f():\n    from trl import SFTTrainer"),
        ("trl", "sts_callback/domains/reader.py", "from trl import is_conversational"),
        ("trl", "sts_callback/domains/reader.py", "class A:\n    import trl.data_utils"),
        ("metrics", "sts_callback/metrics/shift.py", "from sts_callback.records import Forecast"),
        ("metrics", "sts_callback/metrics/shift.py", "from ..config import Settings"),
        ("metrics", "sts_callback/metrics/shift.py", "import sts_callback"),
        ("report", "sts_callback/report/page.py", "from sts_callback.policy import judge_drift"),
        ("report", "sts_callback/report/charts.py", "def draw():\n    import matplotlib.pyplot"),
        ("report", "sts_callback/report/charts.py", "import_module('jinja2')"),
        ("torch", "sts_callback/policy.py", "import torch"),
        ("torch", "sts_callback/records.py", "def f():\n    from torch import nn"),
        ("torch", "sts_callback/errors.py", "async def f():\n    __import__('torch')"),
        ("torch", "sts_callback/config.py", "import os, torch.cuda"),
        ("torch", "sts_callback/hindsight.py", "import torch"),
    ],
)
def test_rule_can_fail(rule: str, path: str, source: str) -> None:
    assert len(RULES[rule](path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "sts_callback/metrics/shift.py",
            "import torch\nfrom ..errors import DataError\nfrom .tokens import is_ordinary",
        ),
        ("sts_callback/metrics/shift.py", "from sts_callback import errors"),
        ("sts_callback/measure.py", "from sts_callback import metrics, model\nfrom .report import page"),
        ("sts_callback/model/encoder.py", "from sae_lens import SAE\nfrom .hooks import resolve"),
        ("sts_callback/domains/reader.py", "def read():\n    import trl"),
        ("sts_callback/callback.py", "from sts_callback.run import Run"),
        ("sts_callback/run.py", "from sts_callback.runlog import RunLog"),
        ("sts_callback/callback.py", "import trlx, sae_lens_extras\nfrom sts_callback.client import call"),
        (
            "sts_callback/report/page.py",
            "import html, xml.etree\nfrom sts_callback.records import Forecast\nfrom .charts import row",
        ),
        ("sts_callback/policy.py", "import torchmetrics\nfrom sts_callback.records import Verdict"),
    ],
)
def test_rules_leave_the_rest_alone(path: str, source: str) -> None:
    assert [breach for rule in RULES.values() for breach in rule(path, source)] == []


def heavy_modules_loaded_by(modules: list[str], root: Path) -> set[str]:
    """Which of the `HEAVY` modules a fresh Python with `root` first on its path loads when it imports `modules`."""
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert heavy_modules_loaded_by(["sts_callback"], ROOT) == set()


def test_torch_free_modules_load_nothing_heavy_by_a_detour() -> None:
    present = [f"sts_callback.{name}" for name in sorted(TORCH_FREE)]
    assert heavy_modules_loaded_by(present, ROOT) == set()


def test_statistics_of_past_runs_need_no_torch() -> None:
    assert heavy_modules_loaded_by([f"sts_callback.{name}" for name in sorted(STATISTICS)], ROOT) == {"numpy", "scipy"}


@pytest.mark.parametrize("name", sorted(HEAVY))
def test_import_check_can_fail(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").touch()  # stands for the real one
    package = tmp_path / "sts_callback"
    package.mkdir()
    (package / "__init__.py").write_text("from sts_callback import detour\n", encoding="utf-8")
    (package / "detour.py").write_text(f"import {name}\n", encoding="utf-8")
    assert heavy_modules_loaded_by(["sts_callback"], tmp_path) == {name}
