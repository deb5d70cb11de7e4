"""Model, SAE and probes to sums: passes over a probe set under several contexts, streamed.

Nothing of size `(n_tokens, d_sae)` outlives a chunk; of one set at a time, the activations `(n_tokens, d_in)` without context do.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from sts_callback.config import ProbeConfig
from sts_callback.errors import ModelError, SaeError
from sts_callback.metrics.sketch import WIDTH, sketch
from sts_callback.metrics.sparse import SparseActs
from sts_callback.metrics.sums import QuerySums
from sts_callback.metrics.tokens import is_ordinary
from sts_callback.model.capture import Capture, Prefix
from sts_callback.model.encoder import Reconstruction, SaeEncoder
from sts_callback.model.hooks import find_layers, resolve, text_config
from sts_callback.model.probes import Candidates, ProbeSet, Query, answer_positions, batches, candidate_rows
from sts_callback.readings import DriftReading, Fit, Reading, Reference, Shift

BARE = "bare"
"""The context without demonstrations."""

_CHUNK_ELEMENTS = 2**24  # activations encoded at once: 64 MiB in float32
_N_CALIBRATION = 4  # queries of each set that set the median norm

OnBatch = Callable[[int], object]
"""Told the number of queries done, for progress."""


@dataclass(frozen=True)
class Context:
    """What stands before each query of a pass."""

    prefix: Prefix
    with_answers: bool
    """Whether the answers follow and their NLL is wanted, which takes the whole depth of the model."""


class Gauge:
    """Reads probe sets through one model and one SAE, after `calibrate` or `adopt`. Use it inside `undisturbed(model)`."""

    def __init__(self, model: nn.Module, encoder: SaeEncoder, config: ProbeConfig) -> None:
        """Find the hook point.

        Raises:
            ModelError: if the model has no such hook point.
            SaeError: if the SAE is too narrow to select from.

        """
        self.encoder = encoder
        self.reference: Reference
        self._config = config
        self._model, self._point = model, resolve(model, encoder.hook_name)
        self._capture = Capture(model, [self._point])
        self._vocab_size = int(getattr(text_config(model), "vocab_size", 2**16))
        self._has_head = any(
            getattr(m, "get_output_embeddings", lambda: None)() is not None for m in model.modules() if hasattr(m, "config")
        )
        if config.n_features > encoder.d_sae // 2:
            raise SaeError(
                f"n_features: {config.n_features} of {encoder.d_sae} features are no selection; allowed is up to "
                f"{encoder.d_sae // 2}."
            )

    def context(self, tokens: Sequence[int], *, with_answers: bool) -> Context:
        """Run what stands before queries, once for all of them; it holds for the weights of this moment.

        Args:
            tokens: BOS and demonstrations.
            with_answers: see `Context`; without a language-model head, answers are never read.

        """
        whole = with_answers and self._has_head
        return Context(self._capture.prefix(tokens, whole=whole), whole)

    def calibrate(self, sets: Sequence[ProbeSet], bare: Context) -> Fit:
        """Set the reference and see how the SAE fits, on a few queries of each set.

        Args:
            sets: all of them.
            bare: the context without demonstrations.

        Raises:
            SaeError: if the SAE has another width than the model.

        """
        x = torch.cat([self._run(s.queries[:_N_CALIBRATION], bare.prefix, with_answers=False)[0] for s in sets]).float()
        if x.shape[1] != self.encoder.d_in:
            raise SaeError(
                f"sae: {self.encoder.name} reads activations of width {self.encoder.d_in}, but {self.encoder.hook_name} of this "
                f"model has width {x.shape[1]}; take an SAE that was trained on this model."
            )
        x, median_norm = self._without_sinks(x)
        self.adopt(Reference(median_norm, x.norm(dim=1).mean().item()))
        return fit(self.encoder, x)

    def fit_by_layer(self, probes: ProbeSet, bare: Context) -> dict[int, float]:
        """Fraction of variance that the SAE would leave at the same site of each layer, on a few queries of one set.

        Args:
            probes: the set.
            bare: the context without demonstrations.

        """
        points = {}
        for layer in range(len(find_layers(self._model))):
            with contextlib.suppress(ModelError):  # not every layer need have the site
                points[layer] = resolve(self._model, re.sub(r"\d+", str(layer), self.encoder.hook_name, count=1))
        queries = probes.queries[:_N_CALIBRATION]
        context = Prefix(bare.prefix.token_ids, None)  # what is kept of it may end at the SAE's own layer
        captured = Capture(self._model, list(points.values())).run([q.query for q in queries], context)
        found = {layer: candidate_rows(captured.activations[point.name], queries) for layer, point in points.items()}
        return {layer: fit(self.encoder, self._without_sinks(x.float())[0]).unexplained for layer, x in found.items()}

    @property
    def layer(self) -> int:
        """The layer that the SAE reads."""
        return self._point.layer

    def adopt(self, reference: Reference) -> None:
        """Take the reference of an earlier visit."""
        self.reference = reference
        if self.encoder.needs_scale:
            self.encoder = self.encoder.scaled(reference.mean_norm)

    def read(
        self,
        probes: ProbeSet,
        bare: Context,
        contexts: Mapping[str, Sequence[Context]],
        on_batch: OnBatch = lambda n_queries: None,
    ) -> Reading:
        """A pass without context and one under each of others, which are compared with it token by token.

        Args:
            probes: what to read.
            bare: the context without demonstrations.
            contexts: by name, one for each group of queries, or one for all.
            on_batch: see `OnBatch`; each query is done once for each context, and once without.

        """
        candidates = Candidates(probes.queries)
        n_queries, device = len(probes.queries), self.encoder.sae.device
        x_bare, bare_nll = self._all(probes, bare, on_batch)
        nll = {BARE: bare_nll} if bare_nll is not None else {}
        nll |= {name: torch.zeros(n_queries) for name, c in contexts.items() if c[0].with_answers}
        activity, raw = (QuerySums(n_queries, width, device) for width in (self.encoder.d_sae, self.encoder.d_in))
        energies = QuerySums(n_queries, 2, device)
        shifts = {name: _ShiftSums(n_queries, self.encoder.d_sae, device) for name in contexts}
        counted = torch.zeros(len(candidates.owner), dtype=torch.bool)

        for group in range(len(probes.draws)):
            members = [i for i in range(n_queries) if probes.group(i) == group]
            for batch in self._batches(probes, members):
                queries, rows = [probes.queries[i] for i in batch], candidates.of(batch)
                found = {BARE: x_bare[rows.to(x_bare.device)]}
                for name, draws in contexts.items():
                    context = draws[group % len(draws)]
                    found[name], losses = self._run(queries, context.prefix, with_answers=context.with_answers)
                    if losses is not None:
                        nll[name][batch] = losses
                    on_batch(len(batch))
                ordinary = torch.stack([self._ordinary(x, self.reference.median_norm) for x in found.values()]).all(dim=0)
                counted[rows] = ordinary.cpu()
                owner = candidates.owner[rows[counted[rows]]]
                found = {name: x[ordinary] for name, x in found.items()}
                for chunk in self._chunks(len(owner)):
                    to = owner[chunk].to(device)
                    here = self.encoder.reconstruct(found[BARE][chunk])
                    activity.add(here.acts, to)
                    raw.add(here.x, to)
                    energies.add(torch.stack([here.acts.square().sum(dim=1), here.x.square().sum(dim=1)], dim=1), to)
                    for name, sums in shifts.items():
                        sums.add(_differences(self.encoder.reconstruct(found[name][chunk]), here), to)

        kept = [self._step_zero(x) for x in self._counted_chunks(x_bare, counted)]
        return Reading(
            n_tokens=torch.bincount(candidates.owner[counted], minlength=n_queries),
            n_masked=int((~counted).sum()),
            activity=activity.result,
            energy=energies.result[:, 0],
            raw=raw.result,
            raw_energy=energies.result[:, 1],
            shifts={name: sums.result for name, sums in shifts.items()},
            n_answer=torch.tensor([len(q.answer) for q in probes.queries]),
            nll=nll,
            counted=counted,
            acts=SparseActs.cat([acts for acts, _ in kept]),
            sketches=torch.cat([sketches for _, sketches in kept]) if kept else torch.zeros(0, 2, WIDTH),
        )

    def read_drift(
        self,
        probes: ProbeSet,
        bare: Context,
        step_zero: StepZero,
        on_batch: OnBatch = lambda n_queries: None,
        *,
        batch_tokens: int | None = None,
    ) -> DriftReading:
        """Compare the same tokens, in the same batches, with step 0.

        With unchanged weights the result is exactly 0: both visits share layout, cache use and arithmetic.

        Args:
            probes: the set that was read at step 0.
            bare: the context without demonstrations, run with the weights of now.
            step_zero: what was kept of it.
            on_batch: see `OnBatch`.
            batch_tokens: another batch layout than that of step 0, to see what it does.

        """
        # Training may rescale the whole stream: a sink now is one that stands out from what is usual now.
        sample, _ = self._run(probes.queries[:_N_CALIBRATION], bare.prefix, with_answers=False)
        scale = max(self.reference.median_norm, sample.float().norm(dim=1).median().item())
        n_queries, device = len(probes.queries), self.encoder.sae.device
        x_now, nll = self._all(probes, bare, on_batch, batch_tokens)
        owner = Candidates(probes.queries).owner[step_zero.counted]
        ordinary = self._ordinary(x_now[step_zero.counted.to(x_now.device)], scale).cpu()
        sums, n_seen = _ShiftSums(n_queries, self.encoder.d_sae, device), 0
        for x in self._counted_chunks(x_now, step_zero.counted):
            rows = slice(n_seen, n_seen + len(x))
            n_seen += len(x)
            now = self.encoder.reconstruct(x)
            then, then_left = step_zero.sketches[rows].to(device).unbind(dim=1)
            differences = (
                (now.acts - step_zero.acts.dense(rows.start, rows.stop, self.encoder.d_sae, device)).square_(),
                (sketch(now.x) - then).square().sum(dim=1),
                (sketch(now.left) - then_left).square().sum(dim=1),
            )
            keep = ordinary[rows].to(device)
            sums.add(tuple(d[keep] for d in differences), owner[rows].to(device)[keep])
        n_tokens = torch.bincount(owner[ordinary], minlength=n_queries)
        return DriftReading(n_tokens, int((~ordinary).sum()), sums.result, nll)

    def read_gradients(self, probes: ProbeSet, bare: Context, on_batch: OnBatch = lambda n_queries: None) -> torch.Tensor:
        """Gradients of the answers' NLL with respect to feature activations, summed over the tokens of each query and its answer.

        Args:
            probes: what to read.
            bare: the context without demonstrations.
            on_batch: see `OnBatch`.

        Returns:
            `(n_queries, d_sae)`, in nats per unit of activation.

        """
        sums = QuerySums(len(probes.queries), self.encoder.d_sae, self.encoder.sae.device)
        for batch in self._batches(probes, range(len(probes.queries))):
            queries = [probes.queries[i] for i in batch]
            acts, gradient = self._capture.gradient(
                [q.tokens for q in queries],
                bare.prefix,
                select=answer_positions(queries),
                loss=lambda logits, queries=queries: _losses(logits, queries).sum(),  # type: ignore[misc]
            )
            real = torch.arange(acts.shape[1]) < torch.tensor([[len(q.tokens)] for q in queries])
            ordinary = self._ordinary(acts.flatten(0, 1), self.reference.median_norm).reshape(real.shape) & real.to(acts.device)
            owner = torch.tensor(batch).unsqueeze(1).expand(real.shape)[ordinary.cpu()]
            x, gradient = acts[ordinary], gradient[ordinary]
            for chunk in self._chunks(len(owner)):
                sums.add(self.encoder.feature_gradient(x[chunk], gradient[chunk]), owner[chunk].to(self.encoder.sae.device))
            on_batch(len(batch))
        return sums.result

    @property
    def can_read_gradients(self) -> bool:
        """Not without a head, through a transcoder, or on a sharded model, where a backward pass is not ours to start."""
        return self._has_head and self.encoder.reconstructs and self._capture.may_stop

    def _all(
        self, probes: ProbeSet, context: Context, on_batch: OnBatch, batch_tokens: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Activations of all candidate tokens, `(n_candidates, d_in)`, and the answers' NLL, `(n_queries,)`."""
        candidates = Candidates(probes.queries)
        everything: torch.Tensor | None = None
        nll = torch.zeros(len(probes.queries)) if context.with_answers else None
        for batch in self._batches(probes, range(len(probes.queries)), batch_tokens):
            queries = [probes.queries[i] for i in batch]
            x, losses = self._run(queries, context.prefix, with_answers=context.with_answers)
            if everything is None:
                everything = x.new_empty(len(candidates.owner), x.shape[1])
            everything[candidates.of(batch).to(x.device)] = x
            if nll is not None and losses is not None:
                nll[batch] = losses
            on_batch(len(batch))
        assert everything is not None, "a probe set has queries"
        return everything, nll

    def _step_zero(self, x: torch.Tensor) -> tuple[SparseActs, torch.Tensor]:
        """What later checks compare with, of `(n_tokens, d_in)`."""
        here = self.encoder.reconstruct(x)
        return SparseActs.of(here.acts), torch.stack([sketch(here.x), sketch(here.left)], dim=1).cpu()

    def _counted_chunks(self, x: torch.Tensor, counted: torch.Tensor) -> Iterator[torch.Tensor]:
        """Rows that count, in chunks whose shapes depend on nothing else: equal shapes, equal last bits."""
        x = x[counted.to(x.device)]
        return (x[chunk] for chunk in self._chunks(len(x)))

    def _batches(self, probes: ProbeSet, members: Sequence[int], batch_tokens: int | None = None) -> Iterator[list[int]]:
        return batches(probes.queries, members, batch_tokens or self._config.batch_tokens, self._vocab_size)

    def _without_sinks(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The ordinary ones of a sample of tokens, `(n_tokens, d_in)`, by its own median norm, and that norm."""
        median_norm = x.norm(dim=1).median().item()
        return x[self._ordinary(x, median_norm)], median_norm

    def _ordinary(self, x: torch.Tensor, median_norm: float) -> torch.Tensor:
        return is_ordinary(x.float().norm(dim=1), median_norm, self._config.max_norm_multiple)

    def _chunks(self, n_tokens: int) -> Iterator[slice]:
        size = max(1, _CHUNK_ELEMENTS // self.encoder.d_sae)
        return (slice(start, start + size) for start in range(0, n_tokens, size))

    def _run(self, queries: Sequence[Query], prefix: Prefix, *, with_answers: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Activations of the candidate tokens, `(n_candidates, d_in)`, and the answers' NLL, `(len(queries),)`."""
        suffixes = [q.tokens if with_answers else q.query for q in queries]
        captured = self._capture.run(suffixes, prefix, select=answer_positions(queries) if with_answers else None)
        acts = captured.activations[self.encoder.hook_name]
        if acts.dim() != 3:
            raise ModelError(f"hook_name: {self.encoder.hook_name} gave shape {tuple(acts.shape)}, not (batch, sequence, width).")
        x = candidate_rows(acts, queries)
        if captured.logits is None:
            return x, None
        n_answer = torch.tensor([len(q.answer) for q in queries])
        answered_by = torch.repeat_interleave(torch.arange(len(queries)), n_answer)
        losses = _losses(captured.logits, queries).cpu()
        return x, torch.zeros(len(queries)).index_add_(0, answered_by, losses)


def fit(encoder: SaeEncoder, x: torch.Tensor) -> Fit:
    """How an SAE fits activations of ordinary tokens, `(n_tokens, d_in)`."""
    left, n_active, ever, seen = 0.0, 0, torch.zeros(encoder.d_sae, dtype=torch.bool, device=encoder.sae.device), []
    for part in torch.split(x, max(1, _CHUNK_ELEMENTS // encoder.d_sae)):
        found = encoder.reconstruct(part)
        active = found.acts > 0
        left += float(found.left.double().square().sum())
        n_active += int(active.sum())
        ever |= active.any(dim=0)
        seen.append(found.x)
    whole = torch.cat(seen)
    return Fit(
        n_tokens=len(x),
        unexplained=left / float((whole - whole.mean(dim=0)).double().square().sum()),
        l0=n_active / len(x),
        silent=float((~ever).double().mean()),
    )


class StepZero(Protocol):
    """What a drift check compares with: a `Reading`, or what a baseline keeps of one."""

    @property
    def counted(self) -> torch.Tensor:
        """See `Reading`."""

    @property
    def acts(self) -> SparseActs:
        """See `Reading`."""

    @property
    def sketches(self) -> torch.Tensor:
        """See `Reading`."""


class _ShiftSums:
    """Running sums of squared differences."""

    def __init__(self, n_queries: int, d_sae: int, device: torch.device) -> None:
        self._sums = [QuerySums(n_queries, width, device) for width in (d_sae, 1, 1)]

    def add(self, differences: tuple[torch.Tensor, ...], owner: torch.Tensor) -> None:
        for sums, values in zip(self._sums, differences, strict=True):
            sums.add(values.unsqueeze(1) if values.dim() == 1 else values, owner)

    @property
    def result(self) -> Shift:
        features, raw, unseen = (sums.result for sums in self._sums)
        return Shift(features, raw[:, 0], unseen[:, 0])


def _differences(one: Reconstruction, other: Reconstruction) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        (one.acts - other.acts).square_(),
        (one.x - other.x).square().sum(dim=1),
        (one.left - other.left).square().sum(dim=1),
    )


def _losses(logits: torch.Tensor, queries: Sequence[Query]) -> torch.Tensor:
    """NLL of each answer token, `(n_answer_tokens,)`; in pieces, so that the float32 copy of the logits stays small."""
    targets = torch.tensor([token for q in queries for token in q.answer], device=logits.device)
    return torch.cat(
        [
            nn.functional.cross_entropy(some.float(), target, reduction="none")
            for some, target in zip(torch.split(logits, 64), torch.split(targets, 64), strict=True)
        ]
    )
