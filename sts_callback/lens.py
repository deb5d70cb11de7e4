"""One SAE at its hook point: which tokens count there, and sums per query of what it sees. No model runs here.

Nothing of size `(n_tokens, d_sae)` outlives a chunk. Step 0 and a later check cut the same tokens into the same chunks, since
equal shapes give equal last bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from sts_callback.errors import SaeError
from sts_callback.metrics.sketch import WIDTH, sketch
from sts_callback.metrics.sparse import SparseActs
from sts_callback.metrics.sums import QuerySums
from sts_callback.metrics.tokens import is_ordinary
from sts_callback.model.encoder import Reconstruction, SaeEncoder
from sts_callback.model.hooks import HookPoint
from sts_callback.readings import BARE, DriftReading, Fit, Peaks, Reading, Reference, Shift, StepZero

# Activations encoded at once: few enough for memory that is used again and again, enough tokens for a fast matrix product.
_CHUNK_ELEMENTS, _FEWEST_TOKENS = 2**22, 256


class Lens:
    """An SAE, where it reads, and what is usual there, after `calibrate` or `adopt`."""

    def __init__(self, encoder: SaeEncoder, point: HookPoint, max_norm_multiple: float) -> None:
        self.encoder, self.point = encoder, point
        self.reference: Reference
        self._max_norm_multiple = max_norm_multiple

    def calibrate(self, x: torch.Tensor) -> Fit:
        """Set the reference and see how the SAE fits.

        Args:
            x: a sample of activations at the hook point, `(n_tokens, d_in)`.

        Raises:
            SaeError: if the SAE has another width than the model.

        """
        if x.shape[1] != self.encoder.d_in:
            raise SaeError(
                f"sae: {self.encoder.name} reads activations of width {self.encoder.d_in}, but {self.encoder.hook_name} of this "
                f"model has width {x.shape[1]}; take an SAE that was trained on this model."
            )
        x, median_norm = self._without_sinks(x.float())
        self.adopt(Reference(median_norm, x.norm(dim=1).mean().item()))
        return self._fit(x)

    def adopt(self, reference: Reference) -> None:
        """Take the reference of an earlier visit."""
        self.reference = reference
        if self.encoder.needs_scale:
            self.encoder = self.encoder.scaled(reference.mean_norm)

    def unexplained(self, x: torch.Tensor) -> float:
        """Fraction of variance that the SAE would leave of activations from anywhere, `(n_tokens, d_in)`, without their sinks."""
        return self._fit(self._without_sinks(x.float())[0]).unexplained

    def ordinary(self, x: torch.Tensor, median_norm: float) -> torch.Tensor:
        """Which of `(n_tokens, d_in)` are no attention sinks, `(n_tokens,)` booleans."""
        return is_ordinary(x.float().norm(dim=1), median_norm, self._max_norm_multiple)

    def ordinary_now(self, x: torch.Tensor) -> torch.Tensor:
        """The same after training, which may rescale the whole stream: sinks are what stands out from what is usual now."""
        return self.ordinary(x, max(self.reference.median_norm, x.float().norm(dim=1).median().item()))

    def chunks(self, n_tokens: int) -> Iterator[slice]:
        """Slices of tokens that are encoded at once."""
        size = max(_FEWEST_TOKENS, _CHUNK_ELEMENTS // self.encoder.d_sae)
        return (slice(start, start + size) for start in range(0, n_tokens, size))

    def _without_sinks(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The ordinary ones of a sample of tokens, by its own median norm, and that norm."""
        median_norm = x.norm(dim=1).median().item()
        return x[self.ordinary(x, median_norm)], median_norm

    def _fit(self, x: torch.Tensor) -> Fit:
        left, n_active = 0.0, 0
        ever, seen = torch.zeros(self.encoder.d_sae, dtype=torch.bool, device=self.encoder.sae.device), []
        for chunk in self.chunks(len(x)):
            found = self.encoder.reconstruct(x[chunk])
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


