"""What `sts-callback launch` has each Python of a command do as it starts: watch every trainer that is made in it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


def begin(file: str, mark: str) -> None:
    """Wait for transformers' `Trainer`, and run the `sitecustomize` that would have been found but for the launcher's.

    Args:
        file: the launcher's `sitecustomize`.
        mark: a file that tells the launcher that a trainer was made.

    """
    folder = Path(file).parent
    sys.meta_path.insert(0, _Waiting(Path(mark)))
    spec = PathFinder.find_spec("sitecustomize", [place for place in sys.path if Path(place) != folder])
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


class _Waiting(MetaPathFinder):
    """Sees `transformers.trainer` imported, however late; importing it now would cost each process of a launcher seconds."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_watch(module: Any) -> None:
                load(module)
                watch(module.Trainer, self._mark)

            spec.loader.exec_module = load_and_watch  # type: ignore[method-assign]
        return spec


def watch(trainer: type, mark: Path) -> None:
    """Put an `STSCallback()` before the callbacks of each trainer that is made from now on and has none.

    Args:
        trainer: `transformers.Trainer`, whose subclasses all come through its `__init__`.
        mark: is written as soon as one is made.

    """
    make: Callable[..., None] = trainer.__init__  # type: ignore[misc]
    place = list(inspect.signature(make).parameters).index("callbacks") - 1  # behind self

    @functools.wraps(make)
    def make_watched(self: Any, *args: Any, **kwargs: Any) -> None:
        from sts_callback import STSCallback

        given = [*args]
        theirs = (given[place] if place < len(given) else kwargs.get("callbacks")) or []
        if not any(isinstance(one, STSCallback) for one in theirs):
            ours = STSCallback()
            if place < len(given):
                given[place] = [ours, *theirs]
            else:
                kwargs["callbacks"] = [ours, *theirs]
            make(self, *given, **kwargs)
            ours.attach(self)
        else:
            make(self, *given, **kwargs)
        mark.touch()

    trainer.__init__ = make_watched  # type: ignore[misc]
