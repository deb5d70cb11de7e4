#!/usr/bin/env bash
# What: torch's FlopCounterMode cannot count a gradient that is asked at a hidden state of a transformers model by torch.autograd.grad, as
#   attribution to SAE features does it: the hidden state is a leaf, and the counter's tracker of modules hooks into the backward pass of
#   each module, which autograd.grad does not allow at leaves. The same loss by backward() is counted, and without the counter both work.
# Versions: torch 2.13.0, transformers 5.23.0.
# Observed: backward(): counted. autograd.grad: RuntimeError, "A leaf node was passed to _will_engine_execute_node". Gradients are equal.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99}
model = LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)
ids = torch.arange(1, 11)[None]


def gradient(by_backward):
    """Of the summed logits at the output of layer 1; below it no graph is made."""
    leaves = []

    def cut(module, args, output):
        leaves.append(output.detach().requires_grad_())
        torch.set_grad_enabled(True)
        return leaves[0]

    handle = model.model.layers[1].register_forward_hook(cut)
    try:
        with torch.no_grad():
            loss = model(input_ids=ids, use_cache=False).logits.sum()
            if by_backward:
                loss.backward()
                return leaves[0].grad
            return torch.autograd.grad(loss, leaves)[0]
    finally:
        handle.remove()


def counted(by_backward):
    try:
        with FlopCounterMode(display=False) as counter:
            gradient(by_backward)
    except RuntimeError as error:
        return "RuntimeError", "A leaf node was passed to _will_engine_execute_node" in str(error)
    return "counted", counter.get_total_flops() > 0


seen = torch.equal(gradient(True), gradient(False)), counted(True), counted(False)
print("without the counter, both gradients are equal:", seen[0])
print("counted by backward():", *seen[1])
print("counted by autograd.grad:", *seen[2])
sys.exit(seen != (True, ("counted", True), ("RuntimeError", True)))
PYTHON
