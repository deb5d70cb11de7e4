"""The quick BatchTopK SAE gives SAELens' own losses and gradients, and SAELens' trainer makes the same SAE of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput

from sts_callback.sae_training.fitting import Schedule, fit
from sts_callback.sae_training.sparse_batch_topk import SparseBatchTopK

D_IN, D_SAE, N = 12, 64, 50


def two(k: float) -> tuple[BatchTopKTrainingSAE, SparseBatchTopK]:
    """SAELens' and ours with the same weights, norms of the decoder that differ and biases that are not 0."""
    torch.manual_seed(0)
    theirs, ours = (
        kind(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k)) for kind in (BatchTopKTrainingSAE, SparseBatchTopK)
    )
    with torch.no_grad():
        theirs.W_dec *= torch.rand(D_SAE, 1) + 0.5
        theirs.b_enc += torch.randn(D_SAE) * 0.1
        theirs.b_dec += torch.randn(D_IN)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def batch(seed: int = 1) -> torch.Tensor:
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed)) * 2


def step(sae: BatchTopKTrainingSAE, x: torch.Tensor, is_dead: torch.Tensor | None) -> dict[str, torch.Tensor]:
    sae.zero_grad()
    out = sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=is_dead, n_training_steps=0, is_logging_step=False)
    )
    out.loss.backward()
    acts = out.feature_acts.to_dense() if out.feature_acts.is_sparse else out.feature_acts
    gradients = {name: p.grad for name, p in sae.named_parameters()}
    return {**out.losses, "loss": out.loss, "acts": acts, "out": out.sae_out, "threshold": sae.topk_threshold, **gradients}


@pytest.mark.parametrize("n_dead", [0, 1, 5, 40])
@pytest.mark.parametrize("k", [0.5, 3.3, 60.0])  # the last asks for more than are above 0
def test_it_gives_the_same_losses_and_gradients(k: float, n_dead: int) -> None:
    theirs, ours = two(k)
    is_dead = torch.zeros(D_SAE, dtype=torch.bool)
    is_dead[torch.randperm(D_SAE, generator=torch.Generator().manual_seed(2))[:n_dead]] = True
    for seed in (1, 2):  # the second batch looks where the first one left its guess
        expected, found = step(theirs, batch(seed), is_dead), step(ours, batch(seed), is_dead)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name].detach(), value.detach(), rtol=1e-4, atol=1e-5, msg=name, check_dtype=True)
    assert (expected["auxiliary_reconstruction_loss"] > 0) == (n_dead > 0)


def test_a_guess_that_is_too_high_changes_nothing() -> None:
    theirs, ours = two(3.0)
    step(ours, batch() * 100, None)
    step(theirs, batch() * 100, None)
    expected, found = step(theirs, batch(), None), step(ours, batch(), None)
    torch.testing.assert_close(found["acts"], expected["acts"])
    assert int((found["acts"] > 0).sum()) == 3 * N


def test_the_trainer_makes_the_same_sae(tmp_path: Path) -> None:
    data = torch.cat([batch(seed) for seed in range(20)])
    saes = []
    for name, sae in zip(("theirs", "ours"), two(4.0), strict=True):
        (tmp_path / name).mkdir()
        saes.append(fit(sae, data, Schedule(100 * N, N, 3e-3, 0), tmp_path / name))
    for (name, theirs), ours in zip(saes[0].state_dict().items(), saes[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3, msg=name)
