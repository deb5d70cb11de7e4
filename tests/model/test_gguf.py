"""Models from GGUF files: unpacked, as a CPU has them, and with weights in blocks, as a device has that has a kernel for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sts_callback.config import ProbeConfig
from sts_callback.measure.monitor import Monitor
from sts_callback.model.fingerprint import weights_of
from tiny import rotated_sae, rows, tiny_model, tiny_tokenizer

KINDS = (Kind.Q8_0, Kind.Q4_0)


def saved(folder: Path, kind: Kind) -> Path:
    """A tiny Llama as llama.cpp saves it, in blocks of 32 weights where rows are that long."""
    model, folder = tiny_model(), folder / kind.name
    folder.mkdir()
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values, place = tensor.numpy(), names.get_name(name, (".weight",))
        assert place is not None
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(place, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", **options)
    return model


def in_blocks(model: PreTrainedModel, kind: Kind) -> PreTrainedModel:
    """With its weights packed, in the modules that transformers puts there."""
    from transformers.integrations.gguf.utils import GgufEmbedding, GgufLinear

    for name, module in list(model.named_modules()):
        packed: nn.Module
        if type(module) is nn.Linear and module.in_features % 32 == 0:
            packed = GgufLinear(module.in_features, module.out_features, int(kind))
        elif type(module) is nn.Embedding:
            packed = GgufEmbedding(module.num_embeddings, module.embedding_dim, int(kind))
        else:
            continue
        blocks = gguf.quants.quantize(module.weight.detach().numpy(), kind)
        packed.weight.data = torch.from_numpy(blocks)
        model.set_submodule(name, packed)
    return model


def require_watched(model: PreTrainedModel) -> None:
    """A forecast of numbers, and no drift of weights that have not changed."""
    monitor = Monitor(
        model,
        tiny_tokenizer(),
        sae=rotated_sae(),
        train_data=rows(30),
        domains={"near": rows(16, seed=50)},
        config=ProbeConfig(n_queries=8, n_features=8),
        progress=False,
    )
    found, check = monitor.forecast().domains["near"], monitor.check(1).domains["near"]
    for number in (found.sts_net.value, found.relative_shift.value, found.nll.value, found.gradient_change.value):
        assert torch.tensor(number).isfinite()
    assert (check.relative_drift.value, check.nll_change.value) == (0, 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_model_from_a_file_is_watched_and_known_again(kind: Kind, tmp_path: Path) -> None:
    from transformers import GgufConfig

    folder = saved(tmp_path, kind)
    model = loaded(folder)
    require_watched(model)
    unpacked = loaded(folder, quantization_config=GgufConfig(dequantize=True))  # what the trainer wants, and can be saved
    unpacked.save_pretrained(tmp_path / "unpacked")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert weights_of(model) == weights_of(loaded(folder)) == weights_of(unpacked) == weights_of(again)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_left_in_blocks_are_watched_and_every_byte_of_them_counts(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.gguf import utils

    def product(weight: torch.Tensor, x: torch.Tensor, ggml_type: int, n: int) -> Any:
        return x @ utils.dequantize_blocks(weight, ggml_type, n, x.shape[1], x.dtype).T

    monkeypatch.setattr(utils, "mul_mat_vec", product)  # else a kernel from the hub
    model = in_blocks(tiny_model(), kind)
    assert sum(p.dtype == torch.uint8 for p in model.parameters()) > 20
    require_watched(model)
    before = weights_of(model)
    assert weights_of(in_blocks(tiny_model(), kind)) == before
    model.model.layers[1].self_attn.o_proj.weight.data[3, 4] += 1
    assert weights_of(model).fingerprint != before.fingerprint
