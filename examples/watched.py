"""What a host waits for and copies, by source line, of a GPU, as torch itself tells it; and the work of matrix products."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import sts_callback

_PACKAGE = str(Path(sts_callback.__file__).parent) + "/"
_SENDER = _PACKAGE + "metrics/copies.py"  # what it sends, its callers send
_LIBRARIES = ("transformers", "sae_lens")
MOVES = ("_to_copy", "copy_")
"""The ATen calls that copy from device to device."""
TO, FROM = "to the device", "from the device"


def source_line() -> str:
    """The innermost line of the package that is running, and that of transformers or SAELens if it was on the way."""
    frame, inside = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not inside and any(f"/{library}/" in file for library in _LIBRARIES):
            inside = f" in {file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        if file.startswith(_PACKAGE) and file != _SENDER:
            return f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno}{inside}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere" + inside


class WatchedGPU(TorchDispatchMode):
    """Inside, waits, copies and work are counted; on a machine without a GPU, only work."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """Calls that torch calls synchronizing, by file and line. It does not see all of them."""
        self.copied: Counter[str] = Counter()
        """Bytes between host and device, by file, line and direction, of copies that are calls of their own."""
        self.flop = 0
        """Floating-point operations of matrix products and attention, backward too, by the formulas of `FlopCounterMode`. That
        class itself keeps a record by module, and fails where a forward is differentiated in part."""

    def __enter__(self) -> WatchedGPU:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
        shown = warnings.showwarning

        def count(message: Any, *where: Any, **more: Any) -> None:
            if "called a synchronizing CUDA operation" in str(message):
                self.waits[source_line()] += 1
            else:
                shown(message, *where, **more)

        warnings.showwarning = count
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            self.flop += formula(*args, **kwargs, out_val=made)
        name = func._schema.name.removeprefix("aten::")
        if name in MOVES:
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != made.device.type:
                way = TO if source.device.type == "cpu" else FROM
                self.copied[f"{source_line()} {way}"] += source.numel() * source.element_size()
        return made
