"""Run a model up to its hook points and leave it as it was found.

The forward stops at the deepest hook point (no upper layers, no head, no logits) unless logits are asked for or the model is
sharded, where an early stop would leave collective state behind. Keys and values of a shared prefix are computed once and forked,
without copies, for every batch of suffixes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sts_callback.model.hooks import HookPoint, text_config


class _Captured(Exception):  # noqa: N818  # not an error: it ends a forward whose rest is not needed
    """All hook points have been read."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode without gradients; on every exit, mode and random state are as they were.

    Training must be bit-identical with and without us, so the random state of Python, NumPy, the CPU and every GPU is put
    back, and each module's own `training` flag (not `model.train()`: TRL picks its log bucket by it).
    """
    flags = [(module, module.training) for module in model.modules()]
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    default_dtype = torch.get_default_dtype()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        for module, _ in flags:
            module.training = False
        torch.set_default_dtype(torch.float32)  # sums take no less, whatever the user's new tensors are
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        torch.set_default_dtype(default_dtype)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes (FSDP, ZeRO-3, tensor parallel), where only whole forwards are safe."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()) or any(
        hasattr(m, "_fsdp_wrapped_module") for m in model.modules()
    )


@dataclass(frozen=True)
class Prefix:
    """Tokens that stand before every suffix of a batch, with their keys and values where the model can keep them."""

    token_ids: tuple[int, ...]
    cache: DynamicCache | None

    def fork(self, n_rows: int) -> DynamicCache:
        """A cache for `n_rows` suffixes: expanded views of the same keys and values; updates leave the original untouched."""
        assert self.cache is not None
        fork = copy.copy(self.cache)
        fork.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in fork.layers:
            assert isinstance(layer, DynamicLayer)  # `Capture.prefix` keeps no other kind
            if layer.keys is not None and layer.values is not None:  # layers above the hook point hold none
                layer.keys = layer.keys.expand(n_rows, -1, -1, -1)
                layer.values = layer.values.expand(n_rows, -1, -1, -1)
        return fork


@dataclass(frozen=True)
class Captured:
    """What one forward left: hook-point tensors and, if asked for, logits."""

    activations: dict[str, torch.Tensor]
    """Per hook name, `(n_rows, n_suffix, d)` in the model's dtype."""
    logits: torch.Tensor | None
    """`(n_selected, vocab)` at the selected positions, row by row."""


@dataclass(frozen=True)
class _Inputs:
    """One batch as the model takes it."""

    ids: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache | None
    select: torch.Tensor | None
    skip: int
    """Leading positions that are prefix, where it has no cache."""


