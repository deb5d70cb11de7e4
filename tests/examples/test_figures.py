"""Figures that README and `docs/` tell are those that the scripts have written."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pages import page
from sts_callback.report.validated import WHAT_HOLDS

HALVES = {"held-out": "Held-out half: 12 runs", "development": "Development half: 12 runs", "both": "Both halves: 24 runs"}
README, TOLD = (" ".join(page(name).split()) for name in ("README.md", "docs/how-it-was-validated.md"))


def results(half: str, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading that begins so, in one half of the validation."""
    text = page("examples/validation/RESULTS.md").split(f"## {HALVES[half]}\n")[1].split("\n## ")[0]
    table = text[text.index(f"### {heading}") :].split("\n| ", 1)[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]


def row(half: str, heading: str, *first: str) -> list[str]:
    """The cells of a row behind its first ones."""
    (found,) = (cells[len(first) :] for cells in results(half, heading) if cells[: len(first)] == [*first])
    return found


def value(cell: str) -> str:
    return cell.split(" ")[0]


def percent(cell: str) -> str:
    """`86% of 212`, and `24 of 87 (27.6%)`, as a whole percentage."""
    (share,) = re.findall(r"([\d.]+)%", cell)
    return f"{float(share):.0f} %"


def found(name: str) -> Any:
    return json.loads(page(f"examples/{name}.json"))


@pytest.mark.parametrize(
    ("heading", "score", "told"),
    [
        ("Movement", "STS_net", "STS_net (`transfer`)"),
        ("Movement", "STS_cross", "STS_cross"),
        ("Movement", "STS_ICL", "STS_ICL, the paper's"),
        ("Movement", "STS_act", "STS_act, the paper's"),
        ("Movement", "*raw shift over that by plain prose*", "no SAE: raw shift over that by plain prose (`raw`)"),
        ("Movement", "*raw shift*", "no SAE: raw shift"),
        ("Movement", "*cosine of mean activations*", "no SAE: cosine of mean activations"),
        (
            "Harm with its sign",
            "ranks of NLL change in context and gradient alignment",
            "NLL change in context and gradients together (`harm`)",
        ),
        ("Harm with its sign", "NLL change in context", "NLL change in context alone"),
        ("Harm with its sign", "*NLL at step 0*", "NLL before training"),
        ("Harm with its sign", "*cosine of mean activations*", "cosine of mean activations"),
    ],
)
def test_scores(heading: str, score: str, told: str) -> None:
    held_out, development = (row(half, heading, score)[0] for half in ("held-out", "development"))
    assert any(f"| {told} | {one} | {value(development)} |" in TOLD for one in (held_out, value(held_out)))
    if "`transfer`" in told or "`harm`" in told:
        over_all = row("both", heading, score)[0]
        assert held_out in README
        assert over_all in TOLD


def test_two_seeds() -> None:
    for what in ("movement", "change with its sign"):
        held_out, development = (
            value(row(half, "What any forecast could reach", what)[-1]) for half in ("held-out", "development")
        )
        assert f"| two seeds of one fine-tune | {held_out} | {development} |" in TOLD


def test_features() -> None:
    counts = [int(value(cells[2])) for cells in results("held-out", "Run by run")[2:]]
    others = [int(re.findall(r"\((\d+)\)", cells[2])[0]) for cells in results("held-out", "Run by run")[2:]]
    assert f"{min(counts)} to {max(counts)} of the 100" in README
    assert f"the forecast had named {min(counts)} to {max(counts)} in every run" in TOLD
    assert f"name {min(others)} to {max(others)} of them too" in TOLD


def test_directions() -> None:
    def both(heading: str, first: str, column: int = 0) -> str:
        return " | ".join(f"{percent(row(half, heading, first)[column])}" for half in ("held-out", "development"))

    assert f"| before training, NLL change in context | {both('Direction', 'NLL change in context')} |" in TOLD
    assert f"| before training, gradients | {both('Direction', 'gradient alignment')} |" in TOLD
    assert f"| always saying *worse* | {both('Direction', 'always worse (the majority)')} |" in TOLD
    for steps in ("5", "20"):
        assert f"| **a check after {steps} of 40 steps** | **{both('Early', steps, 4).replace(' |', '** |')} |" in TOLD
        assert f"in {percent(row('held-out', 'Early', steps)[4])}" in README
    assert f"| a check after 5 steps, gentle rate alone | {both('Early', '5', 5)} |" in TOLD


