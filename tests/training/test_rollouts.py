"""What is overheard of a policy, and what becomes of it: one row a prompt."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from trl import GRPOConfig

from sts_callback.distributed import Ranks
from sts_callback.errors import ConfigError, DataError
from sts_callback.training.rollouts import Rollouts, require_enough, require_possible, samples
from tiny import tiny_model

PROMPTS, COMPLETIONS = ["b", "b", "a", "a"], ["one", "two", "three", "four"]


def length(completions: list[str], **others: Any) -> list[float]:
    """A reward."""
    return [float(len(text)) for text in completions]


def early(completions: list[str], **others: Any) -> list[float | None]:
    return [None if text == "one" else -float(ord(text[0])) for text in completions]


async def late(completions: list[str], **others: Any) -> list[float]:
    return length(completions)


class Judge:
    """A reward with a memory."""

    def __init__(self) -> None:
        self.n_calls = 0

    def __call__(self, completions: list[str], **others: Any) -> list[float]:
        self.n_calls += 1
        return length(completions)


class LateJudge:
    async def __call__(self, completions: list[str], **others: Any) -> list[float]:
        return length(completions)


def heard(*funcs: Any, prompts: Any = None, completions: Any = None, weights: list[float] | None = None) -> list[Any]:
    rollouts = Rollouts()
    tapped = rollouts.tap(list(funcs))
    rollouts.listen()
    for func in tapped:
        func(prompts=prompts or PROMPTS, completions=completions or COMPLETIONS, trainer_state=None)
    rollouts.pause()
    return rollouts.rows(Ranks(), weights)


@pytest.mark.parametrize("func", [length, late, Judge(), LateJudge(), functools.partial(length, x=1), functools.partial(late)])
def test_a_tapped_function_is_to_the_trainer_what_it_was(func: Any) -> None:
    rollouts = Rollouts()
    tapped = rollouts.tap(func)
    from trl.trainer.utils import get_callable_name, is_async_callable  # not there in the lowest version

    assert get_callable_name(tapped) == get_callable_name(func)
    assert is_async_callable(tapped) == is_async_callable(func)
    rollouts.listen()
    given = {"prompts": PROMPTS, "completions": COMPLETIONS}
    rewards = tapped(**given)
    assert (asyncio.run(rewards) if inspect.isawaitable(rewards) else rewards) == length(COMPLETIONS)
    assert [row["completion"] for row in rollouts.rows(Ranks())] == ["one", "three"]


def test_the_very_object_that_a_function_returns_is_handed_on() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rollouts = Rollouts()
    rollouts.listen()
    assert rollouts.tap(lambda **given: rewards)(prompts=PROMPTS, completions=COMPLETIONS) is rewards
    assert [row["reward"] for row in rollouts.rows(Ranks())] == [2.0, 4.0]


def test_what_a_function_raises_is_the_trainers_to_see() -> None:
    def broken(**given: Any) -> list[float]:
        raise LookupError("no judge")

    rollouts = Rollouts()
    rollouts.listen()
    with pytest.raises(LookupError, match="no judge"):
        rollouts.tap(broken)(prompts=PROMPTS, completions=COMPLETIONS)
    assert rollouts.rows(Ranks()) == []


def test_reward_models_pass_as_they_are() -> None:
    judge = torch.nn.Linear(1, 1)
    funcs = ["org/judge", length, judge]
    tapped = Rollouts().tap(funcs)
    assert tapped[0] == "org/judge"
    assert tapped[1] is not length
    assert tapped[2] is judge
    assert funcs == ["org/judge", length, judge]


@pytest.mark.parametrize("funcs", ["org/judge", ["org/judge"], [torch.nn.Linear(1, 1)], []])
def test_nothing_but_reward_models_cannot_be_tapped(funcs: Any) -> None:
    with pytest.raises(ConfigError, match="reward_funcs: got no function"):
        Rollouts().tap(funcs)


def test_the_best_of_each_prompt_counts_in_the_order_of_first_appearance() -> None:
    assert heard(length) == [
        {"prompt": "b", "completion": "one", "reward": 3.0, "sample": "one"},
        {"prompt": "a", "completion": "three", "reward": 5.0, "sample": "three"},
    ]
    (_, a) = heard(lambda completions, **given: [1.0, 1.0, 0.0, 2.0])
    assert (a["completion"], a["sample"]) == ("four", "three")


def test_of_equals_the_first_counts() -> None:
    assert [row["completion"] for row in heard(lambda completions, **given: [1.0] * 4)] == ["one", "three"]


def test_rewards_add_up_over_functions_as_the_trainer_adds_them() -> None:
    assert [row["completion"] for row in heard(length, early)] == ["one", "four"]
    assert [row["reward"] for row in heard(length, early)] == [3.0, 4.0 - ord("f")]
    weighted = heard(length, early, weights=[100.0, 0.5])
    assert [(row["completion"], row["reward"]) for row in weighted] == [("one", 300.0), ("three", 500.0 - ord("t") / 2)]


def test_a_completion_that_none_rewards_is_not_among_the_best() -> None:
    (b, a) = heard(lambda completions, **given: [None, math.nan, math.nan, -1.0])
    assert b == {"prompt": "b", "completion": None, "reward": None, "sample": "one"}
    assert a["completion"] == "four"


def test_conversations_are_told_apart_by_all_they_hold() -> None:
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    rows = heard(lambda completions, **given: [0.0, 1.0, 0.0, 1.0], prompts=prompts, completions=completions)
    assert [(row["prompt"], row["completion"]) for row in rows] == [(prompts[0], completions[1]), (prompts[2], completions[3])]


def test_only_what_a_step_writes_is_heard_and_the_next_takes_its_place() -> None:
    rollouts = Rollouts()
    tapped = rollouts.tap(length)

    def told() -> list[str]:
        return [row["sample"] for row in rollouts.rows(Ranks())]

    tapped(prompts=["p"], completions=["before"])
    rollouts.listen()
    tapped(prompts=["p"], completions=["first"])
    tapped(prompts=["q"], completions=["second"])
    rollouts.pause()
    tapped(prompts=["p"], completions=["of an evaluation"])
    assert told() == ["first", "second"]
    rollouts.listen()  # a step may go on with what was written before
    assert told() == ["first", "second"]
    tapped(prompts=["p"], completions=["third"])
    assert told() == ["third"]
    rollouts.forget()
    assert told() == []


def test_the_same_texts_written_twice_are_two_generations() -> None:
    rollouts = Rollouts()
    tapped = rollouts.tap([length, early])
    rollouts.listen()
    for _ in range(2):
        for func in tapped:
            func(prompts=PROMPTS, completions=COMPLETIONS)
    assert rollouts.rows(Ranks()) == heard(length, early)


def test_a_sample_is_an_answer_whatever_its_reward() -> None:
    rows = heard(lambda completions, **given: [0.0, 1.0, 0.0, 1.0])
    assert samples(rows) == [{"prompt": "b", "completion": "one"}, {"prompt": "a", "completion": "three"}]


def test_too_few_usable_rollouts_are_refused() -> None:
    usable = {"prompt": "p", "completion": "c", "reward": 1.0, "sample": "c"}
    require_enough([usable] * 6, 2)
    with pytest.raises(DataError, match=r"rollouts: the first step left 5 prompts .* takes 6"):
        require_enough([usable] * 5 + [{**usable, "completion": None}], 2)


def arguments(**options: Any) -> GRPOConfig:
    return GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", num_generations=2, **options)


@pytest.mark.parametrize(
    ("options", "n_prompts"),
    [
        ({"per_device_train_batch_size": 10}, 5),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}, 5),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5, "steps_per_generation": 1}, 5),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 5}, 5),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 5, "num_iterations": 2}, 5),
    ],
)
def test_how_many_prompts_the_first_step_has_is_known_before(options: dict[str, Any], n_prompts: int) -> None:
    require_possible(arguments(**options), tiny_model(), n_prompts - 4)
    with pytest.raises(ConfigError, match=f"steps_per_generation: got .* {n_prompts} prompts, but .* takes {n_prompts + 1} at"):
        require_possible(arguments(**options), tiny_model(), n_prompts - 3)


def test_arguments_that_do_not_tell_are_no_reason_to_refuse() -> None:
    require_possible(TrainingArguments(output_dir="unused", use_cpu=True, report_to="none"), tiny_model(), 100)


def test_a_sharded_model_is_refused_with_the_way_round() -> None:
    model = tiny_model()
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ConfigError, match=r"the model is sharded.* give examples with answers as STSCallback\(train_data=...\)"):
        require_possible(arguments(per_device_train_batch_size=20), model, 2)
