"""Stopping early, reusing a prefix and selecting logits change nothing; and the model is left as it was found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sts_callback.model.capture import Capture, Prefix, _cache_argument
from sts_callback.model.head import whole_logits
from sts_callback.model.hooks import find_layers, resolve
from sts_callback.model.sharding import is_sharded, may_differ
from sts_callback.model.undisturbed import undisturbed
from tiny import _SHAPE, ARCHITECTURES, N_LAYERS, tiny_model

pytestmark = pytest.mark.versions

LAYER = 2
POST = f"blocks.{LAYER}.hook_resid_post"
LONG = (1, *range(40, 59))  # more tokens than Gemma's window of 8
SHORT = (1, 40, 41)
SUFFIXES = [tuple(range(70, 73)), tuple(range(100, 112)), tuple(range(130, 137))]
SCALED = ("gemma2", "cohere", "granite")  # a cap, a factor and a divisor behind the head
PREFIXES = {"empty": (), "BOS": (1,), "short": SHORT, "long": LONG}


@cache
def subject(architecture: str) -> PreTrainedModel:
    """The model under test."""
    return tiny_model(architecture)


@cache
def twin(architecture: str) -> PreTrainedModel:
    """Its equal, on which transformers may leave the hooks of `output_hidden_states`."""
    return tiny_model(architecture)


def truth(architecture: str, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states at `POST`, `(n_tokens, d)`, and logits of one sequence alone, by a plain and whole forward."""
    with torch.no_grad():
        out = twin(architecture)(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return out.hidden_states[LAYER + 1][0], out.logits[0]


def capture(model: nn.Module, *hook_names: str, apart: bool = False) -> Capture:
    """A reader, with the head apart or in the model's forward."""
    reader = Capture(model, [resolve(model, name) for name in hook_names or (POST,)])
    if apart:
        assert reader.can_split_head(SUFFIXES[1])
        reader.splits_head = True
    return reader


def made_prefix(reader: Capture, tokens: tuple[int, ...], *, cached: bool, whole: bool) -> Prefix:
    prefix = reader.prefix(tokens, whole=whole) if cached else Prefix(tokens, None)
    assert (prefix.cache is not None) == (cached and len(tokens) > 0)
    return prefix


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_rows_are_true(architecture: str, found: torch.Tensor, prefix: tuple[int, ...]) -> None:
    assert found.shape[:2] == (len(SUFFIXES), max(map(len, SUFFIXES)))
    for row, suffix in zip(found, SUFFIXES, strict=True):
        assert_close(row[: len(suffix)], truth(architecture, prefix + suffix)[0][len(prefix) :])


class Runs:
    """Counts how often each decoder layer runs."""

    def __init__(self, model: nn.Module) -> None:
        self.n = [0] * len(find_layers(model))
        self._handles = [layer.register_forward_pre_hook(self._counter(i)) for i, layer in enumerate(find_layers(model))]

    def _counter(self, i: int) -> Callable[..., None]:
        def count(*args: Any) -> None:
            self.n[i] += 1

        return count

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# The same numbers as a plain forward


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral", "gemma2", "gpt_neox", "opt", "bloom"])
def test_activations_are_those_of_each_sequence_alone(architecture: str, cached: bool, prefix: str) -> None:
    model, tokens = subject(architecture), PREFIXES[prefix]
    with undisturbed(model):
        reader = capture(model)
        kept = made_prefix(reader, tokens, cached=cached, whole=False)
        found = reader.run(SUFFIXES, kept)
    assert found.read is None
    assert_rows_are_true(architecture, found.activations[POST], tokens)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefix_can_be_used_again_and_again(architecture: str, whole: bool) -> None:
    model = subject(architecture)
    select = torch.ones(3, 12, dtype=torch.bool) if whole else None
    with undisturbed(model):
        reader = capture(model)
        prefix = reader.prefix(LONG, whole=whole)
        first = reader.run(SUFFIXES, prefix, select=select)
        reader.run([tuple(range(200, 230))], prefix, select=None if select is None else torch.ones(1, 30, dtype=torch.bool))
        second = reader.run(SUFFIXES, prefix, select=select)
    assert torch.equal(first.activations[POST], second.activations[POST])
    assert prefix.cache is not None
    assert prefix.cache.get_seq_length() == len(LONG)
    assert_rows_are_true(architecture, second.activations[POST], LONG)
    if whole:
        assert first.read is not None and second.read is not None
        assert torch.equal(first.read, second.read)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt_neox", "opt", *SCALED])
def test_selected_logits_are_those_of_each_sequence_alone(architecture: str, apart: bool, cached: bool, prefix: str) -> None:
    model, tokens = subject(architecture), PREFIXES[prefix]
    positions = [(0, 2), (1, 5, 11), (6,)]
    select = torch.zeros(3, 12, dtype=torch.bool)
    for row, chosen in enumerate(positions):
        select[row, list(chosen)] = True
    with undisturbed(model):
        reader = capture(model, apart=apart)
        kept = made_prefix(reader, tokens, cached=cached, whole=True)
        found = reader.run(SUFFIXES, kept, select=select)
    expected = [
        truth(architecture, tokens + suffix)[1][len(tokens) + position]
        for suffix, chosen in zip(SUFFIXES, positions, strict=True)
        for position in chosen
    ]
    assert found.read is not None
    assert_close(found.read, torch.stack(expected))
    assert_rows_are_true(architecture, found.activations[POST], tokens)


class WithoutSelection(nn.Module):
    """The language model, behind a forward that takes no `logits_to_keep`."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.inner = subject("llama").config, [subject("llama")]
        self.model = subject("llama").model

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.inner[0](input_ids=input_ids, **kwargs)


def test_model_that_cannot_select_logits_gives_the_same() -> None:
    select = torch.zeros(3, 12, dtype=torch.bool)
    select[:, 1] = True
    model = WithoutSelection()
    with undisturbed(model):
        found = capture(model).run(SUFFIXES, Prefix(SHORT, None), select=select)
    assert found.read is not None
    assert_close(found.read, torch.stack([truth("llama", SHORT + s)[1][len(SHORT) + 1] for s in SUFFIXES]))


def test_the_positions_of_logits_are_asked_for_by_one_row_of_places() -> None:
    """From the end, since wrappers lengthen the front; a mask of rows and columns is taken from transformers 5.21 on only."""
    model, asked = tiny_model(), list[torch.Tensor]()
    model.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs["logits_to_keep"]), with_kwargs=True)
    with undisturbed(model):
        reader = capture(model)
        reader.run(SUFFIXES, reader.prefix(SHORT, whole=True), select=chosen())
    assert [places.tolist() for places in asked] == [[-1], [-12, -11, -10, -7, -6, -1]]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # peft 0.21's own, on transformers 5.24
@pytest.mark.parametrize("kind", ["prompt tuning", "p-tuning", "prefix tuning"])
def test_virtual_tokens_of_a_wrapper_are_cut_off(kind: str) -> None:
    config: PeftConfig = {
        "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
        "prefix tuning": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }[kind]()
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config).eval()
    with undisturbed(model):
        reader = capture(model)
        kept = reader.prefix(LONG, whole=True)
        found = reader.run(SUFFIXES, kept, select=chosen())
        gradient = reader.gradient(SUFFIXES, kept, select=chosen(), read=score)
    assert kept.cache is None  # prefix tuning's own is in its place
    layer, states = resolve(model, POST).module, list[torch.Tensor]()
    handle = layer.register_forward_hook(lambda module, args, output: states.append(output))
    logits = []
    with torch.no_grad():
        for suffix, positions in zip(SUFFIXES, POSITIONS, strict=True):
            ids = torch.tensor([LONG + suffix])
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -len(suffix) :]
            logits.append(out[list(positions)])
    handle.remove()
    assert found.read is not None
    assert_close(found.read, torch.cat(logits))
    for row, suffix, state in zip(found.activations[POST], SUFFIXES, states, strict=True):
        assert_close(row[: len(suffix)], state[0, -len(suffix) :])
    assert_close(gradient.activations[POST], found.activations[POST])
    assert gradient.gradients[POST].shape == gradient.activations[POST].shape


@pytest.mark.parametrize("kept_as", [list, tuple])
def test_blocks_that_return_several_things_are_read_and_differentiated(kept_as: type) -> None:
    model = tiny_model()
    find_layers(model)[LAYER].register_forward_hook(lambda module, args, output: kept_as([output, None]))
    find_layers(model)[LAYER + 1].register_forward_pre_hook(lambda module, args: (args[0][0], *args[1:]))
    with undisturbed(model):
        found = capture(model).gradient(SUFFIXES, Prefix(LONG, None), select=chosen(), read=score)
    wanted = gradient_of(subject("llama"), POST, cached=False)
    assert_close(found.activations[POST], wanted[0])
    assert_close(found.gradients[POST], wanted[1])


@pytest.mark.parametrize("architecture", ["lfm2"])
def test_recurrent_state_is_not_forked_but_computed_anew(architecture: str) -> None:
    model = subject(architecture)
    with undisturbed(model):
        reader = capture(model)
        prefix = reader.prefix(LONG, whole=False)
        found = reader.run(SUFFIXES, prefix)
    assert prefix == Prefix(LONG, None)
    assert_rows_are_true(architecture, found.activations[POST], LONG)


def test_hook_point_below_the_first_cache_is_read_without_one() -> None:
    model = subject("llama")
    with undisturbed(model):
        reader = capture(model, "blocks.0.hook_resid_pre")
        prefix = reader.prefix(LONG, whole=False)
        found = reader.run(SUFFIXES, prefix).activations["blocks.0.hook_resid_pre"]
    assert prefix == Prefix(LONG, None)  # the forward stops before any key is computed
    assert torch.equal(found[1], model.get_input_embeddings()(torch.tensor(SUFFIXES[1])))


@pytest.mark.parametrize("site", ["hook_resid_mid", "hook_mlp_out", "mlp.hook_post", "hook_attn_out", "attn.hook_z"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "opt"])  # OPT flattens rows and tokens before its MLP
def test_sites_inside_a_layer_are_read_row_by_row(architecture: str, cached: bool, site: str) -> None:
    model, name = subject(architecture), f"blocks.1.{site}"
    with undisturbed(model):
        reader = capture(model, name)
        found = reader.run(SUFFIXES, made_prefix(reader, LONG, cached=cached, whole=False)).activations[name]
        alone = [reader.run([LONG + suffix], Prefix((), None)).activations[name].flatten(0, -2) for suffix in SUFFIXES]
    assert found.shape[:2] == (3, 12)
    for row, suffix, expected in zip(found, SUFFIXES, alone, strict=True):
        assert_close(row[: len(suffix)], expected[len(LONG) :])


# Backwards from a loss

POSITIONS = [(0, 2), (1, 5, 11), (6,)]
SITES = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "mlp.hook_post", "hook_attn_out", "attn.hook_z"]


def chosen() -> torch.Tensor:
    select = torch.zeros(3, 12, dtype=torch.bool)
    for row, positions in enumerate(POSITIONS):
        select[row, list(positions)] = True
    return select


def score(columns: Iterable[torch.Tensor], places: slice = slice(None)) -> torch.Tensor:
    """A loss that bends: NLL of one token at every selected position."""
    return -whole_logits(columns, places).log_softmax(dim=-1)[:, 5]


def gradient_of(
    model: nn.Module, name: str, prefix: tuple[int, ...] = LONG, *, cached: bool = True, loss: Any = score, apart: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    with undisturbed(model):
        reader = capture(model, name, apart=apart)
        kept = made_prefix(reader, prefix, cached=cached, whole=True)
        found = reader.gradient(SUFFIXES, kept, select=chosen(), read=loss)
    return found.activations[name], found.gradients[name]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt", *SCALED])
def test_gradients_are_those_of_each_sequence_alone(architecture: str, apart: bool, cached: bool, prefix: str) -> None:
    tokens = PREFIXES[prefix]
    acts, found = gradient_of(subject(architecture), POST, tokens, cached=cached, apart=apart)
    assert_rows_are_true(architecture, acts, tokens)
    assert found.shape == acts.shape
    for row, suffix, positions in zip(found, SUFFIXES, POSITIONS, strict=True):
        out = twin(architecture)(input_ids=torch.tensor([tokens + suffix]), use_cache=False, output_hidden_states=True)
        hidden = out.hidden_states[LAYER + 1]
        loss = score([out.logits[0, [len(tokens) + position for position in positions]]]).sum()
        (wanted,) = torch.autograd.grad(loss, hidden)
        assert_close(row[: len(suffix)], wanted[0, len(tokens) :])
        assert (row[len(suffix) :] == 0).all()  # padding is seen by no logit that was asked for
        assert (row[positions[-1] + 1 :] == 0).all()  # nor is what comes later


def pushed(model: PreTrainedModel, name: str, tokens: tuple[int, ...], by: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of one sequence with `by`, `(n_suffix, d)`, added at a hook point from position `start` on."""
    point = resolve(model, name)

    def more(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x.view(len(tokens), -1)[start:] += by
        return x

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (
            ((more(args[0]), *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": more(kwargs["hidden_states"])})
        )

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return (more(output[0]), *output[1:]) if isinstance(output, tuple) else more(output)

    on_input = point.side == "input"
    handle = (
        point.module.register_forward_pre_hook(before, with_kwargs=True)
        if on_input
        else point.module.register_forward_hook(after)
    )
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    handle.remove()
    return logits


@pytest.mark.parametrize("name", [*(f"blocks.1.{site}" for site in SITES), "model.layers.1.self_attn.input"])
@pytest.mark.parametrize(
    ("architecture", "step"),
    # Llama and Gemma take norms in float32 whatever their dtype, so that their steps must be large.
    [("llama", 2e-3), ("gemma3", 2e-3), ("opt", 1e-5)],
)
def test_gradients_at_every_site_are_finite_differences(architecture: str, step: float, name: str) -> None:
    model = tiny_model(architecture).double()
    generator = torch.Generator().manual_seed(3)
    for row, suffix, positions in zip(gradient_of(model, name)[1], SUFFIXES, POSITIONS, strict=True):
        at = [len(LONG) + position for position in positions]
        gradient = row[: len(suffix)]
        # Random, but not across the gradient, where there would be no difference to compare.
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64) + gradient / gradient.std()
        losses = {
            n: float(score([pushed(model, name, LONG + suffix, n * step * direction, len(LONG))[at]]).sum())
            for n in (-2, -1, 1, 2)
        }
        difference = (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * step)
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=2e-3)


def test_gradient_of_a_model_that_cannot_select_logits_is_the_same() -> None:
    found, wanted = gradient_of(WithoutSelection(), POST)[1], gradient_of(subject("llama"), POST)[1]
    assert_close(found, wanted)


def test_a_backward_pass_does_not_spoil_the_prefix() -> None:
    model = subject("llama")
    with undisturbed(model):
        reader = capture(model)
        prefix = reader.prefix(LONG, whole=True)
        first = reader.gradient(SUFFIXES, prefix, select=chosen(), read=score)
        plain = reader.run(SUFFIXES, prefix)
        second = reader.gradient(SUFFIXES, prefix, select=chosen(), read=score)
    for name in ("activations", "gradients"):
        assert torch.equal(getattr(first, name)[POST], getattr(second, name)[POST])
    assert torch.equal(first.losses, second.losses)
    assert torch.equal(plain.activations[POST], first.activations[POST])
    assert prefix.cache is not None
    assert prefix.cache.get_seq_length() == len(LONG)
    assert not any(keys.requires_grad for layer in prefix.cache.layers for keys in (layer.keys, layer.values))


def test_a_graph_is_recorded_only_above_the_hook_point() -> None:
    model = tiny_model()
    recording: list[bool] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *args: recording.append(torch.is_grad_enabled()))
    with undisturbed(model):
        capture(model, "blocks.1.hook_resid_post").gradient(SUFFIXES, Prefix((), None), select=chosen(), read=score)
    assert recording == [False, False, True, True]


def lora_model() -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # begins at 0, where adapters do nothing
                parameter.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize("make", [lambda: tiny_model().train(), lora_model], ids=["full", "lora"])
@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_resid_post"])
def test_a_backward_pass_leaves_no_trace(make: Callable[[], nn.Module], site: str) -> None:
    model = make()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.full_like(first, 7.0)  # as in the middle of an accumulation
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    before = n_hooks(model)
    with undisturbed(model):
        reader = capture(model, f"blocks.{LAYER}.{site}")
        found = reader.gradient(SUFFIXES, reader.prefix(LONG, whole=True), select=chosen(), read=score)
        assert not torch.is_grad_enabled()
    (acts,), (gradient,) = found.activations.values(), found.gradients.values()
    assert not any(x.requires_grad for x in (acts, gradient, found.losses))
    assert gradient.abs().max() > 0
    assert torch.is_grad_enabled()
    assert (first.grad == 7).all()
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert n_hooks(model) == before


def test_gradients_through_adapters_are_those_of_the_merged_model() -> None:
    model = lora_model()
    found = gradient_of(model, POST)
    wanted = gradient_of(model.merge_and_unload().requires_grad_(False), POST)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("where", ["below", "above", "loss"])
@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_resid_post"])
def test_an_error_in_a_backward_pass_leaves_no_trace(where: str, site: str) -> None:
    model = tiny_model()

    def fail(*args: Any) -> Any:
        raise RuntimeError("out of luck")

    failing = {"below": model.model.layers[0], "above": model.model.layers[3]}.get(where)
    handle = failing.mlp.register_forward_hook(fail) if failing else None
    before = n_hooks(model)
    with undisturbed(model):
        with pytest.raises(RuntimeError, match="out of luck"):
            capture(model, f"blocks.{LAYER}.{site}").gradient(
                SUFFIXES, Prefix((), None), select=chosen(), read=fail if where == "loss" else score
            )
        assert not torch.is_grad_enabled()
    assert n_hooks(model) == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    if handle:
        handle.remove()
    assert gradient_of(model, POST)[1].isfinite().all()


# No more work than needed


def test_a_batch_keeps_keys_and_values_of_one_layer_at_a_time() -> None:
    model = subject("gemma3")
    with undisturbed(model):
        prefix = capture(model).prefix(LONG, whole=True)
        fork = prefix.fork(3)
        held: list[int] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *args: held.append(sum(kept.keys.shape[2] for kept in fork.layers)))
        with torch.no_grad():
            rows = torch.tensor([SUFFIXES[0]] * 3)
            model(input_ids=rows, use_cache=True, **{_cache_argument(model): fork})
    assert prefix.cache is not None
    assert held == [sum(kept.keys.shape[2] for kept in prefix.cache.layers)] * 4
    assert all(
        kept.keys.untyped_storage().data_ptr() == whole.keys.untyped_storage().data_ptr()
        for kept, whole in zip(fork.layers, prefix.cache.layers, strict=True)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_above_the_hook_point_do_not_run(architecture: str) -> None:
    model = subject(architecture)
    heads: list[Any] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *args: heads.append(args))
    with undisturbed(model), Runs(model) as runs:
        reader = capture(model)
        prefix = reader.prefix(LONG, whole=False)
        assert runs.n == [1, 1, 1, 0]
        reader.run(SUFFIXES, prefix)
        assert runs.n == [2, 2, 2, 0]
        assert heads == []
        reader.run(SUFFIXES, reader.prefix(LONG, whole=True), select=torch.ones(3, 12, dtype=torch.bool))
        assert runs.n == [4, 4, 4, 2]
        assert len(heads) == 2
    handle.remove()


