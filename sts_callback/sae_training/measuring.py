"""The quality card of an SAE, measured on texts that were held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from sts_callback.metrics.next_token import next_token
from sts_callback.model.capture import Prefix
from sts_callback.model.hooked import replaced
from sts_callback.model.quality import QualityCard
from sts_callback.model.sae import SaeEncoder
from sts_callback.sae_training.activations import Reader
from sts_callback.sae_training.texts import Piece

_N_SPLICED = 48  # pieces, of 256 tokens at most, whose next tokens are predicted
_CHUNK = 4096  # tokens encoded at once


def measured(reader: Reader, encoder: SaeEncoder, held_out: Sequence[Piece], training: torch.Tensor, bos: Piece) -> QualityCard:
    """Measure an SAE. Use it inside `undisturbed(model)`.

    Args:
        reader: of the model.
        encoder: the SAE, as it will be used.
        held_out: texts that it was not trained on.
        training: activations that it was trained on, `(n_tokens, d_in)`, by which dead features are known.
        bos: what stands before each text.

    """
    sums = _Sums(encoder.d_in)
    for batch in reader.batches(held_out):
        x = reader.read(batch)
        sums.add(x[reader.is_ordinary(x)], encoder)
    fires = torch.zeros(encoder.d_sae, dtype=torch.bool, device=encoder.sae.device)
    for chunk in torch.split(training, _CHUNK):
        fires |= (encoder.encode(chunk) != 0).any(dim=0)
    mean = sums.mean.to(reader.capture.device)
    nll, nll_reconstructed, nll_mean = _next_token_nll(
        reader,
        reader.capture.prefix(bos, whole=True),
        [piece for piece in held_out if len(piece) > 1][:_N_SPLICED],
        (lambda x: x, lambda x: _reconstructed(encoder, x), lambda x: mean.expand_as(x)),
    )
    return QualityCard(
        fvu=sums.fvu,
        l0=sums.n_active / sums.n,
        dead_fraction=1 - fires.double().mean().item(),
        nll=nll,
        nll_reconstructed=nll_reconstructed,
        nll_mean=nll_mean,
        n_tokens=sums.n,
        d_sae=encoder.d_sae,
    )


class _Sums:
    """What FVU and L0 are made of."""

    def __init__(self, d_in: int) -> None:
        self.n = self.n_active = 0
        self._left = self._squares = 0.0
        self._sum = torch.zeros(d_in, dtype=torch.float64)

    def add(self, x: torch.Tensor, encoder: SaeEncoder) -> None:
        """Add tokens, `(n_tokens, d_in)`."""
        for chunk in torch.split(x, _CHUNK):
            found = encoder.reconstruct(chunk)
            self.n += len(chunk)
            self.n_active += int((found.acts != 0).sum())
            self._left += float(found.left.double().square().sum())
            self._squares += float(chunk.double().square().sum())
            self._sum += chunk.double().sum(dim=0).cpu()

    @property
    def mean(self) -> torch.Tensor:
        """Of all tokens, `(d_in,)`, float32."""
        return (self._sum / self.n).float()

    @property
    def fvu(self) -> float:
        """Fraction of the variance that is left."""
        return self._left / (self._squares - float(self._sum.square().sum()) / self.n)


def _reconstructed(encoder: SaeEncoder, x: torch.Tensor) -> torch.Tensor:
    found = encoder.reconstruct(x.flatten(0, -2))
    return (found.x - found.left).view(x.shape)


def _next_token_nll(
    reader: Reader, prefix: Prefix, pieces: Sequence[Piece], changes: Sequence[Callable[[torch.Tensor], torch.Tensor]]
) -> list[float]:
    """Mean NLL of the next token, in nats, with activations changed in each of several ways.

    Attention sinks keep their own: an SAE is not trained on them, and without them the model is another.
    """

    def changing(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: torch.where(reader.is_ordinary(x)[..., None], change(x).to(x.dtype), x)

    sums, n_tokens = [0.0] * len(changes), 0
    for piece in pieces:
        select = torch.ones(1, len(piece), dtype=torch.bool)
        select[0, -1] = False
        targets = torch.tensor(piece[1:], device=reader.capture.device)

        def nll(columns: Iterable[torch.Tensor], places: slice, targets: torch.Tensor = targets) -> torch.Tensor:
            return next_token(columns, targets[places])[0]

        for i, change in enumerate(changes):
            with replaced(reader.point, changing(change)):
                losses = reader.capture.run([piece], prefix, select=select, read=nll).read
            assert losses is not None
            sums[i] += float(losses.sum())
        n_tokens += len(targets)
    return [one / max(1, n_tokens) for one in sums]
