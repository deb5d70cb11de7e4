"""An SAE from texts to its folder: it fits the model, says how well, goes on after a kill, and is what a forecast takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from torch.nn.functional import cross_entropy

from sts_callback.config import SaeConfig
from sts_callback.errors import ConfigError, DataError, ModelError
from sts_callback.measure.monitor import Monitor
from sts_callback.model.quality import QUALITY_FILE, QualityCard
from sts_callback.model.sae import load_encoder
from sts_callback.sae_training import train
from sts_callback.sae_training.activations import ActivationFile
from sts_callback.sae_training.texts import read_pieces
from sts_callback.sae_training.train import Made, train_sae
from tiny import ARCHITECTURES, bos_tokenizer, rows, tiny_model

CONFIG = SaeConfig(d_sae=256, l0=24, n_tokens=8000, n_passes=25)
SOURCES = {"train": rows(150), "shipped domains": rows(150, "poems")}
LAYER = 3  # two thirds of four


def made(out: Path, config: SaeConfig = CONFIG, architecture: str = "llama", sources: Any = None) -> Made:
    return train_sae(tiny_model(architecture), bos_tokenizer(), sources or SOURCES, config, out, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Made]]:
    out = tmp_path_factory.mktemp("whole") / "sae"
    yield out, made(out)


def test_it_says_how_well_it_fits(whole: tuple[Path, Made]) -> None:
    out, found = whole
    card = found.card
    assert card.fvu < 0.2
    assert card.l0 == pytest.approx(24, rel=0.1)
    assert card.dead_fraction < 0.2  # of random numbers, after a few hundred steps
    assert card.faults() == []
    assert QualityCard.from_json((out / QUALITY_FILE).read_text()) == card
    told = (out / "README.md").read_text()
    assert f"| {card.fvu:.3f} |" in told
    assert f"| {card.loss_kept:.1%} |" in told
    assert f"blocks.{LAYER}.hook_resid_post" in told
    assert not out.with_name("sae.unfinished").exists()


def test_its_figures_are_those_of_other_code(whole: tuple[Path, Made]) -> None:
    """Text by text, by SAELens' own reading of the folder and plain hooks."""
    out, found = whole
    sae, model = SAE.load_from_disk(str(out)), tiny_model()
    pieces = read_pieces(SOURCES, bos_tokenizer(), CONFIG.n_tokens, CONFIG.seed)
    ids = [torch.tensor([(*pieces.bos, *piece)]) for piece in pieces.held_out]

    def nll(change: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Of the tokens after the first, whose predecessor is changed."""
        handle = model.model.layers[LAYER].register_forward_hook(
            lambda module, args, out: torch.cat([out[:, :1], change(out[:, 1:])], dim=1)
        )
        losses = [cross_entropy(model(one).logits[0, 1:-1], one[0, 2:], reduction="none") for one in ids]
        handle.remove()
        return float(torch.cat(losses).mean())

    acts: list[torch.Tensor] = []
    with torch.no_grad():
        plain = nll(lambda x: (acts.append(x[0]), x)[1])
        reconstructed = nll(sae)
        x = torch.cat(acts)
        mean = nll(lambda one: x.mean(dim=0).expand_as(one))
        left = (x - sae(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert found.card.n_tokens == len(x)
    assert found.card.fvu == pytest.approx(float(left), rel=1e-3)
    assert found.card.l0 == pytest.approx(float((sae.encode(x) > 0).sum() / len(x)), rel=1e-3)
    assert found.card.nll == pytest.approx(plain, rel=1e-5)
    assert found.card.nll_reconstructed == pytest.approx(reconstructed, rel=1e-4)
    assert found.card.nll_mean == pytest.approx(mean, rel=1e-4)


def test_a_forecast_takes_it(whole: tuple[Path, Made]) -> None:
    monitor = Monitor(
        tiny_model(), bos_tokenizer(), sae=whole[0], train_data=rows(60), domains={"poems": rows(60, "poems")}, progress=False
    )
    assert monitor.identity.hook_name == f"blocks.{LAYER}.hook_resid_post"
    assert [check.status for check in monitor.forecasts()[0].checks if check.name in ("explained variance", "layer", "L0")] == [
        "pass",
        "pass",
        "pass",
    ]


@pytest.mark.parametrize("where", ["reading", "training", "measuring"])
def test_a_killed_run_goes_on_where_it_was(
    where: str, whole: tuple[Path, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    owner, name = {"reading": (ActivationFile, "collect"), "training": (train, "fit"), "measuring": (train, "measured")}[where]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, dying)
        made(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()
    assert made(tmp_path / "sae").card == whole[1].card
    for file in ("sae_weights.safetensors", "cfg.json", "quality.json"):
        assert (tmp_path / "sae" / file).read_bytes() == (whole[0] / file).read_bytes(), file


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"config": replace(CONFIG, seed=1)}, "another seed, texts"),
        ({"config": replace(CONFIG, l0=20)}, "another l0"),
        ({"sources": {"train": rows(200)}}, "another texts"),
        ({"architecture": "qwen3"}, "another model"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_not_mixed_in(
    other: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ActivationFile, "collect", dying)
        made(tmp_path / "sae")
    with pytest.raises(ConfigError, match=f"out: .*sae.unfinished holds a training that is not finished, with {told};.*delete"):
        made(tmp_path / "sae", **other)


@pytest.mark.parametrize(
    ("given", "hook_name"),
    [
        (None, "blocks.3.hook_resid_post"),
        ("0.5", "blocks.2.hook_resid_post"),
        ("0", "blocks.0.hook_resid_post"),
        ("1", "blocks.3.hook_resid_post"),
        ("blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out"),
        ("model.layers.1.self_attn.o_proj.input", "model.layers.1.self_attn.o_proj.input"),
    ],
)
def test_hook_points_by_every_name(given: str | None, hook_name: str, tmp_path: Path) -> None:
    small = SaeConfig(hook_name=given, d_sae=64, l0=4, n_tokens=2048, n_passes=1)
    found = made(tmp_path / "sae", small)
    assert found.config.hook_name == hook_name
    if not found.card.faults():
        assert load_encoder(tmp_path / "sae", "m", 4).hook_name == hook_name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_of_several_kinds(architecture: str, tmp_path: Path) -> None:
    found = made(tmp_path / "sae", replace(CONFIG, n_tokens=4096), architecture)
    assert found.card.fvu < 0.5
    assert found.card.l0 == pytest.approx(24, rel=0.2)


def test_the_model_and_random_numbers_are_left_as_they_were(tmp_path: Path) -> None:
    model = tiny_model().train()
    before, rng = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    train_sae(
        model, bos_tokenizer(), SOURCES, SaeConfig(d_sae=64, l0=4, n_tokens=2048, n_passes=1), tmp_path / "sae", progress=False
    )
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "error", "told"),
    [
        (replace(CONFIG, hook_name="2.5"), ConfigError, "hook_name: got '2.5'; allowed is .*share of the depth"),
        (replace(CONFIG, hook_name="blocks.9.hook_resid_post"), ModelError, "the model has 4 layers"),
        (replace(CONFIG, l0=26), ConfigError, "l0: got 26.0; allowed is at most 25.6, a tenth of the 256 features"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(config: SaeConfig, error: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=told):
        made(tmp_path / "sae", config)
    assert list(tmp_path.iterdir()) == []


def test_texts_that_are_too_few_for_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train: \d+ tokens .*a step of training takes 512"):
        made(tmp_path / "sae", sources={"train": rows(8)})


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("d_sae", 8, "d_sae: got 8; allowed is 16 or more"),
        ("l0", 0.5, "l0: got 0.5"),
        ("l0", float("nan"), "l0: got nan"),
        ("n_tokens", 100, "tokens: got 100"),
        ("n_passes", 0, "passes: got 0"),
        ("seed", -1, "seed: got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(field: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SaeConfig(**{field: value})
