"""The head apart: it gives what the model's own forward gives or is left alone, and no more logits exist at once than a piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForSequenceClassification, PreTrainedModel

from sts_callback.distributed import Ranks
from sts_callback.model import head
from sts_callback.model.capture import Capture, Prefix
from sts_callback.model.hooks import resolve
from sts_callback.model.self_test import self_test
from sts_callback.model.undisturbed import undisturbed
from tiny import ARCHITECTURES, VOCAB, tiny_model

POST = "blocks.2.hook_resid_post"
QUERIES = [tuple(range(100, 112)), tuple(range(140, 149))]


def examined(model: nn.Module, *, with_logits: bool = True) -> Capture:
    """A reader, which knows whether the head can be had apart."""
    with undisturbed(model):
        capture = Capture(model, [resolve(model, POST)])
        self_test(capture, (1, *range(40, 70)), QUERIES, 30, with_logits=with_logits, ranks=Ranks())
    return capture


def lora(model: PreTrainedModel) -> nn.Module:
    """An adapter on the head too."""
    torch.manual_seed(0)
    model.config.tie_word_embeddings = False  # PEFT warns of merging, which is not done here
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def autocast(model: PreTrainedModel) -> PreTrainedModel:
    """As accelerate prepares a model."""
    forward = model.forward

    def mixed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(*args, **kwargs)
        out.logits = out.logits.float()
        return out

    model.forward = mixed
    return model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "cohere", "granite", "opt", "gpt_neox", "bloom", "lfm2"])
def test_the_head_of_usual_models_can_be_had_apart(architecture: str) -> None:
    assert examined(tiny_model(architecture)).splits_head


@pytest.mark.parametrize(
    "made", [lambda m: m.bfloat16(), lora, autocast], ids=["bfloat16", "adapter on the head", "autocast inside the forward"]
)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere"])
def test_so_can_one_of_another_precision_and_one_with_an_adapter(
    architecture: str, made: Callable[[PreTrainedModel], nn.Module]
) -> None:
    model = made(tiny_model(architecture))
    capture, rows = examined(model), [QUERIES[0], QUERIES[1] + QUERIES[1]]
    assert capture.splits_head
    select = torch.rand(2, 18, generator=torch.Generator().manual_seed(0)) < 0.5
    found = list[torch.Tensor]()
    with undisturbed(model):
        for capture.splits_head in (True, False):
            read = capture.run(rows, Prefix((1,), None), select=select).read
            assert read is not None
            found.append(read.float())
    assert found[0].shape == (int(select.sum()), VOCAB)
    rounding = 0.02 if made is autocast or next(model.parameters()).dtype == torch.bfloat16 else 1e-5
    assert (found[0] - found[1]).norm() <= rounding * found[1].norm()


def with_forward(change: Callable[[Any], None]) -> PreTrainedModel:
    """A model that does something to its logits of which its configuration says nothing."""
    model = tiny_model()
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        change(out)
        return out

    model.forward = changed
    return model


def doubled(out: Any) -> None:
    out.logits = out.logits * 2


def one_token_barred(out: Any) -> None:
    out.logits[..., 7] = -1e4


def not_called() -> PreTrainedModel:
    """Its forward takes the head's weights, not the head."""
    model = tiny_model()
    weight = model.lm_head.weight
    model.lm_head.__class__ = type("Linear", (nn.Linear,), {"__call__": lambda self, x: nn.functional.linear(x, weight)})
    return model


def hooked() -> PreTrainedModel:
    """A hook of the user's changes the head's input: it would do so twice."""
    model = tiny_model()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    return model


