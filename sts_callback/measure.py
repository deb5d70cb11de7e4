"""Model, SAE and probes to sums: one pass over a probe set under several contexts, streamed.

Nothing of size `(n_tokens, d_sae)` outlives a chunk. What comes out are sums per query, from which means, and any resampling over
queries, follow without a further forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from sts_callback.config import ProbeConfig
from sts_callback.errors import ModelError, SaeError
from sts_callback.metrics.sparse import SparseActs
from sts_callback.metrics.sums import QuerySums
from sts_callback.metrics.tokens import is_ordinary
from sts_callback.model.capture import Capture, Prefix
from sts_callback.model.encoder import SaeEncoder
from sts_callback.model.hooks import resolve, text_config
from sts_callback.model.probes import ProbeSet, Query, batches

BARE = "bare"
"""The context without demonstrations."""

_CHUNK_ELEMENTS = 2**24  # activations encoded at once: 64 MiB in float32
_N_CALIBRATION = 4  # queries of each set that set the median norm


@dataclass(frozen=True)
class Context:
    """What stands before each query of a pass."""

    tokens: tuple[int, ...]
    """BOS and demonstrations."""
    with_answers: bool
    """Whether the answers follow and their NLL is wanted, which takes the whole depth of the model."""


@dataclass(frozen=True)
class Reference:
    """What the untuned model's activations look like; thresholds of later visits hang on it."""

    median_norm: float
    """Median activation norm of query tokens at the hook point."""
    mean_norm: float
    """Mean activation norm of the ordinary ones among them."""
    unexplained: float
    """Fraction of the activations' variance that the SAE leaves, over ordinary tokens; NaN for a transcoder."""


@dataclass(frozen=True)
class Reading:
    """Sums per query of one set under its contexts."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_queries,)`, int64."""
    n_masked: int
    """Query tokens left out as attention sinks."""
    activity: torch.Tensor
    """Activations without context, `(n_queries, d_sae)`."""
    energy: torch.Tensor
    """Squared activations without context, summed over features, `(n_queries,)`."""
    shift: Mapping[str, torch.Tensor]
    """Per context: squared differences to no context, `(n_queries, d_sae)`."""
    n_answer: torch.Tensor
    """Answer tokens, `(n_queries,)`, int64."""
    nll: Mapping[str, torch.Tensor]
    """Per context with answers: negative log-likelihood of the answer in nats, `(n_queries,)`."""
    counted: torch.Tensor
    """Which candidate tokens count, in the order of visit, `(n_candidates,)` booleans."""
    acts: SparseActs
    """Activations without context of the tokens that count, in the order of visit."""


@dataclass(frozen=True)
class DriftReading:
    """Sums per query of one set against step 0."""

    n_tokens: torch.Tensor
    """Tokens that count, `(n_queries,)`, int64."""
    n_masked: int
    """Tokens that counted at step 0 and are attention sinks now."""
    drift: torch.Tensor
    """Squared differences to step 0, `(n_queries, d_sae)`."""
    nll: torch.Tensor | None
    """Negative log-likelihood of the answers in nats, `(n_queries,)`; None without a language-model head."""


