"""Run a model up to its hook points.

The forward stops at the deepest hook point (no upper layers, no head, no logits) or, where logits are asked for, at the head's
input, from which the head gives them piece by piece. If the model is sharded the forward runs to its end: to stop early would
leave collective state behind. The keys and values of a shared prefix are computed once. Each batch of suffixes uses them without
a copy.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sts_callback.distributed import Ranks
from sts_callback.errors import ModelError
from sts_callback.metrics.copies import sent
from sts_callback.model.head import Head, Read, output_embeddings, piece_size, read_in_pieces, whole_logits
from sts_callback.model.hooked import hooked, tensor_at, with_tensor
from sts_callback.model.hooks import HookPoint, text_config
from sts_callback.model.sharding import is_sharded


class _Captured(Exception):  # noqa: N818  # not an error: it ends a forward whose rest is not needed
    """All hook points, or the head's input, have been read."""


@dataclass(frozen=True)
class Prefix:
    """Tokens before every suffix of a batch, with their keys and values if the model can keep them."""

    token_ids: tuple[int, ...]
    cache: DynamicCache | None

    def fork(self, n_rows: int) -> DynamicCache:
        """Make a cache for one batch of `n_rows` suffixes. It holds expanded views of the prefix, to which nothing is added."""
        assert self.cache is not None
        fork = _Fork()
        fork.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in fork.layers:
            assert isinstance(layer, DynamicLayer)  # `Capture.prefix` keeps only this kind
            if layer.keys is not None and layer.values is not None:  # layers above the hook point have none
                layer.keys = layer.keys.expand(n_rows, -1, -1, -1)
                layer.values = layer.values.expand(n_rows, -1, -1, -1)
        return fork


class _Fork(DynamicCache):
    """Drops a layer's suffix keys and values once they are returned: no other forward needs them.

    So only one layer at a time holds prefix and suffixes of all rows in memory.
    """

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        before = dict(vars(self.layers[layer_idx]))
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        vars(self.layers[layer_idx]).update(before)
        return found


@dataclass(frozen=True)
class Captured:
    """Result of one forward: the tensors at the hook points and, if asked for, what was read of logits."""

    activations: dict[str, torch.Tensor]
    """Per hook name, `(n_rows, n_suffix, d)` in the model's dtype."""
    read: torch.Tensor | None
    """What was read of the logits at the selected positions, row by row, `(n_selected, ...)`: by default these themselves."""


@dataclass(frozen=True)
class Differentiated:
    """Result of one forward and one backward."""

    activations: dict[str, torch.Tensor]
    """Per hook name, `(n_rows, n_suffix, d)` in the model's dtype."""
    gradients: dict[str, torch.Tensor]
    """Gradients of the loss with respect to these activations."""
    losses: torch.Tensor
    """The losses that were differentiated, `(n_selected,)`."""


