"""The fingerprint of weights: another for any other weights, the same for the same wherever they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sts_callback.model import weights
from sts_callback.model.fingerprint import weights_of
from tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_weights_are_the_same(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    assert weights_of(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) == weights_of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_dtype_has_the_same_fingerprint_and_is_told_apart_by_its_name(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    wider = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert weights_of(wider).fingerprint == weights_of(model).fingerprint
    assert (weights_of(wider).dtype, weights_of(model).dtype) == ("torch.float32", str(dtype))
    assert weights_of(model).fingerprint != weights_of(tiny_model()).fingerprint  # rounding to fewer bits is a change


def test_each_tensor_counts_and_one_element_of_it_is_enough() -> None:
    model = tiny_model()
    seen = {weights_of(model).fingerprint}
    for tensor in model.parameters():
        flat = tensor.data.view(-1)
        kept = flat[-1].clone()
        flat[-1] = torch.nextafter(kept, torch.tensor(torch.inf))
        seen.add(weights_of(model).fingerprint)
        flat[-1] = kept
    assert len(seen) == 1 + len(list(model.parameters()))
    assert weights_of(model).fingerprint in seen


def test_elements_that_have_changed_places_count() -> None:
    model = tiny_model()
    before = weights_of(model).fingerprint
    embedding = model.get_input_embeddings().weight.data
    embedding[:] = embedding.flip(0).clone()
    assert weights_of(model).fingerprint != before


def test_neither_chunks_nor_layout_in_memory_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    whole = weights_of(model)
    for tensor in model.parameters():
        if tensor.dim() == 2:
            tensor.data = tensor.data.T.contiguous().T
    monkeypatch.setattr(weights, "_CHUNK", 100)  # of which most tensors are no multiple
    assert weights_of(model) == whole


def test_the_model_is_left_as_it_is() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights_of(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.requires_grad and tensor.grad is None for tensor in model.parameters())
