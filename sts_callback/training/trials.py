"""Learning rates and mixtures side by side, each tried by a rehearsal. Model and probes are loaded once for all.

The trainer is TRL's SFTTrainer, set up as the user's own would be and left before its first step.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import Trainer, TrainerCallback

from sts_callback.config import PolicyConfig, finite, require
from sts_callback.data.pairs import Row
from sts_callback.errors import CannotTell
from sts_callback.measure.monitor import Monitor
from sts_callback.policy import judge_rehearsal
from sts_callback.power import little_power, require_power
from sts_callback.records import DriftSnapshot, Forecast
from sts_callback.records.rehearsal import Rehearsal, Trial, Trials
from sts_callback.remedies.mixture import apportioned
from sts_callback.report.trials import ahead, trial_line
from sts_callback.training.rehearsal import N_STEPS, NotRehearsed, rehearse_at
from sts_callback.training.sft import SFTSetup, sft_config, sft_trainer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Mixture:
    """What training rows are made of."""

    replay: Mapping[str, float]
    """Share of rows from each source but the training data, in (0, 1), together under 1; empty for the training data alone."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing of the training data."""
        allowed = "a share above 0, under 1"
        for name, share in self.replay.items():
            require(0 < finite(share, f"--replay {name}", allowed) < 1, f"--replay {name}", share, allowed)


@dataclass(frozen=True)
class Rows:
    """All rows that a mixture may be made of."""

    train: Sequence[Row]
    replay: Mapping[str, Sequence[Row]]
    """By source."""
    seed: int
    """Of the draws."""

    def of(self, mixture: Mixture, n: int) -> list[Row]:
        """Rows of a mixture, in random order.

        Mixtures share their rows as far as their shares allow; where a source is too small, its rows come again.

        Args:
            mixture: shares.
            n: how many rows.

        """
        weights = np.array([1 - sum(mixture.replay.values()), *mixture.replay.values()])
        pools = [self.train, *(self.replay[name] for name in mixture.replay)]
        counts = apportioned(weights, n)
        rows = [row for pool, count in zip(pools, counts, strict=True) for row in self._drawn(pool, count)]
        random.Random(self.seed).shuffle(rows)
        return rows

    def _drawn(self, pool: Sequence[Row], n: int) -> list[Row]:
        order = random.Random(self.seed).sample(range(len(pool)), len(pool))
        return [pool[order[i % len(order)]] for i in range(n)]


def try_out(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    setup: SFTSetup,
    rows: Rows,
    mixtures: Sequence[Mixture],
    rates: Sequence[float],
    made_monitor: Callable[[nn.Module], Monitor],
    policy: PolicyConfig,
    *,
    told: Callable[[str], None],
) -> tuple[Forecast, Trials]:
    """Rehearse every mixture at every learning rate.

    Args:
        model: to be tuned; an adapter stays in it, as it was before any step.
        tokenizer: its tokenizer.
        setup: how it is to be trained.
        rows: what mixtures are made of.
        mixtures: to try, at least one.
        rates: to try, at the schedule's peak, the lowest first.
        made_monitor: makes what measures the model, with its adapter.
        policy: budgets and thresholds; at least one domain is protected.
        told: lines before the first trial, on what is ahead and on too few queries, and one after each.

    Returns:
        The forecast without any step, and the trials.

    Raises:
        ConfigError, DataError: if TRL refuses arguments or rows.
        CannotTell: if there are too few queries for any verdict, or such a run cannot be rehearsed.

    """
    with tempfile.TemporaryDirectory() as folder:
        args = sft_config(setup, folder, on_cpu=next(model.parameters()).device.type == "cpu", seed=rows.seed)
        args.max_steps = _n_steps(args, len(rows.train))
        drawn = [rows.of(mixture, _n_rows(args, len(rows.train))) for mixture in mixtures]
        first = sft_trainer(args, setup.adapter, model, tokenizer, drawn[0])
        tuned: Any = first.model
        monitor = made_monitor(tuned)
        n_queries = {name: len(s.queries) for name, s in monitor.domains.items()}
        require_power(n_queries, policy, n_looks=1)
        told(ahead(len(rates), len(mixtures), N_STEPS, len(monitor.train.queries) + sum(n_queries.values())))
        for warning in little_power(n_queries, policy, monitor.config):
            told(warning)
        forecast, started, found = monitor.forecast(), time.monotonic(), list[Trial]()
        for mixture, some in zip(mixtures, drawn, strict=True):

            def add(one: Rehearsal, mixture: Mixture = mixture) -> None:
                found.append(Trial(one.learning_rate, dict(mixture.replay), one, judge_rehearsal(one, policy)))
                told(trial_line(found[-1], len(found), len(mixtures) * len(rates), policy.budgets))

            # The same adapter for all: each rehearsal puts it back.
            trainer = first if some is drawn[0] else sft_trainer(args, None, tuned, tokenizer, some)
            _rehearse(trainer, rates, monitor.check, add)
    return forecast, Trials(forecast.identity, setup.name, tuple(found), dict(policy.budgets), time.monotonic() - started)


def _rehearse(
    trainer: Trainer, rates: Sequence[float], check: Callable[[int], DriftSnapshot], done: Callable[[Rehearsal], None]
) -> None:
    """At each rate, where training would begin; the trainer is left there."""

    class BeforeStep1(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            for rate in rates:
                done(rehearse_at(trainer, kwargs["train_dataloader"], check, rate))
            raise _Stop

    trainer.add_callback(BeforeStep1())
    try:
        trainer.train()
    except _Stop:
        pass
    except NotRehearsed as reason:
        raise CannotTell(f"rehearse: such a run cannot be rehearsed: {reason}") from None


class _Stop(Exception):  # noqa: N818  # no error
    """Leaves a trainer before its first step."""


def _n_rows(args: Any, n_train: int) -> int:
    """Rows that a rehearsal needs: those of its steps, or, where rows are packed, as many as the training data have."""
    if args.packing:
        return n_train
    return int(N_STEPS * args.per_device_train_batch_size * args.gradient_accumulation_steps)


def _n_steps(args: Any, n_train: int) -> int:
    """Optimizer steps of the run on one device."""
    if args.max_steps > 0:
        return int(args.max_steps)
    n_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return math.ceil(args.num_train_epochs * math.ceil(n_train / n_a_step))  # type: ignore[no-any-return]