@dataclass(frozen=True)
class _Inputs:
    """One batch as the model takes it."""

    ids: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache | None
    select: torch.Tensor | None
    n_suffix: int
    """Number of suffix positions, the last ones. Before them come a prefix without a cache and what a wrapper adds (PEFT's
    virtual tokens)."""

    @property
    def columns(self) -> torch.Tensor:
        """Positions whose logits are computed, counted from the end: all that any row needs, or only the last.

        A mask of rows and columns would compute fewer, but transformers takes one only since 5.21, and Liger never.
        """
        if self.select is None:
            return torch.tensor([-1])  # the integer 1 would drop hidden states in Gemma 4's shared layers
        return self.select.any(dim=0).nonzero()[:, 0] - self.n_suffix

    def logits(self, out: Any) -> torch.Tensor:
        """Select the logits at the selected positions, row by row. Some forwards compute the logits of all positions."""
        assert self.select is not None
        logits, columns = out.logits, self.columns
        if logits.shape[1] == len(columns):
            return _taken(logits, self.select[:, columns])
        return self.selected(logits)

    def selected(self, x: torch.Tensor) -> torch.Tensor:
        """Select the selected positions, row by row, of a tensor that has them all, `(n_rows, n_positions, d)`."""
        assert self.select is not None
        return _taken(x[:, -self.n_suffix :], self.select)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Select the suffix positions of a tensor, `(n_rows, n_suffix, d)`. OPT flattens rows and tokens before its MLP."""
        if x.dim() == 2:
            x = x.reshape(len(self.ids), -1, x.shape[-1])
        return (
            x[:, -self.n_suffix :] if x.shape[1] >= self.ids.shape[1] else x
        )  # with fewer positions than tokens these are not the suffixes'


class Capture:
    """Reads the hook points of one model. Use it inside `undisturbed(model)`."""

    def __init__(self, model: nn.Module, points: Sequence[HookPoint], ranks: Ranks | None = None) -> None:
        self.model, self._ranks = model, ranks or Ranks()
        self.points = tuple(points)
        self.may_stop = not is_sharded(model)
        """Whether a forward may end early. If not, only whole forwards are safe, and no backward."""
        self.may_cache = True
        """Whether `prefix` may keep keys and values. The self-test decides."""
        self.splits_head = False
        """Whether the head is had apart, so that no forward makes logits whole. The self-test decides."""
        head = output_embeddings(model) if self.may_stop else None  # sharded, each call of a module takes all processes
        self._head = None if head is None else Head(model, head)
        self._n_piece = piece_size(model)
        self._takes_selection = _takes_selection(model)
        self._cache_argument = _cache_argument(model)
        self._learns_prompt = _learns_prompt(model)

    @property
    def device(self) -> torch.device:
        """Device of the batches, where the model is by now. What was offloaded is on none."""
        places = (p.device for p in self.model.parameters())
        return next((place for place in places if place.type != "meta"), torch.device("cpu"))

    def prefix(self, token_ids: Sequence[int], *, whole: bool) -> Prefix:
        """Run a prefix once and keep its keys and values.

        Args:
            token_ids: the prefix, `(n_prefix,)`; may be empty.
            whole: keep those of all layers, which suffixes need whose logits are wanted; else only up to the deepest hook point.

        """
        ids = tuple(token_ids)
        if not ids or not self.may_cache or self._learns_prompt:
            return Prefix(ids, None)
        cache = DynamicCache(config=text_config(self.model))  # type: ignore[arg-type]
        if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            return Prefix(ids, None)  # recurrent or chunked state cannot be shared by expanding it
        row = sent(torch.tensor([ids]), self.device)
        self._forward(_Inputs(row, torch.ones_like(row), cache, None, len(ids)), whole=whole)
        return Prefix(ids, cache if cache.get_seq_length() == len(ids) else None)

    def run(
        self,
        suffixes: Sequence[Sequence[int]],
        prefix: Prefix,
        *,
        select: torch.Tensor | None = None,
        read: Read = whole_logits,
        whole: bool = False,
    ) -> Captured:
        """Run suffixes behind a prefix, right-padded: causal rows never see the padding.

        Args:
            suffixes: token ids of each row, not padded.
            prefix: from `prefix`, with `whole=True` if `select` is given.
            select: the positions whose logits are wanted, `(n_rows, n_suffix)` booleans on the CPU.
            read: reads them, a piece at a time.
            whole: run all layers, even if no logits are wanted.

        """
        inputs = self._inputs(suffixes, prefix, select)
        found = self._forward(inputs, whole=whole or select is not None, read=read)
        return Captured({name: inputs.rows(x) for name, x in found.activations.items()}, found.read)

    def gradient(
        self,
        suffixes: Sequence[Sequence[int]],
        prefix: Prefix,
        *,
        select: torch.Tensor,
        read: Read,
    ) -> Differentiated:
        """Run one forward, and one backward from a loss to the lowest hook point. No weight gets a gradient.

        Args:
            suffixes: as for `run`.
            prefix: as for `run`; no gradient flows into it.
            select: as for `run`.
            read: gives the loss of each selected position; their sum is differentiated.

        """
        inputs, found, handles = self._inputs(suffixes, prefix, select), dict[str, torch.Tensor](), []
        at_head = list[tuple[torch.Tensor, ...]]()

        def cutting(point: HookPoint) -> Callable[..., Any]:
            def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
                x = tensor_at(point, args, kwargs, *output)
                if torch.is_grad_enabled():  # a lower hook point came before
                    found[point.name] = x
                    return None
                leaf = found[point.name] = x.detach().requires_grad_()
                torch.set_grad_enabled(True)  # from here up; below, trainable weights would record a graph that nobody needs
                return with_tensor(leaf, point, args, kwargs, *output)

            return cut

        def differentiate(head: Head, x: torch.Tensor) -> None:
            selected = inputs.selected(x)
            at_head.append((selected, *head.differentiated(selected, read)))

        try:
            for point in self.points:
                handles.append(hooked(point, cutting(point)))
            if self._head is not None and self.splits_head:
                handles.append(_stopped_at(self._head, differentiate))
            with torch.no_grad():
                try:
                    out = self.model(**self._arguments(inputs))
                except _Captured:
                    ((top, losses, gradient),) = at_head
                else:
                    top = losses = read_in_pieces(inputs.logits(out), read, self._n_piece)
                    gradient = torch.ones_like(losses)
                gradients = torch.autograd.grad(top, list(found.values()), gradient)
        finally:
            for handle in handles:
                handle.remove()
        return Differentiated(
            {name: inputs.rows(x.detach()) for name, x in found.items()},
            {name: inputs.rows(x) for name, x in zip(found, gradients, strict=True)},
            losses.detach(),
        )

    def can_move(self, name: str, suffix: Sequence[int]) -> bool:
        """Whether training can change a hook point: whether a weight below it requires a gradient.

        Args:
            name: name of the hook point.
            suffix: token ids of any text.

        """
        if not self.may_stop:  # after a forward with gradients a sharded model would wait for a backward
            return any(p.requires_grad for p in self.model.parameters())
        with torch.enable_grad():
            found = self._forward(self._inputs([suffix], Prefix((), None), None), whole=False)
        return _has_parameter(found.activations[name].grad_fn)

    def can_split_head(self, tokens: Sequence[int]) -> bool:
        """Whether the head, apart, gives the logits that the model's own forward makes of the same inputs, bit by bit.

        Args:
            tokens: token ids of any text.

        """
        if self._head is None:
            return False
        apart = list[torch.Tensor]()
        handle = self._head.called_before(lambda head, x: apart.append(head.logits(x)))
        try:
            everywhere = torch.ones(1, len(tokens), dtype=torch.bool)
            out = self.model(**self._arguments(self._inputs([tokens], Prefix((), None), everywhere)))
        finally:
            handle.remove()
        return len(apart) == 1 and torch.equal(apart[0].to(out.logits), out.logits)

    def _inputs(self, suffixes: Sequence[Sequence[int]], prefix: Prefix, select: torch.Tensor | None) -> _Inputs:
        n_rows, n_suffix = len(suffixes), max(map(len, suffixes))
        ids = torch.zeros(n_rows, n_suffix, dtype=torch.long)
        mask = torch.zeros(n_rows, n_suffix, dtype=torch.long)
        for row, suffix in enumerate(suffixes):
            ids[row, : len(suffix)] = torch.tensor(suffix, dtype=torch.long)
            mask[row, : len(suffix)] = 1
        head = torch.tensor(prefix.token_ids, dtype=torch.long).expand(n_rows, -1)
        mask = torch.cat([torch.ones_like(head), mask], dim=1)
        cache = None if prefix.cache is None else prefix.fork(n_rows)
        if cache is None:
            ids = torch.cat([head, ids], dim=1)
        return _Inputs(sent(ids, self.device), sent(mask, self.device), cache, select, n_suffix)

    def _arguments(self, inputs: _Inputs) -> dict[str, Any]:
        """Arguments for the model's forward."""
        arguments: dict[str, Any] = {
            "input_ids": inputs.ids,
            "attention_mask": inputs.mask,
            "use_cache": inputs.cache is not None,
        }
        if inputs.cache is not None:  # "none" would replace what prefix tuning gives by the argument's older name
            arguments[self._cache_argument] = inputs.cache
        if self._takes_selection and not self.splits_head:
            arguments["logits_to_keep"] = sent(inputs.columns, inputs.ids.device)
        return arguments

    def _forward(self, inputs: _Inputs, *, whole: bool, read: Read = whole_logits) -> Captured:
        if not self.may_stop:  # all processes must run it: one that has failed says so first, or the others hang
            self._ranks.together(lambda: None)
        activations: dict[str, torch.Tensor] = {}
        stop = self.may_stop and not whole
        handles, at_head = [], list[torch.Tensor]()

        def keep(head: Head, x: torch.Tensor) -> None:
            if inputs.select is not None:
                at_head.append(head.read(inputs.selected(x), read))

        for point in self.points:
            reader = _reader(point, activations, len(self.points) if stop else 0)
            handles.append(hooked(point, reader))
        if self._head is not None and self.splits_head:
            handles.append(_stopped_at(self._head, keep))
        try:
            out = self.model(**self._arguments(inputs))
        except _Captured:
            out = None
        finally:
            for handle in handles:
                handle.remove()
        if out is not None and inputs.select is not None:
            at_head.append(read_in_pieces(inputs.logits(out), read, self._n_piece))
        return Captured(activations, at_head[0] if at_head else None)


