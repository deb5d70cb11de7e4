"""Training by SAELens' trainer: killed and resumed it ends where it would have, and what is saved reads a model's activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE

from sts_callback.model.sae import load_encoder
from sts_callback.sae_training import fitting
from sts_callback.sae_training.activations import Usual
from sts_callback.sae_training.fitting import Schedule, fit, new_sae, save

D_IN, D_SAE, BATCH = 8, 32, 64


def data() -> torch.Tensor:
    """Sparse combinations of 16 directions: what an SAE can find."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(16, D_IN, generator=generator)
    amounts = torch.rand(4000, 16, generator=generator) * (torch.rand(4000, 16, generator=generator) < 0.1)
    return (amounts @ directions).half()


def sae() -> BatchTopKTrainingSAE:
    return new_sae(data(), D_SAE, 2.0, torch.device("cpu"), seed=0)


def trained(folder: Path, n_steps: int = 100) -> BatchTopKTrainingSAE:
    folder.mkdir(exist_ok=True)
    return fit(sae(), data(), Schedule(n_steps * BATCH, BATCH, 1e-2, 0), folder)


def test_features_begin_where_tokens_point_each_elsewhere() -> None:
    made, tokens = sae(), torch.nn.functional.normalize(data().float(), dim=1)
    features = torch.nn.functional.normalize(made.W_dec.detach(), dim=1)
    found = ((features @ tokens.T).max(dim=1).values > 1 - 1e-5).sum()
    assert 0.5 * D_SAE < found < D_SAE  # one token in five is nothing, and points nowhere
    assert torch.equal(made.W_enc, made.W_dec.T)
    assert torch.allclose(made.W_dec.norm(dim=1), made.W_dec.norm(dim=1).mean().expand(D_SAE))
    few = new_sae(data()[:5].repeat(3, 1), D_SAE, 2.0, torch.device("cpu"), seed=0)
    assert few.W_dec.isfinite().all() and len(few.W_dec.detach().unique(dim=0)) == D_SAE


@pytest.mark.parametrize("n_steps", [3, 37, 99])
def test_a_killed_training_goes_on_where_it_was(n_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole").state_dict()
    given = fitting._Batches.__next__

    def dying(batches: fitting._Batches) -> torch.Tensor:
        if batches.n_given == n_steps:
            raise KeyboardInterrupt
        return given(batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting._Batches, "__next__", dying)
        trained(tmp_path / "killed")
    n_given: list[int] = []
    monkeypatch.setattr(fitting._Batches, "__next__", lambda batches: (n_given.append(1), given(batches))[1])
    resumed = trained(tmp_path / "killed").state_dict()
    assert len(n_given) <= 100 - n_steps + 10  # not from the beginning
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert len(list((tmp_path / "killed").glob("*/sae_weights.safetensors"))) == 1  # older checkpoints are gone


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = trained(tmp_path / "run")
    again = trained(tmp_path / "run")
    assert torch.equal(again.W_dec, first.W_dec)


def test_it_finds_what_is_there(tmp_path: Path) -> None:
    x, sae = data().float(), trained(tmp_path, n_steps=1500)
    with torch.no_grad():
        left = (x - sae(x)).square().sum()
    assert left < 0.1 * (x - x.mean(dim=0)).square().sum()


def test_what_is_saved_reads_activations_as_the_model_gives_them(tmp_path: Path) -> None:
    x, usual = data(), Usual(median_norm=1.0, mean=torch.randn(D_IN, generator=torch.Generator().manual_seed(3)) * 5, scale=0.25)
    sae = trained(tmp_path / "run")
    with torch.no_grad():
        kept, expected = sae.encode(x.float()), sae(x.float())
    save(sae, x, usual, tmp_path / "sae", hook_name="blocks.1.hook_resid_post", model_name="m")
    encoder = load_encoder(tmp_path / "sae", "m", 2)
    raw = x.float() / usual.scale + usual.mean
    found = encoder.reconstruct(raw)
    assert (encoder.architecture, encoder.hook_name, encoder.needs_scale) == ("jumprelu", "blocks.1.hook_resid_post", False)
    assert (found.acts != 0).sum() / len(x) == pytest.approx(2.0, rel=0.01)  # the L0 that was asked for
    same = ((found.acts != 0) == (kept != 0)).all(dim=1)  # a threshold for each token is another than one for each batch
    assert same.float().mean() > 0.8
    torch.testing.assert_close((found.x - found.left)[same], (expected / usual.scale + usual.mean)[same], rtol=1e-3, atol=1e-3)


def test_random_numbers_are_left_as_they_are(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    trained(tmp_path, n_steps=5)
    assert torch.equal(torch.get_rng_state(), before)
