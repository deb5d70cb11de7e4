"""SAELens' BatchTopK SAE for training on a CPU: the same losses and gradients, from the few activations that are not 0.

Of the `n_tokens x d_sae` activations of a batch about one in a hundred is active. SAELens multiplies all of them, six times in a
step. Here one such product is left, the encoder's: the decoder, its gradients and the encoder's read active entries alone, and
the loss for dead features reads their columns alone. On a GPU products are cheap, so SAELens' own class serves there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sae_lens import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch.nn.functional import embedding_bag

_CUT = 0.8
"""Entries below this multiple of the last batch's least active one are looked at only if too few are above it."""


class _Active(NamedTuple):
    """The active entries of a batch, token by token."""

    tokens: torch.Tensor
    """The token of each, `(n_active,)`."""
    features: torch.Tensor
    """Its feature."""
    starts: torch.Tensor
    """Where each token's begin, `(n_tokens,)`."""
    values: torch.Tensor
    """Pre-activations, `(n_active,)`."""


class SparseBatchTopK(BatchTopKTrainingSAE):  # type: ignore[misc]  # SAELens ships no types
    """`BatchTopKTrainingSAE` with another way to the same numbers; its trainer takes it like that."""

    _cut = 0.0

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Losses of one batch and its activations, which are given as a sparse tensor."""
        x = step_input.sae_in
        active = self._active(x)
        values = _EncoderAt.apply(x, self.W_enc, self.b_enc, self.b_dec, active)  # type: ignore[no-untyped-call]
        decoded = embedding_bag(active.features, self.W_dec, active.starts, mode="sum", per_sample_weights=values)
        sae_out = decoded + self.b_dec
        acts = active.values * self.W_dec.detach().norm(dim=1)[active.features]  # decoding divides by the norm again
        self._cut = _CUT * float(acts.min()) if len(acts) else 0.0
        self.update_topk_threshold(acts)
        losses = {
            "mse_loss": (sae_out - x).square().sum(dim=1).mean(),
            "auxiliary_reconstruction_loss": self._auxiliary_loss(x, sae_out, step_input.dead_neuron_mask),
        }
        places = torch.stack([active.tokens, active.features])
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=torch.sparse_coo_tensor(
                places, acts, (len(x), self.cfg.d_sae), is_coalesced=True, check_invariants=False
            ),
            hidden_pre=x,  # which no one reads
            loss=sum(losses.values()),
            losses=losses,
        )

    @torch.no_grad()
    def _active(self, x: torch.Tensor) -> _Active:
        """The `k` largest positive activations a token, over the whole batch."""
        pre = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)
        places = _largest_positive((pre * self.W_dec.norm(dim=1)).flatten(), int(self.cfg.k * len(x)), self._cut)
        starts = torch.searchsorted(places, torch.arange(len(x)) * self.cfg.d_sae)
        return _Active(places // self.cfg.d_sae, places % self.cfg.d_sae, starts, pre.flatten()[places])

    def _auxiliary_loss(self, x: torch.Tensor, sae_out: torch.Tensor, is_dead: torch.Tensor | None) -> torch.Tensor:
        """What dead features leave of the error of the living ones: `calculate_topk_aux_loss` on their columns alone."""
        if is_dead is None or not is_dead.any():
            return sae_out.new_zeros(())
        dead = is_dead.nonzero()[:, 0]
        n_asked = x.shape[1] // 2  # Gao et al., 2024, arXiv 2406.04093, appendix B.1
        W_dec = self.W_dec[dead]
        pre = torch.addmm(self.b_enc[dead], x - self.b_dec, self.W_enc[:, dead])
        chosen = (pre * W_dec.norm(dim=1)).topk(min(n_asked, len(dead)), sorted=False).indices
        acts = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
        left = acts @ W_dec - (x - sae_out).detach()
        loss: torch.Tensor = left.square().sum(dim=1).mean() * min(len(dead) / n_asked, 1.0) * self.cfg.aux_loss_coefficient
        return loss


class _EncoderAt(torch.autograd.Function):
    """Pre-activations at active entries, which are known, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor, active: _Active
    ) -> torch.Tensor:
        ctx.save_for_backward(x, W_enc, b_dec)
        ctx.active = active
        return active.values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, W_enc, b_dec = ctx.saved_tensors
        features = ctx.active.features
        by_feature = features.argsort(stable=True)
        n = torch.bincount(features, minlength=W_enc.shape[1])
        for_W_enc = embedding_bag(
            ctx.active.tokens[by_feature], x - b_dec, n.cumsum(0) - n, mode="sum", per_sample_weights=gradient[by_feature]
        )
        for_b_enc = torch.zeros(len(n)).index_add_(0, features, gradient)
        return None, for_W_enc.T, for_b_enc, -(W_enc @ for_b_enc), None


def _largest_positive(x: torch.Tensor, n: int, cut: float) -> torch.Tensor:
    """Places of the `n` largest numbers above 0, ascending; as many as there are.

    Args:
        x: one row.
        n: how many.
        cut: a guess below the least of them; it costs time where it is wrong, not exactness.

    """
    places = (x > cut).nonzero()[:, 0]
    if len(places) < n and cut > 0:
        places = (x > 0).nonzero()[:, 0]
    if len(places) > n:
        places = places[x[places].topk(n, sorted=False).indices].sort().values
    return places
