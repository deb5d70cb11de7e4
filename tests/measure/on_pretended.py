"""Forecast and checks on the device of `pretended.py`, and with faults planted: what `test_device.py` runs and judges."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from pretended import NAME, MixedDevices, Pretended
from sts_callback.config import ProbeConfig
from sts_callback.measure.monitor import Monitor
from sts_callback.metrics.copies import sent
from sts_callback.metrics.sums import SKETCH_WIDTH, QuerySums, SparseActs
from sts_callback.model.capture import Capture
from tiny import rotated_sae, rows, tiny_model, tiny_tokenizer

CONFIG = ProbeConfig(n_queries=8, n_features=8, n_domain_demonstrations=3, batch_tokens=60, max_norm_multiple=1.3)

SAE = rotated_sae(kind="jumprelu")


def made_monitor(model: torch.nn.Module) -> Monitor:
    domains = {"poems": rows(20, "far away poems", seed=40)}
    options: dict[str, Any] = {"train_data": rows(20, "sums"), "domains": domains, "config": CONFIG, "progress": False}
    return Monitor(model, tiny_tokenizer(), sae=SAE, **options)


def made_model() -> PreTrainedModel:
    model = tiny_model("gemma3")
    model.set_attn_implementation("eager")
    return model


def on_device() -> PreTrainedModel:
    model = made_model().to(NAME)
    model.tie_weights()  # parameters were made anew
    return model


def moved(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, device="cpu").to(p.device) * 0.01)


def numbers(record: Any) -> Iterator[float]:
    """Every number of a record but those of time."""
    if dataclasses.is_dataclass(record):
        record = vars(record)
    if isinstance(record, dict):
        for name, value in record.items():
            if not str(name).startswith("seconds"):
                yield from numbers(value)
    elif isinstance(record, (list, tuple)):
        for value in record:
            yield from numbers(value)
    elif isinstance(record, (int, float)):
        yield float(record)


def furthest(one: Any, other: Any) -> float:
    """Largest difference of two records, relative to the larger of the number and 1."""
    pairs = list(zip(numbers(one), numbers(other), strict=True))
    assert len(pairs) > 50
    return max(0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b) / max(1.0, abs(a)) for a, b in pairs)


class Counted:
    """How often a method is called."""

    def __init__(self, stack: ExitStack, *methods: tuple[type, str]) -> None:
        self.n = 0
        for owner, name in methods:
            stack.enter_context(mock.patch.object(owner, name, self._counting(getattr(owner, name))))

    def _counting(self, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.n += 1
            return method(*args, **kwargs)

        return call


def seen(device: Pretended, forwards: Counted, chunks: Counted) -> dict[str, Any]:
    """What has happened since this was called last."""
    found = {"waits": dict(device.waits), "copied": dict(device.copied), "forwards": forwards.n, "chunks": chunks.n}
    device.waits.clear()
    device.copied.clear()
    forwards.n = chunks.n = 0
    return found


def n_bytes(monitor: Monitor) -> int:
    """Bytes that a check must send: what is kept of step 0, and 64 for each token that it reads."""
    assert monitor.step_zero is not None
    kept = monitor.step_zero.sets.values()
    of_tokens = sum(64 * len(q.tokens) for s in (monitor.train, *monitor.domains.values()) for q in s.queries)
    return of_tokens + sum(12 * len(one.acts.values) + 4 * one.sketches.numel() for one in kept)


def whole_run() -> dict[str, Any]:
    """A monitor on the CPU, one on the device, one whose model moves there, and one among tensors that are made there."""
    plain = made_model()
    expected = made_monitor(plain)
    forecast = expected.forecast()
    moved(plain)
    check = expected.check(2)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        forwards = Counted(stack, (Capture, "_inputs"))
        chunks = Counted(stack, (type(expected._runner.sae_readers[0].encoder), "reconstruct"))
        device = stack.enter_context(Pretended())
        model = on_device()
        monitor = made_monitor(model)
        seen(device, forwards, chunks)
        found["forecast_off_by"] = furthest(forecast, monitor.forecast())
        found["forecast"] = seen(device, forwards, chunks)
        same = monitor.check(1)
        found["same"] = [d.relative_drift.value for d in (same.train, *same.domains.values())]
        found["faults"] = faults(device, monitor)
        moved(model)
        seen(device, forwards, chunks)
        found["check_off_by"] = furthest(check, monitor.check(2))
        found["check"] = {**seen(device, forwards, chunks), "most_bytes": n_bytes(monitor)}

        late = made_model()
        monitor = made_monitor(late)
        late.to(NAME).tie_weights()  # its SAE stays behind
        found["moved_afterwards_off_by"] = furthest(forecast, monitor.forecast())

        model = on_device()
        torch.set_default_device(NAME)  # of the user's new tensors
        try:
            monitor = made_monitor(model)
            found["default_device_off_by"] = furthest(forecast, monitor.forecast())
            moved(model)
            found["default_device_off_by"] += furthest(check, monitor.check(2))
        finally:
            torch.set_default_device(None)
    return found


def with_fault(device: Pretended, monitor: Monitor, patch: Any) -> dict[str, Any]:
    """A check with something planted: what is raised, how often the host waits, and what is sent to the device."""
    device.waits.clear()
    device.copied.clear()
    with patch:
        try:
            monitor.check(1)
        except MixedDevices as error:
            return {"raised": str(error), "waits": 0, "sent": 0}
    return {"raised": "", "waits": sum(device.waits.values()), "sent": bytes_sent(device.copied)}


def bytes_sent(copied: Mapping[str, int]) -> int:
    return sum(n for where, n in copied.items() if where.endswith("to the device"))


def faults(device: Pretended, monitor: Monitor) -> dict[str, dict[str, Any]]:
    add, dense = QuerySums.add, SparseActs.dense

    def asking(self: QuerySums, values: torch.Tensor, query_index: torch.Tensor) -> None:
        if bool((values != 0).any()):
            add(self, values, query_index)

    def left_behind(self: SparseActs, start: int, stop: int, d_sae: int, device: torch.device) -> torch.Tensor:
        return dense(self, start, stop, d_sae, torch.device("cpu"))

    def from_the_cpu(x: torch.Tensor) -> torch.Tensor:
        return x.float() @ torch.ones(x.shape[1], SKETCH_WIDTH)

    def sent_anew(x: torch.Tensor) -> torch.Tensor:
        return x.float() @ sent(torch.ones(x.shape[1], SKETCH_WIDTH), x.device)

    sketch = "sts_callback.measure.accumulators.sketch"
    return {
        "none": with_fault(device, monitor, ExitStack()),
        "a question to the device in every sum": with_fault(device, monitor, mock.patch.object(QuerySums, "add", asking)),
        "step 0 on the CPU": with_fault(device, monitor, mock.patch.object(SparseActs, "dense", left_behind)),
        "a projection on the CPU": with_fault(device, monitor, mock.patch(sketch, from_the_cpu)),
        "a projection sent for every chunk": with_fault(device, monitor, mock.patch(sketch, sent_anew)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(whole_run()) + "\n")
