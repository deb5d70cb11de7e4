"""The page and the plot of `benchmark.py`, and what its figures mean for larger models, on paper."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS = ("reference", "limit", "ours")
N_SETS, N_QUERIES, N_DRAWS = 15, 32, 8  # 14 domains and the training data, at default size
QUERY, ANSWER, TRAIN_ICL, DOMAIN_ICL = 150, 150, 600, 1500  # tokens: of a query, of its answer, of two and of five demonstrations
DEFAULT_STEPS = 500  # between two saves of the Trainer
DEPTH = 2 / 3  # where SAEs are usually read
H100_TFLOPS, H100_GB = 989, 80  # bfloat16, dense, by its data sheet
CONSTANTS = {"gemma": (18, 640, 2048, 4, 1), "1B": (26, 1152, 6912, 4, 1)}  # layers, width, MLP, heads, KV heads of 256


@dataclass(frozen=True)
class Large:
    """A model on paper: its width and vocabulary as published for models of this size."""

    name: str
    billions: float
    width: int
    vocab: int
    d_sae: int


LARGE = (
    Large("8B", 8, 4096, 128256, 32768),
    Large("70B", 70, 8192, 128256, 65536),
    Large("405B", 405, 16384, 128256, 131072),
)


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def seconds(row: dict[str, Any], way: str) -> float:
    return float(row[way].get("seconds", float("nan")))


def page(results: dict[str, Any]) -> str:
    titles = (
        "model",
        "context",
        "tokens",
        "SAE",
        *WAYS,
        "reference / ours",
        "reference / limit",
        "ours / limit",
        "probe / limit",
        "memory: reference, limit, ours",
        "same of 100",
    )
    lines = [
        "# What a forecast costs",
        "",
        *wrapped(
            f"Made by `examples/benchmark.py` on {results['machine']}: `benchmark.json` has the numbers. Float32 models, SAEs of "
            "random weights; the three ways are described at the head of the script. Memory is the peak over the loaded model "
            "and SAE. CPU only."
        ),
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in results["cells"]:
        lines.append(f"| {' | '.join(cells_of(row, by_proportion(row, results['cells'])))} |")
    lines += [
        "",
        *wrapped(
            "~: not run; the reference does the same work for every query, so this is its time on the cell with 1,000 tokens in "
            "proportion. The probe is the reading alone, without the calibration that a forecast makes once."
        ),
        "",
        "![Times and memory](benchmark.svg)",
        "",
        f"`import sts_callback` adds {results['import_s'] * 1000:.0f} ms to starting Python, and loads no torch.",
        "",
        *check(results["check"]),
        "",
        *floor(results),
        "",
        *scaling(results),
    ]
    return "\n".join(lines) + "\n"


def by_proportion(row: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    """Seconds of the reference where it was not run."""
    same = ("model", "context", "d_sae", "kind")
    for other in rows:
        if other["tokens"] == 1000 and all(other[key] == row[key] for key in same):
            return seconds(other, "reference") * row["tokens"] / 1000
    return float("nan")


def cells_of(row: dict[str, Any], estimated: float) -> list[str]:
    run = bool(row["reference"].get("seconds"))
    times = {way: seconds(row, way) for way in WAYS}
    shown = {way: f"{t:.1f} s" for way, t in times.items()}
    if not run:
        times["reference"], shown["reference"] = estimated, f"~{estimated:.0f} s"
    about = "" if run else "~"
    memory = ", ".join(f"{row[way]['mib']:.0f}" if row[way] else "-" for way in WAYS)
    name = {"gemma": "Gemma 3 270M", "1B": "1B, random"}[row["model"]]
    return [
        name,
        f"{row['context']:,}",
        f"{row['tokens']:,}",
        f"{row['d_sae']:,} {row['kind']}",
        *shown.values(),
        f"{about}{times['reference'] / times['ours']:.1f}",
        f"{about}{times['reference'] / times['limit']:.1f}",
        f"{times['ours'] / times['limit']:.2f}",
        f"{row['ours']['probe'] / times['limit']:.2f}",
        f"{memory} MiB",
        str(row["same_features"]) if run else "-",
    ]


def limit_flop(row: dict[str, Any]) -> float:
    """Multiplications and additions of the limit's matrix products."""
    layers, width, mlp, heads, kv = CONSTANTS[row["model"]]
    a_layer = 2 * width * (256 * (2 * heads + 2 * kv) + 3 * mlp)
    read = {"gemma": 12, "1B": 17}[row["model"]] + 1
    assert read <= layers
    n_tokens = row["context"] + 2 * row["tokens"]
    return float(n_tokens * (read * a_layer + 2 * width * row["d_sae"]))


