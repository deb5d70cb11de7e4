"""Step 0 on disk: every tensor comes back, and nothing else is taken for it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from sts_callback.data.probes import ProbeSet, Query
from sts_callback.errors import CannotTell
from sts_callback.measure.sae_reader import Reference
from sts_callback.measure.step_zero import StepZeroReference, StepZeroStats
from sts_callback.metrics.sums import SKETCH_WIDTH, SparseActs


def _set(seed: int, n_tokens: int = 9, n_queries: int = 4, d_sae: int = 6) -> StepZeroStats:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(n_tokens, d_sae, generator=generator)
    both = torch.randn(2, n_tokens, SKETCH_WIDTH, generator=generator)
    return StepZeroStats(
        counted=torch.rand(n_tokens, generator=generator) < 0.8,
        acts=SparseActs.of(dense * (dense > 0.5)),
        sketches=(both * float("nan") if seed == 1 else both).transpose(0, 1),  # not contiguous
        n_tokens=torch.randint(1, 5, (n_queries,), generator=generator),
        sq_norm=torch.rand(n_queries, generator=generator),
        raw_sq_norm=torch.rand(2 * n_queries, generator=generator)[::2],
        nll=torch.full((n_queries,), float("nan")) if seed == 1 else torch.rand(n_queries, generator=generator),
        mean_activity=torch.rand(d_sae, generator=generator, dtype=torch.float64),
        mean_own_shift=torch.rand(d_sae, generator=generator, dtype=torch.float64),
        mean_train_shift=torch.rand(2 * d_sae, generator=generator, dtype=torch.float64)[::2],
        mean_filler_shift=torch.rand(d_sae, generator=generator, dtype=torch.float64),
        right=None if seed == 1 else (torch.rand(5, n_queries, generator=generator) < 0.5).T,  # not contiguous
    )


@pytest.fixture
def baseline() -> StepZeroReference:
    return StepZeroReference("f" * 64, Reference(12.5, 11.25), {"train": _set(0), "law": _set(1), "own/data 2": _set(2)})


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


def test_every_tensor_comes_back(baseline: StepZeroReference, tmp_path: Path) -> None:
    file = tmp_path / "baseline.safetensors"
    baseline.save(file)
    back = StepZeroReference.load(file, baseline.fingerprint)
    assert list(back.sets) == ["train", "law", "own/data 2"]
    for name, one in baseline.sets.items():
        for field in fields(StepZeroStats):
            if field.name not in ("acts", "right"):
                assert _same(getattr(back.sets[name], field.name), getattr(one, field.name)), (name, field.name)
        for field in fields(SparseActs):
            assert _same(getattr(back.sets[name].acts, field.name), getattr(one.acts, field.name)), (name, field.name)
        kept, read = one.right, back.sets[name].right
        assert (kept is None) == (read is None) == (name == "law")
        assert kept is None or read is None or _same(read, kept)
    assert back.sets["law"].nll.isnan().all()
    assert back.sets["law"].sketches.isnan().all()
    assert (back.reference, back.fingerprint) == (baseline.reference, baseline.fingerprint)


def test_a_set_without_active_features_comes_back(tmp_path: Path) -> None:
    silent = replace(_set(0), acts=SparseActs.of(torch.zeros(9, 6)))
    StepZeroReference("f", Reference(1.0, 1.0), {"train": silent}).save(tmp_path / "b.safetensors")
    back = StepZeroReference.load(tmp_path / "b.safetensors", "f").sets["train"]
    assert back.acts.n_active.tolist() == [0] * 9
    assert back.acts.values.shape == (0,)


def test_a_set_without_a_token_that_counts_comes_back(tmp_path: Path) -> None:
    empty = replace(
        _set(0), counted=torch.zeros(9, dtype=torch.bool), acts=SparseActs.cat([]), sketches=torch.zeros(0, 2, SKETCH_WIDTH)
    )
    StepZeroReference("f", Reference(1.0, 1.0), {"train": empty}).save(tmp_path / "b.safetensors")
    back = StepZeroReference.load(tmp_path / "b.safetensors", "f").sets["train"]
    assert _same(back.sketches, empty.sketches)
    assert _same(back.acts.n_active, empty.acts.n_active)


def test_only_the_file_itself_is_left(baseline: StepZeroReference, tmp_path: Path) -> None:
    baseline.save(tmp_path / "baseline.safetensors")
    baseline.save(tmp_path / "baseline.safetensors")  # over an older one
    assert [p.name for p in tmp_path.iterdir()] == ["baseline.safetensors"]


def test_a_kill_while_writing_leaves_the_older_one(
    baseline: StepZeroReference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "baseline.safetensors"
    baseline.save(file)
    before = file.read_bytes()

    def killed(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sts_callback.measure.step_zero.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        StepZeroReference("other", baseline.reference, {}).save(file)
    assert file.read_bytes() == before


def test_another_fingerprint_can_not_tell(baseline: StepZeroReference, tmp_path: Path) -> None:
    baseline.save(tmp_path / "baseline.safetensors")
    with pytest.raises(CannotTell, match=r"^baseline: .* was made with another model, SAE or probes; .* start the run anew"):
        StepZeroReference.load(tmp_path / "baseline.safetensors", "e" * 64)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_can_not_tell(baseline: StepZeroReference, tmp_path: Path, share: float) -> None:
    file = tmp_path / "baseline.safetensors"
    baseline.save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CannotTell, match=r"^baseline: baseline\.safetensors cannot be read .* start the run anew"):
        StepZeroReference.load(file, baseline.fingerprint)


def test_a_missing_or_foreign_file_can_not_tell(tmp_path: Path) -> None:
    with pytest.raises(CannotTell, match="cannot be read"):
        StepZeroReference.load(tmp_path / "none.safetensors", "f")
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    with pytest.raises(CannotTell, match="cannot be read"):
        StepZeroReference.load(tmp_path / "text.safetensors", "f")


def test_the_digest_is_that_of_all_contents_and_of_nothing_else(baseline: StepZeroReference, tmp_path: Path) -> None:
    file = tmp_path / "baseline.safetensors"
    baseline.save(file)
    assert StepZeroReference.load(file, baseline.fingerprint).digest == baseline.digest
    changed = replace(baseline.sets["train"], sq_norm=baseline.sets["train"].sq_norm.nextafter(torch.tensor(9.0)))
    others = [
        replace(baseline, fingerprint="g" * 64),
        replace(baseline, reference=Reference(12.5, 11.0)),
        replace(baseline, sets={**baseline.sets, "train": changed}),
        replace(baseline, sets={name: one for name, one in baseline.sets.items() if name != "law"}),
    ]
    assert len({baseline.digest, *(other.digest for other in others)}) == 5


def test_what_was_read_comes_back_with_the_bytes_of_its_answers(baseline: StepZeroReference, tmp_path: Path) -> None:
    queries = (Query((5, 6), (7, 8, 9), (True, False), 11), Query((5,), (), (True,), 0))
    law = ProbeSet("law", queries, ((1, 2), (3,)), 4, "written")
    old = replace(law, name="old", queries=tuple(replace(q, answer_bytes=None) for q in queries))
    file = tmp_path / "b.safetensors"
    replace(baseline, probes={"law": law, "old": old}).save(file)
    back = StepZeroReference.load(file, baseline.fingerprint).probes
    assert back == {"law": law, "old": old}
    assert (back["law"].answer_bytes, back["old"].answer_bytes) == ((11, 0), ())