@pytest.mark.parametrize(
    "made",
    [lambda: with_forward(doubled), lambda: with_forward(one_token_barred), not_called, hooked],
    ids=["factor", "barred", "not called", "hook"],
)
def test_a_head_that_is_not_all_is_left_in_the_forward(made: Callable[[], PreTrainedModel]) -> None:
    model = made()
    capture = examined(model)
    assert not capture.splits_head
    select = torch.ones(1, 12, dtype=torch.bool)
    with undisturbed(model):
        found = capture.run([QUERIES[0]], Prefix((), None), select=select).read
        expected = model(input_ids=torch.tensor([QUERIES[0]]), use_cache=False).logits[0]
    assert found is not None
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_head_is_looked_for_where_no_logits_are_wanted() -> None:
    assert not examined(tiny_model(), with_logits=False).splits_head
    config = tiny_model().config
    config.num_labels = 2
    assert head.output_embeddings(LlamaForSequenceClassification(config)) is None


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "cohere", "granite"])  # plain, capped, scaled, divided
def test_on_a_cpu_no_more_than_some_of_the_vocabulary_is_made_at_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_WIDTH_ON_CPU", 70)
    model = tiny_model(architecture)
    module = head.output_embeddings(model)
    assert isinstance(module, nn.Linear)
    module.bias = nn.Parameter(torch.randn(VOCAB))  # as Phi's has one
    part, x = head.Head(model, module), torch.randn(5, model.config.hidden_size)
    columns = list(part.columns(x))
    assert [c.shape[1] for c in columns] == [70, 70, 70, 70, 20]
    torch.testing.assert_close(torch.cat(columns, dim=1), part.logits(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.register_forward_hook(lambda m, args, out: out * 2),
        lambda module: setattr(module, "forward", lambda x: nn.Linear.forward(module, x) * 2),
        lambda module: nn.utils.parametrizations.weight_norm(module),
        lambda module: module.to("meta"),
    ],
    ids=["hook", "wrapped forward", "parametrised", "offloaded"],
)
def test_a_head_that_does_more_than_a_product_makes_all_at_once(change: Callable[[nn.Module], Any]) -> None:
    model = tiny_model()
    change(model.lm_head)
    columns = list(head.Head(model, model.lm_head).columns(torch.randn(5, model.config.hidden_size)))
    assert [c.shape[1] for c in columns] == [VOCAB]


class Widest(TorchDispatchMode):
    """The largest number of logits that one tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in () if func.is_view else out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == VOCAB and x.is_floating_point():
                self.n = max(self.n, x.numel() // VOCAB)
        return out


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("apart", [True, False])
def test_no_more_logits_than_a_piece_exist_at_once(apart: bool, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they are those of all: `apart=False` shows that the count would tell."""
    monkeypatch.setattr(head, "_PIECE_ELEMENTS", 4 * VOCAB)
    model = tiny_model()
    capture, places = examined(model), list[slice]()
    capture.splits_head = apart

    def nll(columns: Iterable[torch.Tensor], where: slice) -> torch.Tensor:
        places.append(where)
        return -torch.cat(list(columns), dim=1).log_softmax(dim=-1)[:, 5]

    select = torch.zeros(2, 12, dtype=torch.bool)
    select[0, 2:12], select[1, 5:8] = True, True
    with undisturbed(model), Widest() as widest:
        read = capture.gradient if backward else capture.run
        found: Any = read(QUERIES, Prefix((1,), None), select=select, read=nll)
    assert widest.n == 4 if apart else widest.n >= 20
    assert places == [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 13)]
    alone = [model(input_ids=torch.tensor([(1, *q)])).logits[0, 1:].log_softmax(dim=-1)[:, 5] for q in QUERIES]
    expected = -torch.cat([alone[0][2:12], alone[1][5:8]])
    losses = found.losses if backward else found.read
    assert not losses.requires_grad
    assert (losses - expected).abs().max() <= 1e-5


def test_the_forward_ends_at_the_head_and_leaves_no_hook() -> None:
    model, ran = tiny_model(), list[tuple[int, ...]]()
    capture = examined(model)
    model.lm_head.register_forward_hook(lambda module, args, output: ran.append(tuple(output.shape)))
    with undisturbed(model):
        prefix = capture.prefix((1, 40, 41), whole=True)
        assert ran == []  # what stands before needs no logits
        capture.run(QUERIES, prefix, select=torch.ones(2, 12, dtype=torch.bool))
    assert ran == [(24, VOCAB)]
    assert len(model.lm_head._forward_pre_hooks) == 0
    assert model(input_ids=torch.tensor([QUERIES[0]])).logits.shape == (1, 12, VOCAB)


def test_an_error_while_reading_leaves_no_hook() -> None:
    model = tiny_model()
    capture = examined(model)

    def fail(columns: Iterable[torch.Tensor], where: slice) -> torch.Tensor:
        raise RuntimeError("out of luck")

    for read in (capture.run, capture.gradient):
        with undisturbed(model), pytest.raises(RuntimeError, match="out of luck"):
            read(QUERIES, Prefix((), None), select=torch.ones(2, 12, dtype=torch.bool), read=fail)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
