"""Does the doctor refuse what is wrong, and pass what is right?

    python examples/refusals.py

On Gemma 3 270M: the right SAE; the same one read at another layer, at another point of its own layer, turned into that of another
model of the same width (one whose residual stream is rotated), replaced by random weights; and too few queries.
Results go to `refusals.json` beside this file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from sae_lens import SAE
from transformers.utils import logging

from demo import PROTECTED, SAE_FOLDER
from gemma import loaded_gemma
from sts_callback import Monitor, PolicyConfig, ProbeConfig
from sts_callback.config import DEFAULT_BUDGET
from sts_callback.data.starter import starter_domains
from sts_callback.report.terminal.forecast import doctor_table
from word_problems import word_problems

PROBES = ProbeConfig(n_queries=16)


def shipped(hook_name: str = "") -> SAE:
    sae = SAE.load_from_disk(str(SAE_FOLDER), dtype="float32")
    if hook_name:
        sae.cfg.metadata.hook_name = hook_name
    return sae


def rotated() -> SAE:
    """As good an SAE of another model: one with the same residual stream in another basis."""
    sae = shipped()
    basis = torch.linalg.qr(torch.randn(sae.cfg.d_in, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)))[0]
    sae.W_enc.data, sae.W_dec.data = basis @ sae.W_enc.data, sae.W_dec.data @ basis.T
    sae.b_dec.data = sae.b_dec.data @ basis.T
    return sae


def random_weights() -> SAE:
    """Random directions of the lengths that the right ones have."""
    sae, generator = shipped(), torch.Generator().manual_seed(0)
    for weights, dim in ((sae.W_enc, 0), (sae.W_dec, 1)):
        drawn = torch.randn(weights.shape, generator=generator)
        weights.data = drawn / drawn.norm(dim=dim, keepdim=True) * weights.data.norm(dim=dim, keepdim=True)
    return sae


def cases() -> Iterator[tuple[str, SAE, ProbeConfig]]:
    yield "the right one", shipped(), PROBES
    for layer in (6, 11, 13):
        yield f"read at layer {layer}", shipped(f"blocks.{layer}.hook_resid_post"), PROBES
    yield "before its layer", shipped("blocks.12.hook_resid_pre"), PROBES
    yield "at the MLP's output", shipped("blocks.12.hook_mlp_out"), PROBES
    yield "another model's", rotated(), PROBES
    yield "random weights", random_weights(), PROBES
    yield "4 queries a domain", shipped(), ProbeConfig(n_queries=4)


def main() -> None:
    logging.set_verbosity_error()
    model, tokenizer = loaded_gemma()
    files = starter_domains()
    policy = PolicyConfig(budgets=dict.fromkeys(PROTECTED, DEFAULT_BUDGET))
    results = {}
    for case, sae, probes in cases():
        monitor = Monitor(
            model,
            tokenizer,
            sae=sae,
            train_data=word_problems(400),
            domains={domain: files[domain] for domain in PROTECTED},
            config=probes,
        )
        checks = monitor.examine(policy)
        refused = {check.name: check.found for check in checks if check.status == "refuse"}
        results[case] = {"refused": refused, "explained_variance": 1 - monitor.fits[0].fvu, "l0": monitor.fits[0].l0}
        print(f"\n{case}: {'refused' if refused else 'passed'}\n{doctor_table(checks)}", flush=True)
    (Path(__file__).parent / "refusals.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
