"""Answers from logits: NLL by hand, which tokens are right, and nothing that ties, NaN or the precision of logits could turn."""

from __future__ import annotations

import math

import pytest
import torch

from sts_callback.data.probes import Query
from sts_callback.measure.answers import Answers, TokenReader
from sts_callback.model.head import read_in_pieces


def query(*answer: int) -> Query:
    return Query((1, 2), answer, (True, True))


def read_tokens(logits: torch.Tensor, queries: list[Query]) -> tuple[torch.Tensor, torch.Tensor]:
    """In pieces of 64 tokens."""
    read = TokenReader(queries, logits.device)
    return read_in_pieces(logits, read, 64), read.right


LOG_2, LOG_3 = math.log(2), math.log(3)
THREE_ROWS = torch.tensor([[LOG_3, LOG_2, 0.0], [0.0, LOG_2, LOG_3], [LOG_3, LOG_2, 0.0]])
"""Probabilities 3, 2 and 1 of 6, turned round in the middle."""


def test_nll_and_right_tokens_by_hand() -> None:
    """Two answers, (0, 0) and (0): the first token of each is the likeliest one, the second of the first is the least likely."""
    losses, right = read_tokens(THREE_ROWS, [query(0, 0), query(0)])
    assert losses.tolist() == pytest.approx([math.log(2), math.log(6), math.log(2)])
    assert right.tolist() == [True, False, True]
    found = Answers.of(losses, right, [query(0, 0), query(0)])
    assert found.nll.tolist() == pytest.approx([math.log(12), math.log(2)])
    assert found.right.tolist() == [[True, False], [True, False]]  # the last is no token


def test_long_answers_are_read_piece_by_piece_in_their_order() -> None:
    """200 tokens, of which every seventh is right."""
    logits = torch.zeros(200, 5)
    logits[torch.arange(200), torch.where(torch.arange(200) % 7 == 0, 3, 1)] = 1.0
    queries = [query(*(3,) * 150), query(*(3,) * 50)]
    found = Answers.of(*read_tokens(logits, queries), queries)
    assert found.right[0].tolist() == [i % 7 == 0 for i in range(150)]
    assert found.right[1].tolist() == [i < 50 and (150 + i) % 7 == 0 for i in range(150)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equal_logits_the_first_is_the_likeliest_as_in_greedy_decoding(dtype: torch.dtype) -> None:
    """In 16 bits, whose logits are equal often: a token is not counted right twice, and not by chance."""
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [1.0, 5.0, 5.0, 0.0], [2.0, 2.0, 2.0, 2.0]], dtype=dtype)
    for _ in range(3):
        assert read_tokens(logits, [query(1, 2, 3)])[1].tolist() == [True, False, False]
    wide = torch.full((1, 70_000), -1.0, dtype=dtype)
    wide[0, [40_001, 69_999]] = 3.0
    assert read_tokens(wide, [query(40_001)])[1].tolist() == [True]
    assert read_tokens(wide, [query(69_999)])[1].tolist() == [False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_token_is_right_where_logits_are_not_finite(value: float) -> None:
    logits = torch.tensor([[value, 0.0, 1.0], [0.0, value, 1.0], [0.0, 1.0, 2.0]])
    losses, right = read_tokens(logits, [query(0, 0, 2)])
    assert losses.isnan().tolist() == [True, True, False] or math.isinf(value)
    assert right.tolist() == [False, False, True]


def test_right_tokens_take_no_part_in_a_gradient() -> None:
    logits = THREE_ROWS.clone().requires_grad_()
    losses, right = read_tokens(logits, [query(0, 0), query(0)])
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert not right.requires_grad
    assert gradient[0].tolist() == pytest.approx([3 / 6 - 1, 2 / 6, 1 / 6])


def test_answers_of_batches_are_put_to_their_places() -> None:
    queries = [query(0), query(0, 0, 0), query(0, 0)]
    whole = Answers.unread(queries)
    whole.put([2, 0], Answers(torch.tensor([2.0, 0.5]), torch.tensor([[True, True], [True, False]])))
    whole.put(slice(1, 2), Answers(torch.tensor([4.0]), torch.tensor([[False, True, True]])))
    assert whole.nll.tolist() == [0.5, 4.0, 2.0]
    assert whole.right.tolist() == [[True, False, False], [False, True, True], [True, True, False]]


def test_a_query_without_an_answer_has_no_token() -> None:
    queries = [query(), query(1)]
    found = Answers.of(*read_tokens(torch.tensor([[0.0, 1.0]]), queries), queries)
    assert (found.nll.tolist()[0], found.right.tolist()) == (0.0, [[False], [True]])
