"""What a forecast costs: ours, the reference recipe and the practical limit, side by side on the same tokens.

    python examples/benchmark.py               all cells and a check (40 minutes on two cores), each way in a process of its own
    python examples/benchmark.py --only 1 3    the first cell and the third, beside what was measured before; 0 is the check
    python examples/benchmark.py --device cuda another question, on a GPU: see benchmark_device.py

Three ways to find the features that a context shifts, two thirds up a model, with SAEs of random weights of several widths:

- reference: each query with its whole context through the whole model with logits, all activations `(n_tokens, d_sae)` kept, then
  subtracted, squared and sorted;
- limit: a forward truncated at the layer over the context once and the queries twice, one encoder product, nothing kept;
- ours: `ProbeRunner.calibrate` and `ProbeRunner.read` with one context and no answers; the latter alone is the probe.

Reference and ours must name the same features, to rounding. Times are of the measurement alone, after one short forward that
pages the weights in; memory is the peak over what the process takes then. Machine-readable results go to `benchmark.json`, a
table and what follows for larger models to `BENCHMARKS.md`, a plot to `benchmark.svg`, all beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

HERE, N_FEATURES, QUERY_TOKENS = Path(__file__).parent, 100, 50
RESULTS = HERE / "benchmark.json"
WAYS = ("reference", "limit", "ours")
COLUMNS = ("model", "context", "tokens", "d_sae", "kind")
CELLS = [
    dict(zip(COLUMNS, cell, strict=True))
    for cell in [
        ("gemma", 200, 1000, 4096, "jumprelu"),
        ("gemma", 200, 1000, 16384, "jumprelu"),
        ("gemma", 200, 1000, 16384, "topk"),
        ("gemma", 200, 1000, 65536, "jumprelu"),
        ("gemma", 200, 1000, 16384, "relu"),
        ("gemma", 200, 4000, 16384, "jumprelu"),
        ("gemma", 200, 20000, 16384, "jumprelu"),
        ("gemma", 2000, 1000, 16384, "jumprelu"),
        # The paper's setting: two demonstrations of 1,000 tokens or more and 20,000 tokens. The reference is not run: its work is
        # the same for every query, so that its time follows from the cell above.
        ("gemma", 2000, 20000, 16384, "jumprelu"),
        ("gemma", 2000, 40000, 16384, "jumprelu"),
        ("1B", 200, 1000, 16384, "jumprelu"),
    ]
]
MOST_REFERENCE_WORK = 4_000_000  # context times tokens: an hour and more beyond it
CHECK_STEPS = 8


def loaded(name: str) -> tuple[Any, int]:
    """The model and the layer that is read."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    from gemma import cached_gemma

    if name == "gemma":
        return AutoModelForCausalLM.from_pretrained(cached_gemma(), dtype=torch.float32).eval(), 12
    torch.manual_seed(0)  # of Gemma 3 1B's shape, 1.0 billion weights, random
    shape = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
    config = Gemma3TextConfig(**shape, num_key_value_heads=1, head_dim=256, sliding_window=512, vocab_size=262144)
    return Gemma3ForCausalLM(config).eval(), 17