class Gauge:
    """Reads probe sets through one model and one SAE, after `calibrate` or `adopt`. Use it inside `undisturbed(model)`."""

    def __init__(self, model: nn.Module, encoder: SaeEncoder, config: ProbeConfig) -> None:
        """Find the hook point.

        Raises:
            ModelError: if the model has no such hook point.

        """
        self.encoder = encoder
        self.reference: Reference
        self._config = config
        self._capture = Capture(model, [resolve(model, encoder.hook_name)])
        self._vocab_size = int(getattr(text_config(model), "vocab_size", 2**16))
        self.has_head = any(
            getattr(m, "get_output_embeddings", lambda: None)() is not None for m in model.modules() if hasattr(m, "config")
        )
        if config.n_features > encoder.d_sae // 2:
            raise SaeError(
                f"n_features: {config.n_features} of {encoder.d_sae} features are no selection; allowed is up to "
                f"{encoder.d_sae // 2}."
            )

    def calibrate(self, sets: Iterable[ProbeSet], bos: tuple[int, ...]) -> None:
        """Set the median norm and check the SAE on a few queries of each set.

        Raises:
            SaeError: if the SAE has another width, or reconstructs this model's activations no better than their mean does.

        """
        prefix = self._capture.prefix(bos, whole=False)
        found = [self._run(s.queries[:_N_CALIBRATION], prefix, with_answers=False)[0] for s in sets]
        x = torch.cat(found).float()
        if x.shape[1] != self.encoder.d_in:
            raise SaeError(
                f"sae: {self.encoder.name} reads activations of width {self.encoder.d_in}, but {self.encoder.hook_name} of this "
                f"model has width {x.shape[1]}; take an SAE that was trained on this model."
            )
        norms = x.norm(dim=1)
        median_norm = norms.median().item()
        x = x[is_ordinary(norms, median_norm, self._config.max_norm_multiple)]
        mean_norm = x.norm(dim=1).mean().item()
        self.adopt(Reference(median_norm, mean_norm, float("nan")))
        unexplained = self.encoder.unexplained(x)
        if unexplained is not None and not unexplained < 1:
            raise SaeError(
                f"sae: {self.encoder.name} leaves {unexplained:.2f} of the variance at {self.encoder.hook_name} unexplained, no "
                "better than a constant; it was trained on another model or hook point. `sts-callback saes --model ID` lists "
                "those that fit."
            )
        self.reference = replace(self.reference, unexplained=float("nan") if unexplained is None else unexplained)

    def adopt(self, reference: Reference) -> None:
        """Take the reference of an earlier visit."""
        self.reference = reference
        if self.encoder.needs_scale:
            self.encoder = self.encoder.scaled(reference.mean_norm)

    def read(
        self,
        probes: ProbeSet,
        contexts: Mapping[str, Context],
        on_batch: Callable[[int], object] = lambda n_queries: None,
    ) -> Reading:
        """One pass under several contexts, of which one is `BARE`.

        Args:
            probes: what to read.
            contexts: by name; activations under each are compared with `BARE`.
            on_batch: told the number of queries done, for progress.

        """
        prefixes = {name: self._capture.prefix(c.tokens, whole=self._whole(c)) for name, c in contexts.items()}
        n_queries, device, d_sae = len(probes.queries), self.encoder.sae.device, self.encoder.d_sae
        activity, energy = QuerySums(n_queries, d_sae, device), QuerySums(n_queries, 1, device)
        shifts = {name: QuerySums(n_queries, d_sae, device) for name in contexts if name != BARE}
        nll = {name: torch.zeros(n_queries) for name, c in contexts.items() if self._whole(c)}
        n_tokens, counted, kept = torch.zeros(n_queries, dtype=torch.long), [], []

        for batch in batches(probes.queries, self._config, self._vocab_size):
            queries = [probes.queries[i] for i in batch]
            owner = _owners(queries, batch)
            found: dict[str, torch.Tensor] = {}
            for name, context in contexts.items():
                found[name], losses = self._run(queries, prefixes[name], with_answers=self._whole(context))
                if losses is not None:
                    nll[name][batch] = losses
            ordinary = torch.stack([self._ordinary(x, self.reference.median_norm) for x in found.values()]).all(dim=0)
            counted.append(ordinary.cpu())
            owner = owner[counted[-1]]
            n_tokens += torch.bincount(owner, minlength=n_queries)
            found = {name: x[ordinary] for name, x in found.items()}
            for rows in self._chunks(len(owner)):
                to = owner[rows].to(device)
                bare = self.encoder.encode(found[BARE][rows])
                activity.add(bare, to)
                energy.add(bare.square().sum(dim=1, keepdim=True), to)
                kept.append(SparseActs.of(bare))
                for name, shift in shifts.items():
                    shift.add((self.encoder.encode(found[name][rows]) - bare).square_(), to)
            on_batch(len(batch))

        all_counted = torch.cat(counted)
        return Reading(
            n_tokens=n_tokens,
            n_masked=int((~all_counted).sum()),
            activity=activity.result,
            energy=energy.result[:, 0],
            shift={name: shift.result for name, shift in shifts.items()},
            n_answer=torch.tensor([len(q.answer) for q in probes.queries]),
            nll=nll,
            counted=all_counted,
            acts=SparseActs.cat(kept),
        )

    def read_drift(
        self,
        probes: ProbeSet,
        context: Context,
        counted: torch.Tensor,
        acts: SparseActs,
        on_batch: Callable[[int], object] = lambda n_queries: None,
    ) -> DriftReading:
        """Compare the same tokens, in the same batches, with step 0.

        With unchanged weights the result is exactly 0: both visits share layout, cache use and arithmetic.

        Args:
            probes: the set of the first reading.
            context: its `BARE` context.
            counted: which candidate tokens counted then.
            acts: their activations then.
            on_batch: told the number of queries done, for progress.

        """
        # Training may rescale the whole stream: a sink now is one that stands out from what is usual now.
        bare = self._capture.prefix(context.tokens, whole=False)
        sample, _ = self._run(probes.queries[:_N_CALIBRATION], bare, with_answers=False)
        scale = max(self.reference.median_norm, sample.float().norm(dim=1).median().item())
        prefix = self._capture.prefix(context.tokens, whole=self._whole(context))
        n_queries, device = len(probes.queries), self.encoder.sae.device
        drift, nll = QuerySums(n_queries, self.encoder.d_sae, device), torch.zeros(n_queries)
        n_tokens, n_masked, n_candidates, n_before = torch.zeros(n_queries, dtype=torch.long), 0, 0, 0
        for batch in batches(probes.queries, self._config, self._vocab_size):
            queries = [probes.queries[i] for i in batch]
            owner = _owners(queries, batch)
            x, losses = self._run(queries, prefix, with_answers=self._whole(context))
            if losses is not None:
                nll[batch] = losses
            before = counted[n_candidates : n_candidates + len(owner)]
            n_candidates += len(owner)
            x, owner = x[before.to(x.device)], owner[before]
            ordinary = self._ordinary(x, scale).cpu()
            n_masked += int((~ordinary).sum())
            n_tokens += torch.bincount(owner[ordinary], minlength=n_queries)
            for rows in self._chunks(len(owner)):
                then = acts.dense(n_before, n_before + len(owner[rows]), self.encoder.d_sae, device)
                n_before += len(then)
                change = (self.encoder.encode(x[rows]) - then).square_()
                keep = ordinary[rows]
                drift.add(change[keep.to(device)], owner[rows][keep].to(device))
            on_batch(len(batch))
        return DriftReading(n_tokens, n_masked, drift.result, nll if self._whole(context) else None)

    def _whole(self, context: Context) -> bool:
        return context.with_answers and self.has_head

    def _ordinary(self, x: torch.Tensor, median_norm: float) -> torch.Tensor:
        return is_ordinary(x.float().norm(dim=1), median_norm, self._config.max_norm_multiple)

    def _chunks(self, n_tokens: int) -> Iterable[slice]:
        size = max(1, _CHUNK_ELEMENTS // self.encoder.d_sae)
        return (slice(start, start + size) for start in range(0, n_tokens, size))

    def _run(self, queries: Sequence[Query], prefix: Prefix, *, with_answers: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Activations of the candidate tokens, `(n_candidates, d_in)`, and the answers' NLL, `(len(queries),)`."""
        suffixes = [q.tokens if with_answers else q.query for q in queries]
        select = None
        if with_answers:
            select = torch.zeros(len(queries), max(map(len, suffixes)), dtype=torch.bool)
            for row, q in enumerate(queries):
                select[row, len(q.query) - 1 : len(q.tokens) - 1] = True  # position p predicts token p + 1
        captured = self._capture.run(suffixes, prefix, select=select)
        acts = captured.activations[self.encoder.hook_name]
        if acts.dim() != 3:
            raise ModelError(f"hook_name: {self.encoder.hook_name} gave shape {tuple(acts.shape)}, not (batch, sequence, width).")
        rows = torch.tensor([row for row, q in enumerate(queries) for counts in q.counts if counts])
        columns = torch.tensor([column for q in queries for column, counts in enumerate(q.counts) if counts])
        x = acts[rows.to(acts.device), columns.to(acts.device)]
        if captured.logits is None:
            return x, None
        targets = torch.tensor([token for q in queries for token in q.answer], device=captured.logits.device)
        losses = torch.cat(
            [
                nn.functional.cross_entropy(logits.float(), target, reduction="none")
                for logits, target in zip(torch.split(captured.logits, 64), torch.split(targets, 64), strict=True)
            ]
        ).cpu()
        n_answer = torch.tensor([len(q.answer) for q in queries])
        answered_by = torch.repeat_interleave(torch.arange(len(queries)), n_answer)
        return x, torch.zeros(len(queries)).index_add_(0, answered_by, losses)


def _owners(queries: Sequence[Query], batch: Sequence[int]) -> torch.Tensor:
    """The query index of each candidate token, `(n_candidates,)`."""
    return torch.tensor([i for i, q in zip(batch, queries, strict=True) for counts in q.counts if counts])
