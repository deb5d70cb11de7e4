"""The page of `benchmark_device.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmark_pages import DEFAULT_STEPS, wrapped
from watched import FROM, TO

DATA_SHEET = {"A100": 312, "H100": 989, "H200": 989}  # TFLOP/s in bfloat16, dense
SLOWER = ("PCIe", "NVL", "MIG")  # of the H series, and parts of a card
NAMES = {
    "gemma": "Gemma 3 270M",
    "tiny": "tiny Llama, random",
    "tiny, no BOS": "tiny Llama, random, no BOS",
    "1B": "Llama 1B, random",
    "8B": "Llama 8B, random",
}
PARTS = ("forecast", "check")


def page(results: dict[str, dict[str, Any]]) -> str:
    """The Markdown page of all devices that have been measured."""
    lines = [
        "# What a forecast and a check cost on a GPU",
        "",
        *wrapped(
            "Made by `examples/benchmark_device.py`, which says what is measured. `benchmark_device.json` has the numbers. "
            "Models are in bfloat16, SAEs in float32. All weights but those of Gemma 3 270M are random, and so are all texts."
        ),
    ]
    if not any("failed" not in row for found in results.values() if found["device"] == "cuda" for row in found["cells"]):
        lines += [
            "",
            *wrapped(
                '**No GPU has been seen yet.** `make bench ARGS="--device cuda"` on a machine with one puts its times here. The '
                "counts below need none. They were made on a pretended device: a CPU whose tensors say that they are elsewhere. "
                "What waits and what is copied is judged by CUDA's rules. Time it cannot show."
            ),
        ]
    for name, found in results.items():
        lines += ["", "## The pretended device" if found["device"] == "pretended" else f"## {name}"]
        if found["device"] != "pretended":
            lines += ["", *speed(name, found)]
        if found["device"] != "cpu":
            lines += ["", *counts(found["cells"])]
    return "\n".join(lines) + "\n"


def table(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def described(row: dict[str, Any]) -> list[str]:
    """The first columns of each table."""
    return [NAMES[row["model"]], f"{row['d_sae']:,}", f"{row['sets']} x {row['queries']} x {2 * row['tokens']}"]


DESCRIBED = ["model", "SAE", "sets, queries, tokens"]


def data_sheet(name: str) -> float | None:
    """TFLOP/s of a card in bfloat16 by its data sheet, if it is known."""
    series = next((series for series in DATA_SHEET if series in name), None)
    return None if series is None or (series != "A100" and any(word in name for word in SLOWER)) else DATA_SHEET[series]


def speed(name: str, found: dict[str, Any]) -> list[str]:
    peak = data_sheet(name)
    rows = []
    for row in found["cells"]:
        rows.append([*described(row), *(cell for part in PARTS for cell in speed_of(row, part, peak)), *of_steps(row)])
    titles = [f"{part}: {what}" for part in PARTS for what in ("time", "work", "share", "memory")]
    of_sheet = "" if peak is None else f", and of the {peak} TFLOP/s of the data sheet"
    lines = [
        *table([*DESCRIBED, *titles, "a step", f"a check in {DEFAULT_STEPS} steps"], rows),
        "",
        *wrapped(
            "Time is the median of three. Work is that of matrix products and attention, counted. The share is that of the speed "
            f"which one large product in bfloat16 reached on the device just before{of_sheet}. Memory is the peak beyond model "
            "and SAE. A step is one of LoRA on 8 rows of 512 tokens."
        ),
        "",
        *wrapped(identity(found.get("identity", {"failed": "not run"}))),
    ]
    return lines


def speed_of(row: dict[str, Any], part: str, peak: float | None) -> list[str]:
    found = row.get(part, row)
    if "failed" in found:
        return [f"failed: {found['failed']}", "", "", ""]
    reached = found["flop"] / found["seconds"] / 1e12
    shares = [reached / rate for rate in (row["gemm_tflops"], peak) if rate is not None]
    memory = f"{found['peak_mib']:,.0f} MiB" if "peak_mib" in found else "-"
    return [f"{found['seconds']:.3g} s", f"{found['flop'] / 1e12:.3g} TFLOP", ", ".join(f"{s:.1%}" for s in shares), memory]


def of_steps(row: dict[str, Any]) -> list[str]:
    """Seconds of a step of training, and a check's share of those between two."""
    step = row.get("step", row)
    if "failed" in step:
        return [f"failed: {step['failed']}", ""]
    share = f"{row['check']['seconds'] / (DEFAULT_STEPS * step['seconds']):.2%}" if "seconds" in row["check"] else ""
    return [f"{step['seconds']:.3g} s", share]


def identity(found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"Whether training is the same with the callback was not seen: {found['failed']}"
    trained = f"A tiny model was trained with LoRA for {found['steps']} steps, with {found['checks']} checks and without"
    if found["with_and_without"]:
        return f"{trained}: the weights are the same, bit for bit."
    again = "did not repeat itself either" if not found["without_twice"] else "repeats itself"
    return f"{trained}: **the weights differ**. Without the callback, training {again}."


def counts(cells: list[dict[str, Any]]) -> list[str]:
    rows = []
    for row in cells:
        for part in PARTS:
            found = row.get(part, row)
            rows.append([*described(row), part, *(["failed: " + found["failed"]] if "failed" in found else counts_of(found))])
    titles = [*DESCRIBED, "", "forwards", "waits", "waits a forward", "bytes to the device", "bytes back"]
    lines = table(titles, rows)
    for row in cells:
        for part in PARTS:
            if row.get(part, {}).get("waits"):
                lines += ["", *where(row, part)]
    return lines


def n_bytes(found: dict[str, Any], way: str) -> int:
    """Bytes that were copied one way."""
    return sum(n for place, n in found["copied"].items() if place.endswith(way))


def n_waits(found: dict[str, Any]) -> int:
    return sum(found["waits"].values())


def counts_of(found: dict[str, Any]) -> list[str]:
    each = f"{n_waits(found) / found['forwards']:.2f}"
    return [f"{found['forwards']:,}", f"{n_waits(found):,}", each, *(f"{n_bytes(found, way):,}" for way in (TO, FROM))]


def where(row: dict[str, Any], part: str) -> Iterator[str]:
    """The lines that wait and those that copy, most first."""
    yield f"### {NAMES[row['model']]}, {row['d_sae']:,} features: a {part}"
    for what in ("waits", "copied"):
        yield ""
        found = sorted(row[part][what].items(), key=lambda one: (-one[1], one[0]))
        yield from table(
            ["waits" if what == "waits" else "bytes", "line of `sts_callback/`"], [[f"{n:,}", f"`{place}`"] for place, n in found]
        )
