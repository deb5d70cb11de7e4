"""What a forecast and a check cost on a GPU; where there is none, what the host would wait for and copy.

    make bench ARGS="--device cuda"        three models, two SAEs: seconds, share of the card's speed, waits, copies, memory
    make bench ARGS="--device pretended"   the device of `pretended.py`: waits, copies and forwards, no time
    make bench ARGS="--device cpu"         a tiny model, to see that this script runs; so does --quick on any device

Models and SAEs are of random weights but for Gemma 3 270M, all in bfloat16; texts are random tokens. A cell is one model and one
SAE, in a process of its own: `Monitor.forecast` and `Monitor.check`, each once to count and to warm up, then three times by the
clock; a step of training with LoRA on the same model; a large matrix product, for the speed that the device has right then. What
does not fit or fails says so in its place. Then a tiny model is trained with the callback and without it: are the weights the
same, to the bit? Results go to `benchmark_device.json` under the device's name, the page to `BENCHMARK_DEVICE.md`, both beside
this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sts_callback import Monitor

HERE = Path(__file__).parent
COLUMNS = ("model", "d_sae", "sets", "queries", "tokens")
DEFAULT = (15, 32, 150)  # sets, queries of each, tokens of a query and of an answer: what `benchmark_pages` reckons with on paper
QUICK = ("tiny", 512, 3, 8, 40)
NO_BOS = "tiny, no BOS"  # nothing stands before a query then, for which transformers makes masks in another way
CELLS = {
    "cuda": [(model, d_sae, *DEFAULT) for model in ("gemma", "1B", "8B") for d_sae in (16384, 65536)],
    "pretended": [("tiny", 4096, 3, 32, 150), (NO_BOS, 512, 2, 32, 150)],
    "cpu": [QUICK],
}


def loaded(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gemma import cached_gemma
    from random_weights import byte_tokenizer, random_llama

    model: Any
    if name == "gemma":
        folder = cached_gemma()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        shape = "tiny" if name == NO_BOS else name
        model = random_llama(shape, torch.bfloat16, "cuda" if device == "cuda" else "cpu")
        tokenizer = byte_tokenizer(with_bos=name != NO_BOS)
    model.to(device)
    model.tie_weights()  # on the pretended device parameters are made anew
    return model, tokenizer


def made_monitor(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cell: dict[str, Any]) -> Monitor:
    from random_weights import random_sae, token_rows, usual_norm
    from sts_callback import Monitor, ProbeConfig

    config: Any = model.config
    layer = 2 * config.num_hidden_layers // 3
    norm = usual_norm(model, layer)
    sae = random_sae("jumprelu", config.hidden_size, cell["d_sae"], f"blocks.{layer}.hook_resid_post", norm)
    probes = ProbeConfig(n_queries=cell["queries"])
    n_rows = probes.n_queries + probes.n_draws * probes.n_domain_demonstrations
    sets = [token_rows(n_rows, cell["tokens"], vocab_size=config.vocab_size, seed=seed) for seed in range(cell["sets"])]
    domains = {f"domain {i}": rows for i, rows in enumerate(sets[1:], 1)}
    return Monitor(model, tokenizer, sae=sae, train_data=sets[0], domains=domains, config=probes, progress=False)


def or_failure(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it gives, or why it fails."""
    try:
        return what()
    except Exception as error:  # whatever it is, the other parts and cells are measured
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def name_of(device: str) -> str:
    """The card's own name, or that of the kind of device."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device


def on_gpu(device: str) -> Any:
    """What torch has to say of the device's time and memory, if it is real and not the CPU."""
    import torch

    return torch.cuda if device == "cuda" else None


def median_seconds(action: Callable[[], object], device: str, n: int = 3) -> float:
    gpu, times = on_gpu(device), []
    for _ in range(n):
        if gpu:
            gpu.synchronize()
        started = time.perf_counter()
        action()
        if gpu:
            gpu.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@contextlib.contextmanager
def counted_forwards(model: PreTrainedModel) -> Iterator[list[int]]:
    n = [0]

    def count(module: torch.nn.Module, args: Any) -> None:
        n[0] += 1

    handle = model.register_forward_pre_hook(count)
    try:
        yield n
    finally:
        handle.remove()


