#!/usr/bin/env bash
# What: SAELens has a loader for SAEs of EleutherAI's sparsify, but what sparsify 1.3.3 saves does not load with it. sparsify keeps W_dec as
#   (num_latents, d_in), SAELens wants (d_sae, d_in), which is the same; the loader transposes it all the same. With as many latents as
#   dimensions it loads, and is wrong twice: decoder turned, and b_dec is not subtracted from what it reads, as sparsify's encode does.
# Versions: torch 2.13.0, sae-lens 6.54.12, eai-sparsify 1.3.3.
# Observed: 16 latents of 8 dimensions: RuntimeError, size mismatch for W_dec. 8 of 8: loads, features and reconstructions differ.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 sae-lens==6.54.12 natsort==8.4.0 schedulefree==1.4.1 simple-parsing==0.1.9
"$place/venv/bin/pip" install -q --no-deps eai-sparsify==1.3.3
cd "$place"
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON'
import sys

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sparsify import SparseCoder, SparseCoderConfig

torch.manual_seed(0)


def read_back(d_in, n_latents):
    made = SparseCoder(d_in, SparseCoderConfig(num_latents=n_latents, k=4))
    with torch.no_grad():
        for weight in (made.encoder.weight, made.W_dec, made.b_dec):
            weight.copy_(torch.randn(weight.shape))
    folder = f"{n_latents}/layers.2"
    made.save_to_disk(folder)
    try:
        read = SAE.load_from_disk(folder, converter=sparsify_disk_loader).float()
    except RuntimeError as error:
        return "RuntimeError", "size mismatch for W_dec" in str(error)
    x = torch.randn(5, d_in)
    with torch.no_grad():
        code = made.encode(x)
        features = torch.zeros(5, n_latents).scatter(1, code.top_indices, code.top_acts)
        decoded = made.decode(code.top_acts, code.top_indices)
        return (
            "loads",
            torch.allclose(read.encode(x), features, atol=0.1),
            torch.allclose(read.decode(features), decoded, atol=0.1),
            read.cfg.apply_b_dec_to_input,
        )


seen = read_back(8, 16), read_back(8, 8)
print("16 latents, 8 dimensions:", *seen[0])
print("8 latents, 8 dimensions:", *seen[1])
sys.exit(seen != (("RuntimeError", True), ("loads", False, False, False)))
PYTHON
