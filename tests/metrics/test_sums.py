"""Running sums: the same whatever way the tokens arrive."""

from __future__ import annotations

import math

import pytest
import torch

from sts_callback.metrics.sums import QuerySums, token_mean

CPU = torch.device("cpu")


def test_rows_are_added_to_the_query_they_belong_to() -> None:
    sums = QuerySums(3, 2, CPU)
    sums.add(torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), torch.tensor([0, 2, 0]))
    sums.add(torch.tensor([[8.0, 80.0]]), torch.tensor([2]))
    assert sums.result.tolist() == [[5.0, 50.0], [0.0, 0.0], [10.0, 100.0]]


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [23, 1], [5, 0, 7, 12]])
def test_streamed_equals_whole_batch_however_it_is_split(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-50, 50, (24, 5), generator=generator).float()  # integers: float32 adds them without error
    query = torch.randint(0, 4, (24,), generator=generator)
    streamed = QuerySums(4, 5, CPU)
    for part, index in zip(values.split(sizes), query.split(sizes), strict=True):
        streamed.add(part, index)
    whole = torch.stack([values[query == q].sum(dim=0) for q in range(4)])
    assert torch.equal(streamed.result, whole)


def test_order_of_tokens_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    values, query = torch.rand(40, 3, generator=generator), torch.arange(40) % 3
    order = torch.randperm(40, generator=generator)
    one, other = QuerySums(3, 3, CPU), QuerySums(3, 3, CPU)
    one.add(values, query)
    other.add(values[order], query[order])
    torch.testing.assert_close(one.result, other.result)
    assert not torch.equal(values, values[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_are_summed_in_float32(dtype: torch.dtype) -> None:
    sums = QuerySums(1, 1, CPU)
    for _ in range(3000):  # in bfloat16 the sum would stop at 256, in float16 at 2048
        sums.add(torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=torch.long))
    assert sums.result.dtype == torch.float32
    assert sums.result.item() == 3000.0


def test_a_result_can_be_read_before_any_token_came() -> None:
    assert QuerySums(2, 3, CPU).result.tolist() == [[0.0] * 3] * 2


def test_token_mean_weighs_each_token_alike_not_each_query() -> None:
    sums, n_tokens = torch.tensor([[3.0, 30.0], [1.0, 50.0]]), torch.tensor([3, 1])
    assert token_mean(sums, n_tokens).tolist() == [1.0, 20.0]
    assert token_mean(sums[:, 0], n_tokens).item() == 1.0
    assert token_mean(sums, n_tokens).dtype == torch.float64


def test_token_mean_of_no_token_is_nan() -> None:
    assert all(math.isnan(x) for x in token_mean(torch.zeros(2, 3), torch.tensor([0, 0])).tolist())


def test_token_mean_equals_the_mean_over_all_tokens() -> None:
    generator = torch.Generator().manual_seed(2)
    values, query = torch.rand(50, 6, generator=generator), torch.randint(0, 5, (50,), generator=generator)
    sums = QuerySums(5, 6, CPU)
    sums.add(values, query)
    expected = values.double().mean(dim=0)
    torch.testing.assert_close(token_mean(sums.result, torch.bincount(query, minlength=5)), expected, rtol=1e-6, atol=0)