class ReadingSums:
    """Running sums of one set without context, and of what contexts change; `add` takes its tokens in order."""

    def __init__(self, lens: Lens, n_queries: int, contexts: Sequence[str], *, with_gradients: bool) -> None:
        self._lens, self._n_queries = lens, n_queries
        d_sae, device = lens.encoder.d_sae, lens.encoder.sae.device
        self._activity, self._raw = (QuerySums(n_queries, width, device) for width in (d_sae, lens.encoder.d_in))
        self._energies = QuerySums(n_queries, 2, device)
        self._shifts = {name: _ShiftSums(n_queries, d_sae, device) for name in contexts}
        self._gradients = QuerySums(n_queries, d_sae, device) if with_gradients else None
        self._counted: list[torch.Tensor] = []
        self._owner: list[torch.Tensor] = []
        self._acts: list[SparseActs] = []
        self._sketches: list[torch.Tensor] = []

    def add(self, found: Mapping[str, torch.Tensor], owner: torch.Tensor) -> None:
        """Add tokens of some queries, which count if they are no sinks in any context.

        Args:
            found: activations by context, `BARE` among them, each `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        ordinary = torch.stack([self._lens.ordinary(x, self._lens.reference.median_norm) for x in found.values()]).all(dim=0)
        self._counted.append(ordinary.cpu())
        self._owner.append(owner[self._counted[-1]])
        found = {name: x[ordinary] for name, x in found.items()}
        for chunk in self._lens.chunks(len(self._owner[-1])):
            to = self._owner[-1][chunk].to(self._lens.encoder.sae.device)
            here = self._lens.encoder.reconstruct(found[BARE][chunk])
            energies = torch.stack([torch.linalg.vector_norm(v, dim=1).square() for v in (here.acts, here.x)], dim=1)
            for sums, values in ((self._activity, here.acts), (self._raw, here.x), (self._energies, energies)):
                sums.add(values, to)
            self._acts.append(SparseActs.of(here.acts))
            self._sketches.append(torch.stack([sketch(here.x), sketch(here.left)], dim=1).cpu())
            for name, shift in self._shifts.items():
                shift.add(_differences(self._lens.encoder.reconstruct(found[name][chunk]), here), to)

    def add_gradients(self, x: torch.Tensor, gradient: torch.Tensor, owner: torch.Tensor) -> None:
        """Add gradients of the answers' NLL at tokens of queries and answers, in any order.

        Args:
            x: activations without context, `(n_tokens, d_in)`.
            gradient: with respect to them, in nats per unit, `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        assert self._gradients is not None
        ordinary = self._lens.ordinary(x, self._lens.reference.median_norm)
        x, gradient, owner = x[ordinary], gradient[ordinary], owner.to(x.device)[ordinary]
        for chunk in self._lens.chunks(len(x)):
            by_feature = self._lens.encoder.feature_gradient(x[chunk], gradient[chunk])
            self._gradients.add(by_feature, owner[chunk].to(by_feature.device))

    def result(self, nll: Mapping[str, torch.Tensor], n_answer: torch.Tensor) -> Reading:
        """All of it, with the answers' NLL by context and their lengths."""
        counted, energies = torch.cat(self._counted), self._energies.result
        return Reading(
            n_tokens=torch.bincount(torch.cat(self._owner), minlength=self._n_queries),
            n_masked=int((~counted).sum()),
            activity=self._activity.result,
            energy=energies[:, 0],
            raw=self._raw.result,
            raw_energy=energies[:, 1],
            shifts={name: sums.result for name, sums in self._shifts.items()},
            n_answer=n_answer,
            nll=nll,
            gradients=None if self._gradients is None else self._gradients.result,
            counted=counted,
            acts=SparseActs.cat(self._acts),
            sketches=torch.cat(self._sketches) if self._sketches else torch.zeros(0, 2, WIDTH),
        )


class DriftSums:
    """Running sums of one set against its step 0; `add` takes its tokens in order."""

    def __init__(self, lens: Lens, n_queries: int, step_zero: StepZero) -> None:
        self._lens, self._step_zero = lens, step_zero
        self._shift = _ShiftSums(n_queries, lens.encoder.d_sae, lens.encoder.sae.device)
        self._n_tokens = torch.zeros(n_queries, dtype=torch.int64)
        self._n_masked, self._n_candidates, self._n_counted = 0, 0, 0

    def add(self, x: torch.Tensor, owner: torch.Tensor) -> None:
        """Add tokens of some queries, those that counted at step 0 and are no sinks now.

        Args:
            x: their activations, `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        counted = self._step_zero.counted[self._n_candidates : self._n_candidates + len(x)]
        self._n_candidates += len(x)
        if not counted.any():
            return
        x, owner = x[counted.to(x.device)], owner[counted]
        ordinary = self._lens.ordinary_now(x).cpu()
        self._n_masked += int((~ordinary).sum())
        self._n_tokens += torch.bincount(owner[ordinary], minlength=len(self._n_tokens))
        device, d_sae, start = self._lens.encoder.sae.device, self._lens.encoder.d_sae, self._n_counted
        self._n_counted += len(x)
        for chunk in self._lens.chunks(len(x)):
            now = self._lens.encoder.reconstruct(x[chunk])
            rows = slice(start + chunk.start, start + chunk.start + len(now.x))
            then, then_left = self._step_zero.sketches[rows].to(device).unbind(dim=1)
            differences = (
                now.acts.sub_(self._step_zero.acts.dense(rows.start, rows.stop, d_sae, device)).square_(),
                (sketch(now.x) - then).square().sum(dim=1),
                (sketch(now.left) - then_left).square().sum(dim=1),
            )
            for one in differences:
                one[~ordinary[chunk].to(device)] = 0.0
            self._shift.add(differences, owner[chunk].to(device))

    def result(self, nll: torch.Tensor | None) -> DriftReading:
        """All of it, with the answers' NLL."""
        return DriftReading(self._n_tokens, self._n_masked, self._shift.result, nll)


