"""Every kind of adapter that PEFT can put on a model: measured as a plain forward of the same model gives it, or refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import LlamaForSequenceClassification

from sts_callback.distributed import Ranks
from sts_callback.errors import ModelError
from sts_callback.model.capture import Capture
from sts_callback.model.hooks import resolve
from sts_callback.model.self_test import self_test
from sts_callback.model.undisturbed import undisturbed
from tiny import D_MODEL, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of many a default

HOOK = "blocks.2.hook_resid_post"
PREFIX = (1, *range(40, 60))
SUFFIXES = [tuple(range(100, 112)), tuple(range(140, 149))]
LINEAR = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
# What a kind needs beside its defaults on a model as small as this, with the modules that it goes on.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADAMSS": {**LINEAR, "r": 16, "num_subspaces": 3},
    "ADALORA": {**LINEAR, "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"target_modules": ["q_proj"], "block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 5},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 3]},
    "FOURIERFT": {**LINEAR, "n_frequency": 100},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {},
    "MISS": {**LINEAR, "r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 5, "num_tasks": 2},
    "OFT": {**LINEAR, "oft_block_size": 8},
    "P_TUNING": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "PREFIX_TUNING": {"num_virtual_tokens": 5},
    "PROMPT_TUNING": {"num_virtual_tokens": 5},
    "ROAD": {**LINEAR, "group_size": 8},
    "PSOFT": {**LINEAR, "r": 4},
    "SHADOW": {},
    "SHIRA": {**LINEAR, "r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [41, 42, 100]},
    "VBLORA": {**LINEAR, "vector_length": 4, "num_vectors": 16},
    "WAVEFT": {**LINEAR, "n_frequency": 16},
}
REFUSED = {
    "LILY": "is not causal",  # routes by the mean over the text
    "MULTITASK_PROMPT_TUNING": "task_ids",
    "POLY": "task_ids",
    "SHADOW": "gives a ShadowCarrier, not a tensor",  # two streams in one object
}
KINDS = sorted(getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


def stirred(model: nn.Module) -> nn.Module:
    """With adapters that do something, whatever they begin at."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def measured(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations, `(2, 12, d)`, and logits at the last token of each row."""
    select = torch.zeros(2, 12, dtype=torch.bool)
    select[0, 11] = select[1, 8] = True
    with undisturbed(model):
        capture = Capture(model, [resolve(model, HOOK)])
        findings = self_test(capture, PREFIX, SUFFIXES, 30, with_logits=True, ranks=Ranks())
        capture.may_cache = findings.cache
        found = capture.run(SUFFIXES, capture.prefix(PREFIX, whole=True), select=select)
    assert found.read is not None
    return found.activations[HOOK], found.read


def check(model: nn.Module) -> None:
    """Against a plain forward of each row alone."""
    activations, logits = measured(model)
    states: list[Any] = []
    handle = resolve(model, HOOK).module.register_forward_hook(lambda module, args, output: states.append(output))
    for row, suffix in enumerate(SUFFIXES):
        ids = torch.tensor([PREFIX + suffix])
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
        state = (states[-1] if isinstance(states[-1], torch.Tensor) else states[-1][0])[0, -len(suffix) :]
        assert (activations[row, : len(suffix)] - state).abs().max() < 1e-4 * state.abs().max()
        assert (logits[row] - out).abs().max() < 1e-4 * out.abs().max()
    handle.remove()


class KMeans:
    """In place of scikit-learn's, which AdaMSS groups directions by: the points in turn."""

    def __init__(self, n_clusters: int, **options: Any) -> None:
        self._n = n_clusters

    def fit_predict(self, points: np.ndarray) -> np.ndarray:
        return np.arange(len(points)) % self._n


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "XLORA"])
def test_every_kind_is_right_or_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.cluster"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(KMeans=KMeans))
    torch.manual_seed(0)
    config = next(c for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if getattr(k, "value", k) == kind)
    model = stirred(peft.get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", **OPTIONS.get(kind, LINEAR))))
    if kind in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[kind]):
            measured(model)
    else:
        check(model)


@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_a_mixture_that_runs_the_model_twice_is_refused(kind: str, tmp_path: Path) -> None:
    """The first time without adapters: where no logits are wanted, a forward that ended there read the base model."""
    classifier = LlamaForSequenceClassification(tiny_model().config)
    base = tiny_model() if kind == "language model" else classifier.eval()
    base.config.use_cache = False
    for name in ("0", "1"):
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**LINEAR)).save_pretrained(tmp_path / name)
    task = "CAUSAL_LM" if kind == "language model" else "SEQ_CLS"
    adapters = {name: str(tmp_path / name) for name in ("0", "1")}
    model = peft.get_peft_model(base, peft.XLoraConfig(task_type=task, hidden_size=D_MODEL, adapters=adapters))
    with undisturbed(model), pytest.raises(ModelError, match=r"more than once in one forward.*X-LoRA"):
        capture = Capture(model, [resolve(model, HOOK)])
        self_test(capture, PREFIX, SUFFIXES, 30, with_logits=kind == "language model", ranks=Ranks())


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"trainable_token_indices": [41, 100]}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_kinds_of_lora_are_right(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(stirred(peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", **LINEAR, **options))))


@pytest.mark.parametrize("active", ["default", "second", ["default", "second"]], ids=str)
def test_of_two_adapters_the_active_ones_count(active: str | list[str]) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", **LINEAR))
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", **{**LINEAR, "r": 2}))
    for name in ("default", "second"):
        model.set_adapter(name)
        stirred(model)
    model.base_model.set_adapter(active)
    before = model.active_adapters if isinstance(active, str) else model.base_model.active_adapters
    check(model)
    assert (model.active_adapters if isinstance(active, str) else model.base_model.active_adapters) == before