def test_several_hook_points_cost_one_forward_up_to_the_deepest() -> None:
    model = subject("llama")
    names = (POST, "blocks.0.attn.hook_z", "blocks.1.hook_resid_pre", "model.layers.1.output")
    with undisturbed(model), Runs(model) as runs:
        reader = capture(model, *names)
        found = reader.run(SUFFIXES, reader.prefix(SHORT, whole=False)).activations
        assert runs.n == [2, 2, 2, 0]
        alone = {name: capture(model, name).run(SUFFIXES, Prefix(SHORT, None)).activations[name] for name in names}
    assert set(found) == set(names)
    for name in names:
        for i, suffix in enumerate(SUFFIXES):
            assert_close(found[name][i, : len(suffix)], alone[name][i, : len(suffix)])


@pytest.mark.parametrize(("mark", "value"), [("_tp_size", 2), ("ds_autotp_parsed", True)])
def test_processes_that_compute_parts_of_one_batch_are_known(mark: str, value: object) -> None:
    model = tiny_model("llama")
    assert may_differ(model)
    setattr(model, mark, value)
    assert not may_differ(model)


@pytest.mark.parametrize("mark", ["ds_id", "device_mesh"])
def test_sharded_model_runs_to_the_end(mark: str) -> None:
    model = tiny_model()
    assert not is_sharded(model)
    setattr(next(model.parameters()), mark, 0)
    assert is_sharded(model)
    with undisturbed(model), Runs(model) as runs:
        reader = capture(model)
        found = reader.run(SUFFIXES, reader.prefix(LONG, whole=False))
        assert runs.n == [2] * N_LAYERS
    assert found.read is None
    assert_rows_are_true("llama", found.activations[POST], LONG)


