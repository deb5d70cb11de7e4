"""The walls between the modules (see docs/how-it-works.md) hold, and each check is shown to be able to fail."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"launched"},
    {"cli", "callback"},
    {"training"},
    {"remedies", "report", "sae_training"},
    {"runs"},
    {"measure"},
    {"policy"},
    {"data", "model", "power", "records"},
    {"metrics", "config", "distributed", "progress", "versions"},
    {"errors"},
)
"""From top to bottom: a room imports from floors below its own, never from a room beside it."""
TORCH_FREE = {
    "config",
    "errors",
    "policy",
    "power",
    "records",
    "report",
    "runs.directory",
    "runs.files",
    "runs.ledger",
    "runs.lock",
    "training.arguments",
}
STATISTICS = {"metrics.calibration", "remedies.mixture", "runs.track_record"}
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


def room(path: str) -> str:
    """The module or sub-package directly under `sts_callback` that the file belongs to."""
    return PurePosixPath(path).with_suffix("").parts[1]


def module(path: str) -> str:
    """Dotted, without `sts_callback`."""
    return ".".join(PurePosixPath(path).with_suffix("").parts[1:])


def breaches(path: str, source: str, is_breach: Callable[[Import], bool]) -> list[str]:
    return [f"{path}:{found.line} imports {found.name}" for found in imports(path, source) if is_breach(found)]


def upward(path: str, source: str) -> list[str]:
    """Imports from a floor above, or from another room on the same."""
    own = next((i for i, rooms in enumerate(FLOORS) if room(path) in rooms), len(FLOORS))
    forbidden = set().union(*FLOORS[: own + 1]) - {room(path)} if own < len(FLOORS) else set()
    return breaches(path, source, lambda i: any(within(i.name, f"sts_callback.{name}") for name in forbidden))


def sae_lens_elsewhere(path: str, source: str) -> list[str]:
    allowed = path == "sts_callback/model/sae.py" or room(path) == "sae_training"
    return breaches(path, source, lambda i: within(i.name, "sae_lens") and not allowed)


def trl_elsewhere(path: str, source: str) -> list[str]:
    allowed = room(path) == "data" or path == "sts_callback/training/sft.py"
    return breaches(path, source, lambda i: within(i.name, "trl") and not (allowed and i.lazy))


def beyond_tensors(path: str, source: str) -> list[str]:
    """Imports in `metrics` of anything of the package but itself and `errors`."""
    allowed = ("sts_callback.metrics", "sts_callback.errors")
    return breaches(
        path,
        source,
        lambda i: (
            room(path) == "metrics" and within(i.name, "sts_callback") and not any(within(i.name, module) for module in allowed)
        ),
    )


def torch_in_torch_free(path: str, source: str) -> list[str]:
    is_free = any(within(module(path), name) for name in TORCH_FREE | STATISTICS)
    return breaches(path, source, lambda i: is_free and within(i.name, "torch"))


def page_beyond_the_standard_library(path: str, source: str) -> list[str]:
    """Imports in the page of anything but the standard library and of the package's records and how they are told."""
    allowed = [f"sts_callback.{name}" for name in ("report", "records", "runs", "errors")]
    return breaches(
        path,
        source,
        lambda i: (
            within(module(path), "report.html")
            and i.name.partition(".")[0] not in sys.stdlib_module_names
            and not any(within(i.name, module) for module in allowed)
        ),
    )


RULES: dict[str, Callable[[str, str], list[str]]] = {
    "floors": upward,
    "sae_lens": sae_lens_elsewhere,
    "trl": trl_elsewhere,
    "metrics": beyond_tensors,
    "torch": torch_in_torch_free,
    "page": page_beyond_the_standard_library,
}


