"""Which data a run trains on, among the places where it may be found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sts_callback.data.pairs import Row
from sts_callback.data.reader import Source, are_prompts_only, is_sequence
from sts_callback.errors import DataError


def find_train_data(given: Source | None, datasets: Iterable[Any], rollouts: Sequence[Row]) -> Source:
    """The user's own word first, then the trainer's data sets.

    Args:
        given: `STSCallback(train_data=...)`.
        datasets: of the trainer, the one with raw columns first; None where there is none.
        rollouts: what the policy wrote at step 0, which takes the place of prompts without answers.

    Raises:
        DataError: if there is no data, or a stream that cannot be sampled.

    """
    if isinstance(given, (str, Path)) or (given is not None and not hasattr(given, "__len__")):
        return given  # of a stream that they give, a sample is read
    for found in (given, *datasets):
        if found is not None:
            if is_sequence(found):
                return rollouts if rollouts and found is not given and are_prompts_only(found) else found
            raise DataError("train_data: the trainer's data set is a stream; give a sample of it as STSCallback(train_data=...).")
    raise DataError("train_data: the trainer has no training data set; give examples as STSCallback(train_data=...).")
