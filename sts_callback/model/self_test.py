"""Test, before anything is measured, that a model gives a query the same activations in a batch as alone.

Every measurement relies on this: queries come after cached keys and values, in padded batches, with their answers behind them,
and the forward ends early. No list says which architectures, caches, masks and wrappers break it: each model is tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sts_callback.distributed import Ranks
from sts_callback.errors import ModelError, StsError, is_short_of_memory
from sts_callback.model.capture import Capture, Captured, Prefix
from sts_callback.model.head import whole_logits
from sts_callback.model.hooks import architecture
from sts_callback.model.products import rounded_to
from sts_callback.model.undisturbed import writes_to_weights

# Measured on random models of 16 layers and six families, three of them with routed experts, a query alone against one in a batch
# behind a cache: in float32 at most 2e-6 for any token; in bfloat16, float16 and under autocast at most 0.017 for the median
# token, but 0.66 for one that rounding sent to another expert. Twice the depth makes about 1.4 times as much.
_EXACT = 1e-4
"""Largest relative error that rounding may cause for any token, in float32."""
_COARSE = 0.1
"""The same for the median token, in lower precision."""
_MOST_TOKENS, _N_AFTER = 32, 4
_N_HEAD = 8  # tokens whose logits are compared bit by bit


@dataclass(frozen=True)
class Findings:
    """Whether a cache and a backward can be used beside the plain forward."""

    cache: bool = True
    """Whether cached keys and values give the same as new ones."""
    gradients: bool = True
    """Whether gradients pass through every module above the hook points."""
    precision: str = "float32"
    """What the model computes in, see `Identity`."""


def self_test(
    capture: Capture,
    prefix: Sequence[int],
    queries: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    with_logits: bool,
    ranks: Ranks,
) -> Findings:
    """Compare queries alone with the same queries in a padded batch, with tokens after them, behind a cache, the head apart.

    A comparison fails if it fails for all queries: rounding can send tokens of one query to another expert. Each process makes
    the same number of forwards. Use it inside `undisturbed(model)`.

    Args:
        capture: reads the model.
        prefix: tokens before the queries. It must be as long as the longest context, so that it exceeds the same windows.
        queries: the queries to try.
        n_tokens: length of the longest row that will follow the prefix. No position beyond it is used.
        with_logits: whether logits will be needed.
        ranks: the processes that run the same test.

    Raises:
        ModelError: if the model cannot be measured. The message names the cause.

    """
    model, n_writes = capture.model, writes_to_weights(capture.model)
    trials = [_Trial(capture, tuple(prefix), query, n_tokens, with_logits) for query in queries]
    if with_logits:
        apart = [ok for trial in trials for ok in ranks.gathered(trial.head_is_apart)]
        capture.splits_head = all(apart)

    def holds(error: Callable[[_Trial], float]) -> bool:
        """Whether a comparison holds for some query in all processes."""
        return any(max(ranks.gathered(lambda trial=trial: error(trial))) <= 1 for trial in trials)  # type: ignore[misc]

    together = holds(_Trial.together)
    if capture.may_stop and writes_to_weights(model) != n_writes:  # sharding may write to the tensors that hold the shards
        raise ModelError(f"model: {architecture(model)} rewrites its own weights in a forward, so that none can be watched.")
    if not together and not holds(_Trial.followed):
        raise ModelError(
            f"model: {architecture(model)} is not causal: a query's activations depend on what stands after it. Only models that "
            "read from left to right can be measured; see is_decoder and use_bidirectional_attention in its configuration."
        )
    if not together:
        raise ModelError(
            f"model: {architecture(model)} gives a query other activations beside a longer row than alone: it takes padding for "
            "text, or mixes rows. It cannot be measured in batches."
        )
    cache = holds(_Trial.cached)
    if not (with_logits and capture.may_stop):  # there will be no backward
        return Findings(cache, precision=trials[0].precision)
    gradients = all(ranks.gathered(lambda: _passes_gradients(capture, queries[0])))
    return Findings(cache, gradients, trials[0].precision)


class _Trial:
    """One query. Errors are relative to the query alone, in multiples of the largest error that rounding may cause."""

    def __init__(self, capture: Capture, prefix: tuple[int, ...], query: Sequence[int], n_tokens: int, with_logits: bool) -> None:
        n_row = min(n_tokens, _MOST_TOKENS + 2 * _N_AFTER)
        self._query = tuple(query)[: max(1, n_row - 2 * _N_AFTER)]
        self._followed = self._query + self._query[:1] * max(0, min(_N_AFTER, n_row - 1 - len(self._query)))
        self._longer = (tuple(reversed(query)) * n_row)[:n_row]
        self._capture, self._prefix, self._with_logits = capture, Prefix(prefix, None), with_logits
        self._truth: Captured | None = None
        self._exact = False
        self.precision = Findings.precision
        """Known once the query has run alone."""

    def head_is_apart(self) -> bool:
        """Whether the head can be had apart; see `Capture.can_split_head`."""
        self._truth = self._alone()  # by the model's own head, to its end
        return self._capture.can_split_head(self._query[:_N_HEAD])

    def together(self) -> float:
        """Error in a padded batch, with tokens after the query."""
        return self._error([self._followed, self._longer], self._prefix)

    def followed(self) -> float:
        """Error alone, with tokens after the query."""
        return self._error([self._followed], self._prefix)

    def cached(self) -> float:
        """Error as for `together`, but with a cached prefix: of all layers, and up to the hook points."""
        errors = list[float]()
        for whole in (True, False) if self._with_logits and self._capture.may_stop else (self._with_logits,):
            try:
                prefix = self._capture.prefix(self._prefix.token_ids, whole=whole)
                errors.append(self._error([self._followed, self._longer], prefix, whole=whole))
            except Exception as error:
                if not _is_of_the_model(error):
                    raise
                errors.append(math.inf)  # the model takes no cache, or only its own kind
        return max(errors)

    def _error(self, rows: Sequence[Sequence[int]], prefix: Prefix, *, whole: bool = True) -> float:
        truth = self._truth = self._truth or self._alone()
        found = self._run(rows, prefix, whole=whole)
        pairs = [(x, found.activations[name]) for name, x in truth.activations.items()]
        errors = [_relative(y[0, : len(self._query)], x[0]) for x, y in pairs]
        if truth.read is not None and found.read is not None:
            errors.append(_relative(found.read, truth.read))
        worst = [float(e.max()) / _EXACT if self._exact else float(e.median()) / _COARSE for e in errors]
        return max((math.inf if math.isnan(e) else e for e in worst), default=0.0)

    def _alone(self) -> Captured:
        """Run the query alone and uncached: what all else is compared with."""
        point, kind, autocast = self._capture.points[0], self._capture.device.type, set[torch.dtype]()

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_autocast_enabled(kind):
                autocast.add(torch.get_autocast_dtype(kind))

        handle = point.module.register_forward_pre_hook(look)
        try:
            found = self._run([self._query], self._prefix, to_the_end=True)  # this shows whether the hook point runs twice
        except Exception as error:
            if not _is_of_the_model(error):
                raise
            raise ModelError(
                f"model: the forward of {architecture(self._capture.model)} fails on plain text ({error!r}); what can be "
                "measured is a decoder-only language model, by input_ids and attention_mask alone."
            ) from error
        finally:
            handle.remove()
        for each in self._capture.points:
            self._check(each.name, found.activations.get(each.name))
        rounding = rounded_to(kind)
        self._exact = _is_float32(self._capture.model, found) and not (autocast or rounding)
        # By the SAE that decides: a resumed run reads for no other, and what they read may differ under autocast.
        self.precision = _precision(found.activations[point.name].dtype, autocast, rounding)
        if not all(x.isfinite().all() for x in found.activations.values()):
            return Captured({}, None)  # the measurement will report it
        return found

    def _check(self, name: str, x: torch.Tensor | None) -> None:
        model = architecture(self._capture.model)
        if x is None:
            raise ModelError(f"hook_name: {name} does not run in {model} when it reads text; take an SAE of another layer.")
        if x.dim() != 3 or x.shape[1] != len(self._query):
            raise ModelError(
                f"hook_name: {name} of {model} gives shape {tuple(x.shape)} for 1 row of {len(self._query)} tokens, not (rows, "
                "tokens, width): this architecture is not supported there. Take an SAE that reads inside a layer, such as "
                "blocks.N.hook_mlp_out."
            )

    def _run(self, rows: Sequence[Sequence[int]], prefix: Prefix, *, whole: bool = True, to_the_end: bool = False) -> Captured:
        select = None
        if whole and self._with_logits:
            select = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
            select[0, : len(self._query)] = True
        return self._capture.run(rows, prefix, select=select, whole=to_the_end)


def _relative(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Error of each token, relative to the larger of its own norm and the median norm."""
    norms: torch.Tensor = torch.linalg.vector_norm(truth.float(), dim=-1)
    errors: torch.Tensor = torch.linalg.vector_norm(found.float() - truth.float(), dim=-1)
    relative: torch.Tensor = errors / norms.clamp_min(max(float(norms.median()), 1e-30))
    return relative


