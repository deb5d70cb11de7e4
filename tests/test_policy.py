"""Verdicts: each threshold from both sides, and what outweighs what."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from samples import answers, domain_drift, domain_forecast, estimate, forecast, rehearsal, score, snapshot
from sts_callback.config import N_LOOKS, PolicyConfig
from sts_callback.errors import ConfigError
from sts_callback.metrics.statistics import p_above
from sts_callback.policy import (
    Judgement,
    judge_check,
    judge_drift,
    judge_forecast,
    judge_rehearsal,
)
from sts_callback.power import fewest_queries
from sts_callback.records import Decision, DriftSnapshot, Score, State, Verdict
from sts_callback.records.rehearsal import Rehearsal

NAN = float("nan")
BARELY = 2.0**-10
# Powers of two throughout: sums and ratios at a threshold are exact.
POLICY = PolicyConfig({"law": 0.25}, min_drift=0.0625, max_unseen=0.5, max_masked_share=0.125)
LEVEL = 0.005  # of a check, as for ten looks
HARM: dict[str, Any] = answers(0.5, 0.125)
ON_COURSE: dict[str, Any] = answers(0.1875, 0.0625)
UNSURE: dict[str, Any] = answers(0.125, 1.0)
NO_HARM: dict[str, Any] = answers(0.0, 0.125)
UNKNOWN: dict[str, Any] = answers(NAN)
IN_CONTEXT: dict[str, dict[str, Any]] = {
    "harm": {"nll_change": estimate(0.5, 0.375, 0.625)},
    "unsure": {"nll_change": estimate(0.25, -0.25, 0.75)},
    "no harm": {"nll_change": estimate(0.0, -0.125, 0.125)},
    "unknown": {"nll_change": NAN},
}


def judged_forecast(policy: PolicyConfig = POLICY, **domain: Any) -> Verdict:
    """Verdict on one protected domain."""
    return judge_forecast(forecast(domain_forecast("law", **domain)), policy)


def judged_check(level: float = LEVEL, policy: PolicyConfig = POLICY, **domain: Any) -> Judgement:
    """The same by a check alone."""
    return judge_check(snapshot(10, domain_drift("law", **domain)), policy, level)["law"]


def p_of(answer: dict[str, Any], budget: float = 0.25) -> float:
    return p_above(answer["query_changes"], answer["query_answer_tokens"], budget / 2)


# What decides between harm, none and unsure before training, with a budget of 0.25.
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
def test_harm_in_context_from_both_sides(change: tuple[float, float, float], decision: Decision) -> None:
    assert judged_forecast(sts_net=1.0, nll_change=estimate(*change)).decision == decision


@pytest.mark.parametrize(
    ("answer", "decision", "state"),
    [
        (answers(0.25, 0.0625), "no-go", "over"),  # at the budget
        (answers(0.25 - BARELY, 0.0625), "no-go", "on course"),  # under it, and surely over half of it
        (answers(0.125, 0.0625), "go", "within"),  # at half of it
        (answers(0.0, 0.0625), "go", "within"),
        (answers(-1.0, 0.5), "go", "within"),  # better
        (answers(0.5, 2.0), "cannot tell", "inconclusive"),  # could be anything
        (answers(-1.0, 8.0), "cannot tell", "inconclusive"),  # better, but could be beyond the budget
        (answers(0.5, 1.0), "watch", "inconclusive"),  # p 0.02
        (answers(0.0), "go", "within"),  # all alike, as with unchanged weights
        (answers(0.25), "no-go", "over"),
        (UNKNOWN, "cannot tell", "inconclusive"),
        (answers(math.inf), "cannot tell", "inconclusive"),
        (NO_HARM | {"nll_change": estimate(0.0, NAN, NAN)}, "cannot tell", "inconclusive"),
    ],
)
def test_the_three_states_and_doubt(answer: dict[str, Any], decision: Decision, state: State) -> None:
    found = judged_check(**answer)
    assert (found.decision, found.state) == (decision, state)


@pytest.mark.parametrize(("answer", "state"), [(HARM, "over"), (ON_COURSE, "on course")])
def test_the_test_passes_at_its_level_and_not_below(answer: dict[str, Any], state: State) -> None:
    p_value = p_of(answer)
    assert 0 < p_value < LEVEL
    assert judged_check(p_value, **answer)[::2] == ("no-go", state)
    below = judged_check(p_value * (1 - 1e-9), **answer)
    assert (below.decision, below.state) == ("watch", "within" if state == "on course" else "inconclusive")


def test_a_check_with_no_error_to_spend_may_not_alarm() -> None:
    found = judged_check(0.0, **answers(0.5))  # its p-value is 0 as well
    assert found.decision == "watch" and "a check beyond the planned ones" in found.reason


@pytest.mark.parametrize(("factor", "decision"), [(1.01, "cannot tell"), (0.99, "watch")])
def test_a_domain_is_watched_from_one_in_twenty_on(factor: float, decision: Decision) -> None:
    """With 31 degrees of freedom the quantile of 0.95 is 1.6955: so many standard errors above half the budget."""
    spread = factor * 0.25 / 1.6955 * math.sqrt(31)
    assert judged_check(**answers(0.375, spread)).decision == decision
    assert judged_check(**answers(0.375, spread)).state == "inconclusive"


def test_of_two_queries_or_none_too_few_are_told_and_no_alarm_is_raised() -> None:
    assert judged_check(**answers(0.5, 0.0, n_queries=2)).decision == "cannot tell"
    for changes, n_tokens in (((2.0,), (4,)), ((), ())):
        few = {"nll_change": 0.5, "n_queries": len(changes), "query_changes": changes, "query_answer_tokens": n_tokens}
        assert judged_check(**few).decision == "cannot tell"


@pytest.mark.parametrize(("n_queries", "decision"), [(4, "cannot tell"), (5, "no-go")])
def test_an_alarm_takes_enough_queries(n_queries: int, decision: Decision) -> None:
    found = judged_check(**answers(0.5, BARELY, n_queries))
    assert found.decision == decision
    assert ("4 queries are too few for an alarm, 5 are needed" in found.reason) == (decision == "cannot tell")


def test_too_few_queries_do_not_stand_in_the_way_of_no_harm() -> None:
    assert judged_check(**answers(0.0, BARELY, 4)).decision == "go"


@pytest.mark.parametrize("drift", [0.0, 0.0625 - BARELY, 0.0625, 0.5, NAN])
@pytest.mark.parametrize("sae_error_share", [0.0, 1.0, NAN])
@pytest.mark.parametrize("place", [{}, {"n_tokens": 0, "n_masked": 0}, {"n_tokens": 10, "n_masked": 90}])
@pytest.mark.parametrize(
    ("answer", "decision"),
    [(HARM, "no-go"), (ON_COURSE, "no-go"), (UNSURE, "cannot tell"), (NO_HARM, "go"), (UNKNOWN, "cannot tell")],
)
def test_harm_is_judged_by_answers_whatever_was_seen_of_the_layer(
    answer: dict[str, Any], decision: Decision, place: dict[str, int], sae_error_share: float, drift: float
) -> None:
    """But a go takes that the layer could be looked at."""
    law = domain_drift("law", relative_drift=drift, raw_drift=drift, sae_error_share=sae_error_share, **place, **answer)
    for can_move in (True, False):
        unseen = place or not can_move
        found = judge_drift([snapshot(10, law, can_move=can_move)], POLICY)
        assert found.decision == ("cannot tell" if decision == "go" and unseen else decision)
        assert found.states["law"] == ("within" if answer is NO_HARM else found.states["law"])


@pytest.mark.parametrize("answer", [HARM, NO_HARM, UNKNOWN])
def test_a_model_that_has_diverged_is_never_a_go_whoever_is_protected(answer: dict[str, Any]) -> None:
    law = domain_drift("law", n_not_finite=3, **answer)
    verdict = judge_drift([snapshot(10, law)], POLICY)
    assert (verdict.decision, verdict.states) == ("cannot tell", {"law": "inconclusive"})
    kept, broken = domain_drift("law", **NO_HARM), domain_drift("code", n_not_finite=1)
    unprotected = judge_drift([snapshot(10, kept, broken)], POLICY)
    assert (unprotected.decision, unprotected.threatened) == ("cannot tell", ("code",))
    assert unprotected.states == {"law": "within"}
    assert judge_drift([snapshot(10, broken)], PolicyConfig()).decision == "cannot tell"


def test_what_was_hardly_seen_of_the_layer_qualifies_what_is_said_of_movement_alone() -> None:
    for tokens, doubt in (
        ({"n_tokens": 0, "n_masked": 0}, "none of its tokens could be compared"),
        ({"n_tokens": 174, "n_masked": 26}, "13% of its tokens are attention sinks, more than 12%"),
    ):
        found = judged_check(**tokens, **NO_HARM)
        assert f"within its budget of 0.25; drift unknown: {doubt}." in found.reason
    assert "drift unknown" not in judged_check(n_tokens=175, n_masked=25, **NO_HARM).reason
    stays = judge_check(snapshot(10, domain_drift("law", **NO_HARM), can_move=False), POLICY, LEVEL)["law"]
    assert "drift unknown: no weight at or below the layer that is read is trained" in stays.reason


@pytest.mark.parametrize(("sae_error_share", "told"), [(0.5, ""), (0.5 + BARELY, "50%"), (0.75, "75%"), (1.0, "all"), (NAN, "")])
def test_what_the_sae_can_not_express_is_told_and_changes_no_verdict(sae_error_share: float, told: str) -> None:
    harmless = judged_forecast(sts_net=1.0, sae_error_share=sae_error_share, **IN_CONTEXT["no harm"])
    kept = judged_check(relative_drift=0.5, sae_error_share=sae_error_share, **NO_HARM)
    assert (harmless.decision, kept.decision) == ("go", "go")
    for reason in (harmless.reasons["law"], kept.reason):
        assert ("outside the SAE" in reason) == bool(told)
        assert not told or f", {told} of it outside the SAE)" in reason


@pytest.mark.parametrize(("answer", "decision"), [("harm", "no-go"), ("unsure", "cannot tell")])
def test_harm_and_doubt_in_context_stand_whatever_the_sae_can_express(answer: str, decision: Decision) -> None:
    assert judged_forecast(sts_net=1.0, sae_error_share=1.0, **IN_CONTEXT[answer]).decision == decision


def test_a_layer_that_training_cannot_move_makes_no_forecast() -> None:
    record = forecast(domain_forecast("law", **IN_CONTEXT["no harm"]), can_move=False)
    assert judge_forecast(record, POLICY).decision == "cannot tell"


@pytest.mark.parametrize("transfer", [score(-0.5), score(0.0), score(1.0), score(0.5, own=NAN), score(0.5, own=0.0)])
def test_no_transfer_however_low_promises_that_a_domain_stays(transfer: Score) -> None:
    assert judged_forecast(sts_net=transfer, **IN_CONTEXT["harm"]).decision == "no-go"
    assert judged_forecast(sts_net=transfer, **IN_CONTEXT["unsure"]).decision == "cannot tell"
    assert judged_forecast(sts_net=transfer, **IN_CONTEXT["no harm"]).decision == "go"


def test_a_score_that_could_not_be_had_tells_nothing() -> None:
    for tokens in ({"n_tokens": 0, "n_masked": 0}, {}):
        assert judged_forecast(sts_net=NAN, **tokens, **IN_CONTEXT["harm"]).decision == "cannot tell"


@pytest.mark.parametrize(("n_masked", "decision"), [(25, "no-go"), (26, "cannot tell")])  # of 200: 12.5 % and 13 %
def test_too_many_sinks_make_a_forecast_unsure(n_masked: int, decision: Decision) -> None:
    verdict = judged_forecast(sts_net=0.5, n_masked=n_masked, n_tokens=200 - n_masked, **IN_CONTEXT["harm"])
    assert verdict.decision == decision
    assert ("13% of its tokens are attention sinks, more than 12%" in verdict.reasons["law"]) == (decision == "cannot tell")


@pytest.mark.parametrize(("noise", "decision"), [(0.00625, "no-go"), (0.0064, "cannot tell")])
def test_noise_above_a_tenth_of_what_counts_as_movement_makes_a_forecast_unsure(noise: float, decision: Decision) -> None:
    record = forecast(domain_forecast("law", sts_net=0.5, **IN_CONTEXT["harm"]), noise_floor=noise)
    verdict = judge_forecast(record, POLICY)
    assert verdict.decision == decision
    assert ("unchanged weights alone drift by 0.6%; drift from 6% counts" in verdict.reasons["law"]) == (
        decision == "cannot tell"
    )


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
    assert words in judged_check(**drift, **HARM).reason


def test_a_check_is_told_with_its_numbers_its_steps_and_what_is_to_be_expected() -> None:
    policy = PolicyConfig({"law": 0.1})

    def told(step: int, answer: dict[str, Any]) -> str:
        return judge_check(snapshot(step, domain_drift("law", **answer)), policy, LEVEL)["law"].reason

    still = "; representation has not drifted (drift 1.0%, under 5%)."
    course = "at +0.07 [+0.06, +0.08] nats a token after 20 steps, on course to pass 0.10 (p under 0.001 against half of it)"
    assert told(20, answers(0.07, 0.02)) == course + still
    assert told(1, answers(0.14, 0.05)).startswith(
        "at +0.14 [+0.12, +0.16] nats a token after 1 step, over its budget of 0.10 (p under"
    )
    assert (
        told(20, answers(0.01, 0.02)) == f"at +0.01 [+0.00, +0.02] nats a token after 20 steps, within its budget of 0.10{still}"
    )
    perhaps = "perhaps on course to pass 0.10 (p 0.017 against half of it, not sure enough for an alarm)"
    assert perhaps in told(20, answers(0.07, 0.05))
    assert "after 20 steps, too unsure for a budget of 0.10;" in told(20, answers(0.07, 0.5))
    assert "answer NLL unknown" in told(20, UNKNOWN)


def test_a_forecast_is_told_with_its_numbers() -> None:
    answer = "answer NLL +0.50 [+0.38, +0.62] nats a token, budget 0.25"
    before = judged_forecast(sts_net=score(0.75, 0.625, 0.875), **IN_CONTEXT["harm"]).reasons["law"]
    assert answer in before and "transfer 75%, 62% to 88%" in before
    assert "transfer unknown" in judged_forecast(sts_net=score(0.5, own=NAN), **IN_CONTEXT["no harm"]).reasons["law"]
    assert "answer NLL unknown" in judged_forecast(sts_net=0.5, **IN_CONTEXT["unknown"]).reasons["law"]


def test_what_passes_alone_may_fail_among_many() -> None:
    p_value = p_of(ON_COURSE)

    def decided(n_domains: int) -> Judgement:
        names = "abcdefgh"[:n_domains]
        others = [domain_drift(name, **NO_HARM) for name in names[1:]]
        check = snapshot(1, domain_drift("a", **ON_COURSE), *others)
        return judge_check(check, PolicyConfig(dict.fromkeys(names, 0.25)), 4.5 * p_value)["a"]

    assert [decided(n).decision for n in (1, 4, 5, 8)] == ["no-go", "no-go", "watch", "watch"]


def test_domains_that_are_not_protected_and_untested_ones_cost_no_power() -> None:
    others = [domain_drift("b", **UNKNOWN), domain_drift("c", **NO_HARM)]
    policy = PolicyConfig({"a": 0.25, "b": 0.25})
    found = judge_check(snapshot(1, domain_drift("a", **ON_COURSE), *others), policy, p_of(ON_COURSE))
    assert found["a"].decision == "no-go"


def test_a_run_spends_its_error_over_ten_checks_unless_it_is_told_of_others() -> None:
    p_value = p_of(ON_COURSE)
    check = snapshot(1, domain_drift("law", **ON_COURSE))
    for alpha, decision in ((10 * p_value * (1 + 1e-9), "no-go"), (10 * p_value * (1 - 1e-9), "watch")):
        assert judge_drift([check], PolicyConfig({"law": 0.25}, alpha=alpha)).decision == decision
    assert len((1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)) == N_LOOKS
    assert judge_drift([check], POLICY, [p_value]).decision == "no-go"
    assert judge_drift([check], POLICY, [p_value / 2]).decision == "watch"


def test_each_check_has_a_level_of_its_own() -> None:
    policy = PolicyConfig({"law": 0.25}, patience=2)
    checks = [snapshot(step, domain_drift("law", **HARM)) for step in (1, 2)]
    assert judge_drift(checks, policy, [LEVEL, LEVEL]).decision == "no-go"
    assert judge_drift(checks, policy, [0.0, LEVEL]).decision == "watch"
    with pytest.raises(ConfigError, match=r"^levels: got \[0\.005\]; allowed is one for each of 2 checks\.$"):
        judge_drift(checks, policy, [LEVEL])


def test_false_alarms_of_a_run_are_as_rare_as_promised() -> None:
    """If no domain has got worse by half its budget, any alarm is false; domains that share their luck are the hard case."""
    rng, alpha, n_looks, names = np.random.default_rng(0), 0.2, 4, "abcde"
    policy = PolicyConfig(dict.fromkeys(names, 0.25), alpha=alpha)

    def is_false() -> bool:
        shared = rng.normal(0, 1, (n_looks, 8))
        for step, luck in enumerate(shared, 1):
            noise = 0.125 + luck + rng.normal(0, 1, (5, 8))  # truly worse by half the budget
            domains = [
                domain_drift(
                    name,
                    n_queries=8,
                    nll_change=estimate(float(row.mean()), -9.0, 9.0),
                    query_changes=tuple(row.tolist()),
                    query_answer_tokens=(1,) * 8,
                )
                for name, row in zip(names, noise, strict=True)
            ]
            if judge_drift([snapshot(step, *domains)], policy, [alpha / n_looks]).alarmed:
                return True
        return False

    assert fewest_queries(policy, n_looks) <= 8
    rate = np.mean([is_false() for _ in range(200)])
    assert 0 < rate <= alpha


def test_a_forecast_is_of_step_0_and_a_check_of_its_own() -> None:
    assert judged_forecast().step == 0
    assert judge_drift([snapshot(step, domain_drift("law")) for step in (10, 20)], POLICY).step == 20


@pytest.mark.parametrize(("drift", "superseded"), [(0.0625 - BARELY, False), (0.0625, True), (0.5, True), (NAN, False)])
def test_the_training_datas_own_drift_supersedes_the_forecast(drift: float, superseded: bool) -> None:
    still, moved = (snapshot(10, domain_drift("law"), train=domain_drift("train", relative_drift=d)) for d in (0.0, drift))
    assert judge_drift([still, moved], POLICY).supersedes_forecast == superseded
    assert not judge_drift([moved, still], POLICY).supersedes_forecast
    assert not judged_forecast().supersedes_forecast


DRIFTS: dict[Decision, dict[str, Any]] = {"no-go": HARM, "watch": answers(0.5, 1.0), "cannot tell": UNSURE, "go": NO_HARM}


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


@pytest.mark.parametrize("other", ["watch", "cannot tell", "go"])
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


ORDER: tuple[Decision, ...] = ("no-go", "watch", "cannot tell", "go")


@pytest.mark.parametrize(("graver", "lesser"), list(itertools.combinations(ORDER, 2)))
def test_of_two_domains_the_graver_decision_counts(graver: Decision, lesser: Decision) -> None:
    for decisions in ((graver, lesser), (lesser, graver)):
        verdict = _two_checks(*decisions)
        assert verdict.decision == graver
        assert verdict.threatened == ("ab"[decisions.index(graver)],)


@pytest.mark.parametrize(
    ("decisions", "expected", "threatened"),
    [
        (("go", "cannot tell", "watch", "no-go"), "no-go", ("d",)),
        (("go", "go"), "go", ()),
        (("no-go", "go", "no-go"), "no-go", ("a", "c")),
        (("cannot tell", "watch", "cannot tell"), "watch", ("b",)),
        (("cannot tell", "go", "cannot tell"), "cannot tell", ("a", "c")),
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
    worse, unsure = (domain_forecast(n, sts_net=0.5, **IN_CONTEXT[kind]) for n, kind in (("a", "harm"), ("b", "unsure")))
    stays = domain_forecast("c")
    for domains, expected in (((worse, unsure, stays), "no-go"), ((unsure, stays), "cannot tell"), ((stays,), "go")):
        found = judge_forecast(forecast(*domains), PolicyConfig({d.name: 0.25 for d in domains}))
        assert (found.decision, len(found.reasons), found.states) == (expected, len(domains), {})


def test_a_rehearsal_is_judged_by_the_runs_own_rate_with_all_of_its_error() -> None:
    rising = answers(0.1875, 0.125)
    own = snapshot(5, domain_drift(**rising), train=domain_drift("train", relative_drift=0.5))
    harsher = snapshot(10, domain_drift(**HARM))
    for alpha, decision in ((p_of(rising), "no-go"), (0.9 * p_of(rising), "watch")):
        policy = PolicyConfig({"law": 0.25}, alpha=alpha, patience=2)
        found = judge_rehearsal(rehearsal(own, harsher), policy)
        assert (found.decision, found.step, found.supersedes_forecast) == (decision, 0, False)
    assert judge_rehearsal(rehearsal(harsher), POLICY).states == {"law": "over"}
    with pytest.raises(ConfigError, match="rehearsal: got 'a stream'"):
        judge_rehearsal(rehearsal(skipped="a stream"), POLICY)


def tenfold(own: DriftSnapshot, expected: float, multiple: float = 10.0) -> Rehearsal:
    """Two doses, with the change expected of law at the end."""
    made = rehearsal(own, own, expected={"law": estimate(expected, expected - 0.25, expected + 0.25)})
    return replace(made, doses=(made.doses[0], replace(made.doses[1], multiple=multiple)))


@pytest.mark.parametrize("kind", [NO_HARM, UNSURE, ON_COURSE])
def test_a_long_run_is_never_a_go_whose_expected_change_is_clearly_over_the_budget(kind: dict[str, Any]) -> None:
    check, policy = snapshot(5, domain_drift("law", **kind)), PolicyConfig({"law": 0.25})
    own = judge_rehearsal(rehearsal(check), policy)
    for share, multiple, counts in ((1.33, 10.0, False), (1.35, 10.0, True), (1.35, 4.0, False)):
        found = judge_rehearsal(tenfold(check, share * 0.25, multiple), policy)
        if not counts or own.decision == "no-go":
            assert found == own
            continue
        assert (found.decision, found.threatened, found.states) == ("watch", ("law",), own.states)
        expected = "expected at +0.34 [+0.09, +0.59] nats a token at the end, over its budget of 0.25; "
        assert found.reasons["law"] == expected + own.reasons["law"]


def test_a_model_that_has_diverged_in_a_rehearsal_is_not_judged_by_what_is_expected() -> None:
    check = snapshot(5, domain_drift("law", **NO_HARM, n_not_finite=3))
    assert judge_rehearsal(tenfold(check, 9.0), PolicyConfig({"law": 0.25})).decision == "cannot tell"


def test_states_are_told_of_each_protected_domain() -> None:
    kinds: dict[str, dict[str, Any]] = {"within": NO_HARM, "on course": ON_COURSE, "over": HARM, "inconclusive": UNSURE}
    domains = [domain_drift(state, **answer) for state, answer in kinds.items()]
    for patience, decision in ((1, "no-go"), (2, "watch")):
        policy = PolicyConfig(dict.fromkeys(kinds, 0.25), patience=patience)
        verdict = judge_drift([snapshot(1, *domains, domain_drift("other", **HARM))], policy)
        assert (verdict.decision, verdict.threatened) == (decision, ("on course", "over"))
        assert verdict.states == {state: state for state in kinds}


def test_each_domain_has_its_own_budget() -> None:
    domains = [domain_forecast(name, sts_net=0.5, nll_change=0.5) for name in ("a", "b")]
    assert judge_forecast(forecast(*domains), PolicyConfig({"a": 0.75, "b": 0.5})).threatened == ("b",)


def test_domains_that_are_not_protected_decide_nothing() -> None:
    record = forecast(domain_forecast("law"), domain_forecast("code", sts_net=0.5, **IN_CONTEXT["harm"]))
    assert judge_forecast(record, POLICY).decision == "go"
    assert judge_drift([snapshot(1, domain_drift("law"), domain_drift("code", **DRIFTS["no-go"]))], POLICY).decision == "go"
    assert judge_forecast(record, PolicyConfig()) == Verdict("go", (), {}, 0)
