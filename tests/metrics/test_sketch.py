"""Sketches: linear, and squared distances are kept on average."""

from __future__ import annotations

import pytest
import torch

from sts_callback.metrics.sums import SKETCH_WIDTH, sketch


def vectors(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_vector_is_kept_as_a_few_numbers_in_single_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = sketch(vectors(5, 300).to(dtype))
        assert (found.shape, found.dtype) == ((5, SKETCH_WIDTH), torch.float32)


def test_of_nothing_there_is_nothing() -> None:
    assert torch.equal(sketch(torch.zeros(3, 40)), torch.zeros(3, SKETCH_WIDTH))
    assert sketch(torch.zeros(0, 40)).shape == (0, SKETCH_WIDTH)


def test_equal_vectors_have_equal_sketches_at_every_visit_and_others_have_others() -> None:
    x = vectors(4, 100)
    assert torch.equal(sketch(x), sketch(x.clone()))
    assert torch.equal(sketch(x[[2]].expand(2, -1))[0], sketch(x[[2]].expand(2, -1))[1])
    assert not torch.allclose(sketch(x[:1]), sketch(x[1:2]))


def test_the_random_state_of_others_is_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sketch(vectors(2, 10))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_sketch_of_a_difference_is_the_difference_of_the_sketches() -> None:
    one, other = vectors(6, 100), vectors(6, 100, seed=1)
    assert torch.allclose(sketch(one - other), sketch(one) - sketch(other), atol=1e-4)
    assert torch.allclose(sketch(2.5 * one), 2.5 * sketch(one), atol=1e-4)


@pytest.mark.parametrize("d", [64, 640, 2000])
def test_squared_lengths_are_right_on_average_and_each_to_about_a_fifth(d: int) -> None:
    x = vectors(2000, d) * torch.linspace(0.1, 3, d)  # some directions matter more
    ratios = sketch(x).square().sum(dim=1) / x.square().sum(dim=1)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.06)
    assert float(ratios.std()) < 0.3


def test_squared_lengths_are_right_on_average_over_projections() -> None:
    """One vector, seen by the rows of many projections: each vector of a basis is projected by other numbers."""
    ratios = sketch(torch.eye(5000)).square().sum(dim=1)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.01)
    assert float(ratios.std()) == pytest.approx((2 / SKETCH_WIDTH) ** 0.5, rel=0.05)


def test_a_part_of_a_distance_is_seen_as_that_part() -> None:
    whole = vectors(500, 400)
    part = torch.cat([whole[:, :100], torch.zeros(500, 300)], dim=1)
    share = float(sketch(part).square().sum() / sketch(whole).square().sum())
    assert share == pytest.approx(0.25, abs=0.05)