def _is_float32(model: nn.Module, found: Captured) -> bool:
    """Whether weights and activations are in float32 or wider, as far as one can see."""
    tensors = [*model.parameters(), *found.activations.values()]
    return all(type(t) in (torch.Tensor, nn.Parameter) and t.dtype in (torch.float32, torch.float64) for t in tensors)


def _precision(of_activations: torch.dtype, autocast: Iterable[torch.dtype], rounding: str | None) -> str:
    """What a forward computed in, in words."""
    told = [str(of_activations), *(f"autocast to {dtype}" for dtype in autocast)]
    if rounding:
        told.append(f"products in {rounding}")
    return ", ".join(told).replace("torch.", "")


def _passes_gradients(capture: Capture, query: Sequence[int]) -> bool:
    """Whether each module above the lowest hook point passes a gradient to an input that its output depends on.

    Layers that compute with integers (int8 with dynamic activations) pass none. The result would be the gradient of the rest of
    the network.
    """
    cut: list[nn.Module] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        is_above = torch.is_grad_enabled()  # below, embeddings may ask for gradients that nobody takes
        if not (is_above and args and isinstance(args[0], torch.Tensor) and args[0].requires_grad):
            return
        x = args[0].detach().requires_grad_()
        found = _first(module.forward(x.clone(), *args[1:], **kwargs))
        with torch.no_grad():
            change = _first(module.forward(x.roll(1, dims=-1), *args[1:], **kwargs)) - found
        if change.any() and not (found.requires_grad and torch.autograd.grad(found, x, change)[0].any()):
            cut.append(module)

    leaves = [module for module in capture.model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(look, with_kwargs=True) for module in leaves]
    tokens = tuple(query)[:_MOST_TOKENS]
    try:
        capture.gradient(
            [tokens],
            Prefix((), None),
            select=torch.ones(1, len(tokens), dtype=torch.bool),
            read=lambda columns, places: whole_logits(columns, places).float().logsumexp(dim=-1),
        )
    except RuntimeError as error:  # nothing differentiable leads down to the hook point
        if not _is_of_the_model(error):
            raise
        return False
    finally:
        for handle in handles:
            handle.remove()
    return not cut


def _first(output: Any) -> torch.Tensor:
    """Get the first floating-point tensor of a module's output."""
    for x in output if isinstance(output, (tuple, list)) else [output]:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x
    return torch.zeros(())


def _is_of_the_model(error: Exception) -> bool:
    """Whether an error comes from the model, not from a lack of memory or another process."""
    return not (isinstance(error, StsError) or is_short_of_memory(error))
