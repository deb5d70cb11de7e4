"""Where the files of an SAE are: registry, hub or folder, in which library's layout; and what to do if they cannot be read."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sts_callback.config import NO_SAE
from sts_callback.errors import SaeError, is_short_of_memory
from sts_callback.model import registry
from sts_callback.model.sae_formats import Parts, read_dictionary_learning, read_sparsify

_WANTED = (
    "must hold cfg.json and sae_weights.safetensors of an SAE saved for inference (save_inference_model), cfg.json and "
    "sae.safetensors of EleutherAI's sparsify, or config.json and ae.pt of dictionary_learning"
)
_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".json", ".npz"}
_READERS: dict[str, Callable[[Path], Parts]] = {"sae.safetensors": read_sparsify, "ae.pt": read_dictionary_learning}
_OWN = "sae_weights.safetensors"
_FILES = ("cfg.json", _OWN, "config.json", "quality.json", *_READERS)


def is_no_sae(spec: str) -> bool:
    """Whether a source says that raw activations are to be read: `"none"`, or `"none:12"` with their layer."""
    return re.fullmatch(rf"{NO_SAE}(:\d+)?", spec) is not None


def place_of(spec: str) -> tuple[str, str] | None:
    """Find an SAE by its name.

    Args:
        spec: the name that the user gave.

    Returns:
        Release or hub repository, and the SAE's name in it. None for a folder, for `"none"`, and for `"auto"`, which depends on
        the model.

    Raises:
        SaeError: if there is no such SAE (similar names are suggested), if it cannot be used, or if it is a file or a path that
            does not exist.

    """
    if spec == "auto" or is_no_sae(spec) or os.path.isdir(spec):
        return None
    if os.path.isfile(spec):
        raise SaeError(f"sae: {spec} is a file; give its folder, if that is one of an SAE: it {_held_by(Path(spec).parent)}.")
    if entry := registry.find(spec):
        if entry.unusable:
            raise SaeError(
                f"sae: {spec} cannot be used: it {entry.unusable}; take another of `sts-callback saes --model {entry.model}`."
            )
        return entry.release, entry.sae_id
    if spec.startswith((".", "/", "~")) or "\\" in spec or Path(spec).suffix in _SUFFIXES:
        raise SaeError(f"sae: {spec} is not there; correct the path. A folder {_WANTED}.")
    if spec.count("/") >= 2 and not registry.near_names(spec):  # a hub repository and a folder in it
        owner, repository, sae_id = spec.split("/", 2)
        return f"{owner}/{repository}", sae_id
    near = ", ".join(registry.near_names(spec))
    raise SaeError(
        f"sae: {spec!r} is no folder and not in SAELens' registry; near are: {near}. "
        "`sts-callback saes --model ID` lists those of a model."
    )


def downloaded(repository: str, path: str) -> Path:
    """Fetch an SAE that is in no registry from the hub, in any layout that is read from a folder.

    Raises:
        Exception: as the hub's client does.
        SaeError: if the repository has no SAE there.

    """
    from huggingface_hub import snapshot_download

    runs = PurePosixPath(path).parents[:2]  # sparsify's config.json is beside or above the folders of its SAEs
    wanted = [f"{path}/{file}" for file in _FILES] + [str(run / "config.json") for run in runs]
    folder = Path(snapshot_download(repository, allow_patterns=wanted)) / path
    if not folder.is_dir():
        raise SaeError(f"sae: {repository} on the hub has no SAE in {path}; correct the name. Its folder {_WANTED}.")
    return folder


def reader_of(folder: Path) -> Callable[[Path], Parts] | None:
    """Whose layout a folder has: the reader of another library's, or None for SAELens' own."""
    if (folder / _OWN).exists():
        return None
    return next((reader for file, reader in _READERS.items() if (folder / file).exists()), None)


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, no pickle can run code, also where a library leaves `torch.load` to a default that the environment sets."""
    forced, default = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name, None) for name in (forced, default)}
    os.environ[forced] = "1"
    try:
        yield
    finally:
        del os.environ[forced]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _held_by(folder: Path) -> str:
    """Say what a folder holds in place of an SAE, and what to do about it."""
    inner = sorted({str(p.parent.relative_to(folder)) for file in ("cfg.json", *_READERS) for p in folder.glob(f"*/{file}")})
    if inner:
        return f"holds several, give one of {', '.join(inner[:3])}; a folder {_WANTED}"
    if (folder / "ae.pt").exists() and not (folder / "config.json").exists():
        return (
            "holds ae.pt without the config.json that dictionary_learning saves beside it, and that says the kind of SAE and "
            f"where it reads; add it. A folder {_WANTED}"
        )
    return _WANTED


