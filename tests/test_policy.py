"""Verdicts: each threshold from both sides, and what outweighs what."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from samples import domain_drift, domain_forecast, estimate, forecast, score, snapshot
from sts_callback.config import PolicyConfig
from sts_callback.metrics.statistics import p_of_rise
from sts_callback.policy import fewest_queries, holm, judge_drift, judge_forecast
from sts_callback.records import Decision, Score, Verdict

NAN = float("nan")
BARELY = 2.0**-10
# Powers of two throughout: sums and ratios at a threshold are exact.
POLICY = PolicyConfig({"law": 0.25}, min_drift=0.0625, patience=1, alpha=0.03125, max_unseen=0.5, max_masked_share=0.125)
HARM: dict[str, Any] = {"nll_change": estimate(0.5, 0.375, 0.625)}
UNSURE: dict[str, Any] = {"nll_change": estimate(0.25, -0.25, 0.75)}
NO_HARM: dict[str, Any] = {"nll_change": estimate(0.0, -0.125, 0.125)}
UNKNOWN: dict[str, Any] = {"nll_change": NAN}
SURE = {"p_worse": BARELY}


def judged_forecast(policy: PolicyConfig = POLICY, **domain: Any) -> Verdict:
    """Verdict on one protected domain."""
    return judge_forecast(forecast(domain_forecast("law", **domain)), policy)


def judged_drift(policy: PolicyConfig = POLICY, **domain: Any) -> Verdict:
    return judge_drift([snapshot(10, domain_drift("law", **(SURE | domain)))], policy)


# What decides between harm, none and unsure, with a budget of 0.25; the same for both judges.
HARM_CASES: list[tuple[tuple[float, float, float], Decision]] = [
    ((0.25, BARELY, 0.5), "no-go"),  # at the budget, and surely more than nothing
    ((0.25, 0.0, 0.5), "cannot tell"),  # could be nothing
    ((0.25 - BARELY, 0.125, 0.25 - BARELY / 2), "go"),  # surely within the budget
    ((0.25 - BARELY, 0.125, 0.25), "cannot tell"),  # could be at the budget
    ((0.5, 0.25, 0.75), "no-go"),
    ((0.5, -0.25, 1.25), "cannot tell"),
    ((-1.0, -2.0, 0.0), "go"),  # better
    ((-1.0, -3.0, 1.0), "cannot tell"),  # better, but could be beyond the budget
    ((0.0, 0.0, 0.0), "go"),
    ((0.0, -1.0, NAN), "cannot tell"),
    ((NAN, 0.0, 0.1), "cannot tell"),
    ((0.5, NAN, NAN), "cannot tell"),
    ((math.inf, math.inf, math.inf), "cannot tell"),
    ((NAN, NAN, NAN), "cannot tell"),
]


@pytest.mark.parametrize(("change", "decision"), HARM_CASES)
def test_harm_from_both_sides(change: tuple[float, float, float], decision: Decision) -> None:
    answer = {"nll_change": estimate(*change)}
    assert judged_forecast(sts_net=1.0, **answer).decision == decision
    assert judged_drift(relative_drift=0.5, **answer).decision == decision


@pytest.mark.parametrize("drift", [0.0, 0.0625 - BARELY, 0.0625, 0.5, NAN])
@pytest.mark.parametrize(
    ("answer", "decision"), [(HARM, "no-go"), (UNSURE, "cannot tell"), (NO_HARM, "go"), (UNKNOWN, "cannot tell")]
)
def test_harm_is_judged_by_answers_whether_or_not_the_layer_has_moved(
    answer: dict[str, Any], decision: Decision, drift: float
) -> None:
    assert judged_drift(relative_drift=drift, raw_drift=drift, **answer).decision == decision


@pytest.mark.parametrize(("answer", "decision"), [(HARM, "cannot tell"), (NO_HARM, "cannot tell"), (UNKNOWN, "cannot tell")])
def test_a_model_that_has_diverged_is_never_a_go_whoever_is_protected(answer: dict[str, Any], decision: Decision) -> None:
    law = domain_drift("law", n_queries=32, n_not_finite=3, **answer)
    assert judge_drift([snapshot(10, law)], POLICY).decision == decision
    kept, broken = domain_drift("law", n_queries=32, **NO_HARM), domain_drift("code", n_not_finite=1)
    unprotected = judge_drift([snapshot(10, kept, broken)], POLICY)
    assert (unprotected.decision, unprotected.threatened) == ("cannot tell", ("code",))
    assert judge_drift([snapshot(10, broken)], PolicyConfig()).decision == "cannot tell"


@pytest.mark.parametrize(("n_tokens", "n_masked", "decision"), [(0, 0, "cannot tell"), (174, 26, "cannot tell"), (175, 25, "go")])
def test_what_was_hardly_compared_is_no_go_unless_harm_shows(n_tokens: int, n_masked: int, decision: Decision) -> None:
    assert judged_drift(n_tokens=n_tokens, n_masked=n_masked, **NO_HARM).decision == decision
    assert judged_drift(n_tokens=n_tokens, n_masked=n_masked, **HARM).decision == "no-go"


def test_a_layer_that_training_cannot_move_tells_nothing_but_harm() -> None:
    stays = snapshot(10, domain_drift("law", n_queries=32, **NO_HARM), can_move=False)
    assert judge_drift([stays], POLICY).decision == "cannot tell"
    harmed = snapshot(10, domain_drift("law", n_queries=32, **HARM, **SURE), can_move=False)
    assert judge_drift([harmed], POLICY).decision == "no-go"
    assert judge_forecast(forecast(domain_forecast("law", **NO_HARM), can_move=False), POLICY).decision == "cannot tell"


@pytest.mark.parametrize("transfer", [score(-0.5), score(0.0), score(1.0), score(0.5, own=NAN), score(0.5, own=0.0)])
def test_no_transfer_however_low_promises_that_a_domain_stays(transfer: Score) -> None:
    assert judged_forecast(sts_net=transfer, **HARM).decision == "no-go"
    assert judged_forecast(sts_net=transfer, **UNSURE).decision == "cannot tell"
    assert judged_forecast(sts_net=transfer, **NO_HARM).decision == "go"


def test_a_score_that_could_not_be_had_tells_nothing() -> None:
    for tokens in ({"n_tokens": 0, "n_masked": 0}, {}):
        assert judged_forecast(sts_net=NAN, **tokens, **HARM).decision == "cannot tell"


@pytest.mark.parametrize(("n_masked", "decision"), [(25, "no-go"), (26, "cannot tell")])  # of 200: 12.5 % and 13 %
def test_too_many_sinks_make_a_forecast_unsure(n_masked: int, decision: Decision) -> None:
    verdict = judged_forecast(sts_net=0.5, n_masked=n_masked, n_tokens=200 - n_masked, **HARM)
    assert verdict.decision == decision
    assert ("13% of its tokens are attention sinks, more than 12%" in verdict.reasons["law"]) == (decision == "cannot tell")


@pytest.mark.parametrize(("noise", "decision"), [(0.00625, "no-go"), (0.0064, "cannot tell")])
def test_noise_above_a_tenth_of_what_counts_as_movement_makes_a_forecast_unsure(noise: float, decision: Decision) -> None:
    record = forecast(domain_forecast("law", sts_net=0.5, **HARM), noise_floor=noise)
    verdict = judge_forecast(record, POLICY)
    assert verdict.decision == decision
    assert ("unchanged weights alone drift by 0.6%; drift from 6% counts" in verdict.reasons["law"]) == (
        decision == "cannot tell"
    )


@pytest.mark.parametrize(
    ("sae_error_share", "decision"), [(0.5, "go"), (0.5 + BARELY, "not covered"), (1.0, "not covered"), (NAN, "go")]
)
def test_a_change_that_the_sae_can_not_express_is_no_promise_of_no_harm(sae_error_share: float, decision: Decision) -> None:
    stays, harmless = (
        judged_forecast(sae_error_share=sae_error_share),
        judged_forecast(sts_net=1.0, sae_error_share=sae_error_share, **NO_HARM),
    )
    moved = judged_drift(relative_drift=0.5, sae_error_share=sae_error_share, **NO_HARM)
    assert [stays.decision, harmless.decision, moved.decision] == [decision] * 3
    for verdict in (stays, harmless, moved):
        assert ("of the change lies outside the SAE" in verdict.reasons["law"]) == (decision == "not covered")
        assert verdict.threatened == (("law",) if decision == "not covered" else ())


@pytest.mark.parametrize(("answer", "decision"), [(HARM, "no-go"), (UNSURE, "cannot tell")])
def test_harm_and_doubt_stand_whatever_the_sae_can_express(answer: dict[str, Any], decision: Decision) -> None:
    assert judged_forecast(sts_net=1.0, sae_error_share=1.0, **answer).decision == decision
    assert judged_drift(relative_drift=0.5, sae_error_share=1.0, **answer).decision == decision


@pytest.mark.parametrize(
    ("drift", "words"),
    [
        ({"raw_drift": 0.5}, "drifted (raw drift 50.0%, at least 6%)"),
        ({"raw_drift": 0.5, "relative_drift": 0.25}, "drifted (drift 25.0%, at least 6%)"),
        ({"raw_drift": NAN}, "has not drifted (drift 1.0%, under 6%)"),
        ({"relative_drift": NAN}, "drift unknown"),
    ],
)
def test_a_reason_tells_how_far_it_has_moved(drift: dict[str, float], words: str) -> None:
    assert words in judged_drift(**drift, **HARM).reasons["law"]


@pytest.mark.parametrize(
    ("p_value", "decision"), [(0.03125, "no-go"), (0.03125 + BARELY, "cannot tell"), (1.0, "cannot tell"), (NAN, "cannot tell")]
)
def test_a_rise_alarms_only_if_the_test_passes(p_value: float, decision: Decision) -> None:
    assert judged_drift(relative_drift=0.5, p_worse=p_value, **HARM).decision == decision


def test_what_passes_alone_may_fail_among_many() -> None:
    def decided(n_domains: int) -> Verdict:
        names = "abcdefgh"[:n_domains]
        threat = domain_drift("a", n_queries=32, relative_drift=0.5, p_worse=0.0075, **HARM)
        others = [domain_drift(name, n_queries=32) for name in names[1:]]
        return judge_drift([snapshot(1, threat, *others)], PolicyConfig(dict.fromkeys(names, 0.25), patience=1, alpha=0.03))

    assert [decided(n).decision for n in (1, 4, 5, 8)] == ["no-go", "no-go", "cannot tell", "cannot tell"]  # 4 * 0.0075 = 0.03
    assert "p 0.030" in decided(4).reasons["a"]
    assert decided(5).threatened == ("a",)


def test_domains_that_are_not_protected_and_untested_ones_cost_no_power() -> None:
    threat = domain_drift("a", n_queries=32, relative_drift=0.5, p_worse=0.02, **HARM)
    others = [domain_drift("b", p_worse=NAN, nll=NAN, nll_change=NAN), domain_drift("c")]
    policy = PolicyConfig({"a": 0.25, "b": 0.25}, patience=1, alpha=0.03)
    assert judge_drift([snapshot(1, threat, *others)], policy).decision == "no-go"


@pytest.mark.parametrize(("n_queries", "decision"), [(4, "cannot tell"), (5, "no-go")])  # 2^-5 is alpha
def test_an_alarm_takes_enough_queries(n_queries: int, decision: Decision) -> None:
    verdict = judged_drift(relative_drift=0.5, n_queries=n_queries, **HARM)
    assert verdict.decision == decision
    assert ("4 queries are too few for an alarm, 5 are needed" in verdict.reasons["law"]) == (decision == "cannot tell")


def test_too_few_queries_do_not_stand_in_the_way_of_no_harm() -> None:
    assert judged_drift(relative_drift=0.5, n_queries=4, **NO_HARM).decision == "go"


@pytest.mark.parametrize(
    ("n_domains", "alpha", "n_queries"),
    [(1, 0.5, 1), (1, 0.03125, 5), (2, 0.03125, 6), (3, 0.03125, 7), (1, 0.01, 7), (5, 0.01, 9), (0, 0.01, 7)],
)
def test_fewest_queries_by_powers_of_two(n_domains: int, alpha: float, n_queries: int) -> None:
    assert fewest_queries(PolicyConfig({str(i): 0.1 for i in range(n_domains)}, alpha=alpha)) == n_queries


@pytest.mark.parametrize("n_domains", [1, 5, 20])
def test_fewest_queries_suffice_and_one_fewer_does_not(n_domains: int) -> None:
    policy = PolicyConfig({str(i): 0.1 for i in range(n_domains)})
    fewest = fewest_queries(policy)
    for n_queries, is_found in ((fewest, True), (fewest - 1, False)):
        p_values = dict.fromkeys(policy.budgets, 1.0) | {"0": p_of_rise(torch.ones(n_queries))}
        assert (holm(p_values)["0"] <= policy.alpha) == is_found


def test_holm_by_hand() -> None:
    """Of 0.01, 0.04, 0.03, 0.005 in order: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not fall below 0.06."""
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06), "d": pytest.approx(0.02)}
    assert list(found) == ["a", "b", "c", "d"]


def test_holm_of_one_of_none_and_of_unknown_ones() -> None:
    assert holm({"a": 0.02}) == {"a": 0.02}
    assert holm({}) == {}
    found = holm({"a": 0.4, "b": NAN, "c": 0.9, "d": 0.01})
    assert math.isnan(found.pop("b"))
    assert found == {"a": pytest.approx(0.8), "c": pytest.approx(0.9), "d": pytest.approx(0.03)}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


@pytest.mark.slow  # the import takes seconds
def test_holm_equals_that_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for seed in range(20):
        p_values = np.random.default_rng(seed).uniform(0, 1, 7) ** 3
        found = list(holm({str(i): p for i, p in enumerate(p_values)}).values())
        assert found == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist(), abs=1e-12)


def test_false_alarms_among_several_domains_are_as_rare_as_promised() -> None:
    """If no domain has worsened, any alarm is false; tests of domains that share their queries' luck are the hard case."""
    rng, policy = np.random.default_rng(0), PolicyConfig(dict.fromkeys("abcde", 0.25), patience=1, alpha=0.1)

    def checked() -> Decision:
        shared = rng.normal(0, 1, 7)
        domains = []
        for name in policy.budgets:
            p_value = p_of_rise(torch.from_numpy(shared + rng.normal(0, 1, 7)))
            domains.append(domain_drift(name, n_queries=7, relative_drift=0.5, p_worse=p_value, **HARM))
        return judge_drift([snapshot(1, *domains)], policy).decision

    assert fewest_queries(policy) <= 7
    rate = np.mean([checked() == "no-go" for _ in range(300)])
    assert 0 < rate <= 0.1


