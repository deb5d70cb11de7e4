"""Hook names: each tensor is checked against an identity of the residual stream that knows nothing of module names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from sts_callback.errors import ModelError
from sts_callback.model.hooks import find_layers, resolve, text_config
from tiny import D_MODEL, N_LAYERS, VOCAB, tiny_model

N = 1  # the layer looked at
IDS = torch.tensor([[1, *range(20, 42)], [1, *range(250, 228, -1)]])
SERIAL = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "opt", "olmo2", "glm4")
PARALLEL = ("gpt_neox", "gptj")
# Per architecture, by its own names: list of layers, projections out of attention and MLP.
_LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj")
PLACES = {
    **dict.fromkeys(SERIAL, _LLAMA),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
}
# Norms that these architectures put between a projection and the residual stream.
OUTPUT_NORMS = {
    **dict.fromkeys(("gemma2", "gemma3", "olmo2"), ("post_attention_layernorm", "post_feedforward_layernorm")),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}


def read(model: nn.Module, *hook_names: str) -> list[torch.Tensor]:
    """The tensors at hook names, `(2, n_tokens, d)`, by hooks of our own."""
    found: dict[str, torch.Tensor] = {}
    handles = []
    for name in hook_names:
        point = resolve(model, name)

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any = None, name: str = name, side: str = point.side) -> None:
            value = (args[0] if args else kwargs["hidden_states"]) if side == "input" else output
            value = value[0] if isinstance(value, tuple) else value
            found[name] = value.reshape(*IDS.shape, -1)  # OPT flattens inside a layer

        register = point.module.register_forward_pre_hook if point.side == "input" else point.module.register_forward_hook
        handles.append(register(keep, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return [found[name] for name in hook_names]


def block(site: str, layer: int = N) -> str:
    return f"blocks.{layer}.{site}"


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.fixture(scope="module")
def gemma3_multimodal() -> Gemma3ForConditionalGeneration:
    """Its vision tower has as many layers as its text tower, and comes first."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCAB, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, num_hidden_layers=N_LAYERS, intermediate_size=16, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=VOCAB - 1)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Names of TransformerLens


@pytest.mark.parametrize("architecture", SERIAL + PARALLEL)
def test_residual_stream_is_that_of_output_hidden_states(architecture: str) -> None:
    model = tiny_model(architecture)
    pre, post, next_pre = read(model, block("hook_resid_pre"), block("hook_resid_post"), block("hook_resid_pre", N + 1))
    with torch.no_grad():
        states = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(pre, states[N])
    assert torch.equal(post, states[N + 1])
    assert torch.equal(next_pre, post)
    assert not close(pre, post)


@pytest.mark.parametrize("layer", [0, N, N_LAYERS - 1])
@pytest.mark.parametrize("architecture", SERIAL)
def test_attention_and_mlp_add_up_to_the_residual_stream(architecture: str, layer: int) -> None:
    sites = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    pre, attention, mid, mlp, post = read(tiny_model(architecture), *(block(site, layer) for site in sites))
    assert close(mid, pre + attention)
    assert close(post, mid + mlp)
    assert not close(mid, pre)
    assert not close(post, mid)


@pytest.mark.parametrize("architecture", ["gpt_neox"])
def test_parallel_attention_and_mlp_add_up_to_the_residual_stream(architecture: str) -> None:
    sites = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    pre, attention, mlp, post = read(tiny_model(architecture), *map(block, sites))
    assert close(post, pre + attention + mlp)


@pytest.mark.parametrize("architecture", PARALLEL)
def test_parallel_layers_have_no_middle(architecture: str) -> None:
    with pytest.raises(ModelError, match=r"'blocks.1.hook_resid_mid' has no counterpart in GPT"):
        resolve(tiny_model(architecture), block("hook_resid_mid"))


@pytest.mark.parametrize("architecture", [*SERIAL, "gpt_neox"])
def test_heads_through_the_output_projection_are_the_attention_output(architecture: str) -> None:
    model = tiny_model(architecture)
    z, attention = read(model, block("attn.hook_z"), block("hook_attn_out"))
    layers, projection, _ = PLACES[architecture]
    with torch.no_grad():
        projected = model.get_submodule(f"{layers}.{N}.{projection}")(z)
        if architecture in OUTPUT_NORMS:
            projected = model.get_submodule(f"{layers}.{N}.{OUTPUT_NORMS[architecture][0]}")(projected)
    assert close(projected, attention)