def reached(results: dict[str, Any]) -> list[float]:
    """Share of the machine's own speed on a large matrix product that the probe's necessary products reach, cell by cell."""
    return [limit_flop(row) / row["ours"]["probe"] / 1e9 / results["gemm_gflops"] for row in results["cells"]]


def floor(results: dict[str, Any]) -> list[str]:
    shares = reached(results)
    return [
        "## The floor",
        "",
        *wrapped(
            f"A large matrix product reaches {results['gemm_gflops']:.0f} GFLOP/s here. The products that no way can avoid "
            f"(layers up to the SAE, each token once a context, and the encoder) run at {min(shares):.0%} to {max(shares):.0%} "
            "of that speed in our probe, attention, sums and decoding included in the time. What is not a matrix product: rotary "
            "embeddings, norms and the element-wise halves of the MLP in the model; thresholds, differences and their sums in "
            "the SAE, each once over `(n_tokens, d_sae)`."
        ),
    ]


def check(found: dict[str, Any]) -> list[str]:
    share = found["check"] / (DEFAULT_STEPS * found["step"])
    return [
        "## A drift check in training",
        "",
        *wrapped(
            f"At default size ({N_QUERIES} queries a set, {found['sets']} sets, {found['n_tokens']:,} query tokens and the "
            f"answers) beside the demo's training, in one run: a check takes {found['check']:.0f} s, a step on two short rows "
            f"{found['step']:.1f} s, so that a check is {share:.1%} of the training between two default ones ({DEFAULT_STEPS} "
            f"steps); `max_overhead`, 1 % by default, lets about one in {math.ceil(share / 0.01)} pass. A step on as few tokens "
            "as the demo's is unusually cheap; the table below has what larger batches make of it. The forecast there takes "
            f"{found['forecast']:.0f} s."
        ),
    ]