class _Cause(NamedTuple):
    """A kind of errors, by the name of a class or of its bases and by what the message says, and its remedy."""

    classes: str
    message: str
    remedy: str


_CONFIG = "its configuration (cfg.json or config.json)"
_DAMAGED = "a file is cut off or damaged; save the SAE again, or delete the file from the hub's cache and load it again"
_CAUSES = (  # the first that fits counts
    _Cause("GatedRepoError", "", "accept its conditions on the hub and log in (`hf auth login`)"),
    _Cause(
        "LocalEntryNotFoundError|OfflineModeIsEnabled|ConnectionError|ConnectError|TimeoutException|Timeout",
        "",
        "the hub cannot be reached, and it is not in the cache, or SAELens does not look there (for Gemma Scope 2 it always asks "
        "the hub); check the connection and HF_HUB_OFFLINE, or load it with SAELens elsewhere, save_model, and give that folder",
    ),
    _Cause(
        "RepositoryNotFoundError",
        "",
        "the hub has no such repository, or it is private; correct the name, or log in (`hf auth login`)",
    ),
    _Cause("EntryNotFoundError|RevisionNotFoundError", "", "the hub's repository has no such file; correct the name"),
    _Cause("HTTPError|HTTPStatusError", r"\b404\b", "the hub's repository has no such file; correct the name"),
    _Cause("HTTPError|HTTPStatusError", "", "the hub refuses; try again later"),
    _Cause(
        "UnpicklingError",
        "GLOBAL|instantiate|Unsupported class",
        "a file holds code beside tensors, which is not run; if you trust it, save its tensors alone and load those",
    ),
    _Cause("RuntimeError", "size mismatch", f"its weights have other shapes than {_CONFIG} says; correct the wrong one"),
    _Cause("RuntimeError", r"(Missing|Unexpected) key", f"its weights are not those of its architecture; correct {_CONFIG}"),
    _Cause("JSONDecodeError|UnicodeDecodeError|YAMLError", "", f"{_CONFIG} cannot be parsed: {_DAMAGED}"),
    _Cause("SafetensorError|UnpicklingError|EOFError|BadZipFile", "", _DAMAGED),
    _Cause("RuntimeError", "zip archive|PytorchStreamReader|unexpected EOF|storage has wrong", _DAMAGED),
    _Cause("OSError", "Invalid argument", _DAMAGED),  # PyTorch's, where the end of an archive is missing
    _Cause("ValueError", "pickled data", _DAMAGED),  # NumPy's, of all that is no archive of arrays
    _Cause("KeyError|TypeError", "", f"{_CONFIG} or its weights lack this, or have it in another form; save the SAE again"),
    _Cause("PermissionError", "", "it may not be read; change its permissions"),
)
_ARCHITECTURE = (
    "this SAELens does not know that architecture; save an SAE that was saved for training with save_inference_model, or "
    "`pip install --upgrade sae-lens`"
)


def remedy(error: Exception, folder: Path | None = None) -> str:
    """Say what to do about an SAE that could not be loaded.

    Args:
        error: what was raised.
        folder: the folder that was read; None for SAELens' registry.

    """
    if is_short_of_memory(error):
        return "memory does not suffice; take an SAE with fewer features"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, KeyError) and frames and frames[-1].name == "get_sae_class":
        return _ARCHITECTURE
    kinds = {cls.__name__ for cls in type(error).__mro__}
    for cause in _CAUSES:
        if kinds & set(cause.classes.split("|")) and re.search(cause.message, str(error)):
            return cause.remedy
    if folder is not None:
        return f"it {_held_by(folder)}"
    if isinstance(error, OSError):
        return "check the connection and the room on the disk, or give a folder"
    return "its files are not in the form that SAELens expects; `pip install --upgrade sae-lens`, or take another"