@pytest.mark.parametrize("architecture", [*SERIAL, "gpt_neox"])
def test_neurons_through_the_down_projection_are_the_mlp_output(architecture: str) -> None:
    model = tiny_model(architecture)
    neurons, mlp = read(model, block("mlp.hook_post"), block("hook_mlp_out"))
    layers, _, projection = PLACES[architecture]
    with torch.no_grad():
        projected = model.get_submodule(f"{layers}.{N}.{projection}")(neurons)
        if architecture in OUTPUT_NORMS:
            projected = model.get_submodule(f"{layers}.{N}.{OUTPUT_NORMS[architecture][1]}")(projected)
    assert close(projected, mlp)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "olmo2", "glm4"])
def test_a_module_takes_its_hook_in_and_gives_its_hook_out(architecture: str) -> None:
    model = tiny_model(architecture)
    layers, attention, mlp = PLACES[architecture]
    names = [block(f"{name}.{hook}") for name in ("attn", "mlp") for hook in ("hook_in", "hook_out")]
    attn_in, attn_out, mlp_in, mlp_out, neurons = read(model, *names, block("mlp.hook_post"))
    decoder = model.get_submodule(f"{layers}.{N}")
    with torch.no_grad():
        if architecture == "opt":
            given = torch.relu(decoder.fc2(torch.relu(decoder.fc1(mlp_in)))), torch.relu(mlp_out)
        else:
            given = decoder.get_submodule(mlp.partition(".")[0])(mlp_in), mlp_out
        assert close(*given)
        assert close(decoder.get_submodule(mlp)(neurons), mlp_out)
        z = read(model, block("attn.hook_z"))[0]
        assert close(decoder.get_submodule(attention)(z), attn_out)
    assert attn_in.shape == attn_out.shape
    assert not close(attn_in, mlp_in) or architecture == "gpt_neox"
    norms = OUTPUT_NORMS.get(architecture)
    for out, site, norm in ((attn_out, "hook_attn_out", 0), (mlp_out, "hook_mlp_out", 1)):
        with torch.no_grad():
            added = decoder.get_submodule(norms[norm])(out) if norms else out  # what is added to the residual stream
        assert close(added, read(model, block(site))[0])


@pytest.mark.parametrize("architecture", [*SERIAL, *PARALLEL])
def test_hook_in_and_out_of_a_layer_are_the_residual_stream(architecture: str) -> None:
    model = tiny_model(architecture)
    for alias, name in (("hook_in", "hook_resid_pre"), ("hook_out", "hook_resid_post")):
        point, expected = resolve(model, block(alias)), resolve(model, block(name))
        assert (point.module, point.side, point.layer) == (expected.module, expected.side, expected.layer)


# Names of Hugging Face modules


@pytest.mark.parametrize(
    ("architecture", "path", "same_as"),
    [
        ("llama", "model.layers.2.output", "blocks.2.hook_resid_post"),
        ("llama", "model.layers.2", "blocks.2.hook_resid_post"),
        ("llama", "layers.2", "blocks.2.hook_resid_post"),
        ("llama", "model.layers.2.input", "blocks.2.hook_resid_pre"),
        ("llama", "model.layers.2.self_attn.o_proj.input", "blocks.2.attn.hook_z"),
        ("llama", "model.layers.2.mlp.output", "blocks.2.hook_mlp_out"),
        ("llama", "model.layers.2.self_attn.output", "blocks.2.hook_attn_out"),
        ("llama", "model.language_model.layers.2.output", "blocks.2.hook_resid_post"),
        ("llama", "layers.2.mlp", "blocks.2.mlp.hook_out"),
        ("llama", "model.layers.2.mlp.hook_in", "blocks.2.mlp.hook_in"),
        ("llama", "layers.2.mlp.input", "blocks.2.mlp.hook_in"),
        ("llama", "blocks.2", "blocks.2.hook_resid_post"),
        ("llama", "blocks.2.mlp.down_proj.hook_in", "blocks.2.mlp.hook_post"),
        ("gpt2", "h.2.mlp", "blocks.2.hook_mlp_out"),
        ("gemma3", "layers.2.mlp", "blocks.2.mlp.hook_out"),
        ("gemma3", "model.layers.2.post_feedforward_layernorm.output", "blocks.2.hook_mlp_out"),
        ("gpt2", "transformer.h.2.output", "blocks.2.hook_resid_post"),
        ("gpt_neox", "gpt_neox.layers.2.attention.dense.input", "blocks.2.attn.hook_z"),
        ("opt", "model.decoder.layers.2", "blocks.2.hook_resid_post"),
    ],
)
def test_module_paths_and_hook_names_meet(architecture: str, path: str, same_as: str) -> None:
    model = tiny_model(architecture)
    point, expected = resolve(model, path), resolve(model, same_as)
    assert (point.module, point.side, point.layer) == (expected.module, expected.side, 2)
    assert point.name == path
    assert torch.equal(*read(model, path, same_as))