def _taken(x: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
    """Select positions, row by row, by booleans on the CPU, `(n_rows, n_positions)`."""
    places = sent(select.nonzero().T.contiguous(), x.device)
    return x[places[0], places[1]]


def _reader(point: HookPoint, into: dict[str, torch.Tensor], n_wanted: int) -> Callable[..., None]:
    """Make a hook that stores the point's tensor and ends the forward once `n_wanted` are stored (0: never)."""

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        if point.name in into:
            raise ModelError(
                f"hook_name: {point.name} runs more than once in one forward, and an SAE does not say which time it means. "
                "Models that loop over their layers and wrappers that run the model twice (X-LoRA) are not supported."
            )
        into[point.name] = tensor_at(point, args, kwargs, *output)
        if len(into) == n_wanted:
            raise _Captured

    return read


def _stopped_at(head: Head, use: Callable[[Head, torch.Tensor], object]) -> RemovableHandle:
    """Use a head and its inputs before it runs, and end the forward there."""

    def stop(head: Head, x: torch.Tensor) -> None:
        use(head, x)
        raise _Captured

    return head.called_before(stop)


def _has_parameter(node: Any) -> bool:
    """Whether a graph of autograd contains a parameter. With gradient checkpointing, inputs require gradients too."""
    waiting, seen = [node], {None}
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if isinstance(getattr(node, "variable", None), nn.Parameter):
                return True
            waiting += [before for before, _ in node.next_functions]
    return False


def _takes_selection(model: nn.Module) -> bool:
    """Whether the language model can compute logits at chosen positions only, whatever wraps it."""
    return any("logits_to_keep" in inspect.signature(type(module).forward).parameters for module in model.modules())


def _cache_argument(model: nn.Module) -> str:
    """Name of the argument that takes the cache: `past_key_values` was renamed in transformers 5.24."""
    names = (inspect.signature(type(module).forward).parameters for module in model.modules())
    return next((name for taken in names for name in ("cache", "past_key_values") if name in taken), "past_key_values")


def _learns_prompt(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before every text, or a cache of its own in the place of ours."""
    given = (getattr(module, "peft_config", None) for module in model.modules())
    return any(getattr(config, "is_prompt_learning", False) for configs in given if configs for config in configs.values())
