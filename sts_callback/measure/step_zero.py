"""What drift needs from step 0, on disk beside the run: after a resume the weights of step 0 are gone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sts_callback.data.probes import ProbeSet, Query
from sts_callback.errors import CannotTell
from sts_callback.measure.sae_reader import Reference
from sts_callback.metrics.sums import SparseActs


@dataclass(frozen=True)
class StepZeroStats:
    """Step 0 of one probe set."""

    counted: torch.Tensor
    """Which candidate tokens count, query by query, `(n_candidates,)` booleans."""
    acts: SparseActs
    """Their feature activations."""
    sketches: torch.Tensor
    """Of their activations and of what the dictionary leaves of these, `(n_counted, 2, SKETCH_WIDTH)`."""
    n_tokens: torch.Tensor
    """Tokens that count, per query, `(n_queries,)`, int64."""
    sq_norm: torch.Tensor
    """Squared feature activations summed over features, per query, `(n_queries,)`."""
    raw_sq_norm: torch.Tensor
    """Squared norms of activations at the hook point, per query, `(n_queries,)`."""
    nll: torch.Tensor
    """NLL of the answers in nats, per query, `(n_queries,)`; NaN without a language-model head."""
    mean_activity: torch.Tensor
    """Mean activation of each feature, `(d_sae,)`: STS_act for any set of features."""
    mean_own_shift: torch.Tensor
    """Mean squared shift by the set's own demonstrations, `(d_sae,)`: STS_ICL and STS_rel."""
    mean_train_shift: torch.Tensor
    """Mean squared shift by the training demonstrations, `(d_sae,)`: STS_cross."""
    mean_filler_shift: torch.Tensor
    """Mean squared shift by plain prose of equal length, `(d_sae,)`: STS_net."""
    right: torch.Tensor | None = None
    """Which answer tokens are right, see `Answers`; None without a language-model head, and in earlier files."""


_PROBES = "probes"  # no set's, as those have a slash
_KEYS = {"sq_norm": "energy", "raw_sq_norm": "raw_energy", "mean_filler_shift": "mean_neutral_shift"}
"""What files call fields that have been renamed since."""
_TENSORS = {f.name: _KEYS.get(f.name, f.name) for f in fields(StepZeroStats) if f.name not in ("acts", "right")}
_SPARSE = [f.name for f in fields(SparseActs)]


@dataclass(frozen=True)
class StepZeroReference:
    """Step 0 of all probe sets."""

    fingerprint: str
    """Of model, SAE and probes."""
    reference: Reference
    sets: Mapping[str, StepZeroStats]
    probes: Mapping[str, ProbeSet] = field(default_factory=dict)
    """The tokens that were read, by name of the set."""

    @property
    def digest(self) -> str:
        """SHA-256 of all of it: two runs from the same weights share one, runs from other weights do not."""
        digest = hashlib.sha256(json.dumps([self.fingerprint, vars(self.reference)]).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write it as one safetensors file, whole or not at all."""
        metadata = {
            "fingerprint": self.fingerprint,
            "reference": json.dumps(vars(self.reference)),
            "sets": json.dumps(list(self.sets)),
        }
        scratch = path.with_suffix(".part")
        try:
            save_file(self._tensors(), scratch, metadata)
            os.replace(scratch, path)
        finally:  # a full disk must not be filled further by half a file
            scratch.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        if self.probes:  # earlier files have none
            text = json.dumps([_told(s) for s in self.probes.values()])
            tensors[_PROBES] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        for name, one in self.sets.items():
            tensors |= {f"{name}/{key}": getattr(one, field).contiguous() for field, key in _TENSORS.items()}
            tensors |= {f"{name}/acts.{key}": getattr(one.acts, key).contiguous() for key in _SPARSE}
            tensors |= {} if one.right is None else {f"{name}/right": one.right.contiguous()}
        return tensors

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> StepZeroReference:
        """Read it back.

        Raises:
            CannotTell: if it is missing, damaged, or of another model, SAE or set of probes.

        """
        remedy = (
            "drift can be measured only against step 0; start the run anew, or resume it with the same SAE, domains and settings."
        )
        try:
            with safe_open(path, framework="pt") as file:
                metadata, keys = file.metadata(), set(file.keys())
                if metadata["fingerprint"] != fingerprint:
                    raise CannotTell(f"baseline: {path.name} was made with another model, SAE or probes; {remedy}")
                sets = {
                    name: StepZeroStats(
                        acts=SparseActs(**{key: file.get_tensor(f"{name}/acts.{key}") for key in _SPARSE}),
                        **{field: file.get_tensor(f"{name}/{key}") for field, key in _TENSORS.items()},
                        right=file.get_tensor(f"{name}/right") if f"{name}/right" in keys else None,
                    )
                    for name in json.loads(metadata["sets"])
                }
                kept = file.get_tensor(_PROBES).numpy().tobytes() if _PROBES in keys else b"[]"
                probes = [_probes(**one) for one in json.loads(kept)]
                return cls(fingerprint, Reference(**json.loads(metadata["reference"])), sets, {s.name: s for s in probes})
        except CannotTell:
            raise
        except Exception as error:  # safetensors raises its own kinds, not exported in all versions
            raise CannotTell(f"baseline: {path.name} cannot be read ({error!r}); {remedy}") from error


def _told(probes: ProbeSet) -> dict[str, object]:
    """A probe set as JSON holds it; what came of the rows is told at step 0."""
    told = asdict(replace(probes, read=None))
    for query in told["queries"]:
        if query["answer_bytes"] is None:  # as it was before there were any, so that the digest is the same
            del query["answer_bytes"]
    return told


def _probes(queries: list[dict[str, Any]], demo_sets: list[list[int]], **others: Any) -> ProbeSet:
    made = tuple(_query(**one) for one in queries)
    return ProbeSet(queries=made, demo_sets=tuple(map(tuple, demo_sets)), **others)


def _query(query: list[int], answer: list[int], counts: list[bool], answer_bytes: int | None = None) -> Query:
    return Query(tuple(query), tuple(answer), tuple(counts), answer_bytes)
