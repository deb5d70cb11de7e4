"""Models from GGUF files without the hub: checked, de-quantised once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached_model(name: str, sha256: str, write_gguf: Callable[[Path], object]) -> str:
    """Folder of a de-quantised model and its tokenizer, made on first use.

    Args:
        name: of the model, and of the folder.
        sha256: of its GGUF file.
        write_gguf: writes that file.

    Raises:
        ValueError: if the file is another.

    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sts_callback"
    folder = cache / f"{name}-{sha256[:8]}"
    if folder.is_dir():
        return str(folder)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache.mkdir(parents=True, exist_ok=True)
    print(f"De-quantising {name} into {folder} (once, about a minute) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        gguf = Path(scratch) / f"{name}.gguf"
        write_gguf(gguf)
        digest = hashlib.sha256()
        with gguf.open("rb") as content:
            while chunk := content.read(2**20):
                digest.update(chunk)
        if digest.hexdigest() != sha256:
            raise ValueError(f"{name}: its file has SHA-256 {digest.hexdigest()}, the examples were made with {sha256}.")
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
