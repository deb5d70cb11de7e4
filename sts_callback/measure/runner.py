"""Model and probes to readings: passes over a probe set under several contexts, each shared by all SAEs, streamed in segments."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from sts_callback.config import ProbeConfig
from sts_callback.data.batches import Candidates, answer_positions, batches, candidate_rows, segments
from sts_callback.data.probes import ProbeSet, Query
from sts_callback.distributed import Ranks
from sts_callback.errors import ModelError, SaeError
from sts_callback.measure.accumulators import (
    ZERO_SHOT,
    ActivitySums,
    DriftStats,
    DriftSums,
    MaxActivations,
    MaxActivationSums,
    ProbeStats,
    ProbeSums,
    StepZero,
)
from sts_callback.measure.answers import Answers, TokenReader
from sts_callback.measure.sae_reader import Fit, SAEReader
from sts_callback.metrics.copies import sent
from sts_callback.model.capture import Capture, Prefix
from sts_callback.model.encoder import Encoder
from sts_callback.model.head import output_embeddings
from sts_callback.model.hooks import HookPoint, find_layers, resolve, vocab_size
from sts_callback.model.self_test import Findings, self_test
from sts_callback.model.sharding import may_differ

_N_CALIBRATION = 4  # queries of each set that set the median norm

OnBatch = Callable[[int], object]
"""Told the number of queries done, for progress."""
_Ran = tuple[list[int], dict[str, torch.Tensor], Answers | None]
"""A batch, as places in its segment, with its activations and answers, for other processes."""
T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What stands before each query of a pass."""

    token_ids: tuple[int, ...]
    with_answers: bool
    """Whether the answers follow and are to be read, which takes the whole depth of the model."""
    run: Callable[[], Prefix]
    """Gives the tokens with their keys and values."""

    @functools.cached_property
    def prefix(self) -> Prefix:
        """What `run` gives, the first time."""
        return self.run()


