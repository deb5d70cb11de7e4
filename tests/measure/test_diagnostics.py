"""The doctor: each finding at pass, warn and refuse, then whole patients: right, wrong and random SAEs, too few queries."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from torch import nn

from samples import EXAMINED, timeless
from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.data.probes import ProbeSet, Query
from sts_callback.errors import CannotTell, SaeError
from sts_callback.measure import diagnostics
from sts_callback.measure.accumulators import ZERO_SHOT, ProbeStats
from sts_callback.measure.monitor import Monitor
from sts_callback.measure.sae_reader import Fit
from sts_callback.measure.scoring import FILLER
from sts_callback.metrics.statistics import detectable_rise
from sts_callback.metrics.sums import SKETCH_WIDTH, SparseActs
from sts_callback.model.sae import SaeEncoder, load_encoder
from sts_callback.records import Check, Status
from tiny import D_MODEL, N_LAYERS, bos_tokenizer, rotated_sae, rows, tiny_model

NAN = float("nan")
GOOD = Fit(n_tokens=200, fvu=0.2, l0=50.0, dead_fraction=0.1)
LAYERS = {0: 0.5, 1: 0.4, 2: 0.2, 3: 0.3}
POLICY = PolicyConfig({"law": 0.5}, min_drift=0.1, alpha=0.03125, max_masked_share=0.125)


@functools.cache
def encoder() -> SaeEncoder:
    return load_encoder(rotated_sae(), "tiny", N_LAYERS)


def fit_check(
    name: str,
    fit: Fit = GOOD,
    by_layer: Mapping[int, float] = LAYERS,
    model_name: str = "acme/tiny-llama",
    **sae: Any,
) -> Check:
    """One check of an SAE that reads layer 2."""
    found = diagnostics.fit_checks(dataclasses.replace(encoder(), **sae), fit, 2, by_layer, model_name)
    return next(check for check in found if check.name == name)


def test_nothing_is_the_matter_with_a_good_fit() -> None:
    checks = diagnostics.fit_checks(
        dataclasses.replace(encoder(), trained_on="tiny-llama", nominal_l0=50.0), GOOD, 2, LAYERS, "acme/tiny-llama"
    )
    assert [(check.name, check.status, check.remedy) for check in checks] == [
        (name, "pass", "") for name in ("explained variance", "layer", "L0", "silent features", "trained on")
    ]


@pytest.mark.parametrize(
    ("fvu", "status", "found"),
    [
        (0.0, "pass", "100% of the variance of 200 tokens"),
        (0.3, "pass", "70% of"),
        (0.301, "warn", "70% of"),
        (0.5, "warn", "50% of"),
        (0.501, "refuse", "50% of"),
        (10.25, "refuse", "none: it leaves 10.2 times the variance"),
        (float("inf"), "refuse", "none"),
        (NAN, "warn", "unknown: a transcoder"),
    ],
)
def test_explained_variance(fvu: float, status: Status, found: str) -> None:
    check = fit_check("explained variance", dataclasses.replace(GOOD, fvu=fvu))
    assert check.status == status
    assert found in check.found
    assert bool(check.remedy) == (status != "pass")


@pytest.mark.parametrize(
    ("here", "elsewhere", "status"),
    [
        (0.2, 0.3, "pass"),
        (0.2, 0.2, "pass"),
        (0.5, 0.4, "pass"),  # 0.8 times
        (0.5, 0.399, "refuse"),
        (0.05, 0.031, "pass"),  # less than 0.8 times, but by less than 0.02
        (0.05, 0.029, "refuse"),
        (1e-13, 0.0, "pass"),  # rounding
    ],
)
def test_another_layer_must_fit_clearly_better_to_be_named(here: float, elsewhere: float, status: Status) -> None:
    check = fit_check("layer", by_layer={0: 1.5, 1: elsewhere, 2: here})
    assert check.status == status
    if status == "refuse":
        assert re.search(rf"layer 2 .*{here:.2f}.*layer 1 .*{elsewhere:.2f}", check.found)
        assert "hook_name" in check.remedy


@pytest.mark.parametrize(
    ("by_layer", "status"), [({2: 0.2}, "pass"), ({1: 0.2}, "warn"), ({0: NAN, 2: NAN}, "warn"), ({}, "warn")]
)
def test_a_layer_with_nothing_to_compare_is_no_reason_to_refuse(by_layer: dict[int, float], status: Status) -> None:
    assert fit_check("layer", by_layer=by_layer).status == status


@pytest.mark.parametrize(
    ("nominal", "status"),
    [
        (50.0, "pass"),
        (25.0, "pass"),  # half as many
        (100.0, "pass"),
        (24.9, "warn"),
        (101.0, "warn"),
        (12.5, "warn"),  # a quarter
        (200.0, "warn"),
        (12.4, "refuse"),
        (201.0, "refuse"),
    ],
)
def test_active_features_against_the_nominal_number(nominal: float, status: Status) -> None:
    check = fit_check("L0", nominal_l0=nominal)
    assert check.status == status
    assert check.found.startswith("50 active features a token")
    assert bool(check.remedy) == (status != "pass")


@pytest.mark.parametrize(("l0", "status"), [(6.4, "pass"), (6.5, "warn")])
def test_a_dictionary_that_is_not_sparse_is_worth_a_warning_where_nothing_is_stated(l0: float, status: Status) -> None:
    check = fit_check("L0", dataclasses.replace(GOOD, l0=l0), nominal_l0=None)
    assert check.status == status
    assert "its makers state no number" in check.found


def test_an_sae_that_fits_no_layer_is_refused() -> None:
    check = fit_check("layer", by_layer={0: 1.9, 1: 1.0, 2: 1.5})
    assert check.status == "refuse" and re.search(r"none.*\b1\b.*1\.00", check.found)


def test_an_sae_of_which_nothing_is_active_is_refused() -> None:
    assert fit_check("L0", dataclasses.replace(GOOD, l0=0.0), nominal_l0=50.0).status == "refuse"


@pytest.mark.parametrize(("dead_fraction", "status"), [(0.0, "pass"), (0.9, "pass"), (0.901, "warn")])
def test_silent_features(dead_fraction: float, status: Status) -> None:
    check = fit_check("silent features", dataclasses.replace(GOOD, dead_fraction=dead_fraction))
    assert (check.status, bool(check.remedy)) == (status, status == "warn")
    assert check.found.startswith(f"{dead_fraction:.0%} of 64 ") and "200 tokens" in check.found


@pytest.mark.parametrize(
    ("trained_on", "model_name", "status"),
    [
        ("google/gemma-3-270m", "google/gemma-3-270m", "pass"),
        ("gemma-3-270m", "/models/gemma-3-270m/", "pass"),
        ("google/gemma-3-270m", "google/Gemma-3-270m-it", "pass"),  # a tuned model of the same base
        ("gemma-2-2b", "google/gemma-3-270m", "warn"),
        ("gpt2-small", "gpt2", "pass"),
        (None, "gpt2", "warn"),
    ],
)
def test_the_model_that_the_makers_name(trained_on: str | None, model_name: str, status: Status) -> None:
    check = fit_check("trained on", model_name=model_name, trained_on=trained_on)
    assert (check.status, bool(check.remedy)) == (status, status == "warn")


def reading(
    n_queries: int = 32, *, rise: float = 0.0, n_masked: int = 0, n_counted: int = 100, has_head: bool = True
) -> ProbeStats:
    """NLL changes of +rise and -rise in turn by the neutral context, with one answer token a query."""
    signs = torch.tensor([1.0, -1.0]).repeat(n_queries)[:n_queries]
    zero_shot = torch.full((n_queries,), 2.0)
    return ProbeStats(
        n_tokens=torch.full((n_queries,), 10),
        n_masked=n_masked,
        n_not_finite=0,
        activity=torch.ones(n_queries, 4),
        sq_norm=torch.ones(n_queries),
        raw=torch.ones(n_queries, 3),
        raw_sq_norm=torch.ones(n_queries),
        shifts={},
        n_answer=torch.ones(n_queries, dtype=torch.int64),
        nll={ZERO_SHOT: zero_shot, FILLER: zero_shot + rise * signs} if has_head else {},
        right={name: torch.ones(n_queries, 1, dtype=torch.bool) for name in (ZERO_SHOT, FILLER)} if has_head else {},
        gradients=None,
        counted=torch.ones(n_counted, dtype=torch.bool),
        acts=SparseActs.of(torch.ones(2, 4)),
        sketches=torch.zeros(2, 2, SKETCH_WIDTH),
    )


def probe_check(name: str, policy: PolicyConfig = POLICY, noise_floor: float = 0.0, **readings: ProbeStats) -> Check:
    found = probe_checks({"train": reading(), "law": reading()} | readings, noise_floor, policy)
    return next(check for check in found if check.name == name)


def probe_checks(readings: dict[str, ProbeStats], noise_floor: float, policy: PolicyConfig) -> tuple[Check, ...]:
    """Answers of two bytes each."""
    query = Query((5,), (6,), (True,), answer_bytes=2)
    sets = [ProbeSet(name, (query,) * len(r.n_tokens), ((),), 0) for name, r in readings.items()]
    return diagnostics.probe_checks(readings, sets, noise_floor, policy, n_demonstrations=5)


def test_nothing_is_the_matter_with_good_probes() -> None:
    checks = probe_checks({"train": reading(), "law": reading()}, 0.0, POLICY)
    assert [(c.name, c.status, c.remedy) for c in checks] == [
        (name, "pass", "") for name in ("attention sinks", "noise floor", "alarm power")
    ]


@pytest.mark.parametrize(("n_masked", "status"), [(12, "pass"), (13, "warn")])  # of 100, with 12.5 % allowed
def test_attention_sinks_of_the_worst_set(n_masked: int, status: Status) -> None:
    check = probe_check("attention sinks", law=reading(n_masked=n_masked), code=reading(n_masked=2))
    assert (check.status, bool(check.remedy)) == (status, status == "warn")
    assert f"{n_masked}.0% of tokens" in check.found and "law" in check.found


@pytest.mark.parametrize(
    ("noise", "status"), [(0.0, "pass"), (0.01, "pass"), (0.0101, "refuse"), (0.1, "refuse"), (0.101, "refuse")]
)
def test_noise_floor_against_what_counts_as_movement(noise: float, status: Status) -> None:
    check = probe_check("noise floor", noise_floor=noise)
    assert (check.status, bool(check.remedy)) == (status, status != "pass")


@pytest.mark.parametrize(("n_queries", "status"), [(28, "pass"), (27, "warn"), (5, "warn"), (4, "refuse")])
def test_too_few_queries_for_any_alarm(n_queries: int, status: Status) -> None:
    check = probe_check("alarm power", law=reading(n_queries))
    assert check.status == status
    if status == "warn":
        assert check.remedy == f"fewer than 28 queries: law {n_queries}"
    if status == "refuse":
        needed = "an alarm for one of 1 protected domains at one of 10 checks at alpha 0.03125 takes 5"
        assert check.found == f"queries: law 4; {needed}"


def test_more_protected_domains_take_more_queries() -> None:
    policy = dataclasses.replace(POLICY, budgets=dict.fromkeys(("law", "code", "maths", "poems"), 0.5))
    few = {name: reading(5) for name in policy.budgets}
    check = probe_check("alarm power", policy, **(few | {"law": reading(6)}))
    assert (check.status, check.found.split(";")[0]) == ("refuse", "queries: code 5, maths 5, poems 5")
    assert probe_check("alarm power", policy, **dict.fromkeys(policy.budgets, reading(6))).status == "warn"


@pytest.mark.parametrize(("scatter", "status"), [(0.0, "pass"), (0.3, "pass"), (0.4, "warn"), (5.0, "warn")])
def test_answers_that_scatter_hide_a_rise_within_the_budget(scatter: float, status: Status) -> None:
    check = probe_check("alarm power", law=reading(rise=scatter))
    assert check.status == status
    assert ("takes about: law " in check.remedy) == (status == "warn")


@pytest.mark.parametrize("n_domains", [1, 2, 4])
def test_the_smallest_rise_is_that_of_the_test_at_the_standard_error_of_the_neutral_change(n_domains: int) -> None:
    """+-0.5 in 32 queries: variance 32/31 * 0.25, so the standard error of their mean is 0.5 / sqrt(31)."""
    names = ["law", "code", "maths", "poems"][:n_domains]
    policy = dataclasses.replace(POLICY, budgets=dict.fromkeys(names, 0.5))
    check = probe_check("alarm power", policy, **{name: reading(rise=0.5) for name in names})
    shown = float(check.found.rsplit(" ", maxsplit=3)[1])  # 0.44 (budget 0.5)
    assert shown == pytest.approx(0.25 + detectable_rise(0.5 / 31**0.5, 32, 0.003125 / n_domains), abs=0.03)


@pytest.mark.parametrize(("n_flipped", "status"), [(0, "pass"), (2, "warn")])
def test_power_is_that_of_each_budget_in_its_own_unit(n_flipped: int, status: Status) -> None:
    """Bits: the spread in nats by ln 2, over two bytes. Points: prose in front turns two answers of 32 wrong, one right."""
    right = {name: torch.ones(32, 1, dtype=torch.bool) for name in (ZERO_SHOT, FILLER)}
    right[FILLER][:n_flipped] = False
    right[ZERO_SHOT][31] = n_flipped == 0
    policy = dataclasses.replace(POLICY, budgets={"law": "1 bits/byte", "code": "4 points"})
    check = probe_check("alarm power", policy, law=reading(rise=0.5), code=dataclasses.replace(reading(), right=right))
    assert check.status == status
    assert ("takes about: code " in check.remedy and "law" not in check.remedy) == (status == "warn")
    found = re.fullmatch(
        r".*: law ([\d.]+) bits/byte \(budget 1 bits/byte\), code ([\d.]+) points \(budget 4 points\)", check.found
    )
    assert found is not None
    in_bits = 0.5 + detectable_rise(0.5 / math.log(2) / 2 / 31**0.5, 32, 0.003125 / 2)
    assert float(found[1]) == pytest.approx(in_bits, abs=0.01)
    changes = np.array([100.0] * 2 + [-100.0] + [0.0] * 29) * (n_flipped > 0)
    in_points = 2 + detectable_rise(changes.std(ddof=1) / 32**0.5, 32, 0.003125 / 2)
    assert float(found[2]) == pytest.approx(in_points, abs=0.4)


def test_only_weak_domains_are_named() -> None:
    policy = dataclasses.replace(POLICY, budgets={"law": 0.5, "code": 0.5})
    check = probe_check("alarm power", policy, law=reading(rise=5.0), code=reading(rise=0.1))
    assert check.remedy.startswith("a GO may miss harm of that size; to find harm as small as the budget takes about: law n_que")
    assert re.search(r"about: law n_queries=\d+ \(\d+ rows\) or a budget of [\d.]+$", check.remedy)
    assert check.brief.startswith("Few queries: a check may miss harm as large as the budget to law; sts-callback doctor tells")
    assert not probe_check("alarm power", policy, law=reading(rise=0.1), code=reading(rise=0.1)).brief


@pytest.mark.parametrize("what", ["queries", "budget"])
def test_what_is_said_to_be_enough_is_enough_and_less_is_not(what: str) -> None:
    """Changes of +-0.4, in any number of queries; the bootstrap's error of a standard error is a few percent."""
    weak = probe_check("alarm power", law=reading(rise=0.4))
    said = re.search(r"law n_queries=(\d+) \((\d+) rows\) or a budget of ([\d.]+)$", weak.remedy)
    assert said is not None
    n, n_rows, budget = int(said[1]), int(said[2]), float(said[3])
    assert n > 32 and n_rows == n + 5 and budget > 0.5

    def status(share: float) -> Status:
        n_queries, limit = (round(share * n), 0.5) if what == "queries" else (32, share * budget)
        policy = dataclasses.replace(POLICY, budgets={"law": limit})
        return probe_check("alarm power", policy, law=reading(n_queries, rise=0.4)).status

    assert (status(1.1), status(0.9)) == ("pass", "warn")