# The model is left as it was found


def test_hooks_are_gone_after_a_run() -> None:
    model = tiny_model()
    before = n_hooks(model)
    with undisturbed(model):
        reader = capture(model)
        reader.run(SUFFIXES, reader.prefix(LONG, whole=True), select=torch.ones(3, 12, dtype=torch.bool))
        reader.run(SUFFIXES, reader.prefix(LONG, whole=False))
    assert n_hooks(model) == before


def test_hooks_are_gone_after_an_error_inside_a_layer() -> None:
    model = tiny_model()
    before = n_hooks(model)

    def fail(*args: Any) -> None:
        raise RuntimeError("out of luck")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with undisturbed(model), pytest.raises(RuntimeError, match="out of luck"):
        capture(model, POST, "blocks.0.hook_resid_pre").run(SUFFIXES, Prefix((), None))
    handle.remove()
    assert n_hooks(model) == before


class StopError(Exception):
    """Leaves a block early."""


@pytest.fixture
def fixed_random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_random_state_are_as_found(fails: bool, fixed_random_state: None) -> None:
    model = tiny_model().train()
    model.model.layers[1].eval()
    model.model.layers[3].mlp.training = False
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    assert len(set(flags)) == 2
    grads = [p.requires_grad for p in model.parameters()]
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    config = model.config.to_dict()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    try:
        with undisturbed(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            random.random(), np.random.rand(), torch.rand(3)
            capture(model).run(SUFFIXES, Prefix(SHORT, None))
            if fails:
                raise StopError
    except StopError:
        assert fails
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.is_grad_enabled()
    assert model.config.to_dict() == config
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


SWITCHES = {"output_hidden_states": True, "output_router_logits": True, "return_dict": False}


def test_switches_of_a_configuration_do_not_reach_our_forward_and_stay() -> None:
    torch.manual_seed(0)
    shape = {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape), attn_implementation="eager").eval()

    def read() -> torch.Tensor:
        with undisturbed(model):
            reader = capture(model)
            logits = reader.run(SUFFIXES, reader.prefix(LONG, whole=True), select=chosen()).read
        assert logits is not None
        return logits

    plain, before = read(), n_hooks(model)
    for name, value in {**SWITCHES, "output_attentions": True}.items():
        setattr(model.config, name, value)
    assert torch.equal(read(), plain)
    assert {name: getattr(model.config, name) for name in SWITCHES} == SWITCHES
    assert model.config.output_attentions
    assert n_hooks(model) == before  # `output_hidden_states` would leave some for good