@pytest.mark.parametrize("name", ["model.language_model.layers.2.output", "model.layers.2.output", "blocks.2.hook_resid_post"])
def test_multimodal_model_is_read_in_its_text_tower(gemma3_multimodal: Gemma3ForConditionalGeneration, name: str) -> None:
    assert find_layers(gemma3_multimodal) is gemma3_multimodal.model.language_model.layers
    assert text_config(gemma3_multimodal).hidden_size == D_MODEL  # type: ignore[attr-defined]
    assert resolve(gemma3_multimodal, name).module is gemma3_multimodal.model.language_model.layers[2]
    (x,) = read(gemma3_multimodal, name)
    with torch.no_grad():
        states = gemma3_multimodal(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(x, states[3])


def test_path_into_the_vision_tower_is_refused(gemma3_multimodal: Gemma3ForConditionalGeneration) -> None:
    path = next(n for n, _ in gemma3_multimodal.named_modules() if "vision" in n and n.endswith("layers.2"))
    with pytest.raises(ModelError, match="vision"):
        resolve(gemma3_multimodal, path)


# Wrappers


class Wrapper(nn.Module):
    """As data-parallel wrappers are: the model under `module`, a forward that passes everything on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def with_lora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()  # type: ignore[arg-type]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]  # inductor takes seconds to import


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21 asks for it
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("wrap", [Wrapper, with_lora, compiled, lambda m: Wrapper(with_lora(m))])
def test_wrappers_are_seen_through(architecture: str, wrap: Any) -> None:
    names = [block(site) for site in ("hook_resid_post", "hook_attn_out", "attn.hook_z", "mlp.hook_post")]
    expected = read(tiny_model(architecture), *names)
    wrapped = wrap(tiny_model(architecture))
    with torch.compiler.set_stance("force_eager"):  # as `undisturbed` does
        found = read(wrapped, *names)
    assert all(map(torch.equal, found, expected))


def test_distributed_data_parallel_is_seen_through(one_process_group: None) -> None:
    model = tiny_model()
    wrapped = DistributedDataParallel(model)
    assert find_layers(wrapped) is model.model.layers
    assert torch.equal(*read(wrapped, block("hook_resid_post"), "model.layers.1.output"))


# Refusals


@pytest.mark.parametrize("name", ["blocks.4.hook_resid_post", "model.layers.4.output"])
def test_layer_beyond_the_last_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=rf"'{name}' asks for layer 4, but the model has 4 layers \(0 to 3\)"):
        resolve(tiny_model(), name)


@pytest.mark.parametrize(
    "name", ["", "hook_embed", "blocks.hook_resid_post", "blocks.x.hook_resid_post", "lm_head", "ln_final.1"]
)
def test_name_of_no_layer_is_not_understood(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"is not understood; allowed are blocks\.N\.<hook_resid_pre \|.* and module paths such as"
    ):
        resolve(tiny_model(), name)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.ln1.hook_normalized",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.hook_mlp_in",
        "blocks.1.hook_resid_posts",
        "model.layers.1.no_such_module.output",
        "model.layers.1.mlp.act_fn.bias",
    ],
)
def test_site_that_no_module_has_is_refused(name: str) -> None:
    with pytest.raises(
        ModelError,
        match=r"has no counterpart in LlamaDecoderLayer of LlamaForCausalLM \(model type llama\); allowed are blocks.1.<hook_",
    ):
        resolve(tiny_model(), name)


def test_only_sites_that_the_layer_has_are_proposed_and_a_norm_before_its_gain_is_explained() -> None:
    with pytest.raises(ModelError) as refused:
        resolve(tiny_model("gpt_neox"), "blocks.1.ln2.hook_normalized")
    assert "hook_mlp_out" in str(refused.value)
    assert "hook_resid_mid" not in str(refused.value)
    assert "reads a norm there before its gain" in str(refused.value)


def test_model_without_config_is_refused() -> None:
    with pytest.raises(ModelError, match="Sequential has no transformers config; pass a model loaded by transformers"):
        resolve(nn.Sequential(nn.Linear(2, 2)), "blocks.0.hook_resid_post")


def test_encoder_is_refused() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    with pytest.raises(ModelError, match=r"BertModel \(model type bert\) is not supported: it holds no list of 2 decoder layers"):
        find_layers(BertModel(config))
