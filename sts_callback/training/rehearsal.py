"""A rehearsal: a few real optimizer steps of a run, measured and put back before its first one.

The trainer takes them itself, on rows of its own data set: its collator, loss, clipping and accumulation, an optimizer as its
own. Only the sampler, the data loader and wrappers around the model stay out, since they keep what cannot be put back.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import distributed
from torch.optim.lr_scheduler import LambdaLR

from sts_callback.data.reader import is_sequence
from sts_callback.distributed import Ranks
from sts_callback.errors import StsError
from sts_callback.model.sharding import is_sharded
from sts_callback.progress import progress_bar
from sts_callback.records import DriftSnapshot
from sts_callback.records.rehearsal import TENFOLD, Dose, Rehearsal
from sts_callback.training.fence import put_back
from sts_callback.training.overhead import now

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer

N_STEPS = 5
"""Steps of a dose. Our choice; in the validation's held-out half the sign of a check's NLL change was that of a clear change at
the end in 86 % after 5 of 40 steps."""
FEWEST_PLANNED = 2 * N_STEPS
"""Steps of a run that is rehearsed unasked: a shorter one is over before its rehearsal has paid."""
AUTO_SHARE = 0.1
"""Of the training's time, what a rehearsal may take unasked, if `max_overhead` is no more. Our choice: like the
forecast it comes once, before training, and what it may save is the whole run."""
_SMALLEST = 2.0  # multiple of the peak rate in the second dose, `TENFOLD` at most; it is not made for less
_ALL_THE_SAME = "rehearse=True rehearses all the same."


class NotRehearsed(StsError):  # noqa: N818  # an answer rather than a failure
    """A run cannot be rehearsed, or is not worth it; says why."""


def rehearsal_of(
    trainer: Trainer | None,
    loader: Any,
    check: Callable[[int], DriftSnapshot],
    *,
    share: float | None,
    check_s: float,
    ranks: Ranks,
    progress: bool,
    begun: Callable[[int], None],
) -> Rehearsal:
    """Rehearse a run: steps at its schedule's peak rate, then at a multiple of it that reaches what the run adds up to.

    Args:
        trainer: in training, before its first step; None if the callback does not have it.
        loader: its loader of training data, of which no batch is asked.
        check: measures the model, given the number of rehearsed steps.
        share: of the training's time that it may take, infinite without a limit; None if it is asked for in any case.
        check_s: seconds that a check is expected to take.
        ranks: the processes of the run; all rehearse together.
        progress: whether to show a progress bar.
        begun: told, once it is sure that there will be doses, how many steps they take.

    Returns:
        Its doses, or why there are none. All that it has touched is put back, also where it fails.

    """
    try:
        if trainer is None:
            raise NotRehearsed("callback.attach(trainer), which was not called, gives it the trainer's loss and collator.")
        require_possible(trainer, loader)
        n_planned = trainer.state.max_steps
        if share is not None and n_planned < FEWEST_PLANNED:
            raise NotRehearsed(
                f"it has {n_planned} steps; unasked, runs of {FEWEST_PLANNED} or more are rehearsed. {_ALL_THE_SAME}"
            )
        if share is not None and share * n_planned < N_STEPS:
            raise NotRehearsed(_too_dear(n_planned, share))
        return _rehearsed(trainer, loader, check, share, check_s, ranks, progress, begun)
    except NotRehearsed as reason:
        return Rehearsal((), 0 if trainer is None else trainer.state.max_steps, math.nan, 0.0, skipped=str(reason))


def require_possible(trainer: Trainer, loader: Any) -> None:
    """Refuse runs whose steps cannot be taken and put back.

    Args:
        trainer: in training.
        loader: its loader of training data.

    Raises:
        NotRehearsed: with the reason.

    """
    args = trainer.args
    model: Any = trainer.model
    optim = str(getattr(args.optim, "value", args.optim))
    reasons = {
        "its policy learns from rewards of what it writes": getattr(trainer, "reward_funcs", None),
        "a vLLM server writes with its weights": getattr(trainer, "use_vllm", False),
        "its model is sharded": is_sharded(model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
        "nn.DataParallel copies its model to several devices; CUDA_VISIBLE_DEVICES=0 gives it one": args.n_gpu > 1,
        "ddp_static_graph counts backward passes": getattr(trainer.model_wrapped, "static_graph", False),
        f"optim={optim!r} steps during the backward pass": "lomo" in optim or "layerwise" in optim,
        "its training data are a stream": not is_sequence(getattr(loader, "dataset", None)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotRehearsed(f"{reason}.")


def _too_dear(n_planned: int, share: float | None) -> str:
    return f"{N_STEPS} steps and a check take more than {share:.0%} of the time of {n_planned} steps. {_ALL_THE_SAME}"


def _rehearsed(
    trainer: Trainer,
    loader: Any,
    check: Callable[[int], DriftSnapshot],
    share: float | None,
    check_s: float,
    ranks: Ranks,
    progress: bool,
    begun: Callable[[int], None],
) -> Rehearsal:
    started, n_planned = time.monotonic(), trainer.state.max_steps
    peaks, rate_sum = planned_rates(trainer, n_planned)
    multiples = [1.0]
    if rate_sum > _SMALLEST * N_STEPS * peaks[0]:
        multiples.append(min(TENFOLD, rate_sum / (N_STEPS * peaks[0])))
    doses: list[Dose] = []
    n_steps = N_STEPS * len(multiples)
    bar = progress_bar("Rehearsal", n_steps, "step", is_shown=progress)
    with _fenced_steps(trainer, loader, ranks, n_steps) as steps, bar:

        def take_up_to(n_steps: int) -> None:
            while steps.n_taken < n_steps:
                steps.take()
                bar.update()

        steps.set_rates(peaks)
        take_up_to(1)
        if share is not None:
            step_s = ranks.from_first(lambda: steps.seconds)
            n_affordable = share * step_s * n_planned / (N_STEPS * step_s + check_s)
            multiples = [multiple for n, multiple in enumerate(multiples, 1) if n <= n_affordable]
        if not multiples:
            raise NotRehearsed(_too_dear(n_planned, share))
        begun(N_STEPS * len(multiples))
        for multiple in multiples:
            steps.set_rates([multiple * peak for peak in peaks])
            take_up_to(N_STEPS * (len(doses) + 1))
            doses.append(Dose(multiple, multiple * peaks[0], N_STEPS, check(steps.n_taken)))
    seconds = time.monotonic() - started
    return Rehearsal(tuple(doses), n_planned, rate_sum, seconds, step_s=steps.mean_s, n_parameters=_n_parameters(trainer))


def rehearse_at(trainer: Trainer, loader: Any, check: Callable[[int], DriftSnapshot], rate: float) -> Rehearsal:
    """Rehearse a run on one device at one learning rate, whatever its own.

    Args:
        trainer: in training, before its first step.
        loader: its loader of training data.
        check: measures the model, given the number of rehearsed steps.
        rate: at the schedule's peak, of the first group of parameters; others keep their proportion to it.

    Returns:
        One dose. All that it has touched is put back, also where it fails.

    Raises:
        NotRehearsed: with the reason, if its steps cannot be taken and put back.

    """
    require_possible(trainer, loader)
    started, n_planned = time.monotonic(), trainer.state.max_steps
    peaks, rate_sum = planned_rates(trainer, n_planned)
    with _fenced_steps(trainer, loader, Ranks(), N_STEPS) as steps:
        steps.set_rates([rate * peak / peaks[0] for peak in peaks])
        for _ in range(N_STEPS):
            steps.take()
        dose = Dose(1.0, rate, N_STEPS, check(N_STEPS))
    seconds = time.monotonic() - started
    total = rate_sum * rate / peaks[0]
    return Rehearsal((dose,), n_planned, total, seconds, step_s=steps.mean_s, n_parameters=_n_parameters(trainer))


@contextlib.contextmanager
def _fenced_steps(trainer: Trainer, loader: Any, ranks: Ranks, n_steps: int) -> Iterator[_Steps]:
    """Steps that may be taken inside; on every exit all is put back."""
    # Compiled code would be made for these steps alone, and made anew in training.
    with put_back(trainer), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        yield _Steps(trainer, loader, ranks, n_steps)


def _n_parameters(trainer: Trainer) -> int:
    model: Any = trainer.model
    return sum(parameter.numel() for parameter in model.parameters())


def planned_rates(trainer: Trainer, n_steps: int) -> tuple[list[float], float]:
    """What a run's schedule comes to.

    Args:
        trainer: in training.
        n_steps: of the run.

    Returns:
        The highest learning rate of each group of parameters, NaN where the optimizer finds its own; and the sum of the first
        group's over all steps, NaN where the schedule does not say beforehand, as one that follows a metric.

    """
    scheduler, optimizer = trainer.lr_scheduler, trainer.optimizer
    assert optimizer is not None
    if isinstance(scheduler, LambdaLR):
        rates = [
            [float(base * factor(step)) for step in range(n_steps)]
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        return [max(of_group) for of_group in rates], math.fsum(rates[0])
    names = ("lr", "initial_lr", "max_lr")  # of now, before a warm-up, at the top of a cycle
    known = [[float(group[name]) for name in names if group.get(name) is not None] for group in optimizer.param_groups]
    return [max(of_group, default=math.nan) for of_group in known], math.nan


class _Steps:
    """Optimizer steps of a trainer as its own training takes them, on rows drawn apart from it."""

    def __init__(self, trainer: Trainer, loader: Any, ranks: Ranks, n_steps: int) -> None:
        """Make the optimizer, and draw the rows of all steps; only inside a fence.

        Raises:
            NotRehearsed: if there can be no such optimizer.

        """
        self._trainer, self._ranks = trainer, ranks
        model: Any = trainer.model
        self._model, self._parameters = model, [p for p in model.parameters() if p.requires_grad]
        self._optimizer = _fresh_optimizer(trainer)
        trainer.optimizer = self._optimizer
        self._n_batches = trainer.args.gradient_accumulation_steps
        self._batches = _batches(trainer, loader, ranks, n_steps * self._n_batches)
        self.n_taken, self.seconds, self._first_s = 0, 0.0, 0.0

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each group of parameters; NaN leaves it to the optimizer."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if not math.isnan(rate):
                group["lr"] = rate

    def take(self) -> None:
        """Take one."""
        started, optimizer = now(), self._optimizer
        scaler, max_norm = self._trainer.accelerator.scaler, self._trainer.args.max_grad_norm
        # Meetings: a process that fails between them tells the others at the next one.
        batches = self._ranks.together(lambda: list(itertools.islice(self._batches, self._n_batches)))
        self._ranks.together(lambda: self._backward(batches))
        self._average_gradients()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        self._model.zero_grad()
        self.n_taken += 1
        self.seconds += now() - started
        self._first_s = self._first_s or self.seconds

    @property
    def mean_s(self) -> float:
        """Seconds a step, without the first: what a model does only once would count."""
        return (self.seconds - self._first_s) / max(1, self.n_taken - 1)

    def _backward(self, batches: list[Any]) -> None:
        """As `Trainer._run_epoch` does, but on the model as it is without DDP, whose first backward orders its buckets."""
        trainer = self._trainer
        batches, n_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
        trainer.current_gradient_accumulation_steps = len(batches)
        for i, batch in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(i == len(batches) - 1)
            trainer.training_step(self._model, batch, n_items)

    def _average_gradients(self) -> None:
        """Over all processes, as DDP does; what none has used stays without."""
        ranks = self._ranks
        if ranks.n == 1:
            return
        used = ranks.gathered(lambda: [p.grad is not None for p in self._parameters])
        for parameter, by_rank in zip(self._parameters, zip(*used, strict=True), strict=True):
            if any(by_rank):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)
                parameter.grad /= ranks.n


def _batches(trainer: Trainer, loader: Any, ranks: Ranks, n_batches: int) -> Iterator[Any]:
    """This process's batches, of rows that all draw alike and share; where rows run out, they are drawn anew."""
    n_rows = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or trainer._train_batch_size
    collate = getattr(loader, "collate_fn", trainer.data_collator)
    if trainer.accelerator.split_batches:
        n_rows //= ranks.n
    dataset, generator, drawn = loader.dataset, random.Random(trainer.args.seed), list[int]()
    while (n_short := n_batches * n_rows * ranks.n - len(drawn)) > 0:
        drawn += generator.sample(range(len(dataset)), min(n_short, len(dataset)))
    mine = iter(drawn[ranks.index :: ranks.n])
    for _ in range(n_batches):
        yield collate([dataset[i] for i in itertools.islice(mine, n_rows)])


def _fresh_optimizer(trainer: Trainer) -> Optimizer:
    """An optimizer as the trainer's own, with no steps behind it; the trainer then holds it, or none."""
    own: Any = trainer.optimizer
    while isinstance(own, AcceleratedOptimizer):
        own = own.optimizer
    trainer.optimizer = None
    made = trainer.create_optimizer()
    if type(made) is not type(own) or _parameters_of(made) != _parameters_of(own):  # the user's own, given to the trainer
        allowed = inspect.signature(type(own)).parameters
        options = {name: value for name, value in own.defaults.items() if name in allowed}
        try:
            made = type(own)([dict(group) for group in own.param_groups], **options)
        except TypeError as error:
            raise NotRehearsed(f"its {type(own).__name__} cannot be made anew ({error}).") from error
    for group, of_own in zip(made.param_groups, own.param_groups, strict=True):
        group.update((name, value) for name, value in of_own.items() if name != "params")
    return made


def _parameters_of(optimizer: Optimizer) -> list[list[int]]:
    return [[id(p) for p in group["params"]] for group in optimizer.param_groups]
