"""The card beside an SAE: what is below the floor is refused with the figure, and what it says of a loss."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from sts_callback.errors import SaeError
from sts_callback.model.quality import QUALITY_FILE, QualityCard
from sts_callback.model.sae import load_encoder
from tiny import saved_sae

GOOD = QualityCard(fvu=0.1, l0=3.0, dead_fraction=0.0, nll=2.0, nll_reconstructed=2.3, nll_mean=5.0, n_tokens=1000, d_sae=64)


def test_share_of_the_loss_kept() -> None:
    assert GOOD.loss_kept == pytest.approx(0.9)
    assert math.isnan(dataclasses.replace(GOOD, nll_mean=2.001).loss_kept)
    assert dataclasses.replace(GOOD, nll_mean=2.001).faults() == []


@pytest.mark.parametrize(
    ("below", "at", "told"),
    [
        ({"fvu": 0.501}, {"fvu": 0.5}, "fvu is 0.50, at most 0.5"),
        ({"fvu": math.nan}, {"fvu": 0.0}, "fvu is nan, at most 0.5"),
        ({"nll_reconstructed": 3.51}, {"nll_reconstructed": 3.5}, "loss_kept is 0.50, at least 0.5"),
        ({"l0": 6.41}, {"l0": 6.4}, "l0 is 6.4, above 0 and at most 6.4"),
        ({"l0": 0.0}, {"l0": 0.1}, "l0 is 0.0, above 0"),
    ],
)
def test_what_is_below_the_floor_is_refused(below: dict[str, float], at: dict[str, float], told: str, tmp_path: Path) -> None:
    folder = saved_sae(tmp_path)
    (folder / QUALITY_FILE).write_text(dataclasses.replace(GOOD, **below).to_json())
    with pytest.raises(SaeError, match=f"sae: .*{told}.*sae train --tokens"):
        load_encoder(folder, "m", 4)
    (folder / QUALITY_FILE).write_text(dataclasses.replace(GOOD, **at).to_json())
    assert load_encoder(folder, "m", 4).d_sae == 64


@pytest.mark.parametrize("text", ["{", "[]", '{"fvu": 0.1}', json.dumps({**dataclasses.asdict(GOOD), "l0": "many"}), "\x00\xff"])
def test_a_card_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    folder = saved_sae(tmp_path)
    (folder / QUALITY_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(SaeError, match=r"quality\.json cannot be read as a quality card.*correct it, or delete it"):
        load_encoder(folder, "m", 4)


def test_it_reads_what_it_wrote() -> None:
    assert QualityCard.from_json(GOOD.to_json()) == GOOD
    unknown = dataclasses.replace(GOOD, fvu=math.nan)
    assert math.isnan(QualityCard.from_json(unknown.to_json()).fvu)
    assert json.loads(GOOD.to_json())["loss_kept"] == pytest.approx(0.9)
