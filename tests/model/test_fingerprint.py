"""The fingerprint of weights: another for any other weights, the same for the same wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sts_callback.errors import ModelError
from sts_callback.model import fingerprint
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
    monkeypatch.setattr(fingerprint, "_CHUNK", 100)  # of which most tensors are no multiple
    assert weights_of(model) == whole


def test_the_model_is_left_as_it_is() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights_of(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.requires_grad and tensor.grad is None for tensor in model.parameters())


class Packed(torch.Tensor):
    """A weight kept as whole numbers and a scale, as torchao keeps them; it can do nothing else."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values, self.scale, self.zero_point = values, scale, None

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale", "zero_point"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of a packed weight")


class Opaque(Packed):
    """One that does not say what it packs."""

    __tensor_flatten__ = property()  # type: ignore[assignment]  # so that it has none


def with_weight(weight: torch.Tensor) -> nn.Module:
    model = nn.Linear(3, 2, bias=False)
    model.weight = nn.Parameter(weight, requires_grad=False)
    return model


def packed(value: int = 2, scale: float = 0.5, kind: type[Packed] = Packed) -> nn.Module:
    values = torch.tensor([[value, 2, 3], [4, 5, 6]], dtype=torch.int8)
    return with_weight(kind(values, torch.tensor([scale, 1.0])))


def test_packed_weights_count_by_what_they_pack() -> None:
    assert weights_of(packed()) == weights_of(packed())
    assert len({weights_of(packed(*changed)).fingerprint for changed in ((), (3,), (2, 0.25))}) == 3


def test_all_bits_of_whole_numbers_count() -> None:
    model = nn.Module()
    seen = set()
    for value in (2**30, 2**30 + 1):  # the same in float32
        model.register_buffer("packed", torch.tensor([value, 7], dtype=torch.int32))
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
        seen.add(weights_of(model).fingerprint)
    assert len(seen) == 2


def test_weights_that_cannot_be_read_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"model: weight is a .*Opaque, which cannot be fingerprinted .*dequantise the model"):
        weights_of(packed(kind=Opaque))
    with pytest.raises(ModelError, match="model: weight is not whole on this process"):
        weights_of(nn.Linear(3, 2, bias=False, device="meta"))
