"""Products on a CPU: as exact as before, the setting is put back, and the user's own is left alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sts_callback.model import products
from sts_callback.model.products import are_exact, by_onednn, rounded_to
from sts_callback.model.undisturbed import undisturbed
from tiny import tiny_model

pytestmark = pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch has the setting since 2.9")

ONEDNN: Any = getattr(torch.backends.mkldnn, "matmul", None)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    are_exact.cache_clear()
    yield
    are_exact.cache_clear()


@contextlib.contextmanager
def set_by_the_user(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that rounds to bfloat16 once torch allows it, as those with AMX do."""
    real = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if ONEDNN.fp32_precision == "bf16":
            x, weight = x.bfloat16().float(), weight.bfloat16().float()
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize("n", [1, 7, 300])
def test_products_of_ours_are_those_of_float32(n: int) -> None:
    x, weight = torch.randn(n, 640), torch.randn(2048, 640)
    with undisturbed(tiny_model()):
        found = torch.nn.functional.linear(x, weight)
    exact = x.double() @ weight.double().T
    assert (found.double() - exact).norm() < 2e-6 * exact.norm()


def test_setting_is_put_back_also_after_an_error() -> None:
    before, seen = ONEDNN.fp32_precision, []
    with pytest.raises(ValueError, match="ours"), undisturbed(tiny_model()):
        seen.append(ONEDNN.fp32_precision)
        raise ValueError("ours")
    assert seen == ["bf16" if are_exact() else before]
    assert ONEDNN.fp32_precision == before
    assert torch.get_float32_matmul_precision() == "highest"  # raises where settings contradict one another


def test_processor_that_would_round_is_not_asked(rounding: None) -> None:
    before = ONEDNN.fp32_precision
    assert not are_exact()
    with by_onednn():
        assert ONEDNN.fp32_precision == before


@pytest.mark.parametrize("own", ["medium", "high"])
def test_choice_of_the_user_stays(own: str) -> None:
    with set_by_the_user(own):
        chosen = ONEDNN.fp32_precision
        with undisturbed(tiny_model()):
            assert ONEDNN.fp32_precision == chosen
        assert torch.get_float32_matmul_precision() == own


def test_ours_rounds_nothing_and_what_the_user_lets_round_is_told(rounding: None) -> None:
    assert rounded_to("cpu") is None
    with by_onednn():
        assert rounded_to("cpu") is None
    with set_by_the_user("medium"), by_onednn():
        assert rounded_to("cpu") == "bf16"


def test_a_processor_that_rounds_nothing_is_told_so_whatever_the_user_allows() -> None:
    if not are_exact():
        pytest.skip("this processor rounds")
    with set_by_the_user("medium"):
        assert rounded_to("cpu") is None


@pytest.mark.parametrize(("setting", "rounded"), [("highest", None), ("high", "tf32"), ("medium", "tf32")])
def test_a_gpu_has_a_setting_of_its_own(setting: str, rounded: str | None) -> None:
    with set_by_the_user(setting):
        assert rounded_to("cuda") == rounded


def test_without_onednn_a_cpu_rounds_nothing_whatever_other_devices_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # from now on torch has no answer for all devices
    try:
        assert rounded_to("cpu") is None
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_torch_without_the_setting_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_switch", lambda: None)
    assert not are_exact()
    with by_onednn():
        pass
    assert ONEDNN.fp32_precision in {"none", "ieee"}
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")  # there it is for all devices
    assert rounded_to("cpu") == "bf16"


@pytest.mark.parametrize("own", [{}, {"LRU_CACHE_CAPACITY": "7"}])
def test_less_code_is_kept_unless_the_user_has_said_how_much(monkeypatch: pytest.MonkeyPatch, own: dict[str, str]) -> None:
    seen, real = list[dict[str, str]](), products._error

    def error(n: int, seeded: torch.Generator) -> float:
        seen.append({name: os.environ[name] for name in products._CAPACITIES if name in os.environ})
        return real(n, seeded)

    for name in products._CAPACITIES:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(products, "_error", error)
    are_exact()
    assert seen[0] == (own or dict.fromkeys(products._CAPACITIES, str(products._MOST_KEPT)))
    assert {name: os.environ[name] for name in products._CAPACITIES if name in os.environ} == own


def test_asking_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    are_exact()
    assert torch.equal(torch.get_rng_state(), before)
