"""A device that is not there, for faults that a CPU forgives: what lies where, what the host waits for, what is copied.

A tensor on the device `pretended` holds a CPU tensor with its numbers, so that results are real. `Pretended()` sees each ATen
call: it raises where tensors of several places meet as CUDA would, and counts by source line what makes a host wait. What it
cannot show: atomics, streams, memory, and time.

Importing this module names torch's spare backend for the rest of the process: only a process of its own should do so.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from watched import FROM, MOVES, TO, source_line

NAME = "pretended"


class _Module(backend_registration._DummyBackendModule):
    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """It draws nothing."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]


class _Guard(torch._C._acc.DeviceGuard):  # type: ignore[name-defined,misc]
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


backend_registration._setup_privateuseone_for_python_backend(
    NAME, _Module(), backend_registration._DummyPrivateUse1Hook(), _Guard()
)

# Calls whose result, or its size, the host must read.
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_consecutive", "is_nonzero"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class MixedDevices(RuntimeError):  # noqa: N818  # says what, in the words of a reader
    """Tensors of several places in one call."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device."""

    held: torch.Tensor
    """Its numbers, on the CPU."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)  # type: ignore[attr-defined]
        made.held = held
        return made  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made: torch.Tensor = OnDevice(self.held.detach().clone())
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Pretended.active[-1].__torch_dispatch__(func, types, args, kwargs)


class Pretended(TorchDispatchMode):
    """Inside, the device can be used, and is watched."""

    active: list[Pretended] = []  # noqa: RUF012  # the modes that have been entered

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """What the host waited for, by file, line and reason."""
        self.copied: Counter[str] = Counter()
        """Bytes to and from the device, by file, line and direction."""

    def __enter__(self) -> Pretended:
        self._kept = torch.__future__.get_overwrite_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` cannot take another Python type
        torch._C._set_only_lift_cpu_tensors(True)
        self._threads = torch.autograd.set_multithreading_enabled(False)  # a mode holds in its own thread
        self._threads.__enter__()
        Pretended.active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Pretended.active.pop()
        self._threads.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(self._kept[0])
        torch._C._set_only_lift_cpu_tensors(self._kept[1])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, shape = tree_flatten((args, kwargs))
        ours = [x for x in flat if isinstance(x, OnDevice)]
        asked = kwargs.get("device")
        if not ours and (asked is None or torch.device(asked).type != NAME):
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in MOVES:
            to_device = isinstance(args[0], OnDevice) if name == "copy_" else asked is None or torch.device(asked).type == NAME
            source = args[1] if name == "copy_" else args[0]
            wait_not = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            self._move(source, to_device=to_device, waited=not wait_not)
        else:
            to_device = asked is None or torch.device(asked).type == NAME
            self._judge(name, args, flat, bool(ours))
        if name in _READ and ours:
            self._wait(name)
        if name == "repeat_interleave" and ours and kwargs.get("output_size") is None:
            self._wait(name)
        owners = {id(x.held): x for x in ours}
        plain_args, plain = tree_unflatten([x.held if isinstance(x, OnDevice) else x for x in flat], shape)
        if asked is not None:
            plain = {**plain, "device": torch.device("cpu")}
        plain.pop("pin_memory", None)
        if name == "_to_copy":
            plain.pop("non_blocking", None)
        out = func(*plain_args, **plain)
        if name == "copy_":
            return args[0]

        def placed(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
                return x
            return owners.get(id(x), OnDevice(x)) if to_device else x

        return tree_map(placed, out)

    def _judge(self, name: str, args: Any, flat: list[Any], on_device: bool) -> None:
        """Raise where a call mixes places. CPU numbers may be anywhere, and CPU indices at the price of a copy."""
        if name in _INDEXING:
            for index in (i for i in args[1] if isinstance(i, torch.Tensor)):
                if isinstance(index, OnDevice) and not isinstance(args[0], OnDevice):
                    raise MixedDevices(f"{name}: a CPU tensor is indexed by one on the device, {source_line()}")
                fills = name.startswith("index_put") and args[2].dim() == 0  # becomes a fill by a mask
                if isinstance(index, OnDevice) and index.dtype == torch.bool and not fills:
                    self._wait("booleans as an index")
                if not isinstance(index, OnDevice) and isinstance(args[0], OnDevice):
                    self._move(index, to_device=True, waited=True)
            if len(args) > 2 and args[2].dim() and isinstance(args[0], OnDevice) != isinstance(args[2], OnDevice):
                raise MixedDevices(f"{name}: values and tensor are in two places, {source_line()}")
        elif on_device and any(isinstance(x, torch.Tensor) and x.dim() and not isinstance(x, OnDevice) for x in flat):
            raise MixedDevices(f"{name}: tensors on the CPU and on the device, {source_line()}")

    def _move(self, x: torch.Tensor, *, to_device: bool, waited: bool) -> None:
        if x.numel() and isinstance(x, OnDevice) != to_device:
            way = TO if to_device else FROM
            self.copied[f"{source_line()} {way}"] += x.numel() * x.element_size()
            if waited:
                self._wait(f"copy {way}")

    def _wait(self, reason: str) -> None:
        self.waits[f"{source_line()} {reason}"] += 1