class Capture:
    """Reads hook points of one model. Use it inside `undisturbed(model)`."""

    def __init__(self, model: nn.Module, points: Sequence[HookPoint]) -> None:
        self._model = model
        self._points = tuple(points)
        self.may_stop = not is_sharded(model)
        """Whether a forward may end early; if not, only whole ones are safe, and no backward."""
        self._device = next(model.parameters()).device
        self._takes_selection = _takes_selection(model)

    def prefix(self, token_ids: Sequence[int], *, whole: bool) -> Prefix:
        """Run a prefix once and keep its keys and values.

        Args:
            token_ids: the prefix, `(n_prefix,)`; may be empty.
            whole: keep them for all layers, as suffixes that want logits need; else only up to the deepest hook point.

        """
        ids = tuple(token_ids)
        if not ids:
            return Prefix(ids, None)
        cache = DynamicCache(config=text_config(self._model))  # type: ignore[arg-type]
        if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            return Prefix(ids, None)  # recurrent or chunked state cannot be forked by expanding
        row = torch.tensor([ids], device=self._device)
        self._forward(_Inputs(row, torch.ones_like(row), cache, None, 0), whole=whole)
        return Prefix(ids, cache if cache.get_seq_length() == len(ids) else None)

    def run(self, suffixes: Sequence[Sequence[int]], prefix: Prefix, *, select: torch.Tensor | None = None) -> Captured:
        """Run suffixes behind a prefix, right-padded: causal rows never see the padding.

        Args:
            suffixes: token ids of each row, not padded.
            prefix: from `prefix`, with `whole=True` if `select` is given.
            select: `(n_rows, n_suffix)` booleans on the model's device, the positions whose logits are wanted.

        """
        inputs = self._inputs(suffixes, prefix, select)
        found = self._forward(inputs, whole=select is not None)
        return Captured({name: acts[:, inputs.skip :] for name, acts in found.activations.items()}, found.logits)

    def gradient(
        self,
        suffixes: Sequence[Sequence[int]],
        prefix: Prefix,
        *,
        select: torch.Tensor,
        loss: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One backward pass from a loss down to the first hook point; no gradient of a weight is made.

        Args:
            suffixes: as for `run`.
            prefix: as for `run`; a constant, nothing flows into it.
            select: as for `run`.
            loss: of the logits at the selected positions, `(n_selected, vocab)`, a scalar.

        Returns:
            Activations at the hook point and the loss's gradient with respect to them, each `(n_rows, n_suffix, d)`.

        """
        inputs, point, leaves = self._inputs(suffixes, prefix, select), self._points[0], []

        def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
            leaf = _tensor_at(point, args, kwargs, *output).detach().requires_grad_()
            leaves.append(leaf)
            torch.set_grad_enabled(True)  # from here up; below, weights that train would record a graph nobody needs
            if point.side == "output":
                return (leaf, *output[0][1:]) if isinstance(output[0], tuple) else leaf
            return ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf})

        if point.side == "input":
            handle = point.module.register_forward_pre_hook(cut, with_kwargs=True)
        else:
            handle = point.module.register_forward_hook(cut, with_kwargs=True)
        try:
            with torch.no_grad():
                out = self._model(**self._arguments(inputs))
                logits = out.logits if self._takes_selection else out.logits[inputs.select]
                (gradient,) = torch.autograd.grad(loss(logits), leaves)
        finally:
            handle.remove()
        shape = (*inputs.ids.shape, -1)
        return leaves[0].detach().reshape(shape)[:, inputs.skip :], gradient.reshape(shape)[:, inputs.skip :]

    def _inputs(self, suffixes: Sequence[Sequence[int]], prefix: Prefix, select: torch.Tensor | None) -> _Inputs:
        n_rows, n_suffix = len(suffixes), max(map(len, suffixes))
        ids = torch.zeros(n_rows, n_suffix, dtype=torch.long)
        mask = torch.zeros(n_rows, n_suffix, dtype=torch.long)
        for row, suffix in enumerate(suffixes):
            ids[row, : len(suffix)] = torch.tensor(suffix, dtype=torch.long)
            mask[row, : len(suffix)] = 1
        head = torch.tensor(prefix.token_ids, dtype=torch.long).expand(n_rows, -1)
        mask = torch.cat([torch.ones_like(head), mask], dim=1)
        cache, skip = None, 0
        if prefix.cache is not None:
            cache = prefix.fork(n_rows)
        else:
            ids, skip = torch.cat([head, ids], dim=1), len(prefix.token_ids)
            if select is not None:
                select = nn.functional.pad(select, (skip, 0))
        return _Inputs(ids.to(self._device), mask.to(self._device), cache, select, skip)

    def _arguments(self, inputs: _Inputs) -> dict[str, Any]:
        """What the model is called with."""
        arguments: dict[str, Any] = {
            "input_ids": inputs.ids,
            "attention_mask": inputs.mask,
            "past_key_values": inputs.cache,
            "use_cache": inputs.cache is not None,
        }
        if self._takes_selection:
            arguments["logits_to_keep"] = 1 if inputs.select is None else inputs.select
        return arguments

    def _forward(self, inputs: _Inputs, *, whole: bool) -> Captured:
        activations: dict[str, torch.Tensor] = {}
        stop = self.may_stop and not whole
        handles = []
        for point in self._points:
            reader = _reader(point, activations, len(self._points) if stop else 0)
            if point.side == "input":
                handles.append(point.module.register_forward_pre_hook(reader, with_kwargs=True))
            else:
                handles.append(point.module.register_forward_hook(reader, with_kwargs=True))
        try:
            out = self._model(**self._arguments(inputs))
        except _Captured:
            out = None
        finally:
            for handle in handles:
                handle.remove()
        # OPT flattens rows and tokens before its MLP.
        for name, x in activations.items():
            if x.dim() == 2 and len(x) == inputs.ids.numel():
                activations[name] = x.reshape(*inputs.ids.shape, -1)
        if out is None or inputs.select is None:
            return Captured(activations, None)
        logits = out.logits if self._takes_selection else out.logits[inputs.select]
        return Captured(activations, logits)


def _reader(point: HookPoint, into: dict[str, torch.Tensor], n_wanted: int) -> Callable[..., None]:
    """A forward (pre-)hook that stores the point's tensor and ends the forward once `n_wanted` are there (0: never)."""

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        into[point.name] = _tensor_at(point, args, kwargs, *output)
        if len(into) == n_wanted:
            raise _Captured

    return read


def _tensor_at(point: HookPoint, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> torch.Tensor:
    value = (args[0] if args else kwargs["hidden_states"]) if point.side == "input" else output[0]
    tensor: torch.Tensor = value[0] if isinstance(value, tuple) else value
    return tensor


def _takes_selection(model: nn.Module) -> bool:
    """Whether the language model, under whatever wrappers, computes logits at chosen positions only."""
    return any("logits_to_keep" in inspect.signature(type(module).forward).parameters for module in model.modules())
