"""The validation: who may see which rows, what a fine-tune leaves behind, and the arithmetic of its tables."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata, ttest_1samp

from samples import domain_forecast, forecast
from sts_callback.config import ProbeConfig
from sts_callback.data.probes import ProbeSet, Query
from sts_callback.measure.runner import ProbeRunner
from sts_callback.measure.sae_reader import SAEReader
from sts_callback.model.hooks import resolve
from sts_callback.model.sae import load_encoder
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import DomainForecast
from sts_callback.report.validated import WHAT_HOLDS
from tiny import N_LAYERS, VOCAB, rotated_sae, tiny_model
from validation import measure
from validation.alarms import auroc, harmed_at, over_all, rate, within_runs
from validation.data import CATEGORIES, DOMAINS, deal
from validation.lab import require_untuned
from validation.mixtures import additivity, planned
from validation.plan import FORECASTS, HERE, SUMS, stored
from validation.scores import (
    margins,
    net_by_size,
    partial_spearman,
    ratio,
    signed_orders,
    student,
)
from validation.tables import above_chance, by_layer, elsewhere, overlap_of_others, pooled, ranking, reach
from validation.train import tune

BOS = (1,)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, object]]) -> None:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    write(
        "mmlu_pro",
        [
            {"question_id": i, "category": c, "question": f"{c} {i}?", "options": [f"right {i}", f"wrong {i}"], "answer_index": 0}
            for i, c in enumerate(c for c in CATEGORIES for _ in range(40))
        ],
    )
    for name in ("gsm8k", "translate", "instruct"):
        write(name, [{"prompt": f"{name} {i}", "completion": f"answer {i}"} for i in range(1600)])
    talk = [("human", "Weather in {}?"), ("function_call", '{{"name": "w{}"}}'), ("observation", "rain"), ("gpt", "It rains.")]
    write("toolcall", [{"conversations": [{"from": a, "value": b.format(i)} for a, b in talk]} for i in range(60)])
    prose = [" ".join(f"word{i}x{j}" for j in range(100)) for i in range(40)]
    write("corpus", [{"text": text} for text in (*prose, "Question: what? " * 60, "  indented\n  lines " * 60)])
    return folder


def test_no_row_is_dealt_twice_and_training_sees_nothing_that_is_measured(data_dir: Path) -> None:
    dealt = deal(data_dir, n_measured=10, seed=0)
    assert tuple(dealt) == DOMAINS
    for name, parts in dealt.items():
        prompts = [{row["prompt"] for row in part} for part in (parts.measured, parts.forecast, parts.training)]
        assert len(parts.measured) == 10 and len(prompts[1]) >= 5, name
        assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2]), name
    assert deal(data_dir, n_measured=10, seed=0) == dealt
    assert deal(data_dir, n_measured=10, seed=1) != dealt


def test_mmlu_pro_is_measured_where_the_sae_has_not_seen_it(data_dir: Path) -> None:
    for category in CATEGORIES:
        dealt = deal(data_dir, n_measured=10, seed=0)[category]
        number = [int(row["prompt"].split()[-2].rstrip("?\nAnswer:")) for row in dealt.measured + dealt.forecast]
        assert all(n % 4 != 2 for n in number)
        assert all(row["wrong"].startswith(" wrong") for row in dealt.measured)


def test_web_is_prose_and_gsm8k_rows_that_the_sae_has_seen_are_for_training(data_dir: Path) -> None:
    dealt = deal(data_dir, n_measured=10, seed=0)
    assert all(row["prompt"].startswith("word") for row in dealt["web"].measured)
    assert {int(row["completion"].split()[1]) for row in dealt["gsm8k"].training} == set(range(1500))


def queries(n: int, seed: int = 0) -> list[Query]:
    draw = random.Random(seed)

    def some(fewest: int, most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCAB) for _ in range(draw.randint(fewest, most)))

    return [Query(q, some(2, 6), (True,) * len(q)) for q in (some(4, 12) for _ in range(n))]


def lens_on(model: torch.nn.Module) -> SAEReader:
    encoder = load_encoder(rotated_sae(), "tiny", N_LAYERS)
    runner = ProbeRunner(model, [encoder], ProbeConfig(n_queries=4, n_features=8))
    with undisturbed(model):
        runner.calibrate([ProbeSet("some", tuple(queries(8)), ((),), 0)], runner.context(BOS, with_answers=True))
    assert runner.sae_readers[0].point == resolve(model, encoder.hook_name)
    return runner.sae_readers[0]


def test_untouched_weights_have_not_drifted_and_losses_are_those_of_a_plain_forward() -> None:
    model = tiny_model("gemma3")
    sae_reader, asked = lens_on(model), queries(9)
    found, zero = measure.before(model, sae_reader, asked, BOS)
    again, drift = measure.after(model, sae_reader, asked, BOS, zero)
    assert again == found
    assert float(drift.shift.features.abs().sum()) == 0.0
    for query, tokens in zip(asked, found.tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*BOS, *query.tokens]])).logits[0, -len(query.answer) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(query.answer), reduction="none")
        assert tokens == pytest.approx(expected.tolist(), abs=1e-4)
    assert found.sums(2) == [pytest.approx(sum(tokens[2:])) for tokens in found.tokens]
    assert found.counts(2) == [max(0, len(query.answer) - 2) for query in asked]


SETTINGS = {"steps": 12, "rows": 4, "warmup": 2, "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}}


def test_a_fine_tune_learns_moves_features_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gemma3")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sae_reader, asked = lens_on(model), queries(9)
    zero = measure.before(model, sae_reader, asked, BOS)[1]
    moved: list[float] = []

    def on_step(step: int) -> None:
        with pytest.raises(AssertionError, match="in the middle of a run"):
            require_untuned(model)
        if step in (1, 12):
            moved.append(float(measure.after(model, sae_reader, asked, BOS, zero)[1].shift.features.sum()))

    rows = queries(8, seed=1)
    curve = tune(model, rows, BOS, SETTINGS, learning_rate=1e-2, seed=0, on_step=on_step)
    assert np.mean(curve[-4:]) < np.mean(curve[:4]) - 0.1
    assert 0 < moved[0] < moved[1]
    require_untuned(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert float(measure.after(model, sae_reader, asked, BOS, zero)[1].shift.features.sum()) == 0.0
    quiet = tune(model, rows, BOS, SETTINGS, learning_rate=1e-2, seed=0, on_step=lambda step: None)
    assert quiet == curve  # measuring changes nothing
    assert tune(model, rows, BOS, SETTINGS, learning_rate=1e-2, seed=1, on_step=lambda step: None) != curve


def test_the_standard_error_of_a_change_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        n = rng.integers(3, 20, size=60).astype(float)
        value, error = ratio(0.2 * n + rng.normal(0, 1, 60) * n, n)
        values.append(value)
        errors.append(error)
    assert np.mean(values) == pytest.approx(0.2, abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_auroc_counts_ties_by_half() -> None:
    assert auroc(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, False, True, True])) == 1.0
    assert auroc(np.array([4.0, 3.0, 2.0, 1.0]), np.array([False, False, True, True])) == 0.0
    assert auroc(np.array([1.0, 1.0, 1.0, 1.0]), np.array([False, True, True, False])) == 0.5


def test_harm_is_dated_by_the_first_checkpoint_that_shows_it() -> None:
    zero = {"law": {"nll": [10.0, 10.0, 10.0], "n": [10, 10, 10]}}
    run = {"on_the_way": {"5": {"law": [10.0, 10.5]}, "20": {"law": [12.0, 11.0]}}}
    assert harmed_at(run, zero, "law") == 20
    assert harmed_at({"on_the_way": {"5": {"law": [10.0, 10.5]}}}, zero, "law") == 40


def test_mixtures_have_the_budget_of_all_runs_and_replay_where_most_is_expected() -> None:
    settings = {
        "training": {"steps": 40, "rows": 4},
        "mixtures": {
            "halves": [["gsm8k", "law"]],
            "replay": {"base": "gsm8k", "setting": "harsh", "seeds": [0], "share": 0.25, "domains": ["code", "law", "web"]},
        },
    }
    expected = {name: domain_forecast(name, sts_cross=x).to_dict() for name, x in (("code", 0.2), ("law", 0.9), ("web", 0.5))}
    found = {mixture.run: dict(mixture.rows) for mixture in planned(settings, {"gsm8k": {"domains": expected}})}
    assert all(sum(rows.values()) == 160 for rows in found.values())
    assert found["gsm8k+law/gentle/0"] == {"gsm8k": 80, "law": 80}
    assert found["gsm8k and replay, even/harsh/0"] == {"gsm8k": 120, "code": 14, "law": 13, "web": 13}
    assert found["gsm8k and replay, most expected/harsh/0"] == {"gsm8k": 120, "law": 40}


def test_what_adds_up_is_told_from_what_does_not() -> None:
    draw = np.random.default_rng(0)
    alone = draw.normal(size=(2, 20))
    same = additivity(alone.mean(axis=0), alone)
    assert same["r"] == pytest.approx(1) and same["miss"] == pytest.approx(0, abs=1e-12) and same["miss of one source"] > 0.1
    assert abs(additivity(draw.normal(size=20), alone)["r"]) < 0.5


def test_a_domains_past_is_that_of_other_fine_tunes_at_the_same_rate() -> None:
    runs = [
        {"run": f"{name}/{setting}", "fine_tune": name, "setting": setting} for name in "abc" for setting in ("gentle", "harsh")
    ]
    moved = {run["run"]: np.arange(4.0) for run in runs}
    moved["a/harsh"] = np.array([3.0, 2.0, 1.0, -1.0])
    moved["b/harsh"] = np.array([0.0, 1.0, 3.0, 2.0])
    moved["c/harsh"] = np.array([0.0, 2.0, 1.0, 3.0])
    found = elsewhere(runs, moved)
    assert [found[f"{name}/gentle"] for name in "abc"] == pytest.approx([1, 1, 1])
    assert found["a/harsh"] == pytest.approx(-1)  # mean ranks of the two others: 1, 2.5, 3, 3.5
    assert found["b/harsh"] == pytest.approx(-3 / (4.5 * 5) ** 0.5)  # 2.5, 3, 2, 2.5 against 1, 2, 4, 3


def test_the_interval_over_fine_tunes_is_students() -> None:
    values = np.array([0.42, 0.64, 0.66, 0.84])
    found, scipys = student(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0.64, scipys.low, scipys.high))
    # By hand: the spread is 0.172, Student's quantile with three degrees of freedom 3.182.
    assert (found.low, found.high) == pytest.approx((0.64 - 3.182 * 0.172 / 2, 0.64 + 3.182 * 0.172 / 2), abs=1e-3)


def test_no_interval_reaches_where_no_correlation_can_be_and_one_fine_tune_has_none() -> None:
    wide = student(np.array([-0.9, 0.9, 0.95]))
    assert (wide.low, wide.high) == (-1.0, 1.0)
    alone = student(np.array([0.5]))
    assert alone.value == 0.5 and np.isnan([alone.low, alone.high]).all()


def test_runs_of_one_fine_tune_count_once() -> None:
    runs = [{"run": f"{name}{seed}", "fine_tune": name} for name in "abc" for seed in range(3)]
    values = {run["run"]: {"a": 0.1, "b": 0.3, "c": 0.5}[str(run["fine_tune"])] for run in runs}
    assert pooled(runs, values) == "0.30 [-0.20, 0.80]"  # 0.2 times 4.303 over the square root of three
    assert pooled(runs[:3], values) == "0.10 [-, -]"
    assert pooled([], {}) == "-"


def test_scores_of_only_some_fine_tunes_are_not_ranked_together() -> None:
    runs = [{"run": name, "fine_tune": name} for name in "ab"]
    up = np.arange(5.0)
    scores = {"a": {"s": up, "NLL at step 0": -up, "tried on a alone": up}, "b": {"s": up, "NLL at step 0": -up}}
    _, *rows = ranking(runs, scores, dict.fromkeys("ab", up))
    assert [row[:2] for row in rows] == [["s", "1.00 [1.00, 1.00]"], ["*NLL at step 0*", "-1.00 [-1.00, -1.00]"]]


def test_what_tells_runs_apart_may_tell_nothing_within_them() -> None:
    """Of two runs one is harmed nearly everywhere: to know the run alone is much over both and nothing in each."""
    mild, bad = np.zeros(20), np.ones(20)
    mild[0], bad[0] = 1.0, 0.0
    runs = [{"run": "mild", "setting": "gentle"}, {"run": "bad", "setting": "harsh"}, {"run": "none", "setting": "gentle"}]
    changed = {"mild": (mild, np.full(20, 0.01)), "bad": (bad, np.full(20, 0.01)), "none": (np.zeros(20), np.full(20, 0.01))}
    assert over_all(runs[:2], changed, rate) == pytest.approx(0.95)
    assert within_runs(runs, changed, rate) == {"mild": 0.5, "bad": 0.5}


def test_features_that_other_forecasts_name_too_are_counted() -> None:
    run = {"fine_tune": "a", "checks": [{"realised_features": [9]}, {"realised_features": [1, 2, 3]}]}
    forecasts = {"a": {"features": [1, 2, 3]}, "b": {"features": [1, 7, 8]}, "c": {"features": [1, 2, 8]}}
    assert overlap_of_others(run, forecasts) == 1.5


def test_a_correlation_that_a_third_number_makes_is_gone_without_it() -> None:
    draw = np.random.default_rng(0)
    third = draw.normal(size=2000)
    one, other = (third + draw.normal(size=2000) for _ in range(2))
    assert abs(partial_spearman(one, other, third)) < 0.05 < 0.3 < partial_spearman(one, other, draw.normal(size=2000))
    assert np.isnan(partial_spearman(third, other, third))


def test_two_rates_that_contradict_one_another_bound_what_one_order_can_reach() -> None:
    runs = [
        {"run": f"a/{setting}/{seed}", "fine_tune": "a", "setting": setting, "seed": seed}
        for setting, seed in (("gentle", 0), ("harsh", 0), ("harsh", 1))
    ]
    up, down = np.arange(5.0), -np.arange(5.0)
    contrary = {"a/gentle/0": up, "a/harsh/0": down, "a/harsh/1": down}
    alike = dict.fromkeys(contrary, up)
    _, *rows = reach(runs, {"contrary": contrary, "alike": alike})
    assert rows == [
        ["contrary", "-1.00 (-1.00 to -1.00)", "0.00", "1.00 (1.00 to 1.00)"],
        ["alike", "1.00 (1.00 to 1.00)", "1.00", "1.00 (1.00 to 1.00)"],
    ]
    assert reach(runs[:1], {"alone": contrary})[1] == ["alone", "-", "-", "-"]


def test_the_score_by_size_is_the_forecasts_own_at_its_own_number_of_features() -> None:
    means = dict(np.load(SUMS))
    for line in stored(FORECASTS):
        own = [line["domains"][name]["sts_net"]["value"] for name in DOMAINS]
        n = len(line["features"])
        by_size = net_by_size(line["fine_tune"], means, (n, n // 2))
        assert by_size[n].tolist() == pytest.approx(own, abs=1e-5)
        assert np.abs(by_size[n // 2] - own).max() > 1e-3


def test_each_layers_forecast_is_held_against_what_moved_at_either() -> None:
    n = len(DOMAINS)
    runs = [{"run": f"{name}/harsh/0", "fine_tune": name} for name in "ab"]

    def expects(order: np.ndarray) -> dict[str, dict[str, object]]:
        scores = ("sts_act", "sts_icl", "sts_rel", "sts_cross", "sts_net", "raw_shift", "raw_over_prose")
        places = dict(zip(DOMAINS, order.tolist(), strict=True))
        found = {name: domain_forecast(name, **dict.fromkeys(scores, x)).to_dict() for name, x in places.items()}
        return {name: {"fine_tune": name, "domains": found} for name in "ab"}

    up = np.arange(n) / n
    upwards, downwards = ({run["run"]: order for run in runs} for order in (up, -up))
    moved = {"early": upwards, "late": downwards}
    head, *rows = by_layer(runs, {"early": expects(up), "late": expects(-up)}, moved, upwards)
    assert head[2:] == ["movement in early", "movement in late", "absolute change"]
    one, other = "1.00 [1.00, 1.00]", "-1.00 [-1.00, -1.00]"
    for layer, name, *found in rows:
        assert found == {"early": [one, other, one], "late": [other, one, other]}[layer], name
    assert {row[1] for row in rows} >= {"STS_net", "STS_act", "*raw shift*"}


def test_a_margin_is_by_how_much_the_right_option_is_likelier_per_token() -> None:
    zero = {"law": {"nll": [10.0, 30.0, 99.0], "n": [10, 10, 10], "wrong": [1.5, 2.0]}}
    assert margins(zero, zero, "law").tolist() == [0.5, -1.0]  # the third question has no wrong option
    tuned = {"law": {"nll": [20.0, 10.0, 99.0], "wrong": [1.5, 2.0]}}
    assert margins(tuned, zero, "law").tolist() == [-0.5, 1.0]


def test_a_domain_is_above_chance_only_where_that_is_hardly_luck() -> None:
    def answers(n_right: int) -> dict[str, list[float]]:
        return {"nll": [10.0] * 32, "n": [10] * 32, "wrong": [2.0] * n_right + [0.5] * (32 - n_right)}

    assert above_chance({name: answers(21) for name in CATEGORIES}) == "none"
    assert above_chance({name: answers(22 if name == "law" else 16) for name in CATEGORIES}) == "law"


def test_orders_by_harm_keep_the_sign_and_take_both_ranks_together() -> None:
    def says(change: float, gradient: float) -> dict[str, dict[str, float]]:
        return {"nll_change": {"value": change}, "gradient_change": {"value": gradient}}

    n = len(DOMAINS)
    forecast = {"domains": {name: says(i - n / 2, (i * 7) % n) for i, name in enumerate(DOMAINS)}}
    found = signed_orders(forecast, {"STS_net": np.ones(n), "NLL change in context": np.zeros(n)})
    assert found["NLL change in context"].min() == -n / 2
    assert found["STS_net"].tolist() == [1.0] * n
    together = found["ranks of NLL change in context and gradient alignment"]
    assert together.tolist() == [(i + 1) + ((i * 7) % n + 1) for i in range(n)]


def test_the_order_that_is_shown_as_harm_is_the_one_that_was_validated() -> None:
    for line in stored(FORECASTS):
        domains = {name: DomainForecast.from_dict(line["domains"][name]) for name in DOMAINS}
        shown = forecast(*domains.values()).harm_rank
        validated = signed_orders(line, {})["ranks of NLL change in context and gradient alignment"]
        assert rankdata([shown[name] for name in DOMAINS]).tolist() == rankdata(-validated).tolist()


def test_what_is_told_with_a_forecast_is_what_came_out() -> None:
    results = (HERE / "RESULTS.md").read_text()
    n_runs = sum(int(n) for n in re.findall(r"^## .* half: (\d+) runs$", results, re.MULTILINE))
    held_out = results[results.index("## Held-out half") : results.index("## Both halves")]
    movement = held_out[: held_out.index("### Harm")]
    ((value, low, high),) = re.findall(r"^\| STS_net \| (\S+) \[(\S+), (\S+)\] \|", movement, re.MULTILINE)
    (rival,) = re.findall(r"^\| \*raw shift over that by plain prose\* \| (\S+) \[.*$", movement, re.MULTILINE)
    ((fared, worst, best),) = re.findall(
        r"^\| ranks of NLL change in context and gradient alignment \| (\S+) \[(\S+), (\S+)\] \|", held_out, re.MULTILINE
    )
    ((gentle, harsh),) = re.findall(r"^\| go \| .*?\((\S+)%\) \| .*?\((\S+)%\) \|$", held_out, re.MULTILINE)
    (sign,) = re.findall(r"^\| 5 \| .*?\] \| (\d+)% of \d+ \|", held_out, re.MULTILINE)
    (majority,) = re.findall(r"^\| always worse \(the majority\) \| (\d+)% of \d+ \|", held_out, re.MULTILINE)
    assert f"({n_runs} LoRA runs" in WHAT_HOLDS
    assert f"Spearman {value}, 95% interval {low} to {high}, on four data sets" in WHAT_HOLDS
    assert float(rival) >= float(value) and "raw, without an SAE, did as well" in WHAT_HOLDS
    assert f"harm by how they then fared ({fared}, {worst} to {best})" in WHAT_HOLDS
    assert f"training harmed {float(gentle):.0f}% at a gentle rate and {float(harsh):.0f}% at a harsh one" in WHAT_HOLDS
    assert f"the right direction for {sign}% of clear changes; always guessing worse gives {majority}%" in WHAT_HOLDS
