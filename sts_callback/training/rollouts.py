"""What a policy writes while rewards train it: overheard in the trainer's own reward functions, whose rewards pass unchanged.

Only what is written between the begin of a step and its optimizer step counts: that is training's, not an evaluation's. What is
written before the first optimizer step comes of the weights of step 0.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from sts_callback.data.pairs import Row
from sts_callback.data.probes import FEWEST_QUERIES
from sts_callback.distributed import Ranks
from sts_callback.errors import ConfigError, DataError
from sts_callback.model.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import TrainingArguments

_WAY_ROUND = "give examples with answers as STSCallback(train_data=...)"


@dataclass
class _Generation:
    """Completions that were rewarded together."""

    prompts: Any
    completions: Any
    rewards: dict[int, Any] = field(default_factory=dict)
    """By the place of the function that gave them."""


class Rollouts:
    """Prompts, completions and rewards of the newest generations, and of those at step 0."""

    def __init__(self) -> None:
        self.is_tapped = False
        """Whether reward functions were wrapped."""
        self.first: Sequence[Row] = []
        """The rows of step 0, see `rows`."""
        self._generations: list[_Generation] = []
        self._listens = self._is_new_step = False

    def tap(self, reward_funcs: Any) -> Any:
        """Wrap reward functions so that what they judge is overheard; they keep their names, and reward as they would.

        Args:
            reward_funcs: what the trainer takes: one or a list; reward models are handed back as they are.

        Returns:
            The same, wrapped.

        Raises:
            ConfigError: if there is no function among them.

        """
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not any(_is_function(func) for func in funcs):
            raise ConfigError(
                "reward_funcs: got no function, and what a reward model judges cannot be overheard; give examples with answers "
                "as STSCallback(train_data=...), and the trainer its reward models as they are."
            )
        self.is_tapped = True
        tapped = [self._tapped(func, place) if _is_function(func) else func for place, func in enumerate(funcs)]
        return tapped if isinstance(reward_funcs, list) else tapped[0]

    def forget(self) -> None:
        """Begin a run of which nothing is known."""
        self.first, self._generations, self._listens = [], [], False

    def listen(self) -> None:
        """A training step begins; what it writes takes the place of what earlier ones wrote."""
        self._listens = self._is_new_step = True

    def pause(self) -> None:
        """What is written from here on, until the next step, is not training's."""
        self._listens = False

    def rows(self, ranks: Ranks, reward_weights: Sequence[float] | None = None) -> list[Row]:
        """What was written last, in all processes: a row for each prompt, by first appearance.

        It holds the `prompt`, its best-rewarded `completion` (of equals the first) with its `reward`, both None if none was
        rewarded, and as a `sample` of the policy the first completion, whatever its reward.

        Args:
            ranks: the processes, which must all call this.
            reward_weights: one for each function, as the trainer's arguments have them; by default all weigh the same.

        """
        if not self.is_tapped:
            return []

        def told() -> str:
            """Plain JSON, so that a resumed run reads back the same."""
            return json.dumps([t for generation in self._generations for t in _turns(generation, reward_weights)], default=str)

        found: dict[str, dict[str, Any]] = {}
        for text in ranks.gathered(told):
            for prompt, completion, reward in json.loads(text):
                row = {"prompt": prompt, "completion": None, "reward": None, "sample": completion}
                row = found.setdefault(json.dumps(prompt), row)
                if reward is not None and (row["reward"] is None or reward > row["reward"]):
                    row |= {"completion": completion, "reward": reward}
        return list(found.values())

    def _tapped(self, func: Callable[..., Any], place: int) -> Any:
        inner = func
        while isinstance(inner, functools.partial):
            inner = inner.func

        def now(*args: Any, **kwargs: Any) -> Any:
            rewards = func(*args, **kwargs)
            self._hear(place, rewards, **kwargs)
            return rewards

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            rewards = await func(*args, **kwargs)
            self._hear(place, rewards, **kwargs)
            return rewards

        is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)
        tapped: Any = functools.update_wrapper(awaited if is_async else now, func)
        tapped.__name__ = getattr(inner, "__name__", type(inner).__name__)  # by which the trainer logs it
        return tapped

    def _hear(self, place: int, rewards: Any, prompts: Any = (), completions: Any = (), **others: Any) -> None:
        if not self._listens:
            return
        if self._is_new_step:
            self._generations, self._is_new_step = [], False
        newest = self._generations[-1] if self._generations else None
        if newest is None or place in newest.rewards or (newest.prompts, newest.completions) != (prompts, completions):
            newest = _Generation(prompts, completions)
            self._generations.append(newest)
        newest.rewards[place] = rewards


