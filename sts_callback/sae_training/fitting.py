"""An SAE trained on activations by SAELens' own trainer, from checkpoint to checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from torch.nn.functional import normalize

from sts_callback.runs.files import write_whole
from sts_callback.sae_training.activations import Usual
from sts_callback.sae_training.sparse_batch_topk import SparseBatchTopK

_WARM_UP, _DECAY = 0.05, 0.4  # shares of all steps
_DEAD_AFTER = 200_000  # tokens
_N_CHECKPOINTS = 10
_NOTE = "checkpoint.json"
_N_SAMPLE, _CHUNK = 16_384, 1024  # tokens that set the threshold, and how many at once


@dataclass(frozen=True)
class Schedule:
    """How long to train, and how."""

    n_tokens: int
    """Activations that are gone through, the same ones again once all have been."""
    batch: int
    """Of them in a step."""
    lr: float
    """Adam's learning rate, which rises to this and falls to 0."""
    seed: int


def new_sae(data: torch.Tensor, d_sae: int, l0: float, device: torch.device, seed: int) -> BatchTopKTrainingSAE:
    """A BatchTopK SAE to begin with: SAELens' own, but its features point where tokens do.

    Random directions take many steps until they are of use, and some never are.

    Args:
        data: centred activations that it will be trained on, `(n_tokens, d_in)`.
        d_sae: number of features.
        l0: mean number of active features a token.
        device: to train on.
        seed: of the random numbers; the global ones are left as they are.

    """
    kind = SparseBatchTopK if device.type == "cpu" else BatchTopKTrainingSAE
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        config = BatchTopKTrainingSAEConfig(d_in=data.shape[1], d_sae=d_sae, k=l0, apply_b_dec_to_input=True, device=str(device))
        sae = kind(config)
        drawn = data[torch.randperm(len(data))[:d_sae]].float()
        directions = normalize(torch.unique(drawn[drawn.any(dim=1)], dim=0), dim=1)  # two that are alike would stay so
        sae.W_dec[: len(directions)] = directions.to(device) * sae.W_dec.norm(dim=1).mean()  # any others stay random
        sae.W_enc[:, : len(directions)] = sae.W_dec[: len(directions)].T
        return sae


def fit(sae: BatchTopKTrainingSAE, data: torch.Tensor, schedule: Schedule, folder: Path) -> BatchTopKTrainingSAE:
    """Train an SAE, or go on where a run that was killed had been.

    Args:
        sae: to begin with; trained in place.
        data: centred activations of about unit spread, `(n_tokens, d_in)`.
        schedule: how long, and how.
        folder: for checkpoints.

    """
    checkpoints = _Checkpoints(folder)
    n_steps = schedule.n_tokens // schedule.batch
    batches = _Batches(data, schedule.batch, schedule.seed)
    trainer: Any = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=n_steps * schedule.batch,
            train_batch_size_samples=schedule.batch,
            lr=schedule.lr,
            lr_end=schedule.lr,
            lr_warm_up_steps=int(_WARM_UP * n_steps),
            lr_decay_steps=int(_DECAY * n_steps),
            device=str(sae.device),
            dead_feature_window=max(1, _DEAD_AFTER // schedule.batch),
            n_checkpoints=_N_CHECKPOINTS,
            checkpoint_path=str(folder),
            save_final_checkpoint=True,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=batches,
        save_checkpoint_fn=checkpoints.saved,
    )
    for group in trainer.optimizer.param_groups:
        group["fused"] = True  # the same steps, several times faster on a CPU
    if (last := checkpoints.last()) is not None:
        sae.load_weights_from_checkpoint(last)
        trainer.load_trainer_state(last)
        batches.n_given = trainer.n_training_samples // schedule.batch
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n > trainer.n_training_samples]
    trainer.fit()
    return sae


@torch.no_grad()
def save(sae: BatchTopKTrainingSAE, data: torch.Tensor, usual: Usual, folder: Path, **stated: Any) -> None:
    """Write an SAE as it is used: as JumpReLU, reading activations as the model gives them.

    Its threshold is the one under which a sample has the L0 that was trained for. SAELens' own is a running mean, which a short
    training leaves too low.

    Args:
        sae: changed in place.
        data: that it was trained on.
        usual: mean and scale of the data.
        folder: to write to.
        stated: of the SAE, for its metadata.

    """
    sae.to("cpu")
    largest, sample = [], data[:_N_SAMPLE]
    for chunk in torch.split(sample, _CHUNK):
        pre = torch.addmm(sae.b_enc, chunk.float() - sae.b_dec, sae.W_enc) * sae.W_dec.norm(dim=1)
        largest.append(pre.flatten().topk(min(pre.numel(), int(2 * sae.cfg.k * len(chunk))), sorted=False).values)
    sae.topk_threshold.fill_(torch.cat(largest).topk(int(sae.cfg.k * len(sample))).values[-1].clamp_min(0))
    sae.fold_activation_norm_scaling_factor(usual.scale)
    sae.b_dec += usual.mean
    for name, value in stated.items():
        sae.cfg.metadata[name] = value
    sae.cfg.device = "cpu"
    sae.save_inference_model(folder)


class _Batches(Iterator[torch.Tensor]):
    """Random batches in endless passes, float32; which they are hangs on how many were given alone."""

    def __init__(self, data: torch.Tensor, size: int, seed: int) -> None:
        self._data, self._size, self._seed = data, size, seed
        self._pass, self._order = -1, torch.empty(0, dtype=torch.long)
        self.n_given = 0

    def __next__(self) -> torch.Tensor:
        n_pass, number = divmod(self.n_given, len(self._data) // self._size)
        if n_pass != self._pass:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + n_pass)
            self._pass, self._order = n_pass, torch.randperm(len(self._data), generator=generator)
        self.n_given += 1
        return self._data[self._order[number * self._size : (number + 1) * self._size]].float()


class _Checkpoints:
    """The last whole checkpoint in a folder: its name is noted when all of it is written."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._note = folder, folder / _NOTE

    def last(self) -> Path | None:
        """The last one, if there is one."""
        return self._folder / json.loads(self._note.read_text(encoding="utf-8")) if self._note.is_file() else None

    def saved(self, checkpoint_path: Path | None) -> None:
        """Note one that the trainer has written, and delete the one before."""
        assert checkpoint_path is not None
        before = self.last()
        write_whole(self._note, json.dumps(checkpoint_path.name))
        if before not in (None, checkpoint_path):
            shutil.rmtree(before, ignore_errors=True)
