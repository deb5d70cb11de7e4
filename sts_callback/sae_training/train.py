"""From a model and texts to the folder of an SAE: read, train, save, measure; a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sts_callback.config import SaeConfig, require
from sts_callback.data.counts import RowsRead
from sts_callback.data.pairs import Row
from sts_callback.errors import ConfigError, DataError
from sts_callback.model.fingerprint import weights_of
from sts_callback.model.hooks import find_layers, model_name, resolve
from sts_callback.model.products import by_onednn
from sts_callback.model.quality import MOST_DENSE, QUALITY_FILE, QualityCard
from sts_callback.model.sae import load_encoder
from sts_callback.model.undisturbed import undisturbed
from sts_callback.runs.files import require_new_folder, write_whole
from sts_callback.sae_training.activations import ActivationFile, Reader
from sts_callback.sae_training.fitting import Schedule, fit, new_sae, save
from sts_callback.sae_training.measuring import measured
from sts_callback.sae_training.readme import readme
from sts_callback.sae_training.texts import CONTEXT, Pieces, read_pieces

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_DEPTH = 2 / 3  # of the hook point where none is named, as for sae="auto"
_WIDTH = 8  # features for each dimension of the activations, at most, where no number is named
_LR = 1e-3
_N_SAMPLE = 200_000  # of the training activations, by which dead features are known
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Made:
    """An SAE that has been trained."""

    card: QualityCard
    reads: tuple[RowsRead, ...]
    """What came of the rows."""
    config: SaeConfig
    """With what was left open filled in."""


def train_sae(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, Sequence[Row]],
    config: SaeConfig,
    out: Path,
    *,
    progress: bool,
) -> Made:
    """Train an SAE and write it with its card.

    Args:
        model: a decoder-only transformers model; left as found.
        tokenizer: its tokenizer; not altered.
        sources: rows by name; `train` are the training data.
        config: what to train.
        out: folder for the SAE. What has been done so far stands in `<out>.unfinished` until all is.
        progress: whether to show bars.

    Raises:
        ConfigError: if the folder holds something, settings are not those of the unfinished run, or the disk is too small.
        DataError: if the texts are too few.
        ModelError: if the model lacks the hook point, or cannot be read.

    """
    require_new_folder(out, "out")
    hook_name = _hook_name(model, config.hook_name)
    with undisturbed(model):
        pieces = read_pieces(sources, tokenizer, config.n_tokens, config.seed)
        reader = Reader(model, hook_name, pieces)
        d_in = len(reader.usual.mean)
        d_sae = config.d_sae or 2 ** ((_WIDTH * d_in).bit_length() - 1)
        config = replace(config, hook_name=hook_name, d_sae=d_sae)
        most = d_sae * MOST_DENSE
        require(config.l0 <= most, "l0", config.l0, f"at most {most:g}, a tenth of the {d_sae} features")
        unfinished = _unfinished(out, config, model, pieces)
        file = ActivationFile(unfinished, d_in)
        data = file.collect(reader, pieces.training, config.n_tokens, progress=progress)
    if len(data) < config.batch:
        raise DataError(
            f"train: {len(data):,} tokens of text can be read, but a step of training takes {config.batch:,}; give more."
        )
    schedule = Schedule(int(config.n_passes * len(data)), config.batch, _LR, config.seed)
    with by_onednn():
        sae = fit(new_sae(data, d_sae, config.l0, reader.capture.device, config.seed), data, schedule, unfinished)
    made = unfinished / "sae"
    name = Path(model_name(model)).name if Path(model_name(model)).is_dir() else model_name(model)
    save(sae, data, reader.usual, made, model_name=name, hook_name=hook_name, context_size=CONTEXT, prepend_bos=bool(pieces.bos))
    with undisturbed(model):
        encoder = load_encoder(made, name, len(find_layers(model))).to(reader.capture.device)
        sample = data[:_N_SAMPLE].float() / reader.usual.scale + reader.usual.mean
        card = measured(reader, encoder, pieces.held_out, sample, pieces.bos)
    found = Made(card, pieces.reads, config)
    write_whole(made / QUALITY_FILE, card.to_json())
    write_whole(made / "README.md", readme(found, name, len(data), file.sink_share))
    if out.is_dir():  # an empty one
        out.rmdir()
    os.replace(made, out)
    shutil.rmtree(unfinished)
    return found


def _hook_name(model: nn.Module, given: str | None) -> str:
    """The name of a hook point, which may be given as a share of the depth."""
    n_layers = len(find_layers(model))
    try:
        depth = _DEPTH if given is None else float(given)
    except ValueError:
        assert given is not None
        resolve(model, given)
        return given
    require(0 <= depth <= 1, "hook_name", given, "a hook name, or a share of the depth between 0 and 1")
    return f"blocks.{min(n_layers - 1, round(depth * n_layers))}.hook_resid_post"


def _unfinished(out: Path, config: SaeConfig, model: nn.Module, pieces: Pieces) -> Path:
    """The folder of what has been done so far, of this run and no other."""
    folder = out.with_name(f"{out.name}.unfinished")
    ours: dict[str, Any] = {
        **asdict(config),
        "model": weights_of(model).fingerprint,
        "texts": hashlib.sha256(json.dumps([pieces.training, pieces.bos]).encode()).hexdigest(),
        "device": next(model.parameters()).device.type,
    }
    note = folder / _SETTINGS
    if note.is_file():
        theirs = json.loads(note.read_text(encoding="utf-8"))
        if other := [name for name in ours if theirs.get(name) != ours[name]]:
            raise ConfigError(
                f"out: {folder} holds a training that is not finished, with another {', '.join(other)}; give the same to go on, "
                "delete that folder, or give another --out."
            )
    folder.mkdir(exist_ok=True)
    write_whole(note, json.dumps(ours))
    return folder
