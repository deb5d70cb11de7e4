"""How good an SAE is, as measured when it was made: the card beside its weights, and the floor under which it is not used."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sts_callback.errors import SaeError

QUALITY_FILE = "quality.json"
MOST_FVU = 0.5
"""Beyond a half, an SAE misses more of the variance than it sees; `doctor` refuses at the same share."""
LEAST_LOSS_KEPT = 0.5
"""Below a half, its reconstruction loses more of what the layer does for the next token than it keeps. Our choice."""
MOST_DENSE = 0.1
"""With more than this share of the features active at a token a dictionary is not sparse, and fits anything; published SAEs stay
under 0.02."""
_LEAST_ABLATION = 0.01  # nats that a layer must be worth for the share of them to mean something


@dataclass(frozen=True)
class QualityCard:
    """Figures on texts that an SAE was not trained on, BOS, special tokens and attention sinks left out."""

    fvu: float
    """Fraction of the activations' variance that the reconstruction leaves."""
    l0: float
    """Mean number of active features a token."""
    dead_fraction: float
    """Share of the features that none of the training tokens read for it activates."""
    nll: float
    """Of the next token, in nats, with activations as they are."""
    nll_reconstructed: float
    """The same with the reconstruction in place of the activations."""
    nll_mean: float
    """The same with the mean activation in their place."""
    n_tokens: int
    """Held-out tokens that `fvu` and `l0` are measured on."""
    d_sae: int
    """Number of features."""

    @property
    def loss_kept(self) -> float:
        """Share of the rise of NLL by the mean that the reconstruction saves, 1 if all; NaN where the mean does no harm."""
        worth = self.nll_mean - self.nll
        return (self.nll_mean - self.nll_reconstructed) / worth if worth >= _LEAST_ABLATION else math.nan

    def faults(self) -> list[str]:
        """By what it is below the floor, in words; empty if it is not."""
        found = []
        if not self.fvu <= MOST_FVU:
            found.append(f"fvu is {self.fvu:.2f}, at most {MOST_FVU:g} is allowed")
        if self.loss_kept < LEAST_LOSS_KEPT:  # NaN is no fault: there was nothing to keep
            found.append(f"loss_kept is {self.loss_kept:.2f}, at least {LEAST_LOSS_KEPT:g} is allowed")
        if not 0 < self.l0 <= MOST_DENSE * self.d_sae:
            found.append(f"l0 is {self.l0:.1f}, above 0 and at most {MOST_DENSE * self.d_sae:g} (of {self.d_sae}) is allowed")
        return found

    def to_json(self) -> str:
        """All figures as strict JSON, with what follows from them."""
        content = {**asdict(self), "loss_kept": self.loss_kept}
        return json.dumps({k: v if math.isfinite(v) else None for k, v in content.items()}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> QualityCard:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if it is something else.

        """
        content = json.loads(text)
        names = {f.name: f.type for f in fields(cls)}
        if not isinstance(content, dict) or not names.keys() <= content.keys():
            raise ValueError(f"it must hold {', '.join(names)}")
        found = {name: math.nan if content[name] is None else content[name] for name in names}
        if wrong := [name for name, value in found.items() if type(value) not in (int, float)]:
            raise ValueError(f"{', '.join(wrong)} must be numbers")
        return cls(**found)  # type: ignore[arg-type]  # they are numbers


def require_quality(folder: Path) -> None:
    """Refuse an SAE whose own card says that it is below the floor; one without a card is taken as it is.

    Args:
        folder: of the SAE.

    Raises:
        SaeError: with the figures and what to do, or if the card cannot be read.

    """
    file = folder / QUALITY_FILE
    if not file.is_file():
        return
    try:
        card = QualityCard.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SaeError(f"sae: {file} cannot be read as a quality card ({error}); correct it, or delete it.") from error
    if faults := card.faults():
        raise SaeError(
            f"sae: {folder} is below the floor by its own {QUALITY_FILE}: {'; '.join(faults)}. Train it on more tokens or for "
            "more passes (`sts-callback sae train --tokens N --passes N`), or take another."
        )
