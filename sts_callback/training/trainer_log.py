"""The numbers of a check under the names by which logs, trackers and `metric_for_best_model` know them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from transformers import PrinterCallback, ProgressCallback, Trainer

from sts_callback.config import PolicyConfig
from sts_callback.errors import ConfigError
from sts_callback.policy import worst_headroom
from sts_callback.records import DriftSnapshot, Verdict

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

N_SHARED = "sts/n_shared_features"
"""A key that every check's row has."""
_HEADROOM = "sts/worst_headroom"
"""The least that any protected domain has left of its budget, see `policy.worst_headroom`; the larger the better."""
_EVAL = "eval_"  # what transformers sets before `metric_for_best_model`


def row(snapshot: DriftSnapshot, policy: PolicyConfig, verdict: Verdict | None = None) -> dict[str, float]:
    """The row that a check adds to the trainer's log, in Python floats.

    What was not measured, such as the NLL of a model without a head, is left out: NaN is not JSON, and no curve.

    Args:
        snapshot: the check.
        policy: with the protected domains.
        verdict: on it; with it the row names the best checkpoint, if one is known.

    """
    numbers = {
        N_SHARED: float(snapshot.n_shared),
        "sts/check_s": snapshot.seconds,
        f"sts/{snapshot.train.name}/text_drift": snapshot.output_drift.value,
        _HEADROOM: worst_headroom(snapshot, policy),
    }
    if verdict is not None and verdict.best_checkpoint:
        numbers["sts/best_checkpoint"] = float(verdict.best_checkpoint)
    for d in (snapshot.train, *snapshot.domains.values()):
        numbers |= {f"sts/{d.name}/drift": d.relative_drift.value, f"sts/{d.name}/nll_change": d.nll_change.value}
        numbers[f"sts/{d.name}/accuracy"] = d.accuracy.now if d.accuracy else math.nan
    return {key: value for key, value in numbers.items() if not math.isnan(value)}


def write(numbers: Mapping[str, float], trainer: Trainer | None, state: TrainerState, control: TrainerControl) -> None:
    """Add a row of its own to the trainer's log.

    Args:
        numbers: Python floats by their keys.
        trainer: the one that the callback is attached to; without it the row misses the trackers.
        state: the trainer's.
        control: the trainer's.

    """
    if trainer is None:
        state.log_history.append({"step": state.global_step, "epoch": state.epoch or 0.0, **numbers})
        return
    handler, should_log = trainer.callback_handler, control.should_log
    everyone = handler.callbacks
    # Not to those that print a row as it is: the check has its own lines on the screen.
    handler.callbacks = [c for c in everyone if not isinstance(c, (ProgressCallback, PrinterCallback))]
    try:
        Trainer.log(trainer, dict(numbers))  # the base method: TRL's own would flush its running means early
    finally:
        handler.callbacks = everyone
        control.should_log = should_log  # logging clears it, and the step's loss row would vanish


def evaluation_metrics(
    snapshot: DriftSnapshot | None, policy: PolicyConfig, metric_for_best_model: str | None
) -> dict[str, float]:
    """What a check adds to the metrics of the evaluation that it follows.

    Args:
        snapshot: the check; None if it failed.
        policy: with the protected domains.
        metric_for_best_model: as the training arguments have it. If it is one of ours that was not measured, it becomes NaN,
            which is never the best so far: the trainer would raise an error if it were missing.

    """
    measured = {_EVAL + key: value for key, value in row(snapshot, policy).items()} if snapshot is not None else {}
    wanted = _key(metric_for_best_model)
    return {_EVAL + wanted: math.nan, **measured} if wanted else measured


def is_ours(metric_for_best_model: str | None) -> bool:
    """Whether the best checkpoint is chosen by a number of ours, so that no check may be left out."""
    return bool(_key(metric_for_best_model))


def require_metric(
    metric_for_best_model: str | None,
    greater_is_better: bool | None,
    names: Iterable[str],
    protected: Collection[str],
    check_on: object,
) -> None:
    """Refuse a choice of the best checkpoint by a number of ours that would fail at the first evaluation, or keep the worst.

    Args:
        metric_for_best_model: as the training arguments have it.
        greater_is_better: likewise.
        names: of the training data's probe set and the domains.
        protected: the domains that have budgets.
        check_on: when drift is measured.

    Raises:
        ConfigError: with the setting that it takes.

    """
    wanted = _key(metric_for_best_model)
    if not wanted:
        return
    known = [f"sts/{name}/{number}" for name in names for number in ("nll_change", "drift")]
    known += [_HEADROOM] if protected else []
    if wanted not in known:
        raise ConfigError(f"metric_for_best_model: got {metric_for_best_model!r}; allowed of STS's are {', '.join(known)}.")
    if check_on != "evaluate":
        raise ConfigError(
            f"check_on: got {check_on!r}; metric_for_best_model={metric_for_best_model!r} is looked up at each evaluation and "
            "takes check_on='evaluate'."
        )
    if greater_is_better and wanted != _HEADROOM:
        raise ConfigError(
            f"greater_is_better: got True (the default for this name), which would keep the checkpoint with the most {wanted}; "
            "set greater_is_better=False."
        )
    if not greater_is_better and wanted == _HEADROOM:
        raise ConfigError(
            f"greater_is_better: got {greater_is_better!r}, which would keep the checkpoint with the least {wanted}; set "
            "greater_is_better=True."
        )


def _key(metric_for_best_model: str | None) -> str:
    """The name without its prefix, or nothing if it is not ours."""
    key = (metric_for_best_model or "").removeprefix(_EVAL)
    return key if key.startswith("sts/") else ""