def test_what_a_go_means() -> None:
    (gentle, harsh), (gentle_before, harsh_before) = (
        [percent(cell) for cell in row(half, "The verdict before training", "go")] for half in ("held-out", "development")
    )
    assert f"training harmed {gentle} ({gentle_before}) at the gentle rate and {harsh} ({harsh_before}) at the harsh one" in TOLD
    assert f"training harmed {gentle} at a gentle and {harsh} at a harsh rate" in README
    kept = [re.sub(r" \(.*", "", cell) for half in ("held-out", "development") for cell in row(half, "Early", "20")[7:]]
    assert "harmed at the end {} ({}) at the gentle rate and {} ({}) at the harsh one".format(*kept[::2], *kept[1::2]) in TOLD


def test_alarms() -> None:
    for n_queries in ("28", "12"):
        held_out, development = (row(half, "The monitor", n_queries, "1", "0.05") for half in ("held-out", "development"))
        assert f"harmed domains found | {held_out[0]} | {development[0]} |" in TOLD
        others = (re.sub(r" \(.*", "", cells[1]) for cells in (held_out, development))
        assert "others alarmed | {} | {} |".format(*others) in TOLD
    found_28 = row("held-out", "The monitor", "28", "1", "0.05")
    assert f"found {found_28[0]} harmed domains, and {re.sub(r' .([0-9.]+%).', '', found_28[1])} others" in README
    assert value(found_28[2]) == "0"  # the median one comes with the harm


def test_how_well_alarms_tell_apart() -> None:
    text = page("examples/validation/RESULTS.md")
    development, held_out, over_all = re.findall(
        r"over all runs together: ([\d.]+); knowing only a run's learning\nrate gives ([\d.]+)\. Within .*?: ([\d.]+) (\[.*?\])",
        text,
    )
    assert f"{held_out[0]} ({development[0]}) over all runs together" in TOLD
    assert f"gives {held_out[1]} ({development[1]})" in TOLD
    assert f"it is {held_out[2]} ({development[2]}), over all eight data sets {over_all[2]} {over_all[3]}" in TOLD


def test_mixtures() -> None:
    text = page("examples/validation/RESULTS.md")
    cells = {
        name: re.findall(rf"\| {re.escape(name)} \| harm \| ([\d.]+) \| ([\d.]+) ", text)[0]
        for name in ("gsm8k+law, gentle", "code+translation, gentle", "gsm8k+law, harsh", "code+translation, harsh")
    }
    (r, miss), (r2, miss2), (h, h_miss), (h2, h2_miss) = cells.values()
    assert f"r {r} and {r2}, typical miss {miss} and {miss2} nats" in TOLD
    assert f"r {h} and {h2}, miss {h_miss} and {h2_miss}" in TOLD
    kinds = {"no replay": "nothing", "even": "all four alike"}
    kinds |= {f"{which} expected": f"the two domains expected to move {which}" for which in ("most", "least")}
    for kind, told in kinds.items():
        medians = re.findall(rf"\| {kind}, seed \d \|.* ([+-][\d.]+) \|$", text, re.MULTILINE)
        assert f"| {told} | {' | '.join(medians)} |" in TOLD