def test_no_budget_of_more_points_than_there_are_is_named() -> None:
    right = {name: torch.ones(6, 1, dtype=torch.bool) for name in (ZERO_SHOT, FILLER)}
    right[FILLER][:3] = False
    policy = dataclasses.replace(POLICY, budgets={"law": "4 points"})
    check = probe_check("alarm power", policy, law=dataclasses.replace(reading(6), right=right))
    assert re.search(r"law n_queries=\d+ \(\d+ rows\);", check.remedy)


def test_answers_that_are_not_finite_are_helped_by_no_number_of_queries() -> None:
    check = probe_check("alarm power", law=reading(rise=NAN))
    assert (check.status, "look at the answers of law: their NLL is NaN" in check.remedy) == ("warn", True)


@pytest.mark.parametrize(("budgets", "found"), [({}, "no domain is protected"), ({"code": 0.1}, "no domain is protected")])
def test_without_a_protected_domain_there_is_nothing_to_alarm_for(budgets: dict[str, float], found: str) -> None:
    check = probe_check("alarm power", dataclasses.replace(POLICY, budgets=budgets))
    assert (check.status, check.found) == ("warn", found)


def test_without_a_head_there_is_no_harm_to_measure() -> None:
    check = probe_check("alarm power", law=reading(has_head=False))
    assert check.status == "warn"
    assert "no language-model head" in check.found


