"""What is kept of activations: those of ordinary tokens, as the model has them, in a file that a kill does not spoil."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sts_callback.errors import ConfigError, ModelError
from sts_callback.model.undisturbed import undisturbed
from sts_callback.sae_training import activations
from sts_callback.sae_training.activations import ActivationFile, Reader
from sts_callback.sae_training.texts import Pieces
from tiny import D_MODEL, tiny_model

HOOK = "blocks.1.hook_resid_post"


def pieces(n: int = 40, seed: int = 0) -> Pieces:
    """Texts of several lengths behind BOS; 2 is special."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 60, (n,), generator=generator).tolist()
    texts = [tuple(torch.randint(2, 300, (length,), generator=generator).tolist()) for length in lengths]
    return Pieces(tuple(texts), (), (1,), frozenset({0, 1, 2}), ())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_BATCH_TOKENS_CPU", 128)


def expected(texts: Pieces, hook_layer: int = 1) -> torch.Tensor:
    """Text by text and without our own reading."""
    model, found = tiny_model(), []
    for text in texts.training:
        ids = torch.tensor([(*texts.bos, *text)])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[hook_layer + 1][0]
        found.append(hidden[~torch.isin(ids[0], torch.tensor(sorted(texts.special)))])
    return torch.cat(found)


def kept(folder: Path, texts: Pieces, n_tokens: int = 10**6) -> tuple[torch.Tensor, Reader, ActivationFile]:
    folder.mkdir(exist_ok=True)
    model, file = tiny_model(), ActivationFile(folder, D_MODEL)
    with undisturbed(model):
        reader = Reader(model, HOOK, texts)
        return file.collect(reader, texts.training, n_tokens, progress=False), reader, file


def test_they_are_the_models_own(tmp_path: Path) -> None:
    texts = pieces()
    found, reader, file = kept(tmp_path, texts)
    x = expected(texts)
    assert reader.usual.median_norm == pytest.approx(x.norm(dim=1).median().item(), rel=1e-5)
    assert file.sink_share == 0  # this model has none
    raw = found.float() / reader.usual.scale + reader.usual.mean
    far, nearest = torch.cdist(raw.double(), x.double()).min(dim=1)
    assert far.max() < 1e-3 * x.norm(dim=1).mean()  # the rounding of float16
    assert len(x) == len(raw)
    assert len(nearest.unique()) > 0.99 * len(x)  # kept in half precision, near twins may be taken for one another
    assert found.float().mean().abs() < 0.05
    assert found.float().square().mean() == pytest.approx(1, rel=0.02)


def test_attention_sinks_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = pieces()
    norms = expected(texts).norm(dim=1)
    multiple = 1.2  # so that this model has some
    monkeypatch.setattr(activations, "MAX_NORM_MULTIPLE", multiple)
    found, reader, file = kept(tmp_path, texts)
    n_sinks = int((norms >= multiple * norms.median()).sum())
    assert 0 < n_sinks < len(norms) / 2
    assert len(found) == len(norms) - n_sinks
    assert file.sink_share == pytest.approx(n_sinks / len(norms))
    assert (found.float() / reader.usual.scale + reader.usual.mean).norm(dim=1).max() < 1.001 * multiple * norms.median()


@pytest.mark.parametrize("n_batches", [0, 1, 7])
def test_a_killed_reading_goes_on_where_it_was(n_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = kept(tmp_path / "whole", pieces())
    model, read = tiny_model(), Reader.read
    (tmp_path / "killed").mkdir()
    with undisturbed(model):
        reader = Reader(model, HOOK, pieces())
        done: list[int] = []

        def dying(self: Reader, batch: list[tuple[int, ...]]) -> torch.Tensor:
            if len(done) == n_batches:
                raise KeyboardInterrupt
            done.append(len(batch))
            return read(self, batch)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Reader, "read", dying)
            ActivationFile(tmp_path / "killed", D_MODEL).collect(reader, pieces().training, 10**6, progress=False)
    with (tmp_path / "killed" / "activations.f16").open("ab") as file:
        file.write(b"half a batch")
    again: list[int] = []
    monkeypatch.setattr(ActivationFile, "collect", _counted(ActivationFile.collect, again))
    resumed, reader, _ = kept(tmp_path / "killed", pieces())
    assert torch.equal(resumed, whole)
    assert again == [len(reader.batches(pieces().training)) - n_batches]


def _counted(collect: object, into: list[int]) -> object:
    """`collect`, noting how many batches the model ran."""

    def counted(self: ActivationFile, reader: Reader, *args: object, **kwargs: object) -> torch.Tensor:
        read, n = reader.read, []
        reader.read = lambda batch: (n.append(1), read(batch))[1]  # type: ignore[method-assign]
        found = collect(self, reader, *args, **kwargs)  # type: ignore[operator]
        into.append(len(n))
        return found  # type: ignore[no-any-return]

    return counted


def test_it_stops_when_there_are_enough(tmp_path: Path) -> None:
    found, _, _ = kept(tmp_path, pieces(), n_tokens=300)
    assert 300 <= len(found) < 300 + 128


def test_a_batch_that_memory_does_not_hold_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, _ = kept(tmp_path / "whole", pieces())
    model = tiny_model()
    forward, sizes = model.forward, []

    def short(input_ids: torch.Tensor, **kwargs: object) -> object:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids, **kwargs)

    with undisturbed(model):
        reader = Reader(model, HOOK, pieces())
        monkeypatch.setattr(model, "forward", short)
        (tmp_path / "short").mkdir()
        found = ActivationFile(tmp_path / "short", D_MODEL).collect(reader, pieces().training, 10**6, progress=False)
    assert max(sizes) > 2
    torch.testing.assert_close(found, whole, rtol=0, atol=0.01)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = activations.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"tokens: got 1,\d+.*0.0 GiB are free"):
        kept(tmp_path, pieces())


def test_a_model_that_gives_nan_is_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with undisturbed(model), pytest.raises(ModelError):
        Reader(model, HOOK, pieces())