def test_reasons_name_the_numbers() -> None:
    answer = "answer NLL +0.50 [+0.38, +0.62] nats a token, budget 0.25"
    before = judged_forecast(sts_net=score(0.75, 0.625, 0.875), **HARM).reasons["law"]
    assert answer in before and "transfer 75%, 62% to 88%" in before
    assert "transfer unknown" in judged_forecast(sts_net=score(0.5, own=NAN), **NO_HARM).reasons["law"]
    after = judged_drift(relative_drift=0.5, **HARM).reasons["law"]
    assert answer in after and "p under 0.001" in after and "50.0%" in after
    assert "p 0.031)" in judged_drift(relative_drift=0.5, p_worse=0.03125, **HARM).reasons["law"]
    assert "answer NLL unknown" in judged_drift(**UNKNOWN).reasons["law"]
    assert "answer NLL unknown" in judged_forecast(sts_net=0.5, **UNKNOWN).reasons["law"]


def test_a_forecast_is_of_step_0_and_a_check_of_its_own() -> None:
    assert judged_forecast().step == 0
    assert judge_drift([snapshot(step, domain_drift("law")) for step in (10, 20)], POLICY).step == 20


@pytest.mark.parametrize(("drift", "superseded"), [(0.0625 - BARELY, False), (0.0625, True), (0.5, True), (NAN, False)])
def test_the_training_datas_own_drift_supersedes_the_forecast(drift: float, superseded: bool) -> None:
    still, moved = (snapshot(10, domain_drift("law"), train=domain_drift("train", relative_drift=d)) for d in (0.0, drift))
    assert judge_drift([still, moved], POLICY).supersedes_forecast == superseded
    assert not judge_drift([moved, still], POLICY).supersedes_forecast
    assert not judged_forecast().supersedes_forecast


