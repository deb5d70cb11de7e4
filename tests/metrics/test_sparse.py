"""Sparse activations: nothing is lost on the way to sparse and back."""

from __future__ import annotations

import pytest
import torch

from sts_callback.metrics.sums import SparseActs

CPU = torch.device("cpu")
N_TOKENS, D_SAE = 12, 9


@pytest.fixture
def acts() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(N_TOKENS, D_SAE, generator=generator) * (torch.rand(N_TOKENS, D_SAE, generator=generator) < 0.3)
    acts[[0, 5, 6, N_TOKENS - 1]] = 0.0  # tokens on which no feature is active: first, two in a row, last
    return acts


def test_only_what_is_not_zero_is_kept() -> None:
    kept = SparseActs.of(torch.tensor([[0.0, 1.5, 0.0], [0.0, 0.0, 0.0], [2.5, 0.0, 3.5]]))
    assert kept.n_active.tolist() == [1, 0, 2]
    assert kept.features.tolist() == [1, 0, 2]
    assert kept.values.tolist() == [1.5, 2.5, 3.5]
    assert (kept.n_active.dtype, kept.features.dtype, kept.values.dtype) == (torch.int32, torch.int32, torch.float32)


def test_every_slice_comes_back_exactly(acts: torch.Tensor) -> None:
    sparse = SparseActs.of(acts)
    for start in range(N_TOKENS + 1):
        for stop in range(start, N_TOKENS + 1):
            assert torch.equal(sparse.dense(start, stop, D_SAE, CPU), acts[start:stop]), (start, stop)


def test_zeros_are_exact_and_no_other_value_is_taken_for_zero() -> None:
    acts = torch.tensor([[0.0, 1e-30, -0.0, 3e38]])
    back = SparseActs.of(acts).dense(0, 1, 4, CPU)
    assert back.tolist() == [[0.0, acts[0, 1].item(), 0.0, acts[0, 3].item()]]
    assert back[0, 1] > 0


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 0, 7], [1, 10, 1]])
def test_parts_put_together_equal_the_whole(acts: torch.Tensor, sizes: list[int]) -> None:
    whole, parts = SparseActs.of(acts), SparseActs.cat([SparseActs.of(part) for part in acts.split(sizes)])
    assert torch.equal(parts.n_active, whole.n_active)
    assert torch.equal(parts.features, whole.features)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.dense(3, 11, D_SAE, CPU), acts[3:11])


def test_tokens_without_active_features_and_no_tokens_at_all() -> None:
    silent = SparseActs.of(torch.zeros(3, D_SAE))
    assert silent.n_active.tolist() == [0, 0, 0]
    assert torch.equal(silent.dense(1, 3, D_SAE, CPU), torch.zeros(2, D_SAE))
    assert SparseActs.of(torch.zeros(0, D_SAE)).dense(0, 0, D_SAE, CPU).shape == (0, D_SAE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_come_back_as_the_same_numbers(acts: torch.Tensor, dtype: torch.dtype) -> None:
    low = acts.to(dtype)
    assert torch.equal(SparseActs.of(low).dense(0, N_TOKENS, D_SAE, CPU), low.float())