def reset_peak() -> float:
    """Forget the peak of resident memory so far (Linux); what is resident now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def measured(way: str, cell: dict[str, Any]) -> dict[str, Any]:
    """Run one way in this process."""
    import torch

    from random_weights import random_sae, usual_norm
    from sts_callback.config import ProbeConfig
    from sts_callback.data.probes import ProbeSet, Query
    from sts_callback.measure.runner import ProbeRunner
    from sts_callback.metrics.scores import shifted_features
    from sts_callback.metrics.sums import token_mean
    from sts_callback.model.capture import Capture
    from sts_callback.model.hooks import resolve
    from sts_callback.model.sae import load_encoder
    from sts_callback.model.undisturbed import undisturbed

    model, layer = loaded(cell["model"])
    d_in, d_sae, hook_name = model.config.hidden_size, cell["d_sae"], f"blocks.{layer}.hook_resid_post"
    found: list[torch.Tensor] = []
    block = model.model.layers[layer]
    sae = random_sae(cell["kind"], d_in, d_sae, hook_name, usual_norm(model, layer))
    encoder = load_encoder(sae, "random", layer + 1)
    del sae
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 100_000, (cell["context"] + cell["tokens"],), generator=draw).tolist()
    bos, context, rest = 2, ids[: cell["context"]], ids[cell["context"] :]
    queries = [rest[i : i + QUERY_TOKENS] for i in range(0, len(rest), QUERY_TOKENS)]
    seconds: dict[str, float] = {}

    def reference() -> tuple[int, ...]:
        kept: list[list[torch.Tensor]] = [[], []]
        handle = block.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for side, before in enumerate(([bos], [bos, *context])):
            for query in queries:
                model(input_ids=torch.tensor([before + query]), use_cache=False)
                kept[side].append(encoder.encode(found.pop()[0][-QUERY_TOKENS:]))
        handle.remove()
        shift = (torch.cat(kept[1]) - torch.cat(kept[0])).square().mean(dim=0)
        return tuple(torch.argsort(shift, descending=True)[:N_FEATURES].tolist())

    def limit() -> tuple[int, ...]:
        capture = Capture(model, [resolve(model, hook_name)])
        nothing = capture.prefix((), whole=False)
        for rows in ([context], queries, queries):
            for start in range(0, len(rows), 20):
                x = capture.run(rows[start : start + 20], nothing).activations[hook_name]
                _ = x.flatten(0, 1) @ encoder.sae.W_enc
        return ()

    def ours() -> tuple[int, ...]:
        runner = ProbeRunner(model, [encoder], ProbeConfig(n_features=N_FEATURES, max_norm_multiple=1e9))
        probes = ProbeSet("train", tuple(Query(tuple(q), (), (True,) * len(q)) for q in queries), (tuple(context),), 0)
        zero_shot = runner.context((bos,), with_answers=False)
        runner.calibrate([probes], zero_shot)
        started = time.perf_counter()
        (reading,) = runner.read(probes, zero_shot, {"own": [runner.context((bos, *context), with_answers=False)]})
        seconds["probe"] = time.perf_counter() - started
        return shifted_features(token_mean(reading.shifts["own"].features, reading.n_tokens), N_FEATURES)

    before = reset_peak()
    with undisturbed(model):
        started = time.perf_counter()
        features = {"reference": reference, "limit": limit, "ours": ours}[way]()
        seconds["seconds"] = time.perf_counter() - started
    return {**seconds, "mib": status("VmHWM") - before, "features": features}


def measured_check() -> dict[str, Any]:
    """A drift check at default size beside the training steps of the demo, in one run of it."""
    import torch
    from peft import LoraConfig
    from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed

    from demo import PROTECTED, SAE_FOLDER
    from gemma import cached_gemma
    from sts_callback import STSCallback
    from tuning import tuned
    from word_problems import word_problems

    steps: list[float] = []

    class Timed(STSCallback):
        def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            super().on_step_begin(args, state, control, **kwargs)
            steps.append(-time.perf_counter())

        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            steps[-1] += time.perf_counter()
            super().on_step_end(args, state, control, **kwargs)

    set_seed(0)
    callback = Timed(sae=SAE_FOLDER, protect=PROTECTED, check_on=CHECK_STEPS // 2, max_overhead=None)
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    checks = tuned(cached_gemma(), word_problems(400), callback, lora, steps=CHECK_STEPS, learning_rate=5e-5)
    assert callback.forecast is not None
    return {
        "check": statistics.median(check.seconds for check in checks),
        "step": statistics.median(steps),
        "forecast": callback.forecast.seconds,
        "sets": 1 + len(PROTECTED),
        "n_tokens": checks[0].train.n_tokens + sum(domain.n_tokens for domain in checks[0].domains.values()),
        "threads": torch.get_num_threads(),
    }


def in_child(way: str, cell: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", way, json.dumps(cell)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:  # such as killed for memory
        print(f"{way} failed: {run.stderr[-500:]}", flush=True)
        return {"failed": run.returncode}
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def gemm_gflops() -> float:
    """What a large matrix product reaches on this machine, by the library that torch chooses."""
    import torch

    a, b, times = torch.randn(2048, 2048), torch.randn(2048, 2048), []
    for _ in range(7):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(times) / 1e9


def import_seconds() -> float:
    """What `import sts_callback` adds to starting Python."""

    def median_of(code: str) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    return median_of("import sts_callback, sys; assert 'torch' not in sys.modules") - median_of("pass")


def measure(numbers: Sequence[int]) -> None:
    """Measure cells, by their number from 1, and with 0 the check; what else is in the file stays."""
    from sts_callback.model.products import by_onednn

    with by_onednn():  # as all cells are
        gflops = gemm_gflops()
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, no accelerator"
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    results |= {"machine": machine, "gemm_gflops": gflops, "import_s": import_seconds()}
    for number in numbers:
        if number == 0:
            results["check"] = row = in_child("check", {})
        else:
            row = dict(CELLS[number - 1])
            for way in WAYS:
                is_run = way != "reference" or row["context"] * row["tokens"] <= MOST_REFERENCE_WORK
                row[way] = in_child(way, CELLS[number - 1]) if is_run else {}
            features = [set(row[way].pop("features", ())) for way in WAYS]
            row["same_features"] = len(features[0] & features[2])
            measured = [*(other for other in results["cells"] if cell_of(other) != cell_of(row)), row]
            results["cells"] = sorted(measured, key=lambda other: CELLS.index(cell_of(other)))
        print(json.dumps(row), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def cell_of(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in COLUMNS}


def main() -> None:
    if any(argument.startswith("--device") for argument in sys.argv[1:]):
        import benchmark_device

        benchmark_device.main(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=range(len(CELLS) + 1), metavar="N", help="cells, from 1; 0: check")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pages", action="store_true", help="only make BENCHMARKS.md and the plot from benchmark.json")
    args = parser.parse_args()
    if args.child:
        way, cell = args.child[0], json.loads(args.child[1])
        print(json.dumps(measured_check() if way == "check" else measured(way, cell)))
        return
    if not args.pages:
        measure(range(len(CELLS) + 1) if args.only is None else args.only)
    results = json.loads(RESULTS.read_text())
    from benchmark_pages import page, plot

    (HERE / "BENCHMARKS.md").write_text(page(results))
    plot(results, HERE / "benchmark.svg")


if __name__ == "__main__":
    main()
