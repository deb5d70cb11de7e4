"""Activations of a model at one hook point, read once into a file that training goes through again and again.

The file grows batch by batch, and how far it has come is noted beside it: a killed run goes on from there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from sts_callback.config import ProbeConfig
from sts_callback.distributed import Ranks
from sts_callback.errors import ConfigError, ModelError, is_short_of_memory
from sts_callback.metrics.sums import is_not_outlier
from sts_callback.model.capture import Capture
from sts_callback.model.hooks import resolve
from sts_callback.model.self_test import self_test
from sts_callback.runs.files import write_whole
from sts_callback.sae_training.texts import Piece, Pieces

MAX_NORM_MULTIPLE = ProbeConfig().max_norm_multiple
"""Tokens of a larger multiple of the median norm are attention sinks, as where probes are read."""
_BATCH_TOKENS_CPU, _BATCH_TOKENS_GPU = 2048, 8192  # of one forward, padding included
_POOL = 64  # batches whose rows are sorted by length together: little is wasted on padding, and order stays random
_SAMPLE_TOKENS = 8192  # that tell what is usual
_BYTES = 2  # of a float16


@dataclass(frozen=True)
class Usual:
    """What activations are like, by a sample of them."""

    median_norm: float
    """Of all tokens that count."""
    mean: torch.Tensor
    """Without attention sinks, `(d_in,)`, float32 on the CPU."""
    scale: float
    """Factor by which what differs from the mean has a mean square of 1."""


class Reader:
    """Reads pieces behind what stands before every text, without special tokens. Use it inside `undisturbed(model)`."""

    def __init__(self, model: nn.Module, hook_name: str, pieces: Pieces) -> None:
        """Find the hook point, test that the model can be read in batches, and see what is usual.

        Raises:
            ModelError: if there is no such hook point, or the model cannot be read.

        """
        self.point = resolve(model, hook_name)
        self.capture = Capture(model, [self.point])
        self._special = torch.tensor(sorted(pieces.special))
        self._batch_tokens = _BATCH_TOKENS_CPU if self.capture.device.type == "cpu" else _BATCH_TOKENS_GPU
        longest = max(map(len, pieces.training))
        found = self_test(self.capture, pieces.bos, pieces.training[:2], longest, with_logits=True, ranks=Ranks())
        self.capture.may_cache = found.cache
        self._prefix = self.capture.prefix(pieces.bos, whole=False)
        self.usual = self._usual(pieces.training)

    def batches(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Pieces in batches of like length, always the same."""
        pool, pools = _POOL * self._batch_tokens, list[list[Piece]]()
        n_tokens = pool
        for piece in pieces:
            if n_tokens + len(piece) > pool:
                pools.append([])
                n_tokens = 0
            pools[-1].append(piece)
            n_tokens += len(piece)
        return [batch for number, one in enumerate(pools) for batch in self._of_like_length(one, number)]

    def read(self, batch: Sequence[Piece]) -> torch.Tensor:
        """Activations of the tokens of a batch that count, attention sinks too, `(n_tokens, d_in)`, float32."""
        try:
            x = self.capture.run(batch, self._prefix).activations[self.point.name].float()
        except Exception as error:
            if len(batch) == 1 or not is_short_of_memory(error):
                raise
            half = len(batch) // 2
            return torch.cat([self.read(batch[:half]), self.read(batch[half:])])
        counts = torch.zeros(x.shape[:2], dtype=torch.bool)
        for row, piece in enumerate(batch):
            counts[row, : len(piece)] = ~torch.isin(torch.tensor(piece), self._special)
        return x[counts.to(x.device)]

    def is_ordinary(self, x: torch.Tensor) -> torch.Tensor:
        """Which tokens of `(..., d_in)` are no attention sinks, `(...)` booleans."""
        return is_not_outlier(x.float().norm(dim=-1), self.usual.median_norm, MAX_NORM_MULTIPLE)

    def _of_like_length(self, pieces: list[Piece], number: int) -> list[list[Piece]]:
        found: list[list[Piece]] = []
        for piece in sorted(pieces, key=len):
            if not found or (len(found[-1]) + 1) * len(piece) > self._batch_tokens:
                found.append([])
            found[-1].append(piece)
        random.Random(number).shuffle(found)
        return found

    def _usual(self, pieces: Sequence[Piece]) -> Usual:
        n_tokens, parts = 0, []
        for batch in self.batches(pieces):
            parts.append(self.read(batch))
            n_tokens += len(parts[-1])
            if n_tokens >= _SAMPLE_TOKENS:
                break
        x = torch.cat(parts)
        if not bool(x.isfinite().all()):
            raise ModelError(
                f"model: activations at {self.point.name} are NaN or infinite; look at its weights, or load it in float32 or "
                "bfloat16 in place of float16."
            )
        norms = x.norm(dim=1)
        x = x[is_not_outlier(norms, norms.median().item(), MAX_NORM_MULTIPLE)]
        mean = x.mean(dim=0)
        spread = (x - mean).square().mean().sqrt().item()
        if not spread > 0:
            raise ModelError(f"model: activations at {self.point.name} are all alike; take another hook point.")
        return Usual(norms.median().item(), mean.cpu(), 1 / spread)