class ActivitySums:
    """Running sums of feature activations of one set, whatever they were at step 0."""

    def __init__(self, lens: Lens, n_queries: int) -> None:
        self._lens = lens
        self._activity = QuerySums(n_queries, lens.encoder.d_sae, lens.encoder.sae.device)
        self._n_tokens = torch.zeros(n_queries, dtype=torch.int64)

    def add(self, x: torch.Tensor, owner: torch.Tensor) -> None:
        """Add tokens of some queries, those that are no sinks now.

        Args:
            x: their activations, `(n_tokens, d_in)`.
            owner: the query of each, `(n_tokens,)`.

        """
        if len(x) == 0:
            return
        ordinary = self._lens.ordinary_now(x)
        x, owner = x[ordinary], owner[ordinary.cpu()]
        self._n_tokens += torch.bincount(owner, minlength=len(self._n_tokens))
        for chunk in self._lens.chunks(len(x)):
            self._activity.add(self._lens.encoder.encode(x[chunk]), owner[chunk].to(self._lens.encoder.sae.device))

    @property
    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums, `(n_queries, d_sae)`, and tokens that count, `(n_queries,)`."""
        return self._activity.result, self._n_tokens


class PeakSums:
    """Running sums of some features over texts, and where each text fires them most; `add` takes whole texts, token by token."""

    def __init__(self, lens: Lens, n_texts: int, features: Sequence[int]) -> None:
        device, shape = lens.encoder.sae.device, (n_texts, len(features))
        self._lens, self._features = lens, torch.tensor(features, device=device)
        self._activity = QuerySums(*shape, device)
        self._n_tokens = torch.zeros(n_texts, dtype=torch.int64)
        self._highest, self._place = torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, x: torch.Tensor, owner: torch.Tensor) -> None:
        """Add tokens of some texts, those that are no sinks.

        Args:
            x: their activations, `(n_tokens, d_in)`.
            owner: the text of each, `(n_tokens,)`, in ascending order.

        """
        place = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
        ordinary = self._lens.ordinary(x, self._lens.reference.median_norm)
        x, owner, place = x[ordinary], owner[ordinary.cpu()], place[ordinary.cpu()]
        self._n_tokens += torch.bincount(owner, minlength=len(self._n_tokens))
        device = self._lens.encoder.sae.device
        for chunk in self._lens.chunks(len(x)):
            acts = self._lens.encoder.encode(x[chunk])[:, self._features]
            self._activity.add(acts, owner[chunk].to(device))
            for text, n_tokens in Counter(owner[chunk].tolist()).items():
                ours, acts = acts[:n_tokens], acts[n_tokens:]
                places, place = place[:n_tokens].to(device), place[n_tokens:]
                highest, at = ours.max(dim=0)
                self._place[text] = torch.where(highest > self._highest[text], places[at], self._place[text])
                self._highest[text] = torch.maximum(highest, self._highest[text])

    @property
    def result(self) -> Peaks:
        """All of it, on the CPU."""
        return Peaks(self._n_tokens, self._activity.result, self._highest.cpu(), self._place.cpu())


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
    """Squared ones; the activations of `one` are used up for them."""
    return (
        one.acts.sub_(other.acts).square_(),
        (one.x - other.x).square().sum(dim=1),
        (one.left - other.left).square().sum(dim=1),
    )