def test_costs_are_told() -> None:
    sets = [ProbeSet(name, (Query((5,), (6,), (True,)),) * 12, ((9,),), 0) for name in ("train", "law")]
    check = diagnostics.cost_check(encoder(), sets, seconds=8.0)
    assert (check.status, check.remedy) == ("pass", "")
    assert re.search(r"\b20 s\b.*\b4 s\b.*\b0 MiB\b.*\b24 queries", check.found)


def test_processes() -> None:
    for n, is_sharded, status in ((1, False, "pass"), (4, False, "pass"), (4, True, "warn")):
        check = diagnostics.process_check(n, is_sharded=is_sharded)
        assert (check.status, bool(check.remedy)) == (status, is_sharded)
        assert n == 1 or check.found.startswith("4")


@functools.cache
def fitted_sae(layer: int, hook_layer: int) -> SAE[Any]:
    """An SAE of half the dimensions, those that vary most at one layer of the tiny model, that says it reads `hook_layer`."""
    model, tokenizer = tiny_model(), bos_tokenizer()
    texts = [row["prompt"] for subject in ("sums", "poems") for row in rows(30, subject, seed=100)]  # others than are measured
    with torch.no_grad():
        x = torch.cat(
            [
                model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[layer + 1][0]
                for text in texts
            ]
        )
    _, _, directions = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    kept = directions[: D_MODEL // 2]
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_MODEL, apply_b_dec_to_input=True))
    sae.W_enc.data = torch.cat([kept.T, -kept.T], dim=1).contiguous()
    sae.W_dec.data = torch.cat([kept, -kept]).contiguous()
    sae.b_enc.data.zero_()
    sae.b_dec.data = x.mean(dim=0)
    sae.cfg.metadata.hook_name = f"blocks.{hook_layer}.hook_resid_post"
    return sae


