"""What a forecast and a drift check cost beside an earlier build, in one run, and whether both find the same.

    python examples/benchmark_builds.py 8f9bc93             at the demo's size and at default size (half an hour on two cores)
    python examples/benchmark_builds.py 8f9bc93 --only demo

The other build is checked out of this repository into a temporary folder. Each size is measured in turn, old and new, each in a
process of its own: a forecast of Gemma 3 270M on the demo's domains, then a check of weights that were rounded to bfloat16, and
the peak of memory over the loaded model and SAE. Results go to `benchmark_builds.json` beside this file, each maker's processors
under their own key.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmark import gemm_gflops, reset_peak, status

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "benchmark_builds.json"
SIZES: dict[str, dict[str, int]] = {"demo": {"n_queries": 10, "max_tokens": 48, "n_domain_demonstrations": 2}, "default": {}}
REPEATS = {"demo": 3, "default": 1}
SCORES = ("sts_act", "sts_icl", "sts_rel", "sts_cross", "sts_net")


def measured(size: str) -> dict[str, Any]:
    """Measure the build that Python finds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from demo import PROTECTED, SAE_FOLDER
    from gemma import cached_gemma
    from sts_callback import Monitor, ProbeConfig
    from word_problems import word_problems

    name = cached_gemma()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    monitor = Monitor(
        model,
        AutoTokenizer.from_pretrained(name),
        sae=SAE_FOLDER,
        train_data=word_problems(400),
        domains={domain: HERE.parent / "sts_callback" / "data" / "domains" / f"{domain}.jsonl" for domain in PROTECTED},
        config=ProbeConfig(**SIZES[size]),  # type: ignore[arg-type]
        progress=False,
    )
    with torch.no_grad():
        model(input_ids=torch.arange(1000, 1020)[None], use_cache=False)  # pages the weights in
    before = reset_peak()
    began = time.perf_counter()
    forecast = monitor.forecast()
    forecast_s, forecast_mib = time.perf_counter() - began, status("VmHWM") - before
    model.load_state_dict({key: value.bfloat16().float() for key, value in model.state_dict().items()})
    before = reset_peak()
    began = time.perf_counter()
    check = monitor.check(1)
    return {
        "forecast_s": forecast_s,
        "check_s": time.perf_counter() - began,
        "forecast_mib": forecast_mib,
        "check_mib": status("VmHWM") - before,
        "features": forecast.features,
        "scores": {
            domain: {score: getattr(found, score).value for score in SCORES} for domain, found in forecast.domains.items()
        },
        "nll_changes": {domain: found.nll_change.value for domain, found in check.domains.items()},
        "drifts": {domain: found.relative_drift.value for domain, found in check.domains.items()},
    }


def in_child(build: Path, size: str) -> dict[str, Any]:
    run = subprocess.run(
        [sys.executable, __file__, "--child", size],
        env={**os.environ, "PYTHONPATH": str(build)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise SystemExit(f"{build.name} failed: {run.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def compared(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each, and how far what they found differs."""
    rows: dict[str, Any] = {}
    for what in ("forecast_s", "check_s", "forecast_mib", "check_mib"):
        before, after = (statistics.median(run[what] for run in runs) for runs in (old, new))
        rows[what] = {"old": before, "new": after, "new / old": after / before}
    first, last = old[0], new[0]
    rows["same_of_100"] = len(set(first["features"]) & set(last["features"]))
    rows["largest_difference"] = {
        **{s: max(abs(last["scores"][d][s] - found[s]) for d, found in first["scores"].items()) for s in SCORES},
        **{key: max(abs(last[key][d] - value) for d, value in first[key].items()) for key in ("nll_changes", "drifts")},
    }
    return rows


def processor() -> str:
    """Its maker, and whether it has AMX: both decide which library makes products best (Linux)."""
    said = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in said.items()}
    return f"{found['vendor_id']}, {'AMX' if 'amx_tile' in found['flags'].split() else 'no AMX'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="the earlier build")
    parser.add_argument("--only", choices=SIZES, help="one size")
    parser.add_argument("--child", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.child)))
        return
    if not args.commit:
        parser.error("give the commit of the earlier build")
    everywhere: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results: dict[str, Any] = everywhere.setdefault(processor(), {"sizes": {}})
    results |= {"against": args.commit, "gemm_gflops": gemm_gflops()}
    with tempfile.TemporaryDirectory() as folder:
        old_build = Path(folder) / "old"
        git = ["git", "-C", str(HERE.parent)]
        subprocess.run([*git, "worktree", "add", "--detach", str(old_build), args.commit], check=True, capture_output=True)
        try:
            for size in [args.only] if args.only else SIZES:
                old, new = list[dict[str, Any]](), list[dict[str, Any]]()
                for _ in range(REPEATS[size]):
                    old.append(in_child(old_build, size))
                    new.append(in_child(HERE.parent, size))
                    print(json.dumps(compared(old, new)), flush=True)
                results["sizes"][size] = {"repeats": len(old), **compared(old, new)}
                RESULTS.write_text(json.dumps(everywhere, indent=1) + "\n")
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(old_build)], check=True)


if __name__ == "__main__":
    main()
