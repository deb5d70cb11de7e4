#!/usr/bin/env bash
# What: in Gemma 4 text models whose last layers share keys and values, the integer logits_to_keep=1 makes these layers run on the last
#   position alone. A forward hook on such a layer then gets one position for a text of ten, so activations read there are those of one
#   token. The same request as a tensor, and any other integer, leaves every layer all positions; the logits are the same either way.
# Versions: torch 2.13.0, transformers 5.23.0.
# Observed: positions by layer [10, 10, 10, 1] with logits_to_keep=1, [10, 10, 10, 10] with 0, 2 and torch.tensor([-1]).
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/venv/bin/python" - <<'PYTHON'
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
config = AutoConfig.for_model(
    "gemma4_text",
    hidden_size=32,
    num_hidden_layers=4,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=100,
    vocab_size_per_layer_input=100,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=1,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
model = AutoModelForCausalLM.from_config(config).eval()
tokens = torch.arange(5, 15).unsqueeze(0)


def run(logits_to_keep):
    seen = []

    def read(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).shape[1])

    handles = [layer.register_forward_hook(read) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=logits_to_keep).logits
    for handle in handles:
        handle.remove()
    return seen, logits[:, -1]


whole = [10, 10, 10, 10]
by_integer, last = run(1)
by_tensor, same = run(torch.tensor([-1]))
print("positions by layer:", {"1": by_integer, "tensor([-1])": by_tensor, "0": run(0)[0], "2": run(2)[0]})
as_observed = by_integer == [10, 10, 10, 1] and by_tensor == run(0)[0] == run(2)[0] == whole
sys.exit(0 if as_observed and torch.allclose(last, same, atol=1e-5) else "this is not what was observed")
PYTHON
