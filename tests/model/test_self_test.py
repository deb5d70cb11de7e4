"""The self-test lets through what is right, goes without what is not needed, and refuses the rest in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MoshiConfig, MoshiForCausalLM, PreTrainedModel

from sts_callback import Monitor, ProbeConfig
from sts_callback.distributed import Ranks
from sts_callback.errors import ModelError
from sts_callback.model.capture import Capture, Prefix, _cache_argument
from sts_callback.model.hooks import find_layers, resolve
from sts_callback.model.self_test import Findings, self_test
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import Forecast
from tiny import _SHAPE, ARCHITECTURES, rotated_sae, rows, tiny_model, tiny_tokenizer

POST = "blocks.2.hook_resid_post"
PREFIX = (1, *range(40, 70))  # longer than the windows of 8
QUERIES = [tuple(range(100, 112)), tuple(range(140, 149))]


def findings_of(model: nn.Module, *hook_names: str, n_tokens: int = 30) -> Findings:
    with undisturbed(model):
        capture = Capture(model, [resolve(model, name) for name in hook_names or (POST,)])
        return self_test(capture, PREFIX, QUERIES, n_tokens, with_logits=True, ranks=Ranks())


def stirred(model: PreTrainedModel) -> PreTrainedModel:
    """With weights that make each layer matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def bidirectional() -> PreTrainedModel:
    torch.manual_seed(0)
    more = {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "use_bidirectional_attention": True}
    return stirred(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **_SHAPE, **more)))