def test_every_room_has_a_floor() -> None:
    rooms = {file.stem if file.suffix else file.name for file in (ROOT / "sts_callback").iterdir()}
    folders = [file for file in (ROOT / "sts_callback").iterdir() if (file / "__init__.py").exists()]
    assert rooms - {"__init__", "__main__", "py", "__pycache__"} == set().union(*FLOORS)
    assert len(folders) <= 11


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
        ("floors", "sts_callback/metrics/drift.py", "from sts_callback.model import capture"),
        ("floors", "sts_callback/model/capture.py", "from ..measure.runner import Context"),
        ("floors", "sts_callback/model/__init__.py", "from .. import data"),
        ("floors", "sts_callback/report/html/page.py", "def page():\n    from sts_callback.remedies.mixture import search"),
        ("floors", "sts_callback/report.py", "from .training.session import Session"),
        ("floors", "sts_callback/report/card.py", "importlib.import_module('sts_callback.callback')"),
        ("floors", "sts_callback/callback.py", "from sts_callback.cli import main"),
        ("floors", "sts_callback/cli/launch.py", "from sts_callback.launched import watch"),
        ("floors", "sts_callback/cli/forecast.py", "if TYPE_CHECKING:\n    from ..callback import STSCallback"),
        ("floors", "sts_callback/training/session.py", "def f():\n    from .. import cli"),
        ("floors", "sts_callback/policy.py", "import sts_callback.measure.scoring as scoring"),
        ("sae_lens", "sts_callback/measure/runner.py", "from sae_lens import SAE"),
        ("sae_lens", "sts_callback/model/capture.py", "def f():\n    import sae_lens.saes.sae"),
        ("sae_lens", "sts_callback/cli/forecast.py", "import_module('sae_lens')"),
        ("trl", "sts_callback/callback.py", "def f():\n    from trl import SFTTrainer"),
        ("trl", "sts_callback/data/reader.py", "from trl import is_conversational"),
        ("trl", "sts_callback/training/session.py", "def f():\n    from trl import SFTTrainer"),
        ("trl", "sts_callback/data/reader.py", "class A:\n    import trl.data_utils"),
        ("metrics", "sts_callback/metrics/shift.py", "import sts_callback"),
        ("page", "sts_callback/report/html/page.py", "from sts_callback.config import PolicyConfig"),
        ("page", "sts_callback/report/html/charts.py", "def draw():\n    import matplotlib.pyplot"),
        ("page", "sts_callback/report/html/charts.py", "import_module('jinja2')"),
        ("torch", "sts_callback/policy.py", "import torch"),
        ("torch", "sts_callback/records/results.py", "def f():\n    from torch import nn"),
        ("torch", "sts_callback/errors.py", "async def f():\n    __import__('torch')"),
        ("torch", "sts_callback/config.py", "import os, torch.cuda"),
        ("torch", "sts_callback/runs/track_record.py", "import torch"),
    ],
)
def test_rule_can_fail(rule: str, path: str, source: str) -> None:
    assert len(RULES[rule](path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sts_callback/metrics/shift.py", "import torch\nfrom ..errors import DataError\nfrom .sums import is_not_outlier"),
        ("sts_callback/metrics/shift.py", "from sts_callback import errors"),
        ("sts_callback/measure/runner.py", "from sts_callback import metrics, model\nfrom ..data import probes"),
        ("sts_callback/model/sae.py", "from sae_lens import SAE\nfrom .hooks import resolve"),
        ("sts_callback/sae_training/fitting.py", "from sae_lens import SAETrainer\nfrom ..runs.files import write_whole"),
        ("sts_callback/data/reader.py", "def read():\n    import trl"),
        ("sts_callback/training/sft.py", "def made():\n    import trl"),
        ("sts_callback/callback.py", "from sts_callback.training.session import Session"),
        ("sts_callback/training/session.py", "from sts_callback.runs.directory import RunDirectory"),
        ("sts_callback/callback.py", "import trlx, sae_lens_extras\nfrom sts_callback.client import call"),
        ("sts_callback/report/html/page.py", "import html\nfrom sts_callback.records import Forecast\nfrom .charts import row"),
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


@pytest.mark.parametrize("name", ["sts_callback", "sts_callback.cli"])
def test_importing_the_package_or_its_commands_loads_nothing_heavy(name: str) -> None:
    assert heavy_modules_loaded_by([name], ROOT) == set()


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