def test_reinforcement_learning() -> None:
    one, told = found("grpo"), " ".join(page("docs/rl.md").split())
    first, last = (sum(part) / 5 for part in (one["rewards"][:5], one["rewards"][-5:]))
    assert f"{first:.2f} in the first five steps and {last:.2f} in the last five" in told
    assert f"named {one['n_shared']['20']} of the 100 features" in told
    drifts = [100 * drift for drift in one["outcomes"]["movement"]]
    assert f"drifted by {min(drifts):.1f} to {max(drifts):.1f} %" in told
    first_made, *anew = ({score: by["movement"] for score, by in scores.items()} for scores in one["spearman"].values())
    assert f"by Spearman {first_made['sts_cross']:.2f}, STS_net by {first_made['sts_net']:.2f}" in told
    crosses = [scores["sts_cross"] for scores in anew]
    assert f"came to {min(crosses):.2f} to {max(crosses):.2f}" in told


def test_rows_to_blame() -> None:
    runs = found("blame")
    counts = [one["n_left_out"] for name, one in runs.items() if name.startswith("planted")]
    assert "would leave out {}, {} and {} rows, all of them planted".format(*counts) in TOLD
    assert all(one["precision"] == 1 for name, one in runs.items() if name.startswith("planted"))
    assert all(one["n_left_out"] == 0 for name, one in runs.items() if name.startswith("nothing"))


def test_the_doctor() -> None:
    cases = found("refusals")
    assert all(bool(case["refused"]) == (name != "the right one") for name, case in cases.items())

    def told(*names: str) -> list[str]:
        shares = [cases[name]["explained_variance"] for name in names]
        return [f"{share:.0%}".replace("%", " %") if share > 0 else "none" for share in shares]

    def n_active(*names: str) -> list[str]:
        return [f"{cases[name]['l0']:,.0f}" for name in names]

    layers = ("read at layer 11", "read at layer 13", "read at layer 6")
    assert f"six too low | {', '.join(told(*layers))} | {', '.join(n_active(*layers))} |" in TOLD
    sites = ("before its layer", "at the MLP's output")
    assert f"at the MLP's output | {'; '.join(told(*sites))} | {'; '.join(n_active(*sites))} |" in TOLD
    for name, words in (
        ("the right one", "the right one"),
        ("another model's", "another model's of the same width (a rotated basis)"),
        ("random weights", "random weights"),
        ("4 queries a domain", "the right one with 4 queries a domain"),
    ):
        assert f"| {words} | {told(name)[0]} | {n_active(name)[0]} |" in TOLD


def test_features_that_forecasts_share() -> None:
    one = found("overlap")
    assert f"| {one['gsm8k_forecast_and_realised']['n_shared']} of 100 |" in TOLD
    assert f"| **{one['forecast_code_and_law_shared']} of 100** |" in TOLD


def test_the_second_round() -> None:
    made = page("examples/validation/second/RESULTS.md")
    section = page("docs/how-it-was-validated.md").split("## The second round")[1].split("\n## ")[0]
    cells = re.findall(r"\d+ of \d+ \([\d.]+%\)|\d\.\d\d \[-?\d\.\d\d, \d\.\d\d\]", section)
    assert len(cells) > 10
    assert [cell for cell in cells if cell not in made] == []
    (named,) = re.findall(r"\| harmed domains named before step 1 \(over\) .*", made)
    counts = re.findall(r"(\d+) of (\d+) ", named)[1:]
    told = "named {} of {} domains that harsh runs harmed, and {} of {}".format(*counts[0], *counts[1])
    named_others = re.findall(r"\| 1: over \| (\d+) of \d+ \(.*?\) \| (\d+) of", made)
    right, wrong = map(int, named_others[0])
    assert f"{right} of the {right + wrong} domains that five steps named were harmed" in section
    fitted = re.findall(r"\| 2: fitted .*", made)[0].split("|")[6].split()
    assert f"[expected change](docs/rehearsal.md#the-expected-change-at-the-end) named {fitted[0]}." in README
    assert told in README and told.replace("named", "found") in WHAT_HOLDS
    decision = " ".join(made.split("## Does the expected change decide?")[1].split())
    was_right, was_named = re.findall(r"Of these (\d+ of \d+) .*? it names (\d+ of \d+)", decision)[0]
    assert "does not decide" in decision
    assert f"They were {was_right} and {was_named}" in " ".join(section.split())


