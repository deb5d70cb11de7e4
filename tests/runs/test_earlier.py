"""A run and a ledger of the build before the floor plan (0.1.0 as of its commit 8f9bc93) are still read, and told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sts_callback.data.probes import ProbeSet, Query
from sts_callback.measure.step_zero import StepZeroReference
from sts_callback.report.card import card_section
from sts_callback.report.html.page import write_report
from sts_callback.runs.directory import RunDirectory
from sts_callback.runs.ledger import read

EARLIER = Path(__file__).parent / "earlier"


def test_all_of_the_folder_is_read() -> None:
    found = RunDirectory(EARLIER / "sts").read_all()
    assert found.unreadable == ()
    assert found.settings is not None and found.settings.policy.budgets == {"near": 0.1}
    written = json.loads((EARLIER / "sts" / "forecast.json").read_text())["forecast"]["domains"]["near"]
    assert found.forecast is not None
    near = found.forecast.domains["near"]
    assert (near.sae_error_share, near.sts_net.value) == (written["unseen"], written["sts_net"]["value"])
    assert [check.snapshot.step for check in found.checks] == [1, 2]
    assert found.checks[-1].verdict.decision == "cannot tell"
    assert len(found.top_examples) >= 8


def holds(now: Any, then: Any) -> bool:
    """Whether all that was written then is written now; there may be more."""
    if isinstance(then, dict):
        return isinstance(now, dict) and all(key in now and holds(now[key], then[key]) for key in then)
    if isinstance(then, list):
        return isinstance(now, list) and len(now) == len(then) and all(map(holds, now, then))
    return bool(now == then)


def test_what_is_written_now_has_the_same_keys() -> None:
    found = RunDirectory(EARLIER / "sts").read_all()
    line = (EARLIER / "sts" / "drift.jsonl").read_text().splitlines()[-1]
    assert holds(found.checks[-1].snapshot.to_dict(), json.loads(line)["snapshot"])
    assert found.forecast is not None
    assert holds(found.forecast.to_dict(), json.loads((EARLIER / "sts" / "forecast.json").read_text())["forecast"])
    assert not holds({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}})
    assert not holds([{"a": 1}], [{"a": 1, "b": 2}]) and not holds([1, 2], [1])


def test_step_zero_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    file = EARLIER / "sts" / "baseline.safetensors"
    with safe_open(file, framework="pt") as content:
        fingerprint, keys = content.metadata()["fingerprint"], set(content.keys())
    found = StepZeroReference.load(file, fingerprint)
    assert float(found.sets["near"].sq_norm.sum()) > 0
    found.save(tmp_path / "again.safetensors")
    with safe_open(tmp_path / "again.safetensors", framework="pt") as content:
        assert set(content.keys()) == keys
    assert StepZeroReference.load(tmp_path / "again.safetensors", fingerprint).digest == found.digest


def test_a_run_of_before_there_was_accuracy_is_known_by_the_same_digest() -> None:
    """As that build gave it, of its file and with probes in it: what a resumed run has in its state."""
    file = EARLIER / "sts" / "baseline.safetensors"
    with safe_open(file, framework="pt") as content:
        found = StepZeroReference.load(file, content.metadata()["fingerprint"])
    assert found.digest == "00180520d00545e7fdbb83bbc1f9c01f3c11ba8fc4ce3c1cab949b94ff85da74"
    queries = (Query((5, 6), (7, 8, 9), (True, False)), Query((5,), (), (True,)))
    probes = {"law": ProbeSet("law", queries, ((1, 2), (3,)), 4, "written")}
    assert replace(found, probes=probes).digest == "ff2817da43d921b3b6dd87e3c09d1a40b62607e2b8b9df6f267f667a63713bce"


def test_report_and_card_are_made_of_it(tmp_path: Path) -> None:
    log = RunDirectory(Path(shutil.copytree(EARLIER / "sts", tmp_path / "sts")))
    assert "near" in write_report(log).read_text()
    assert "near" in card_section(log)


def test_a_line_of_the_ledger_is_read() -> None:
    found = read(EARLIER / "ledger.jsonl")
    assert (len(found.entries), found.n_unreadable) == (1, 0)
    assert found.entries[0].domains["near"].relative_drift.value > 0
