"""What a forecast costs: ours, the reference recipe and the practical limit, side by side on the same tokens.

    python examples/benchmark.py             all cells that fit this machine, each way in a process of its own
    python examples/benchmark.py --only 1    the first cell

Three ways to find the features that a context shifts, at layer 12 of Gemma 3 270M with SAEs of random weights of several widths:

- reference: each query with its whole context through the whole model with logits, all activations `(n_tokens, d_sae)` kept, then
  subtracted, squared and sorted;
- limit: a forward truncated at the layer over the context once and the queries twice, one encoder product, nothing kept;
- ours: `Gauge.read` with one context and no answers.

Reference and ours must name the same features, to rounding. Times are of the measurement alone; memory is the peak over what the
loaded model and SAE take. Results go to `benchmark.json` and as a table to `BENCHMARKS.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

HERE, LAYER, N_FEATURES, QUERY_TOKENS = Path(__file__).parent, 12, 100, 50
WAYS = ("reference", "limit", "ours")
CELLS: list[
    dict[str, Any]
] = [  # the paper's settings are 2 and 5 demonstrations of 1,000 tokens or more, 20,000 tokens, 16k features
    {"context": context, "tokens": tokens, "d_sae": d_sae, "kind": kind}
    for context, tokens, d_sae, kind in [
        (200, 1000, 4096, "jumprelu"),
        (200, 1000, 16384, "jumprelu"),
        (200, 1000, 16384, "topk"),
        (200, 4000, 16384, "jumprelu"),
        (2000, 1000, 16384, "jumprelu"),
        (2000, 1000, 65536, "jumprelu"),
    ]
]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(way: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Run one way in this process."""
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
    from transformers import AutoModelForCausalLM

    from gemma import cached_gemma
    from sts_callback.config import ProbeConfig
    from sts_callback.measure import Gauge
    from sts_callback.metrics.scores import shifted_features
    from sts_callback.metrics.sums import token_mean
    from sts_callback.model.capture import Capture, undisturbed
    from sts_callback.model.encoder import load_encoder
    from sts_callback.model.hooks import resolve
    from sts_callback.model.probes import ProbeSet, Query

    model = AutoModelForCausalLM.from_pretrained(cached_gemma(), dtype=torch.float32).eval()
    d_in, d_sae, hook_name = model.config.hidden_size, cell["d_sae"], f"blocks.{LAYER}.hook_resid_post"
    torch.manual_seed(0)
    if cell["kind"] == "topk":
        sae: Any = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=50))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae))
    sae.W_enc.data = torch.randn(d_in, d_sae) / d_in**0.5
    sae.cfg.metadata.hook_name = hook_name
    if cell["kind"] == "jumprelu":  # about 50 features of a token of usual norm pass
        sae.threshold.data.fill_(13500 * float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - 50 / d_sae))) / d_in**0.5)
    encoder = load_encoder(sae, "gemma", LAYER + 1)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 100_000, (cell["context"] + cell["tokens"],), generator=draw).tolist()
    bos, context, rest = 2, ids[: cell["context"]], ids[cell["context"] :]
    queries = [rest[i : i + QUERY_TOKENS] for i in range(0, len(rest), QUERY_TOKENS)]

    def reference() -> tuple[int, ...]:
        kept: list[list[torch.Tensor]] = [[], []]
        found: list[torch.Tensor] = []
        block = model.model.layers[LAYER]
        handle = block.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for side, before in enumerate(([bos], [bos, *context])):
            for query in queries:
                model(input_ids=torch.tensor([before + query]), use_cache=False)
                kept[side].append(encoder.encode(found.pop()[0]))
        handle.remove()
        without, within = ([acts[-QUERY_TOKENS:] for acts in side] for side in kept)
        shift = (torch.cat(within) - torch.cat(without)).square().mean(dim=0)
        return tuple(torch.argsort(shift, descending=True)[:N_FEATURES].tolist())

    def limit() -> tuple[int, ...]:
        capture = Capture(model, [resolve(model, hook_name)])
        nothing = capture.prefix((), whole=False)
        parts = [[context], *([queries] * 2)]
        for rows in parts:
            for start in range(0, len(rows), 20):
                x = capture.run(rows[start : start + 20], nothing).activations[hook_name]
                _ = x.flatten(0, 1) @ encoder.sae.W_enc
        return ()

    def ours() -> tuple[int, ...]:
        config = ProbeConfig(n_features=N_FEATURES, max_norm_multiple=1e9)
        gauge = Gauge(model, encoder, config)
        probes = ProbeSet("train", tuple(Query(tuple(q), (), (True,) * len(q)) for q in queries), (tuple(context),), 0)
        bare = gauge.context((bos,), with_answers=False)
        gauge.calibrate([probes], bare)
        reading = gauge.read(probes, bare, {"own": [gauge.context((bos, *context), with_answers=False)]})
        return shifted_features(token_mean(reading.shifts["own"].features, reading.n_tokens), N_FEATURES)

    before = peak_mib()
    with undisturbed(model):
        started = time.perf_counter()
        features = {"reference": reference, "limit": limit, "ours": ours}[way]()
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "mib": peak_mib() - before, "features": features}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, help="how many cells, from the first")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.child[0], json.loads(args.child[1]))))
        return
    results = []
    for cell in CELLS[: args.only]:
        row: dict[str, Any] = dict(cell)
        for way in WAYS:
            command = [sys.executable, __file__, "--child", way, json.dumps(cell)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                row[way] = {"failed": run.returncode}  # such as killed for memory
                print(f"{way} failed: {run.stderr[-500:]}", flush=True)
                continue
            row[way] = json.loads(run.stdout.splitlines()[-1])
        features = [set(row[way].pop("features", ())) for way in WAYS]
        row["same_features"] = len(features[0] & features[2])
        results.append(row)
        print(json.dumps(row), flush=True)
        machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
        (HERE / "benchmark.json").write_text(json.dumps({"machine": machine, "cells": results}, indent=1) + "\n")
        (HERE / "BENCHMARKS.md").write_text(table(machine, results))


def table(machine: str, results: list[dict[str, Any]]) -> str:
    titles = ("context", "tokens", "SAE", *WAYS, "reference / ours", "ours / limit", "memory: reference, ours", "same of 100")
    lines = [
        "# What a forecast costs",
        "",
        f"Made by `examples/benchmark.py` on {machine}, no accelerator. Gemma 3 270M in float32, layer {LAYER}, SAEs of random",
        "weights; the three ways are described at the head of the script. Memory is the peak over the loaded model and SAE.",
        "",
        f"| {' | '.join(titles)} |",
        "|---" * len(titles) + "|",
    ]
    for row in results:
        seconds = [row[way].get("seconds", float("nan")) for way in WAYS]
        memory = ", ".join(f"{row[way].get('mib', float('nan')):.0f}" for way in ("reference", "ours"))
        cells = [row["context"], row["tokens"], f"{row['d_sae']} {row['kind']}", *(f"{s:.1f} s" for s in seconds)]
        cells += [f"{seconds[0] / seconds[2]:.1f}", f"{seconds[2] / seconds[1]:.2f}", f"{memory} MiB", row["same_features"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
