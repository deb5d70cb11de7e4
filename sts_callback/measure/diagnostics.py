"""Checks of the SAE and the probes before a forecast. Each passes, warns or refuses, and says what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sts_callback.config import DIGITS, N_LOOKS, Budget, PolicyConfig, Unit
from sts_callback.data.probes import ProbeSet
from sts_callback.errors import CannotTell, ModelError
from sts_callback.measure.accumulators import ZERO_SHOT, ProbeStats
from sts_callback.measure.runner import Context, ProbeRunner
from sts_callback.measure.sae_reader import Fit
from sts_callback.measure.scoring import FILLER
from sts_callback.metrics.statistics import detectable_rise, queries_for_rise, resampled_ratios
from sts_callback.model.encoder import Encoder, RawActivations
from sts_callback.model.registry import base_name
from sts_callback.model.sae import SaeEncoder
from sts_callback.model.self_test import Findings
from sts_callback.policy import NOISE_MARGIN
from sts_callback.power import ENOUGH_QUERIES, fewest_queries, power_needed, short_of_queries
from sts_callback.records import POWER, Check, Status

WARN_UNEXPLAINED, REFUSE_UNEXPLAINED = 0.3, 0.5
"""Fraction of variance unexplained at which to warn and to refuse. Published SAEs leave 0.1 to 0.3."""
WARN_L0, REFUSE_L0 = 2.0, 4.0
"""Factor by which L0 may differ from its nominal value. Texts differ by less than two, other models by more."""
DENSE = 0.1
"""If a token activates a larger share of the features, the SAE is not sparse. Published SAEs stay below 0.02."""
OTHER_LAYER = 0.8, 0.02
"""An SAE fits another layer better if its FVU there is below this multiple, and lower by this difference."""


def examined_fits(
    runner: ProbeRunner, sets: Sequence[ProbeSet], zero_shot: Context, model_name: str
) -> tuple[list[Fit], list[tuple[Check, ...]]]:
    """Calibrate a runner and check how its SAEs fit.

    Args:
        runner: reads the model.
        sets: all probes; the first set is read at other layers too.
        zero_shot: the context without demonstrations.
        model_name: name of the measured model.

    Raises:
        SaeError: if an SAE has another width than the model.

    """
    fits = runner.calibrate(sets, zero_shot)
    checks: list[tuple[Check, ...]] = []
    for sae_reader, fit in zip(runner.sae_readers, fits, strict=True):
        encoder, layer = sae_reader.encoder, sae_reader.point.layer
        found = (
            (Check("SAE", "pass", f"none: raw activations after layer {layer}", ""),)
            if isinstance(encoder, RawActivations)
            else fit_checks(encoder, fit, layer, runner.fit_by_layer(sets[0], zero_shot, sae_reader), model_name)
        )
        checks.append((*found, *_self_test_checks(runner.findings)))
    return fits, checks


def require_fit(checks: Sequence[Sequence[Check]]) -> None:
    """Refuse to measure with SAEs that do not fit.

    Raises:
        CannotTell: if an SAE is refused. The message says why and what to do.

    """
    if refused := [check for one in checks for check in one if check.status == "refuse"]:
        raise CannotTell(" ".join(f"{c.name}: {c.found}. {c.remedy}" for c in refused))


def require_finite(name: str, stats: ProbeStats) -> None:
    """Refuse an untrained model that gives NaN or infinite numbers.

    Args:
        name: name of the set that was read.
        stats: what was read.

    Raises:
        ModelError: if there are such numbers.

    """
    n_answers = 0 if not stats.nll else int((~stats.zero_shot_nll.isfinite()).sum())
    if stats.n_not_finite or n_answers:
        raise ModelError(
            f"model: on {name}, activations of {stats.n_not_finite} tokens and the NLL of {n_answers} answers are NaN or "
            "infinite before training; look at its weights, or load it in float32 or bfloat16 in place of float16."
        )


def fit_checks(encoder: SaeEncoder, fit: Fit, layer: int, by_layer: Mapping[int, float], model_name: str) -> tuple[Check, ...]:
    """Check whether an SAE fits a model at its hook point.

    Args:
        encoder: the SAE.
        fit: how it fits there, on the user's texts without attention sinks.
        layer: layer of the hook point.
        by_layer: the SAE's fraction of variance unexplained (FVU) at each layer.
        model_name: name of the measured model.

    """
    source = "take an SAE that was trained on this model; `sts-callback saes --model ID` lists them"
    return (
        _variance(fit, source),
        _place(layer, by_layer),
        _sparsity(encoder, fit, source),
        Check(
            "silent features",
            "warn" if fit.dead_fraction > 0.9 else "pass",
            f"{fit.dead_fraction:.0%} of {encoder.d_sae} active on none of {fit.n_tokens} tokens",
            "give more or longer texts, or a narrower SAE" if fit.dead_fraction > 0.9 else "",
        ),
        _origin(encoder, model_name),
    )


def probe_checks(
    readings: Mapping[str, ProbeStats], sets: Sequence[ProbeSet], noise_floor: float, policy: PolicyConfig, n_demonstrations: int
) -> tuple[Check, ...]:
    """Whether probes can tell movement and harm from nothing.

    Args:
        readings: of all sets under `FILLER`, whose effect stands in for that of a training that changes nothing.
        sets: the same sets.
        noise_floor: relative drift of unchanged weights.
        policy: the thresholds that probes must be able to reach.
        n_demonstrations: rows of a domain that are kept as examples.

    """
    masked = {name: r.n_masked / max(1, len(r.counted)) for name, r in readings.items()}
    most = max(masked, key=lambda name: masked[name])
    too_many = masked[most] > policy.max_masked_share
    noisy: Status = "refuse" if noise_floor * NOISE_MARGIN > policy.min_drift else "pass"
    return (
        Check(
            "attention sinks",
            "warn" if too_many else "pass",
            f"at most {masked[most]:.1%} of tokens left out ({most})",
            "look at the texts of that domain: very short ones are mostly first tokens" if too_many else "",
        ),
        Check(
            "noise floor",
            noisy,
            f"unchanged weights drift by {noise_floor:.1e} in other batches; {policy.min_drift:.0%} counts as movement",
            "" if noisy == "pass" else "raise policy.min_drift, or measure in float32",
        ),
        power_check({s.name: neutral_error(readings[s.name], s, policy) for s in sets}, sets, policy, n_demonstrations),
    )


def neutral_error(reading: ProbeStats, probes: ProbeSet, policy: PolicyConfig) -> float | None:
    """Standard error of the harm that plain prose in front does to a set, which stands in for that of any check.

    Args:
        reading: of the set under `FILLER`.
        probes: the set.
        policy: with the protected domains and the units of their budgets.

    Returns:
        In the unit of the domain's budget; None where it is not protected, or there is no language-model head.

    """
    budget = policy.limits.get(probes.name)
    if budget is None or ZERO_SHOT not in reading.nll:
        return None
    taken, over = _harm_by_prose(budget.unit, reading, probes.answer_bytes)
    return float(resampled_ratios(taken, over, torch.arange(len(over))).std())


def power_check(
    errors: Mapping[str, float | None],
    sets: Sequence[ProbeSet],
    policy: PolicyConfig,
    n_demonstrations: int,
    n_looks: int = N_LOOKS,
) -> Check:
    """Whether the queries suffice to find harm of the size of each budget.

    Args:
        errors: of each set, see `neutral_error`.
        sets: all probes.
        policy: budgets and test.
        n_demonstrations: rows of a domain that are shown, not asked.
        n_looks: checks that share the error of the run.

    """
    wanted = {name: budget for name, budget in policy.limits.items() if name in errors}
    if not wanted:
        return Check(POWER, "warn", "no domain is protected", "name some with protect=")
    n_queries = {s.name: len(s.queries) for s in sets}
    if short := short_of_queries(n_queries, policy, fewest_queries(policy, n_looks)):
        found = f"queries: {_each(short)}; {power_needed(policy, n_looks).rstrip('.')}"
        return Check(POWER, "refuse", found, "give more rows, raise n_queries, or protect fewer domains")
    level = policy.alpha / n_looks / len(wanted)
    smallest, weak, unknown = list[str](), dict[str, str](), list[str]()
    for name, budget in wanted.items():
        error = errors[name]
        if error is None:
            return Check(POWER, "warn", "the model has no language-model head, so harm cannot be measured", "")
        rise = detectable_rise(error, n_queries[name], level)  # above half the budget, against which the test is
        smallest.append(f"{name} {_number(budget.value / 2 + rise, budget.unit)} (budget {budget.plain})")
        if not math.isfinite(rise):
            unknown.append(name)
        elif rise > budget.value / 2:
            n = queries_for_rise(budget.value / 2, error, n_queries[name], level)
            weak[name] = _enough(budget, rise, n, n_demonstrations)
    few = short_of_queries(n_queries, policy, ENOUGH_QUERIES)
    remedies = (
        [f"a GO may miss harm of that size; to find harm as small as the budget takes about: {_each(weak)}"] if weak else []
    )
    remedies += [f"look at the answers of {', '.join(unknown)}: their NLL is NaN or infinite"] if unknown else []
    remedies += [f"fewer than {ENOUGH_QUERIES} queries: {_each(few)}"] if few else []
    told = (
        "smallest harm that one check finds 4 times in 5, if training scatters the answers as much as plain prose in front of "
        f"them does (less, if it scatters them less); nats a token unless another unit is named: {', '.join(smallest)}"
    )
    brief = (
        f"Few queries: a check may miss harm as large as the budget to {', '.join(weak)}; sts-callback doctor tells how many "
        "rows it takes."
    )
    return Check(POWER, "warn" if remedies else "pass", told, "; ".join(remedies), brief if weak and not unknown else "")


def cost_check(encoder: Encoder, sets: Sequence[ProbeSet], seconds: float) -> Check:
    """Estimate what a forecast and a check will cost.

    Args:
        encoder: the SAE, if any.
        sets: all probes.
        seconds: time that two passes with answers over all of them took.

    """
    weights = f"SAE {encoder.n_bytes / 2**20:.0f} MiB; " if encoder.n_bytes else ""
    return Check(
        "cost",
        "pass",
        f"forecast about {2.5 * seconds:.0f} s, a check about {seconds / 2:.0f} s; {weights}"
        f"{sum(len(s.queries) for s in sets)} queries",
        "",
    )


def process_check(n_processes: int, is_sharded: bool) -> Check:
    """Say how many processes share the measurement, and whether the model is sharded."""
    if is_sharded:
        return Check(
            "processes", "warn", f"{n_processes}, parameters sharded", "forwards run whole, and no gradients are taken there"
        )
    if n_processes > 1:
        return Check("processes", "pass", f"{n_processes}, which share the probes", "")
    return Check("processes", "pass", "one", "")


def _self_test_checks(findings: Findings) -> tuple[Check, ...]:
    """Report what failed in the self-test, and what is done instead."""
    checks = []
    if not findings.cache:
        found = "with kept keys and values the model gives other activations than without"
        checks.append(Check("cache", "warn", found, "measured without, which takes longer"))
    if not findings.gradients:
        found = "a layer above the hook point passes none on, as int8 layers with dynamic activations do"
        checks.append(Check("gradients", "warn", found, "there is no gradient score; all else is as usual"))
    return tuple(checks)


def _variance(fit: Fit, source: str) -> Check:
    if math.isnan(fit.fvu):
        return Check("explained variance", "warn", "unknown: a transcoder does not reconstruct what it reads", "prefer an SAE")
    status: Status = "pass"
    if not fit.fvu <= WARN_UNEXPLAINED:
        status = "refuse" if not fit.fvu <= REFUSE_UNEXPLAINED else "warn"
    found = f"{1 - fit.fvu:.0%} of the variance of {fit.n_tokens} tokens"
    if not fit.fvu < 1:
        found = f"none: it leaves {fit.fvu:.1f} times the variance of {fit.n_tokens} tokens"
    return Check("explained variance", status, found, "" if status == "pass" else source)


def _place(layer: int, by_layer: Mapping[int, float]) -> Check:
    known = {index: left for index, left in by_layer.items() if not math.isnan(left)}
    if layer not in known:
        return Check("layer", "warn", "the fit at other layers is unknown", "")
    best = min(known, key=lambda index: known[index])
    if not known[best] < 1:
        return Check("layer", "refuse", f"fits none: the best is {best}, where it leaves {known[best]:.2f}", "see above")
    multiple, margin = OTHER_LAYER
    if known[best] < min(multiple * known[layer], known[layer] - margin):
        return Check(
            "layer",
            "refuse",
            f"reads layer {layer} (leaves {known[layer]:.2f}), but fits layer {best} better (leaves {known[best]:.2f})",
            "correct hook_name in its cfg.json, or take the SAE of this layer",
        )
    others = [left for index, left in known.items() if index != layer]
    found = f"{layer} (leaves {known[layer]:.2f}; the best other one {min(others):.2f})" if others else f"{layer}"
    return Check("layer", "pass", found, "")


def _sparsity(encoder: SaeEncoder, fit: Fit, source: str) -> Check:
    if encoder.nominal_l0 is None:
        dense = fit.l0 > DENSE * encoder.d_sae
        found = f"{fit.l0:.0f} of {encoder.d_sae} features active a token; its makers state no number"
        return Check("L0", "warn" if dense else "pass", found, "a dictionary that is not sparse fits anything" if dense else "")
    factor = max(fit.l0, 1e-9) / encoder.nominal_l0
    factor = max(factor, 1 / factor)
    status: Status = "refuse" if factor > REFUSE_L0 else "warn" if factor > WARN_L0 else "pass"
    found = f"{fit.l0:.0f} active features a token, {encoder.nominal_l0:.0f} nominal"
    return Check("L0", status, found, "" if status == "pass" else source)


def _origin(encoder: SaeEncoder, model_name: str) -> Check:
    made_for = encoder.trained_on
    if made_for is None:
        return Check("trained on", "warn", "the SAE does not name its model", "trust explained variance and layer above")
    one, other = base_name(made_for), base_name(model_name)
    if one in other or other in one:
        return Check("trained on", "pass", made_for, "")
    return Check("trained on", "warn", f"{made_for}, the model is {model_name}", "explained variance says how far it has moved")


def _enough(budget: Budget, rise: float, n_queries: int, n_demonstrations: int) -> str:
    """How many queries a budget takes, or which budget the queries there are; a test against half of it finds twice the rise."""
    digits = 10 ** DIGITS[budget.unit]
    larger = math.ceil(2 * rise * digits) / digits
    by_budget = "" if budget.unit == "points" and larger > 100 else f" or a budget of {_number(larger, budget.unit)}"
    return f"n_queries={n_queries} ({n_queries + n_demonstrations} rows){by_budget}"


def _harm_by_prose(unit: Unit, r: ProbeStats, answer_bytes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What plain prose in front takes from each answer, in a budget's unit, and over how many tokens or bytes."""
    if unit == "points":
        return 100 * (r.right[ZERO_SHOT].sum(dim=1) - r.right[FILLER].sum(dim=1)), r.n_answer
    risen = r.nll[FILLER] - r.nll[ZERO_SHOT]
    return (risen, r.n_answer) if unit == "nats/token" else (risen / math.log(2), torch.tensor(answer_bytes))


def _number(harm: float, unit: Unit) -> str:
    return f"{harm:.{DIGITS[unit]}f}" + ("" if unit == "nats/token" else f" {unit}")


def _each(n_queries: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {n}" for name, n in n_queries.items())