@dataclass
class _Progress:
    """How far a file has come."""

    n_batches: int = 0
    n_tokens: int = 0
    n_sinks: int = 0
    """Left out."""


class ActivationFile:
    """Activations less their mean, scaled, float16, in a folder."""

    def __init__(self, folder: Path, d_in: int) -> None:
        self._data, self._note, self._d_in = folder / "activations.f16", folder / "activations.json", d_in
        self._progress = _Progress()

    @property
    def sink_share(self) -> float:
        """Of the tokens that were read, the share of attention sinks, which were left out."""
        return self._progress.n_sinks / (self._progress.n_tokens + self._progress.n_sinks)

    def collect(self, reader: Reader, pieces: Sequence[Piece], n_tokens: int, *, progress: bool) -> torch.Tensor:
        """Read until there are enough, or all pieces have been read.

        Args:
            reader: of the model.
            pieces: to read.
            n_tokens: how many.
            progress: whether to show a bar.

        Returns:
            `(n, d_in)`, float16, from the file: parts of it are in memory as they are used.

        Raises:
            ConfigError: if the disk is too small.
            DataError: if there are fewer tokens than a batch of training.

        """
        self._resume()
        n_tokens = min(n_tokens, sum(map(len, pieces)))
        self._require_space(n_tokens)
        mean, done = reader.usual.mean, self._progress
        with (
            self._data.open("ab") as file,
            tqdm(total=n_tokens, initial=done.n_tokens, desc="Reading activations", unit="tok", disable=not progress) as bar,
        ):
            for batch in reader.batches(pieces)[done.n_batches :]:
                if done.n_tokens >= n_tokens:
                    break
                x = reader.read(batch)
                kept = x[reader.is_ordinary(x)].cpu()
                file.write(((kept - mean) * reader.usual.scale).half().numpy().tobytes())
                file.flush()
                done.n_batches += 1
                done.n_tokens += len(kept)
                done.n_sinks += len(x) - len(kept)
                write_whole(self._note, json.dumps(asdict(done)))
                bar.update(len(kept))
        n = done.n_tokens
        return torch.from_file(str(self._data), size=n * self._d_in, dtype=torch.float16).view(n, self._d_in)

    def _resume(self) -> None:
        """Go back to what was noted last; a file that is shorter than that has been tampered with, and is begun anew."""
        if self._note.is_file():
            self._progress = _Progress(**json.loads(self._note.read_text(encoding="utf-8")))
        n_bytes = self._progress.n_tokens * self._d_in * _BYTES
        if not self._data.is_file() or self._data.stat().st_size < n_bytes:
            self._progress, n_bytes = _Progress(), 0
            self._data.write_bytes(b"")
        os.truncate(self._data, n_bytes)

    def _require_space(self, n_tokens: int) -> None:
        needed = (n_tokens - self._progress.n_tokens) * self._d_in * _BYTES
        free = shutil.disk_usage(self._data.parent).free
        if needed > free:
            raise ConfigError(
                f"tokens: got {n_tokens:,}, whose activations take {needed / 2**30:.1f} GiB in {self._data.parent}, where "
                f"{free / 2**30:.1f} GiB are free; ask for fewer, or write to another disk."
            )