def scaling(results: dict[str, Any]) -> list[str]:
    share = sorted(reached(results))[len(results["cells"]) // 2]
    speed = H100_TFLOPS * 1e12 * share
    lines = [
        "## On paper: 8B to 405B",
        "",
        *wrapped(
            f"A forecast of 14 domains at default size ({N_QUERIES} queries a set, {N_DRAWS} draws; queries and answers of "
            f"{QUERY} tokens, demonstrations of 300), SAE at two thirds of the depth. From counted operations; seconds if an "
            f"H100 ({H100_TFLOPS} TFLOP/s in bfloat16 by its data sheet) reaches the same share of its peak as measured above in "
            f"the middle cell ({share:.0%}). Nothing in this table was run."
        ),
        "",
        "| model | SAE | forecast | a check | its encoding | one GPU: forecast, check | FSDP: forecast, check | model, SAE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in LARGE:
        forecast, check = forecast_flop(model, DEPTH), check_flop(model)
        sharded = forecast_flop(model, 1.0)  # on a sharded model no forward may end early
        weights, sae = 2 * model.billions, 2 * 4 * model.width * model.d_sae / 1e9
        fits = weights + sae < 0.9 * H100_GB
        alone = f"{forecast / speed:.2g} s, {check / speed:.2g} s" if fits else "does not fit"
        n_gpus = 8 if weights < 8 * 0.8 * H100_GB else 16
        encoding = N_SETS * N_QUERIES * QUERY * 2 * model.width * model.d_sae / check
        lines.append(
            f"| {model.name} | {model.d_sae:,} | {forecast / 1e15:.1f} PFLOP | {check / 1e15:.1f} PFLOP | {encoding:.1%} "
            f"| {alone} | {n_gpus} GPUs: {sharded / speed / n_gpus:.2g} s, {check / speed / n_gpus:.2g} s "
            f"| {weights:.0f} GB in bfloat16, {sae:.1f} GB in float32 |"
        )
    n_tokens, a_step = N_SETS * N_QUERIES * (QUERY + ANSWER), 3 * 8 * 2000
    lines += [
        "",
        *wrapped(
            "Beside model and SAE a probe needs one segment's activations, the keys of one layer for a batch and a chunk of "
            "feature activations (16 MiB, or 256 tokens of a very wide SAE): none of it grows with the number of tokens. What "
            "does grow is what is kept: of each query, for the bootstrap, one sum a feature and context, and of each token its "
            "active features, for drift; with 16,384 features and queries of 50 tokens about 4 KiB a token. Under FSDP every "
            "process keeps its own copy of the SAE. A training step on 8 sequences of 2,000 tokens is "
            f"worth {a_step:,} token forwards; a check is {n_tokens:,}, as much as {n_tokens / a_step:.1f} such steps: "
            f"{n_tokens / a_step / 500:.1%} of the 500 between two default checks. Encoding is so small a part of a check that "
            "following only the features of the forecast would save next to nothing; all are encoded, which also tells what else "
            "has moved."
        ),
    ]
    return lines


def forecast_flop(model: Large, depth: float) -> float:
    """Of one forecast."""
    token, head, encode = 2e9 * model.billions, 2 * model.width * model.vocab, 2 * model.width * model.d_sae
    contexts = N_DRAWS * TRAIN_ICL + TRAIN_ICL
    whole = N_QUERIES * (QUERY + ANSWER)
    a_set = (
        N_DRAWS * DOMAIN_ICL * token * depth  # contexts of its own
        + 3 * whole * token  # bare, taught, neutral
        + (2 * whole * token * (1 - depth) if depth < 1 else 0)  # the backward pass, which a sharded model does without
        + N_QUERIES * QUERY * token * depth  # behind its own demonstrations
        + (5 if depth < 1 else 3) * N_QUERIES * ANSWER * head
        + (4 * QUERY + (2 * (QUERY + ANSWER) if depth < 1 else 0)) * N_QUERIES * encode
    )
    return float(contexts * token + N_SETS * a_set)


def check_flop(model: Large) -> float:
    """Of one drift check."""
    token, head, encode = 2e9 * model.billions, 2 * model.width * model.vocab, 2 * model.width * model.d_sae
    return float(N_SETS * N_QUERIES * ((QUERY + ANSWER) * token + ANSWER * head + QUERY * encode))


def plot(results: dict[str, Any], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "sts_callback"  # the same file from the same numbers
    rows = [row for row in results["cells"] if row["reference"].get("seconds")]
    names = [f"{row['model']}, {row['context']:,} + {row['tokens']:,}\n{row['d_sae']:,} {row['kind']}" for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.7 * len(rows)), sharey=True, layout="constrained")
    for axis, key, title in ((axes[0], "seconds", "seconds"), (axes[1], "mib", "MiB over model and SAE")):
        for place, way in enumerate(WAYS):
            values = [row[way][key] for row in rows]
            bars = axis.barh([i + 0.27 * (place - 1) for i in range(len(rows))], values, 0.25, label=way)
            axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
        axis.set(xscale="log", xlabel=title, yticks=range(len(rows)), yticklabels=names)
        axis.margins(x=0.1)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Features that a context shifts: {results['machine']}", fontsize=10)
    figure.savefig(file, metadata={"Date": None})