def hooked(where: Callable[[PreTrainedModel], nn.Module], change: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """A model one of whose modules gives something else."""
    model = tiny_model()
    where(model).register_forward_hook(lambda module, args, output: change(output))
    return model


def mlp(model: PreTrainedModel, layer: int = 1) -> nn.Module:
    found: nn.Module = model.model.layers[layer].mlp
    return found


# What is right


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "gpt_neox", "opt", "bloom", "lfm2"])
def test_usual_models_pass(architecture: str) -> None:
    assert findings_of(tiny_model(architecture), POST, "blocks.0.hook_resid_pre") == Findings(cache=True, gradients=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rounding_to_few_bits_is_no_fault(architecture: str, dtype: torch.dtype) -> None:
    assert findings_of(tiny_model(architecture).to(dtype)) == Findings(precision=str(dtype).removeprefix("torch."))


def test_autocast_inside_the_forward_is_known() -> None:
    model = tiny_model()
    forward = model.forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward = mixed
    assert findings_of(model) == Findings(precision="float32, autocast to bfloat16")
    # An MLP gives bfloat16 there. The first hook point decides, as a resumed run has no other.
    assert findings_of(model, POST, "blocks.1.hook_mlp_out").precision == "float32, autocast to bfloat16"
    assert findings_of(model, "blocks.1.hook_mlp_out", POST).precision == "bfloat16, autocast to bfloat16"


def test_precision_is_known_where_activations_are_not_finite() -> None:
    model = tiny_model().bfloat16()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
        model.model.embed_tokens.weight.fill_(math.nan)
    assert findings_of(model).precision == "bfloat16"


@pytest.mark.parametrize("n_tokens", [2, 3, 5, 12])
def test_rows_are_no_longer_than_the_model_has_positions_for(n_tokens: int) -> None:
    lengths: list[int] = []
    model = tiny_model()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    assert findings_of(model, n_tokens=n_tokens) == Findings()
    assert max(lengths) <= len(PREFIX) + n_tokens


def test_a_router_that_tips_over_once_is_no_fault() -> None:
    calls: list[int] = []

    def once(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x + 1 if len(calls) == 5 else x  # in the first batch; each query alone came before, twice

    assert findings_of(hooked(mlp, once)) == Findings()


def test_nothing_is_left_behind() -> None:
    model = tiny_model().train()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    findings_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# What is gone without


def test_a_cache_that_disagrees_is_not_used() -> None:
    torch.manual_seed(0)
    shape = {**_SHAPE, "num_key_value_heads": 4, "head_dim": 8, "sliding_window": 8, "ffn_dim": 48}
    model = stirred(MoshiForCausalLM(MoshiConfig(**shape)))
    assert findings_of(model) == Findings(cache=False, gradients=True)


def test_a_forward_that_cannot_take_our_cache_is_measured_without() -> None:
    model = tiny_model()
    forward = model.model.forward

    def plain(*args: Any, **kwargs: Any) -> Any:
        if kwargs[_cache_argument(model)] is not None:
            raise TypeError("a cache of another kind")
        return forward(*args, **kwargs)

    model.model.forward = plain
    assert findings_of(model) == Findings(cache=False, gradients=True)


@pytest.mark.parametrize("cut", [torch.Tensor.detach, torch.round], ids=["detached", "rounded"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_layer_that_passes_no_gradient_is_found_where_it_matters(cut: Callable[..., torch.Tensor], layer: int) -> None:
    model = tiny_model()
    linear = mlp(model, layer).up_proj
    linear.forward = lambda x: cut(nn.functional.linear(x, linear.weight) * 8)
    assert findings_of(model) == Findings(gradients=layer == 1)  # below the hook point no gradient is needed


def test_gradients_are_kept_where_embeddings_ask_for_them() -> None:
    """As TRL sets up a LoRA run with activation checkpointing, its default: below the hook point nothing is differentiated."""
    model = tiny_model().requires_grad_(False)
    model.enable_input_require_grads()
    assert findings_of(model) == Findings(cache=True, gradients=True)


# What is refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"Gemma3ForCausalLM \(model type gemma3_text\) is not causal"):
        findings_of(bidirectional().to(dtype))
    bidirectional().float()


def test_a_model_that_mixes_rows_is_refused() -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM \(model type llama\) gives .* beside a longer row than alone"):
        findings_of(hooked(mlp, lambda x: x + x.mean(dim=0, keepdim=True)))


def test_a_layer_that_runs_twice_is_refused() -> None:
    model = tiny_model()
    find_layers(model)[3] = find_layers(model)[2]
    with pytest.raises(ModelError, match="runs more than once in one forward"):
        findings_of(model)


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = tiny_model()
    model.model.layers[2].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ModelError, match=r"blocks.2.hook_mlp_out does not run in LlamaForCausalLM"):
        findings_of(model, "blocks.2.hook_mlp_out")


@pytest.mark.parametrize("change", [lambda x: x.unsqueeze(0), lambda x: x[:, ::2]], ids=["4-D", "fewer positions"])
def test_states_of_another_shape_are_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model, between = tiny_model(), list[torch.Tensor]()

    def leave(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        between.append(output)
        return change(output)

    find_layers(model)[2].register_forward_hook(leave)
    find_layers(model)[3].register_forward_pre_hook(lambda module, args: (between[-1], *args[1:]))
    with pytest.raises(
        ModelError, match=r"hook_resid_post of LlamaForCausalLM .* gives shape .*not supported there.*hook_mlp_out"
    ):
        findings_of(model)


def test_a_forward_that_needs_more_than_text_is_refused_with_its_own_words() -> None:
    model = tiny_model()

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("You must specify pixel_values")

    model.forward = forward
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .* fails on plain text .*You must specify pixel_values"):
        findings_of(model)


def test_lack_of_memory_is_no_fault_of_the_model() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        findings_of(hooked(mlp, fail))


def test_a_model_that_rewrites_its_weights_is_refused() -> None:
    model = tiny_model()

    def rescale(module: nn.Module, args: Any) -> None:
        module.mlp.up_proj.weight.mul_(1.0)

    model.model.layers[1].register_forward_pre_hook(rescale)
    with pytest.raises(ModelError, match="rewrites its own weights"):
        findings_of(model)


def test_gaps_of_what_is_measured_are_left_to_who_measures() -> None:
    """Weights that are not finite are told by the forecast."""
    model = tiny_model()
    with torch.no_grad():
        mlp(model).up_proj.weight.fill_(torch.nan)
    assert findings_of(model).cache


def test_a_prefix_that_may_not_be_kept_is_not() -> None:
    model = tiny_model()
    capture = Capture(model, [resolve(model, POST)])
    capture.may_cache = False
    with undisturbed(model):
        assert capture.prefix(PREFIX, whole=True) == Prefix(PREFIX, None)


# What a forecast says of it


def forecast_of(model: nn.Module) -> Forecast:
    monitor = Monitor(
        model,
        tiny_tokenizer(),
        sae=rotated_sae(POST),
        train_data=rows(30),
        domains={"near": rows(16, seed=50)},
        config=ProbeConfig(n_queries=8, n_features=8),
        progress=False,
    )
    return monitor.forecast()


def warnings_of(forecast: Forecast) -> list[str]:
    return [check.name for check in forecast.checks if check.name in ("cache", "gradients")]


def test_a_forecast_without_gradients_says_so_and_is_otherwise_the_same() -> None:
    model = tiny_model()
    usual = forecast_of(model)
    linear = mlp(model, 3).up_proj
    linear.forward = lambda x: nn.functional.linear(x, linear.weight).detach()
    cut = forecast_of(model)
    assert (warnings_of(usual), warnings_of(cut)) == ([], ["gradients"])
    assert not math.isnan(usual.domains["near"].gradient_change.value)
    assert math.isnan(cut.domains["near"].gradient_change.value)
    assert cut.domains["near"].sts_icl == usual.domains["near"].sts_icl


def test_a_forecast_without_the_cache_says_so() -> None:
    model = tiny_model()
    usual = forecast_of(model)
    forward = model.model.forward

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs[_cache_argument(model)]
        if cache is not None and cache.get_seq_length():
            cache.crop(cache.get_seq_length() - 1)
        return forward(*args, **kwargs)

    model.model.forward = forgetful
    without = forecast_of(model)
    assert warnings_of(without) == ["cache"]
    assert without.domains["near"].sts_icl.value == pytest.approx(usual.domains["near"].sts_icl.value, rel=1e-4)
