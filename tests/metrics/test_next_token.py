"""The next token from columns of logits: as torch computes it from all of them, wherever the vocabulary is cut."""

from __future__ import annotations

import math

import pytest
import torch

from sts_callback.metrics.next_token import next_token

LOGITS = torch.randn(40, 23, generator=torch.Generator().manual_seed(0)) * 3
TARGETS = torch.arange(40) % 23


@pytest.mark.parametrize("width", [1, 2, 7, 22, 23])
def test_it_is_cross_entropy_and_greedy_decoding(width: int) -> None:
    logits = LOGITS.clone().requires_grad_()
    losses, right = next_token(logits.split(width, dim=1), TARGETS)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    reference = LOGITS.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(reference, TARGETS, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected.sum(), reference)[0], rtol=1e-5, atol=1e-6)
    assert right.tolist() == (LOGITS.argmax(dim=1) == TARGETS).tolist()
    assert 0 < int(right.sum()) < 40
    assert not right.requires_grad


@pytest.mark.parametrize("width", [1, 2, 4])
def test_of_equal_logits_in_several_columns_the_first_is_the_likeliest(width: int) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0]]).expand(4, 4)
    assert next_token(logits.split(width, dim=1), torch.arange(4))[1].tolist() == [False, True, False, False]


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(3))
def test_no_token_is_right_where_any_logit_is_not_finite(width: int, value: float, place: int) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
    logits[:, place] = value
    losses, right = next_token(logits.split(width, dim=1), torch.arange(3))
    assert not losses.isfinite().any()
    assert not right.any()


def test_large_logits_do_not_overflow_and_a_barred_column_takes_no_part() -> None:
    logits = torch.tensor([[1e4, 1e4, -math.inf, -math.inf]])
    losses, right = next_token(logits.split(2, dim=1), torch.tensor([0]))
    assert losses.item() == pytest.approx(math.log(2), abs=1e-3)
    assert right.tolist() == [True]


def test_of_16_bits_sums_are_float32() -> None:
    logits = LOGITS.bfloat16()
    losses, _ = next_token(logits.split(5, dim=1), TARGETS)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, next_token([logits.float()], TARGETS)[0])


def test_nothing_is_read_of_no_position() -> None:
    losses, right = next_token(torch.zeros(0, 6).split(4, dim=1), torch.zeros(0, dtype=torch.long))
    assert (losses.shape, right.shape) == ((0,), (0,))