DRIFTS: dict[Decision, dict[str, Any]] = {
    "no-go": {"n_queries": 32, "relative_drift": 0.5, **HARM, **SURE},
    "cannot tell": {"n_queries": 32, "relative_drift": 0.5, **UNSURE},
    "not covered": {"n_queries": 32, "relative_drift": 0.5, "sae_error_share": 0.75, **NO_HARM},
    "go": {"n_queries": 32, "relative_drift": 0.01},
}


def _history(*moves: bool) -> list[Any]:
    return [snapshot(10 * i, domain_drift("law", **DRIFTS["no-go" if moved else "go"])) for i, moved in enumerate(moves, 1)]


@pytest.mark.parametrize(
    ("patience", "threat_at", "decision"),
    [
        (1, (True,), "no-go"),
        (1, (True, False), "go"),
        (2, (True,), "watch"),
        (2, (True, True), "no-go"),
        (2, (False, True), "watch"),
        (2, (True, False, True), "watch"),
        (2, (True, True, False), "go"),
        (3, (True, True), "watch"),
        (3, (False, True, True), "watch"),
        (3, (False, True, True, True), "no-go"),
    ],
)
def test_a_threat_alarms_once_it_has_held(patience: int, threat_at: tuple[bool, ...], decision: Decision) -> None:
    policy = PolicyConfig({"law": 0.25}, min_drift=0.0625, patience=patience)
    assert judge_drift(_history(*threat_at), policy).decision == decision