class Remembering(nn.Module):
    """Adds what the last forward has left, as recurrent states are, and keeps a table that grows with the text."""

    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None
        self.scale = torch.tensor(2.0)
        self.length = 0
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            self.register_buffer("table", torch.arange(x.shape[1]), persistent=False)
        x = x * self.scale if self.last is None else x + self.last
        self.last, self.added = x.mean(), x
        return x


@pytest.mark.parametrize("used", [True, False])
def test_state_between_forwards_is_neither_read_nor_left(used: bool) -> None:
    model = tiny_model()
    keeper = model.model.layers[1].mlp.act_fn = Remembering()
    with undisturbed(model):
        fresh = capture(model).run(SUFFIXES, Prefix(LONG, None)).activations[POST]
    assert set(vars(keeper)) == set(vars(Remembering()))
    if used:
        model(input_ids=torch.tensor([LONG]))
    before = {**vars(keeper), **keeper._buffers}
    with undisturbed(model):
        found = capture(model).run(SUFFIXES, Prefix(LONG, None)).activations[POST]
    assert torch.equal(found, fresh)
    assert (keeper.last is not None) == used
    after = {**vars(keeper), **keeper._buffers}
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before if name != "training")


def test_what_modules_know_of_their_weights_stays_with_the_weights() -> None:
    """RWKV halves weights for evaluation, notes it, and doubles them in the next training step."""

    class Halving(nn.Linear):
        is_halved = False

        def halve(self) -> None:
            if self.is_halved == self.training:
                self.weight.data.div_(0.5 if self.is_halved else 2.0)
                torch._C._increment_version([self.weight])
                self.is_halved = not self.is_halved

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.halve()
            return super().forward(x)

    model = nn.Sequential(Halving(2, 2)).train()
    weight = model[0].weight.clone()
    with undisturbed(model):
        model(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert torch.equal(model[0].weight, weight)


def test_gradients_stay_off_where_they_were_off() -> None:
    model = tiny_model()
    with torch.no_grad():
        with undisturbed(model):
            pass
        assert not torch.is_grad_enabled()


def test_gradients_flow_after_a_visit_as_before() -> None:
    def gradient(visit: bool) -> torch.Tensor:
        model = tiny_model().train()
        torch.manual_seed(7)  # dropout
        if visit:
            with undisturbed(model):
                reader = capture(model)
                reader.run(SUFFIXES, reader.prefix(LONG, whole=False))
        ids = torch.tensor([LONG])
        model(input_ids=ids, labels=ids).loss.backward()
        grad: torch.Tensor = model.model.layers[0].mlp.up_proj.weight.grad
        return grad

    assert torch.equal(gradient(visit=True), gradient(visit=False))


def test_training_model_with_dropout_and_checkpointing_is_read_as_in_evaluation() -> None:
    model = tiny_model()
    model.activation_checkpointing_enable()
    model.train()
    assert model.is_activation_checkpointing
    with undisturbed(model):
        reader = capture(model)
        prefix = reader.prefix(LONG, whole=True)
        assert prefix.cache is not None  # layers drop the cache when they checkpoint
        found = reader.run(SUFFIXES, prefix, select=torch.ones(3, 12, dtype=torch.bool))
    assert_rows_are_true("llama", found.activations[POST], LONG)
    assert model.is_activation_checkpointing
    assert model.training


def test_model_that_its_user_compiled_is_read_without_compiling() -> None:
    def backend(*args: Any) -> Any:
        raise AssertionError("compiled a graph")

    model = tiny_model()
    model.compile(backend=backend)
    with undisturbed(model):
        reader = capture(model)
        found = reader.run(SUFFIXES, reader.prefix(LONG, whole=False))
    assert_rows_are_true("llama", found.activations[POST], LONG)
    with pytest.raises(Exception, match="compiled a graph"):  # the user's stance is back
        model(input_ids=torch.tensor([LONG]))


def test_a_forward_that_calls_its_cache_cache_gets_it_by_that_name() -> None:
    class Renamed(nn.Module):
        def forward(self, input_ids: torch.Tensor, cache: Any = None) -> None: ...

    class Usual(nn.Module):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> None: ...

    assert _cache_argument(nn.Sequential(Renamed())) == "cache"
    assert _cache_argument(nn.Sequential(Usual(), Renamed())) == "past_key_values"


def test_where_there_is_no_cache_none_is_given() -> None:
    """Prefix tuning gives its own as `past_key_values`, in whose place transformers takes our `cache`, even if that is None."""
    model, given = tiny_model(), list[set[str]]()
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    with undisturbed(model):
        reader = capture(model)
        reader.run(SUFFIXES, Prefix(LONG, None))
        reader.run(SUFFIXES, reader.prefix(LONG, whole=True))
    assert [len(names & {"cache", "past_key_values"}) for names in given] == [0, 1, 1]


def test_without_an_accelerator_torch_may_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_is_there() -> torch.device:
        raise RuntimeError("Cannot access accelerator device when none is available.")  # as torch 2.6 does

    monkeypatch.setattr(torch.accelerator, "current_accelerator", none_is_there)
    with undisturbed(tiny_model()):
        assert not torch.is_grad_enabled()