class ProbeRunner:
    """Reads probe sets through one model and its SAEs, after `calibrate` or `adopt`. Use it inside `undisturbed(model)`.

    Several processes share the batches of each pass and tell one another what they saw: what comes after is the same as for one
    process alone, bit for bit.
    """

    def __init__(self, model: nn.Module, encoders: Sequence[Encoder], config: ProbeConfig, ranks: Ranks | None = None) -> None:
        """Find the hook points.

        Raises:
            ModelError: if the model lacks one.
            SaeError: if an SAE is too narrow to select from.

        """
        for encoder in encoders:
            if encoder.d_sae and config.n_features > encoder.d_sae // 2:
                raise SaeError(
                    f"n_features: {config.n_features} of {encoder.d_sae} features are no selection; allowed is up to "
                    f"{encoder.d_sae // 2}."
                )
        self.sae_readers = [SAEReader(e, resolve(model, e.hook_name), config.max_norm_multiple) for e in encoders]
        self._config = config
        self._model = model
        self._ranks = ranks or Ranks()
        self._n_shares = self._ranks.n if may_differ(model) else 1
        self._capture = Capture(
            model, list({sae_reader.point.name: sae_reader.point for sae_reader in self.sae_readers}.values()), self._ranks
        )
        self.findings = Findings()
        """What the self-test found."""
        self._vocab_size = vocab_size(model) or 2**16  # a guess, for the size of batches
        self._has_head = output_embeddings(model) is not None

    def self_test(self, sets: Sequence[ProbeSet], contexts: Sequence[Sequence[int]]) -> None:
        """Find out whether the model gives each query what it gives it alone, and go without what does not.

        Args:
            sets: all probes.
            contexts: the tokens of all that will stand before them.

        Raises:
            ModelError: if the model cannot be measured.

        """
        self.findings = self_test(
            self._capture,
            max(contexts, key=len),
            [query.query for query in sets[0].queries[:2]],
            max(len(query.tokens) for s in sets for query in s.queries),
            with_logits=self._has_head,
            ranks=self._ranks,
        )
        self._capture.may_cache = self.findings.cache

    def context(self, tokens: Sequence[int], *, with_answers: bool) -> Context:
        """Run what stands before queries, once for all of them; it holds for the weights of this moment.

        Args:
            tokens: BOS and demonstrations.
            with_answers: see `Context`; without a language-model head, answers are never read.

        """
        whole = with_answers and self._has_head
        run = functools.partial(self._capture.prefix, tokens, whole=whole)
        if self._n_shares > 1 and self._capture.may_stop:
            return Context(tuple(tokens), whole, run)  # run once a batch of this process needs it, if ever
        prefix = run()
        return Context(tuple(tokens), whole, lambda: prefix)

    def calibrate(self, sets: Sequence[ProbeSet], zero_shot: Context) -> list[Fit]:
        """Set each SAE's reference and see how it fits, on a few queries of each set.

        Args:
            sets: all of them.
            zero_shot: the context without demonstrations.

        Raises:
            SaeError: if an SAE has another width than the model.

        """
        short = Context(zero_shot.token_ids, False, lambda: zero_shot.prefix)
        samples = [self._batch(s.queries[:_N_CALIBRATION], short)[0] for s in sets]
        return [sae_reader.calibrate(torch.cat([x[sae_reader.point.name] for x in samples])) for sae_reader in self.sae_readers]

    def can_move(self, probes: ProbeSet) -> bool:
        """Whether training changes what the first SAE reads, by one query of a set: see `Capture.can_move`."""
        return self._capture.can_move(self.sae_readers[0].point.name, probes.queries[0].query)

    def fit_by_layer(self, probes: ProbeSet, zero_shot: Context, sae_reader: SAEReader) -> dict[int, float]:
        """Fraction of variance that an SAE would leave at the same site of each layer, on a few queries of one set.

        Args:
            probes: the set.
            zero_shot: the context without demonstrations.
            sae_reader: the SAE.

        """
        points: dict[int, HookPoint] = {}
        for layer in range(len(find_layers(self._model))):
            with contextlib.suppress(ModelError):  # not every layer need have the site
                points[layer] = resolve(self._model, re.sub(r"\d+", str(layer), sae_reader.point.name, count=1))
        queries = probes.queries[:_N_CALIBRATION]
        context = Prefix(zero_shot.token_ids, None)  # what is kept of it may end at the SAE's own layer
        captured = Capture(self._model, list(points.values()), self._ranks).run([q.query for q in queries], context)
        ran = {layer: captured.activations.get(point.name) for layer, point in points.items()}  # those that read images may not
        width = sae_reader.encoder.d_in
        return {
            layer: sae_reader.fvu(candidate_rows(x, queries))
            for layer, x in ran.items()
            if x is not None and x.shape[2:] == (width,)
        }

    def read(
        self,
        probes: ProbeSet,
        zero_shot: Context,
        contexts: Mapping[str, Sequence[Context]],
        on_batch: OnBatch = lambda n_queries: None,
        *,
        with_gradients: bool = False,
    ) -> list[ProbeStats]:
        """A pass without context and one under each of others, which are compared with it token by token.

        Args:
            probes: what to read.
            zero_shot: the context without demonstrations.
            contexts: by name, one for each group of queries, or one for all.
            on_batch: see `OnBatch`; each query is done once for each context, and once without.
            with_gradients: whether to differentiate the answers' NLL too, where that can be done.

        Returns:
            One for each SAE.

        """
        n_queries = len(probes.queries)
        reconstructs = any(sae_reader.encoder.reconstructs for sae_reader in self.sae_readers)
        may_differentiate = self._capture.may_stop and self.findings.gradients
        differentiable = with_gradients and zero_shot.with_answers and reconstructs and may_differentiate
        sums = [
            ProbeSums(sae_reader, n_queries, list(contexts), with_gradients=differentiable and sae_reader.encoder.reconstructs)
            for sae_reader in self.sae_readers
        ]
        passes = {ZERO_SHOT: [zero_shot], **contexts}
        answers = {name: Answers.unread(probes.queries) for name, draws in passes.items() if draws[0].with_answers}
        for segment in segments(probes, self._config.batch_tokens):
            found: dict[str, dict[str, torch.Tensor]] = {}
            for name, draws in passes.items():
                to_gradients = sums if differentiable and name == ZERO_SHOT else ()
                found[name], some = self._segment(probes, segment, draws, on_batch, to_gradients=to_gradients)
                if some is not None:
                    answers[name].put(slice(segment.start, segment.stop), some)
            owner = _owner(probes, segment)
            for sae_reader, one in zip(self.sae_readers, sums, strict=True):
                one.add({name: x[sae_reader.point.name] for name, x in found.items()}, owner)
        n_answer = torch.tensor([len(q.answer) for q in probes.queries])
        return self._with_whole_gradients([one.result(answers, n_answer) for one in sums])

    def _with_whole_gradients(self, readings: list[ProbeStats]) -> list[ProbeStats]:
        """Put together the gradients of queries, of each of which one process has them and the others zeros."""
        if self._n_shares == 1:
            return readings
        found = [reading.gradients for reading in readings]
        made = [None if rows is None else (rows.any(dim=1), rows[rows.any(dim=1)]) for rows in found]
        for theirs in self._ranks.gathered(lambda: made):
            for rows, part in zip(found, theirs, strict=True):
                if rows is not None and part is not None:
                    rows[part[0]] = part[1]
        return readings

    def read_drift(
        self,
        probes: ProbeSet,
        zero_shot: Context,
        step_zeros: Sequence[StepZero],
        on_batch: OnBatch = lambda n_queries: None,
        *,
        batch_tokens: int | None = None,
    ) -> list[DriftStats]:
        """Compare the same tokens, in the same batches, with step 0.

        With unchanged weights the result is exactly 0: both visits share layout, cache use and arithmetic.

        Args:
            probes: the set that was read at step 0.
            zero_shot: the context without demonstrations, run with the weights of now.
            step_zeros: what was kept of it, for each of the first SAEs.
            on_batch: see `OnBatch`.
            batch_tokens: another batch layout than that of step 0, to see what it does.

        Returns:
            One for each of these SAEs.

        """
        n_queries = len(probes.queries)
        sae_readers = self.sae_readers[: len(step_zeros)]
        sums = [DriftSums(sae_reader, n_queries, zero) for sae_reader, zero in zip(sae_readers, step_zeros, strict=True)]
        answers = Answers.unread(probes.queries) if zero_shot.with_answers else None
        for segment in segments(probes, self._config.batch_tokens):
            x, some = self._segment(probes, segment, [zero_shot], on_batch, batch_tokens)
            if answers is not None and some is not None:
                answers.put(slice(segment.start, segment.stop), some)
            for sae_reader, one in zip(sae_readers, sums, strict=True):
                one.add(x[sae_reader.point.name], _owner(probes, segment))
        return [one.result(answers) for one in sums]

    def read_activity(
        self, probes: ProbeSet, zero_shot: Context, *, batch_tokens: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature activations of texts by the first SAE, whatever they were at step 0.

        Args:
            probes: the texts.
            zero_shot: the context without demonstrations, run with the weights of now.
            batch_tokens: another batch layout than the settings'.

        Returns:
            Sums, `(n_queries, d_sae)`, over the tokens that count, and the number of these, `(n_queries,)`.

        """
        sae_reader = self.sae_readers[0]
        sums = ActivitySums(sae_reader, len(probes.queries))
        for segment in segments(probes, self._config.batch_tokens):
            x, _ = self._segment(probes, segment, [zero_shot], lambda n_queries: None, batch_tokens)
            sums.add(x[sae_reader.point.name], _owner(probes, segment))
        return sums.result

    def read_max_activations(
        self, probes: ProbeSet, zero_shot: Context, features: Sequence[int], on_batch: OnBatch = lambda n_queries: None
    ) -> MaxActivations:
        """How strongly texts activate some features of the first SAE, and where most.

        Args:
            probes: the texts.
            zero_shot: the context without demonstrations and without answers.
            features: their indices.
            on_batch: see `OnBatch`.

        """
        sae_reader = self.sae_readers[0]
        sums = MaxActivationSums(sae_reader, len(probes.queries), features)
        for segment in segments(probes, self._config.batch_tokens):
            x, _ = self._segment(probes, segment, [zero_shot], on_batch)
            sums.add(x[sae_reader.point.name], _owner(probes, segment))
        return sums.result

    def _segment(
        self,
        probes: ProbeSet,
        segment: range,
        draws: Sequence[Context],
        on_batch: OnBatch,
        batch_tokens: int | None = None,
        to_gradients: Sequence[ProbeSums] = (),
    ) -> tuple[dict[str, torch.Tensor], Answers | None]:
        """Activations of the candidate tokens, by hook point `(n_candidates, d_in)`, and the answers."""
        queries = [probes.queries[i] for i in segment]
        candidates = Candidates(queries)
        everything: dict[str, torch.Tensor] = {}
        answers = Answers.unread(queries) if draws[0].with_answers else None

        def keep(batch: list[int], acts: Mapping[str, torch.Tensor], some: Answers | None) -> None:
            for name, x in acts.items():
                if name not in everything:
                    everything[name] = x.new_empty(len(candidates.owner), x.shape[1])
                everything[name][sent(candidates.of(batch), x.device)] = x
            if answers is not None and some is not None:
                answers.put(batch, some)

        def share() -> list[_Ran]:
            """What this process runs, for the others. Answers are waited for once, when all has been launched."""
            ran, losses = list[tuple[list[int], dict[str, torch.Tensor]]](), list[torch.Tensor]()
            for batch, context in own:
                some = [queries[i] for i in batch]
                acts, read = (
                    self._differentiated(some, context, [segment[i] for i in batch], to_gradients)
                    if to_gradients
                    else self._batch(some, context)
                )
                keep(batch, acts, None)
                on_batch(len(batch))
                ran.append((batch, {name: x.cpu() for name, x in acts.items()} if self._n_shares > 1 else {}))
                losses += [] if read is None else [read]
            for batch, context in idle:
                self._batch([queries[i] for i in batch], context)
            found = Answers.each(losses, [[queries[i] for i in batch] for batch, _ in ran]) if losses else [None] * len(ran)
            done = [(batch, acts, answers_of) for (batch, acts), answers_of in zip(ran, found, strict=True)]
            for batch, _, answers_of in done:
                keep(batch, {}, answers_of)
            return done

        own, idle = self._own(list(self._layout(probes, segment, draws, batch_tokens or self._config.batch_tokens)))
        for rank, ran in enumerate(self._ranks.gathered(share)):
            for batch, acts, read in ran if rank != self._ranks.index else ():
                keep(batch, {name: sent(x, self._capture.device) for name, x in acts.items()}, read)
                on_batch(len(batch))
        return everything, answers

    def _own(self, layout: list[T]) -> tuple[list[T], list[T]]:
        """Of a pass's batches those of this process, neighbours since they may share a context, and what it runs for nothing.

        A forward of a sharded model takes all processes, so all must run as many.
        """
        if self._n_shares == 1:
            return layout, []
        n = -(-len(layout) // self._n_shares)
        own = layout[self._ranks.index * n : (self._ranks.index + 1) * n]
        return own, [] if self._capture.may_stop else layout[-1:] * (n - len(own))

    def _layout(
        self, probes: ProbeSet, segment: range, draws: Sequence[Context], batch_tokens: int
    ) -> Iterator[tuple[list[int], Context]]:
        """Batches of places in a segment, each with the context that its queries stand behind."""
        queries = probes.queries[segment.start : segment.stop]
        for draw, context in enumerate(draws):
            members = [place for place, i in enumerate(segment) if probes.group(i) % len(draws) == draw]
            whole_logits = self._vocab_size if context.with_answers and not self._capture.splits_head else None
            for batch in batches(queries, members, batch_tokens, whole_logits, len(context.token_ids)):
                yield batch, context

    def _batch(self, queries: Sequence[Query], context: Context) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """One forward: activations of the candidate tokens, by hook point `(n_candidates, d_in)`, and losses."""
        if not context.with_answers:
            captured, tokens = self._capture.run([q.query for q in queries], context.prefix), None
        else:
            read = TokenReader(queries, self._capture.device)
            captured = self._capture.run([q.tokens for q in queries], context.prefix, select=answer_positions(queries), read=read)
            assert captured.read is not None
            tokens = read.found(captured.read)
        return {name: candidate_rows(acts, queries) for name, acts in captured.activations.items()}, tokens

    def _differentiated(
        self, queries: Sequence[Query], context: Context, owners: Sequence[int], to_gradients: Sequence[ProbeSums]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The same with one backward, whose gradients go straight into sums."""
        read = TokenReader(queries, self._capture.device)
        found = self._capture.gradient([q.tokens for q in queries], context.prefix, select=answer_positions(queries), read=read)
        real = torch.arange(max(len(q.tokens) for q in queries)) < torch.tensor([[len(q.tokens)] for q in queries])
        owner = torch.tensor(owners).unsqueeze(1).expand(real.shape)[real]
        for sae_reader, sums in zip(self.sae_readers, to_gradients, strict=True):
            acts, gradient = found.activations[sae_reader.point.name], found.gradients[sae_reader.point.name]
            if sae_reader.encoder.reconstructs:
                at = sent(real.flatten().nonzero()[:, 0], acts.device)
                sums.add_gradients(acts.flatten(0, 1)[at], gradient.flatten(0, 1)[at], owner)
        x = {name: candidate_rows(acts, queries) for name, acts in found.activations.items()}
        return x, read.found(found.losses)


def _owner(probes: ProbeSet, segment: range) -> torch.Tensor:
    """The query of each candidate token, `(n_candidates,)`."""
    return Candidates(probes.queries[segment.start : segment.stop]).owner + segment.start