@pytest.mark.parametrize("other", ["cannot tell", "not covered", "go"])
def test_any_other_answer_breaks_a_threat(other: Decision) -> None:
    sure, unsure = (domain_drift("law", **DRIFTS[kind]) for kind in ("no-go", other))
    policy = PolicyConfig({"law": 0.25}, patience=2)
    assert judge_drift([snapshot(1, unsure), snapshot(2, sure)], policy).decision == "watch"
    assert judge_drift([snapshot(1, sure), snapshot(2, unsure)], policy).decision == other


def test_two_domains_that_take_turns_are_watched_each() -> None:
    policy = PolicyConfig({"a": 0.25, "b": 0.25}, patience=2)
    checks = [
        snapshot(i, *(domain_drift(n, **DRIFTS["no-go" if n == worse else "go"]) for n in "ab")) for i, worse in enumerate("ab")
    ]
    assert (judge_drift(checks, policy).decision, judge_drift(checks, policy).threatened) == ("watch", ("b",))


def _two_checks(*decisions: Decision) -> Verdict:
    """Verdict on domains a, b, ... that each deserve one decision; a watched one has become a threat only now."""
    names = "abcdef"[: len(decisions)]
    checks = []
    for newest in (False, True):
        kinds = ["no-go" if d == "watch" and newest else "go" if d == "watch" else d for d in decisions]
        checks.append(snapshot(1 + newest, *(domain_drift(n, **DRIFTS[k]) for n, k in zip(names, kinds, strict=True))))
    return judge_drift(checks, PolicyConfig(dict.fromkeys(names, 0.25), patience=2))