def cost(action: Callable[[], object], model: PreTrainedModel, device: str) -> dict[str, Any]:
    """What one measurement takes."""
    watch: Any
    if device == "pretended":
        from pretended import Pretended as watch  # noqa: N813
    else:
        from watched import WatchedGPU as watch  # noqa: N813
    gpu = on_gpu(device)
    before = 0
    if gpu:
        gpu.empty_cache()
        gpu.reset_peak_memory_stats()
        before = gpu.memory_allocated()
    with counted_forwards(model) as n, watch() as seen:
        action()
    found: dict[str, Any] = {"forwards": n[0], "waits": dict(seen.waits), "copied": dict(seen.copied)}
    if gpu:
        found["peak_mib"] = (gpu.max_memory_allocated() - before) / 2**20
    if device != "pretended":
        found["seconds"] = median_seconds(action, device)
        found["flop"] = seen.flop
    return found


def measured(cell: dict[str, Any], device: str) -> dict[str, Any]:
    """One cell, in this process."""
    import torch

    from benchmark_device_training import FIT, lora_step

    found: dict[str, Any] = {"torch": torch.__version__}
    around: Any = contextlib.nullcontext()
    if device == "pretended":
        from pretended import Pretended

        around = Pretended()
    with around, mock.patch(FIT):
        model, tokenizer = loaded(cell["model"], device)
        monitor = made_monitor(model, tokenizer, cell)
        found["check_tokens"] = sum(len(q.tokens) for s in (monitor.train, *monitor.domains.values()) for q in s.queries)
        if device != "pretended":
            found["gemm_tflops"] = gemm_tflops(device)
        found["forecast"] = or_failure(lambda: cost(monitor.forecast, model, device))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)  # as if training had moved it
        found["check"] = or_failure(lambda: cost(lambda: monitor.check(1), model, device))
        if device != "pretended":
            found["step"] = or_failure(lambda: {"seconds": median_seconds(lora_step(model, device), device, n=5)})
    return found


def gemm_tflops(device: str) -> float:
    """The speed of a large matrix product, right now."""
    import torch

    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in "ab")
    a @ b
    return 2 * n**3 / median_seconds(lambda: a @ b, device, n=20) / 1e12


def child(what: str, device: str) -> dict[str, Any]:
    """What a process of its own measures: a cell, or whether training stays the same."""
    import torch

    if device == "cuda":
        torch.cuda.current_device()  # raises where there is none: a trainer would take the CPU
    from benchmark_device_training import identity

    return identity(device) if what == "identity" else measured(json.loads(what), device)


def in_child(what: str, device: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, __file__, "--device", device, "--child", what], capture_output=True, text=True, check=False
    )
    if run.returncode:  # such as killed for memory
        return {"failed": f"ended with {run.returncode}: {run.stderr[-200:]!r}"}
    row: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return row


def measure(cells: list[tuple[Any, ...]], device: str, file: Path) -> None:
    """Measure cells, each in a process of its own; what else is in the file stays."""
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    name = device  # until a child says more
    for values in cells:
        cell = dict(zip(COLUMNS, values, strict=True))
        row = {**cell, **in_child(json.dumps(cell), device)}
        name = row.pop("name", name)
        print(json.dumps(row), flush=True)
        ours = results.setdefault(name, {"device": device, "cells": []})
        ours["cells"] = [*(other for other in ours["cells"] if any(other[key] != cell[key] for key in COLUMNS)), row]
        file.write_text(json.dumps(results, indent=1) + "\n")
    if device != "pretended":  # there, no trainer trains
        found = in_child("identity", device)
        found.pop("name", None)
        results[name]["identity"] = found
        print(json.dumps(found), flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=CELLS, required=True)
    parser.add_argument("--quick", action="store_true", help="one tiny model")
    parser.add_argument("--pages", action="store_true", help="only make the page from the results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results and page (default: beside this script)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one card: with several, a trainer would spread the rows
    if args.child:
        print(json.dumps({"name": name_of(args.device), **or_failure(lambda: child(args.child, args.device))}))
        return
    file = args.out / "benchmark_device.json"
    if not args.pages:
        measure([QUICK] if args.quick else CELLS[args.device], args.device, file)
    from benchmark_device_pages import page

    (args.out / "BENCHMARK_DEVICE.md").write_text(page(json.loads(file.read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
