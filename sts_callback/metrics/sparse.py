"""Activations at step 0, kept sparse: what drift subtracts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseActs:
    """Non-zero feature activations of a sequence of tokens."""

    n_active: torch.Tensor
    """Active features of each token, `(n_tokens,)`, int32."""
    features: torch.Tensor
    """Their indices, token by token, `(n_nonzero,)`, int32."""
    values: torch.Tensor
    """Their activations, `(n_nonzero,)`, float32."""

    @classmethod
    def of(cls, acts: torch.Tensor) -> SparseActs:
        """Keep what is not zero of `(n_tokens, d_sae)`, on the CPU."""
        rows, features = acts.nonzero(as_tuple=True)
        n_active = torch.bincount(rows, minlength=len(acts))
        return cls(n_active.int().cpu(), features.int().cpu(), acts[rows, features].float().cpu())

    @classmethod
    def cat(cls, parts: list[SparseActs]) -> SparseActs:
        """Tokens of several parts, in order; none of no parts."""
        if not parts:
            return cls(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0))
        return cls(
            torch.cat([p.n_active for p in parts]),
            torch.cat([p.features for p in parts]),
            torch.cat([p.values for p in parts]),
        )

    def dense(self, start: int, stop: int, d_sae: int, device: torch.device) -> torch.Tensor:
        """Tokens `start` to `stop` as `(stop - start, d_sae)`, float32."""
        ends = self.n_active.long().cumsum(0)
        first = int(ends[start - 1]) if start else 0
        last = int(ends[stop - 1]) if stop else 0
        rows = torch.repeat_interleave(torch.arange(stop - start), self.n_active[start:stop].long())
        out = torch.zeros(stop - start, d_sae, device=device)
        out[rows.to(device), self.features[first:last].long().to(device)] = self.values[first:last].to(device)
        return out