ORDER: tuple[Decision, ...] = ("no-go", "watch", "not covered", "cannot tell", "go")


@pytest.mark.parametrize(("graver", "lesser"), list(itertools.combinations(ORDER, 2)))
def test_of_two_domains_the_graver_decision_counts(graver: Decision, lesser: Decision) -> None:
    for decisions in ((graver, lesser), (lesser, graver)):
        verdict = _two_checks(*decisions)
        assert verdict.decision == graver
        assert verdict.threatened == ("ab"[decisions.index(graver)],)


@pytest.mark.parametrize(
    ("decisions", "expected", "threatened"),
    [
        (("go", "cannot tell", "not covered", "watch", "no-go"), "no-go", ("e",)),
        (("go", "go"), "go", ()),
        (("no-go", "go", "no-go"), "no-go", ("a", "c")),
        (("cannot tell", "watch", "cannot tell"), "watch", ("b",)),
        (("not covered", "cannot tell", "not covered"), "not covered", ("a", "c")),
    ],
)
def test_the_gravest_of_several_domains_decides(
    decisions: tuple[Decision, ...], expected: Decision, threatened: tuple[str, ...]
) -> None:
    verdict = _two_checks(*decisions)
    assert verdict.decision == expected
    assert verdict.threatened == threatened
    assert list(verdict.reasons) == list("abcdef"[: len(decisions)])


def test_the_gravest_of_several_forecasts_decides() -> None:
    worse, unsure = domain_forecast("a", sts_net=0.5, **HARM), domain_forecast("b", sts_net=0.5, **UNSURE)
    blind, stays = domain_forecast("c", sae_error_share=0.75), domain_forecast("d")
    for domains, expected in (
        ((worse, blind, unsure, stays), "no-go"),
        ((unsure, stays, blind), "not covered"),
        ((unsure, stays), "cannot tell"),
        ((stays,), "go"),
    ):
        found = judge_forecast(forecast(*domains), PolicyConfig({d.name: 0.25 for d in domains}))
        assert (found.decision, len(found.reasons)) == (expected, len(domains))


def test_each_domain_has_its_own_budget() -> None:
    domains = [domain_forecast(name, sts_net=0.5, nll_change=0.5) for name in ("a", "b")]
    assert judge_forecast(forecast(*domains), PolicyConfig({"a": 0.75, "b": 0.5})).threatened == ("b",)


def test_domains_that_are_not_protected_decide_nothing() -> None:
    record = forecast(domain_forecast("law"), domain_forecast("code", sts_net=0.5, **HARM))
    assert judge_forecast(record, POLICY).decision == "go"
    assert judge_drift([snapshot(1, domain_drift("law"), domain_drift("code", **DRIFTS["no-go"]))], POLICY).decision == "go"
    assert judge_forecast(record, PolicyConfig()) == Verdict("go", (), {}, 0)
