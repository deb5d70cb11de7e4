"""Budgets in every unit: each is judged in its own by the same test, and harm by loss alone is called that."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from scipy import stats

from samples import answers, domain_drift, domain_forecast, estimate, forecast, score, snapshot
from sts_callback.config import PlainBudget, PolicyConfig
from sts_callback.policy import Judgement, judge_check, judge_drift, judge_forecast, worst_headroom, worst_share
from sts_callback.records import Decision, DomainDrift, Estimate, State, TokenAccuracy, Verdict

LEVEL = 0.005
NAN = float("nan")
UNKNOWN = Estimate(NAN, NAN, NAN)
N_QUERIES, N_TOKENS, N_BYTES = 32, 50, 200
STILL = "; representation has not drifted (drift 1.0%, under 5%)."


def judged(budget: PlainBudget, domain: DomainDrift) -> Judgement:
    return judge_check(snapshot(20, domain), PolicyConfig({"law": budget}), LEVEL)["law"]


def flipped(lost: tuple[int, int], gained: tuple[int, int] = (0, 0), then: float = 0.5) -> TokenAccuracy:
    """So many tokens of 50 in every other answer of 32, and so many in the rest."""
    changes = tuple(gained[i % 2] - lost[i % 2] for i in range(N_QUERIES))
    shares = [change / N_TOKENS for change in changes]
    mean = sum(shares) / N_QUERIES
    reach = float(stats.t.ppf(0.975, N_QUERIES - 1) * stats.sem(shares))
    n_lost, n_gained = N_QUERIES // 2 * sum(lost), N_QUERIES // 2 * sum(gained)
    n_queries_lost = N_QUERIES // 2 * sum(map(bool, lost))
    return TokenAccuracy(then, then + mean, Estimate(mean, mean - reach, mean + reach), n_lost, n_gained, n_queries_lost, changes)


def law(nll: float = 0.0, spread: float = 0.01, accuracy: TokenAccuracy | None = None, **changes: Any) -> DomainDrift:
    """Answers of 50 tokens and 200 bytes whose NLL has changed so, nats a token: an `nll` of 0.1 is 0.036 bits a byte."""
    made = answers(nll, spread, N_QUERIES, N_TOKENS)
    in_bits = N_TOKENS / N_BYTES / math.log(2)
    bits = Estimate(*(in_bits * end for end in vars(made["nll_change"]).values()))
    known = {"bits_change": bits, "query_answer_bytes": (N_BYTES,) * N_QUERIES, "accuracy": accuracy}
    return domain_drift("law", **(made | known | changes))


@pytest.mark.parametrize(
    ("budget", "state", "told"),
    [  # 0.08 nats a token are 4 nats an answer of 200 bytes, by ln 2: 0.0289 bits a byte. Two tokens of 50 are 4 points.
        (0.08, "over", "at +0.08 [+0.08, +0.08] nats a token after 20 steps, over its budget of 0.08 (p "),
        (0.12, "on course", "at +0.08 [+0.08, +0.08] nats a token after 20 steps, on course to pass 0.12 (p "),
        (0.2, "within", "at +0.08 [+0.08, +0.08] nats a token after 20 steps, within its budget of 0.20"),
        ("0.028 bits/byte", "over", "at +0.029 [+0.028, +0.030] bits a byte after 20 steps, over its budget of 0.028 (p "),
        ("0.05 bits/byte", "on course", "at +0.029 [+0.028, +0.030] bits a byte after 20 steps, on course to pass 0.050 (p "),
        ("0.06 bits/byte", "within", "at +0.029 [+0.028, +0.030] bits a byte after 20 steps, within its budget of 0.060"),
        (
            "4 points",
            "over",
            "at -4.0 [-4.7, -3.3] points of token accuracy after 20 steps, over its budget of 4.0 (p under 0.001 against half",
        ),
        ("5 points", "on course", "at -4.0 [-4.7, -3.3] points of token accuracy after 20 steps, on course to pass 5.0 (p "),
        ("9 points", "within", "at -4.0 [-4.7, -3.3] points of token accuracy after 20 steps, within its budget of 9.0; "),
    ],
)
def test_each_budget_is_judged_and_told_in_its_own_unit(budget: PlainBudget, state: State, told: str) -> None:
    found = judged(budget, law(0.08, accuracy=flipped(lost=(1, 3))))
    assert found.state == state
    assert found.decision == ("go" if state == "within" else "no-go")
    assert found.reason.startswith(told)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("nll", [-0.1, 0.0, 0.05, 0.1, 0.3])
def test_bits_a_byte_are_nats_a_token_where_all_answers_have_as_many_bytes_a_token(nll: float, spread: float) -> None:
    """0.1 nats a token of four bytes are 0.025 nats a byte."""
    in_bits = f"{0.025 / math.log(2)!r} bits/byte"
    one, other = (judged(budget, law(nll, spread)) for budget in (0.1, in_bits))
    assert one[::2] == other[::2]


def test_points_are_judged_by_the_test_of_their_tokens() -> None:
    """15 tokens lost in every other answer of 50: mean 15 points, SE 15/sqrt(31), so t is 2.784 against 7.5 points."""
    found = judged("15 points", law(accuracy=flipped(lost=(0, 15))))
    p_value = stats.t.sf(7.5 / (15 / math.sqrt(31)), 31)
    assert 0.001 < p_value < LEVEL
    assert f"(p {p_value:.3f} against half of it)" in found.reason
    assert judge_check(
        snapshot(1, law(accuracy=flipped(lost=(0, 15)))), PolicyConfig({"law": "15 points"}), p_value * (1 - 1e-9)
    )["law"].decision == ("watch")


@pytest.mark.parametrize(
    ("budget", "domain", "decision"),
    [
        ("2 points", law(0.5, accuracy=flipped(lost=(0, 0), gained=(1, 2))), "go"),  # loss is not what it is about
        (0.1, law(0.0, accuracy=flipped(lost=(10, 20))), "go"),
        ("2 points", law(-0.5, accuracy=flipped(lost=(2, 4))), "no-go"),
        ("2 points", law(0.5, accuracy=None), "cannot tell"),
        ("0.05 bits/byte", law(0.5, bits_change=UNKNOWN, query_answer_bytes=()), "cannot tell"),
        ("2 points", law(accuracy=flipped(lost=(0, 0))), "go"),
    ],
)
def test_a_budget_knows_nothing_of_other_units(budget: PlainBudget, domain: DomainDrift, decision: Decision) -> None:
    assert judged(budget, domain).decision == decision


def test_what_is_not_known_is_named() -> None:
    assert judged("2 points", law(0.5)).reason == f"token accuracy unknown{STILL}"
    unknown = law(0.5, bits_change=UNKNOWN, query_answer_bytes=())
    assert judged("1 bits/byte", unknown).reason == f"answer NLL unknown{STILL}"


def test_protected_domains_of_several_units_are_corrected_together() -> None:
    """Its p-value of 0.005 or less passes for one domain alone, not for one of three."""
    in_bytes = {"query_answer_bytes": (N_BYTES,) * N_QUERIES}
    domains = [domain_drift(name, **answers(0.0, 0.01), **in_bytes) for name in ("code", "math")]
    alone = law(accuracy=flipped(lost=(0, 15)))
    budgets: dict[str, PlainBudget] = {"law": "15 points", "code": 0.1, "math": "0.1 bits/byte"}
    assert judge_check(snapshot(20, alone), PolicyConfig({"law": "15 points"}), LEVEL)["law"].decision == "no-go"
    assert judge_check(snapshot(20, alone, *domains), PolicyConfig(budgets), LEVEL)["law"].decision == "watch"


def test_what_is_left_of_budgets_is_told_in_their_unit_or_as_a_share_where_they_have_several() -> None:
    """0.08 nats a token are 0.0289 bits a byte; two tokens of 50 are 4 points, more than the budget of two."""
    accuracy = flipped(lost=(1, 3))
    found = snapshot(20, law(0.08, accuracy=accuracy), dataclasses.replace(law(0.08, accuracy=accuracy), name="code"))

    def left(law: PlainBudget, code: PlainBudget) -> tuple[float, float]:
        policy = PolicyConfig({"law": law, "code": code})
        return worst_headroom(found, policy), worst_share(found, policy)

    in_bits = 0.02 / math.log(2)
    assert left(0.1, 0.2) == pytest.approx((0.02, 0.8))
    assert left("0.1 bits/byte", "0.05 bits/byte") == pytest.approx((0.05 - in_bits, in_bits / 0.05))
    assert left("10 points", "5 points") == pytest.approx((1, 0.8))
    assert left(0.1, "5 points") == pytest.approx((0.2, 0.8))
    assert left("2 points", 0.1) == pytest.approx((-1, 2))
    unknown = snapshot(20, law(0.08, accuracy=None))
    assert math.isnan(worst_headroom(unknown, PolicyConfig({"law": "2 points"})))
    assert math.isnan(worst_share(unknown, PolicyConfig({"law": "2 points"})))


ROSE = flipped(lost=(0, 1), gained=(1, 2), then=0.41)
"""One token more in each answer: 2 points."""
UNSURE = flipped(lost=(0, 10), gained=(9, 0), then=0.43)
"""Half a token less, give or take ten."""
FELL = flipped(lost=(1, 3), then=0.43)
NEITHER = flipped(lost=(1, 1), gained=(1, 1), then=0.43)


@pytest.mark.parametrize(
    ("accuracy", "told"),
    [
        (ROSE, "; by loss alone: token accuracy 41.0% to 43.0%"),
        (NEITHER, "; by loss alone: token accuracy 43.0% to 43.0%"),
        (UNSURE, "; by loss alone: token accuracy 43.0% to 42.0%, no sure fall"),
        (FELL, "; token accuracy 43.0% to 39.0%"),
        (None, ""),
    ],
)
@pytest.mark.parametrize(
    ("budget", "at"),
    [
        (0.08, "at +0.08 [+0.08, +0.08] nats a token after 20 steps, over its budget of 0.08"),
        (0.12, "at +0.08 [+0.08, +0.08] nats a token after 20 steps, on course to pass 0.12"),
        ("0.05 bits/byte", "at +0.029 [+0.028, +0.030] bits a byte after 20 steps, on course to pass 0.050"),
    ],
)
def test_harm_by_loss_alone_is_called_that(budget: PlainBudget, at: str, accuracy: TokenAccuracy | None, told: str) -> None:
    assert judged(budget, law(0.08, accuracy=accuracy)).reason == f"{at} (p under 0.001 against half of it){told}{STILL}"


def test_accuracy_is_told_of_harm_by_loss_and_of_nothing_else() -> None:
    for found in (judged(0.2, law(0.08, accuracy=ROSE)), judged("2 points", law(0.08, accuracy=FELL))):
        assert "by loss alone" not in found.reason
        assert "token accuracy 4" not in found.reason


def test_the_words_reach_the_verdict() -> None:
    verdict = judge_drift([snapshot(20, law(0.5, accuracy=ROSE))], PolicyConfig({"law": 0.1}))
    assert (verdict.decision, verdict.states) == ("no-go", {"law": "over"})
    assert "by loss alone: token accuracy 41.0% to 43.0%" in verdict.explanation


@pytest.mark.parametrize(
    ("budget", "decision", "told"),
    [
        (0.1, "no-go", "NLL rises in context (answer NLL +0.20 [+0.10, +0.30] nats a token, budget 0.10; transfer "),
        ("0.05 bits/byte", "go", "no harm in context (answer NLL +0.020 [+0.010, +0.030] bits a byte, budget 0.050; transfer "),
        ("0.02 bits/byte", "no-go", "NLL rises in context (answer NLL +0.020 [+0.010, +0.030] bits a byte, budget 0.020; "),
        (
            "2 points",
            "no-go",
            "token accuracy falls in context (-3.0 [-5.0, -1.0] points of token accuracy, budget 2.0; transfer ",
        ),
        ("4 points", "cannot tell", "direction unsure (-3.0 [-5.0, -1.0] points of token accuracy, budget 4.0; transfer "),
        ("6 points", "go", "no harm in context (-3.0 [-5.0, -1.0] points of token accuracy, budget 6.0; transfer "),
    ],
)
def test_a_forecast_is_judged_in_each_unit(budget: PlainBudget, decision: Decision, told: str) -> None:
    domain = domain_forecast(
        "law",
        sts_net=score(0.5),
        nll_change=estimate(0.2, 0.1, 0.3),
        bits_change=estimate(0.02, 0.01, 0.03),
        accuracy_change=estimate(-0.03, -0.05, -0.01),
    )
    found = judge_forecast(forecast(domain), PolicyConfig({"law": budget}))
    assert found.decision == decision
    assert found.reasons["law"].startswith(told)


def test_a_forecast_of_before_there_was_accuracy_can_not_tell_in_points() -> None:
    def of(budget: PlainBudget) -> Verdict:
        old = domain_forecast("law", sts_net=score(0.5), accuracy=NAN, accuracy_change=NAN, bits_change=NAN)
        return judge_forecast(forecast(old), PolicyConfig({"law": budget}))

    assert [of(budget).decision for budget in (0.1, "0.1 bits/byte", "2 points")] == ["go", "cannot tell", "cannot tell"]
    assert of("2 points").reasons["law"].startswith("direction unsure (token accuracy unknown; ")
    assert of("1 bits/byte").reasons["law"].startswith("direction unsure (answer NLL unknown; ")