@functools.cache
def random_sae(seed: int) -> SAE[Any]:
    """Of the same shape, with random weights."""
    sae, generator = rotated_sae(), torch.Generator().manual_seed(seed)
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
        parameter.data = torch.randn(parameter.shape, generator=generator) / D_MODEL**0.5
    return sae


def patient(sae: SAE[Any], n_queries: int = 12, model: nn.Module | None = None) -> Monitor:
    config = ProbeConfig(n_queries=n_queries, n_features=8)
    domains = {"poems": rows(40, "poems", seed=50)}
    shared: dict[str, Any] = {"sae": sae, "train_data": rows(40), "domains": domains, "config": config, "progress": False}
    return Monitor(tiny_model() if model is None else model, bos_tokenizer(), **shared)


PROTECT = PolicyConfig({"poems": 0.1})


def examined(monitor: Monitor, policy: PolicyConfig = PROTECT) -> dict[str, Check]:
    return {check.name: check for check in monitor.examine(policy)}


def refused(checks: Mapping[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == "refuse"}


@pytest.mark.parametrize("layer", [1, 2])
def test_the_right_sae_is_passed(layer: int) -> None:
    checks = examined(patient(fitted_sae(layer, layer)))
    assert refused(checks) == set()
    assert checks["layer"].status == checks["explained variance"].status == "pass"
    assert list(checks) == EXAMINED


@pytest.mark.parametrize(("layer", "hook_layer"), [(1, 2), (1, 3), (2, 1), (3, 0)])
def test_an_sae_that_reads_a_wrong_layer_is_refused_and_the_right_one_named(layer: int, hook_layer: int) -> None:
    monitor = patient(fitted_sae(layer, hook_layer))
    checks = examined(monitor)
    assert "layer" in refused(checks)
    assert f"reads layer {hook_layer}" in checks["layer"].found
    assert f"fits layer {layer} better" in checks["layer"].found
    with pytest.raises(CannotTell, match=rf"layer: reads layer {hook_layer} .* but fits layer {layer} better"):
        monitor.forecast()


@pytest.mark.parametrize("seed", range(3))
def test_a_random_sae_is_refused(seed: int) -> None:
    monitor = patient(random_sae(seed))
    checks = examined(monitor)
    assert "explained variance" in refused(checks)
    assert "alarm power" not in checks  # nothing is measured with it
    with pytest.raises(CannotTell, match=r"explained variance: .* take an SAE that was trained on this model"):
        monitor.forecast()


def test_an_sae_of_another_model_is_refused() -> None:
    other = Monitor(
        tiny_model(seed=1),
        bos_tokenizer(),
        sae=fitted_sae(1, 1),
        train_data=rows(40),
        domains={"poems": rows(40, "poems", seed=50)},
        config=ProbeConfig(n_queries=12, n_features=8),
        progress=False,
    )
    assert "explained variance" in refused(examined(other))


def test_an_sae_of_another_width_is_an_error_of_the_input() -> None:
    monitor = patient(rotated_sae(d_in=16))
    with pytest.raises(SaeError, match="width 16"):
        monitor.examine(PROTECT)


@pytest.mark.parametrize(("n_queries", "is_refused"), [(4, True), (5, False)])
def test_too_few_queries_are_refused(n_queries: int, is_refused: bool) -> None:
    checks = examined(patient(fitted_sae(1, 1), n_queries))
    assert ("alarm power" in refused(checks)) == is_refused


def test_an_examination_leaves_the_model_and_random_state_as_found() -> None:
    model = tiny_model().train()
    monitor = patient(fitted_sae(1, 1), model=model)
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    monitor.examine(PROTECT)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.named_parameters())


def test_an_examination_stands_in_no_forecasts_way() -> None:
    monitor = patient(fitted_sae(1, 1))
    monitor.examine(PROTECT)
    one, other = monitor.forecast(), patient(fitted_sae(1, 1)).forecast()
    assert timeless(one) == timeless(other)


def test_a_forecast_finds_the_power_that_an_examination_finds() -> None:
    monitor = patient(fitted_sae(1, 1))
    power = examined(monitor)["alarm power"]
    assert (power.status, monitor.forecasts(PROTECT)[0].checks[-1]) == ("warn", power)
    more_looks = monitor.forecasts(PROTECT, 100)[0].checks[-1]
    more, fewer = (float(check.found.rsplit(" ", maxsplit=3)[1]) for check in (more_looks, power))
    assert more > fewer  # each check has less of the error to spend
    assert "alarm power" not in {check.name for check in monitor.forecasts(PolicyConfig({}))[0].checks}