def samples(rows: Sequence[Row]) -> list[Row]:
    """What the policy answers to the prompts of `Rollouts.rows`, whatever the reward."""
    return [{"prompt": row["prompt"], "completion": row["sample"]} for row in rows]


def require_enough(rows: Sequence[Row], n_demonstrations: int) -> None:
    """Refuse too few rollouts to forecast from.

    Args:
        rows: of step 0.
        n_demonstrations: training examples in each context.

    Raises:
        DataError: with their number.

    """
    n_usable, n_needed = sum(row["completion"] is not None for row in rows), n_demonstrations + FEWEST_QUERIES
    if n_usable < n_needed:
        raise DataError(
            f"rollouts: the first step left {n_usable} prompts with a rewarded completion, but a forecast takes {n_needed} at "
            f"least, and later ones are not of the weights of step 0; hand the trainer what callback.tap() returned, raise "
            f"steps_per_generation, or {_WAY_ROUND}."
        )


def require_possible(args: TrainingArguments, model: nn.Module, n_demonstrations: int) -> None:
    """Refuse a run whose rollouts could not be measured before its weights move, or are sure to be too few.

    Args:
        args: the trainer's.
        model: that is trained.
        n_demonstrations: training examples in each context.

    Raises:
        ConfigError: with the reason and the way round.

    """
    if is_sharded(model):
        raise ConfigError(
            "train_data: the training data are prompts without answers, and the model is sharded: its own rollouts are known "
            f"only when no forward of ours is safe, just before the first optimizer step; {_WAY_ROUND}."
        )
    n_prompts, n_needed = _n_prompts_at_step_zero(args), n_demonstrations + FEWEST_QUERIES
    if n_prompts < n_needed:
        raise ConfigError(
            f"steps_per_generation: got {getattr(args, 'steps_per_generation', None)}, by which the first step has {n_prompts:g} "
            f"prompts, but a forecast from the model's own rollouts takes {n_needed} at least; raise steps_per_generation, "
            f"or {_WAY_ROUND}."
        )


def _n_prompts_at_step_zero(args: TrainingArguments) -> float:
    """How many prompts the policy answers before its weights move; no limit if the trainer's arguments do not tell."""
    size, n_generations = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
    if not size or not n_generations:
        return math.inf
    lasts = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    return float(math.ceil(args.gradient_accumulation_steps / lasts) * size // n_generations)


def _is_function(func: Any) -> bool:
    """Whether the trainer calls it with texts; the rest are reward models and their names."""
    return callable(func) and not isinstance(func, nn.Module)


def _turns(generation: _Generation, reward_weights: Sequence[float] | None) -> list[tuple[Any, Any, float | None]]:
    """Each prompt with a completion and its reward, added up over functions as the trainer does; None if none gave one."""
    totals: list[float | None] = [None] * len(generation.completions)
    for place in sorted(generation.rewards):
        weight = 1.0 if reward_weights is None else reward_weights[place]
        for i, reward in enumerate(generation.rewards[place]):
            if reward is not None and not math.isnan(reward):
                totals[i] = (totals[i] or 0.0) + weight * float(reward)
    return list(zip(generation.prompts, generation.completions, totals, strict=True))
