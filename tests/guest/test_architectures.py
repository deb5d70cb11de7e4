"""Some of the sweep over all architectures, each for what is odd about it."""

from __future__ import annotations

import re

import pytest

from guest.architectures import examine, tiny
from sts_callback import Monitor, ProbeConfig
from sts_callback.errors import ModelError
from tiny import rotated_sae, rows, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of many a configuration


@pytest.mark.parametrize(
    ("model_type", "note"),
    [
        ("deepseek_v3", ""),  # experts in groups, low-rank attention
        ("gemma4_text", ""),  # its last layer shares keys and values
        ("mllama", ""),  # layers that run with images only
        ("moshi", "measured without the model's cache"),  # whose mask forgets the window
        ("openai-gpt", ""),  # blocks return lists
        ("qwen2_vl", ""),  # keeps places of images from one forward to the next
        ("recurrent_gemma", ""),  # keeps its recurrent state in its modules
    ],
)
def test_odd_architectures_are_measured_right(model_type: str, note: str) -> None:
    assert examine(model_type)[1:] == ("right", note)


@pytest.mark.parametrize(
    ("model_type", "cause"),
    [
        ("bert", "holds no list of 4 decoder layers"),
        ("gemma3n_text", r"gives shape \(4, 1, \d+, 32\) .* not supported there"),
        ("paligemma", "is not causal"),
        ("pix2struct", "has an encoder beside its decoder"),
        ("rwkv", "rewrites its own weights"),
        ("xlm", "is not causal"),
    ],
)
def test_others_are_refused_by_name_and_cause(model_type: str, cause: str) -> None:
    name, result, why = examine(model_type)
    assert result.startswith("refused")
    assert name in why
    assert re.search(cause, why)


def test_an_sae_at_a_layer_that_runs_with_images_only_is_refused() -> None:
    model = tiny("mllama")
    (layer, *_) = model.config.get_text_config().cross_attention_layers
    with pytest.raises(ModelError, match=rf"blocks.{layer}.hook_resid_post does not run in {type(model).__name__}"):
        Monitor(
            model,
            tiny_tokenizer(),
            sae=rotated_sae(f"blocks.{layer}.hook_resid_post"),
            train_data=rows(30),
            domains={"near": rows(16, seed=50)},
            config=ProbeConfig(n_queries=8, n_features=8),
            progress=False,
        )
