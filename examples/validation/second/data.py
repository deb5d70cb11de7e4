"""Rows of the second round: the domains of the first, and fine-tunes that nobody has seen."""

from __future__ import annotations

import random
from pathlib import Path

from rows import lines
from validation.data import Dealt, Row, deal
from validation.second.plan import SETTINGS

_ASKED_AS = {"statements": "User: {}\nAssistant:", "exams": "Question: {}\nAnswer:"}


def all_rows(data_dir: Path) -> dict[str, Dealt]:
    """Of all domains, without rows to train on, and of all fine-tunes, which have nothing else.

    Args:
        data_dir: what `validation.data.deal` needs, and `statements` and `exams`, each `.jsonl.gz` with the columns task,
            prompt and completion.

    """
    dealt = deal(data_dir, SETTINGS["n_measured"], SETTINGS["seed"])
    domains = {name: Dealt(dealt[name].measured, dealt[name].forecast, []) for name in SETTINGS["domains"]}
    return domains | {name: Dealt([], [], _training(data_dir, name)) for name in SETTINGS["fine_tunes"]}


def _training(data_dir: Path, fine_tune: str) -> list[Row]:
    """Each pair once, in a seeded order."""
    rows: dict[tuple[str, str], Row] = {}
    for file, asked in _ASKED_AS.items():
        for row in lines(data_dir / f"{file}.jsonl.gz"):
            if row["task"] == fine_tune:
                pair = {"prompt": asked.format(row["prompt"]), "completion": f" {row['completion'].strip()}"}
                rows[pair["prompt"], pair["completion"]] = pair
    shuffled = list(rows.values())
    random.Random(f"{SETTINGS['seed']}/{fine_tune}").shuffle(shuffled)
    return shuffled
