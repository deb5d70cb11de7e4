#!/usr/bin/env bash
# What: with HF_HUB_OFFLINE=1 and every file of a Gemma Scope 2 SAE in the hub's cache, SAELens still asks the hub over HTTP: it reads the
#   tensors' shapes from the remote file's header, and not by huggingface_hub, which would refuse. So an SAE that was loaded once cannot
#   be loaded again on a machine without a connection. The SAEs of Gemma Scope 1, in the same kind of cache, load without a request.
# Versions: torch 2.13.0, sae-lens 6.54.12, huggingface_hub 2.4.0.
# Observed: Gemma Scope 1: loads, no request. Gemma Scope 2: two GET requests for params.safetensors; without a hub, ConnectionError.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 sae-lens==6.54.12 huggingface_hub==2.4.0
cd "$place"
cat >hub.py <<'PYTHON'
"""A hub on this machine that hands out the cached files and notes each request."""
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

asked = []


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(f"GET {Path(self.path).name}")
        content = next(Path(os.environ["HF_HUB_CACHE"]).rglob(Path(self.path).name)).read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args):
        pass


def started():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
PYTHON
cat >look.py <<'PYTHON'
import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path("cache").resolve())}
import hub

server = hub.started()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"

import numpy
import torch
from sae_lens import SAE
from safetensors.torch import save_file

D, N = 4, 8
tensors = {"w_enc": torch.randn(D, N), "w_dec": torch.randn(N, D), "b_enc": torch.zeros(N), "b_dec": torch.zeros(D)}


def cached(repository, commit="0" * 40):
    folder = Path("cache") / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


two = cached("google/gemma-scope-2-270m-pt") / "resid_post" / "layer_12_width_16k_l0_small"
two.mkdir(parents=True)
(two / "config.json").write_text(
    json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.12.output", "l0": 10})
)
save_file(tensors | {"threshold": torch.zeros(N)}, two / "params.safetensors")
one = cached("google/gemma-scope-2b-pt-res") / "layer_12" / "width_16k" / "average_l0_82"
one.mkdir(parents=True)
shapes = {"W_enc": (2304, 16384), "W_dec": (16384, 2304), "b_enc": 16384, "b_dec": 2304, "threshold": 16384}  # SAELens knows them
numpy.savez_compressed(one / "params.npz", **{name: numpy.zeros(shape, "float32") for name, shape in shapes.items()})


def loaded(release, sae_id):
    hub.asked.clear()
    try:
        return type(SAE.from_pretrained(release, sae_id)).__name__, list(hub.asked)
    except Exception as error:
        return type(error).__name__, list(hub.asked)


seen = [
    loaded("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"),
    loaded("gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_small"),
]
server.shutdown()
server.server_close()
seen.append(loaded("gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_small"))
for name, what in zip(("Gemma Scope 1", "Gemma Scope 2", "Gemma Scope 2, no hub"), seen, strict=True):
    print(f"{name}:", *what)
sys.exit(
    seen != [("JumpReLUSAE", []), ("JumpReLUSAE", ["GET params.safetensors"] * 2), ("ConnectionError", [])]
)
PYTHON
"$place/venv/bin/python" look.py