def test_the_second_model() -> None:
    with_sae, without = (found("second_model")[key] for key in ("sae", "none"))
    last = [run["checks"]["20"]["domains"] for run in (with_sae, without)]
    for name, domain in last[0].items():
        first = with_sae["rehearsal"]["doses"][0]["domains"][name], with_sae["checks"]["5"]["domains"][name], domain
        changes = " | ".join("{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**one["nll_change"]) for one in first)
        moved = " | ".join(f"{run[name]['relative_drift']['value']:.0%}" for run in last)
        assert f"| {name} | {changes} | {moved} |" in TOLD
    assert with_sae["losses"] == without["losses"]
    for step, check in with_sae["checks"].items():
        for name, domain in check["domains"].items():
            assert domain["nll_change"] == without["checks"][step]["domains"][name]["nll_change"]
    named = [check["n_shared"] for check in with_sae["checks"].values()]
    assert f"{min(named)} to {max(named)} of the 100 that training moved most" in TOLD
    assert [check["verdict"]["decision"] for check in with_sae["checks"].values()] == ["go", "go", "go", "cannot tell", "go"]


def times(cell: dict[str, Any], way: str, than: str, what: str = "seconds") -> float:
    """How many times as much one way of the benchmark takes as another."""
    return float(cell[way][what] / cell[than]["seconds" if what == "probe" else what])


def test_what_a_forecast_costs() -> None:
    gemma = [cell for cell in found("benchmark")["cells"] if cell["model"] == "gemma"]
    long = next(cell for cell in gemma if cell["context"] == 2000)
    for cell in (cell for cell in gemma if cell["kind"] == "jumprelu"):
        if cell["reference"]:
            less = f"{times(cell, 'reference', 'ours'):.1f}, {times(cell, 'reference', 'ours', 'mib'):.1f}"
        else:
            work = long["reference"]["seconds"] * cell["tokens"] / long["tokens"]
            less = f"about {work / cell['ours']['seconds']:.1f} by proportion, not run"
        width = "" if cell["d_sae"] == 16384 else f", {cell['d_sae']:,} features"
        what = f"context of {cell['context']:,} tokens, {cell['tokens']:,} query tokens{width}"
        assert f"| {what} | {less} | {times(cell, 'ours', 'limit'):.2f}, {times(cell, 'ours', 'limit', 'probe'):.2f} |" in TOLD
    (top_k,) = (cell for cell in gemma if cell["kind"] == "topk")
    assert f"or top-k ({times(top_k, 'ours', 'limit', 'probe'):.2f})" in TOLD
    bounds = [times(cell, "reference", "limit") for cell in gemma if cell["context"] == 200]
    assert f"the limit itself is {min(bounds):.0f} to {max(bounds):.0f} times less than the reference" in TOLD


def test_what_a_check_costs() -> None:
    took = found("benchmark")["check"]
    share = took["check"] / (500 * took["step"])
    for page_text in (TOLD, README):
        assert f"took {took['check']:.0f} s" in page_text
    assert f"{100 * share:.1f} % of the training between two default saves" in TOLD
    assert f"lets about one in {share / 0.01:.0f} pass" in TOLD


def test_the_build_before() -> None:
    amd, intel = (found("benchmark_builds")[name]["sizes"] for name in ("AuthenticAMD, no AMX", "GenuineIntel, AMX"))
    sizes = [amd["demo"], amd["default"], intel["demo"]]
    ratio = {key: [f"{size[key]['new / old']:.2f}" for size in sizes] for key in ("forecast_s", "check_s", "forecast_mib")}
    times = " | ".join(", ".join(pair) for pair in zip(ratio["forecast_s"], ratio["check_s"], strict=True))
    assert f"| time of a forecast, of a check | {times} |" in TOLD
    assert f"| peak memory of a forecast | {' | '.join(ratio['forecast_mib'])} |" in TOLD
    assert " | ".join(f"{size['check_mib']['old']:.0f} MiB" for size in sizes) in TOLD
    assert " | ".join(f"{size['same_of_100']} of 100" for size in sizes) in TOLD
