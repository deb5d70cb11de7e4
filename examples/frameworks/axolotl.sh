#!/usr/bin/env bash
# Axolotl's own command, `axolotl train`: LoRA and sample packing on a CPU, with and without the callback. It asks for Python 3.12 or newer.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
environment torch==2.14.1 axolotl==0.21.0
workplace
export DO_NOT_TRACK=1

cat >sts_plugin.py <<'PYTHON'
from axolotl.integrations.base import BasePlugin

from sts_callback import STSCallback


class STSPlugin(BasePlugin):
    def add_callbacks_post_trainer(self, cfg, trainer):
        return [STSCallback().attach(trainer)]
PYTHON
cat >plain.yaml <<'YAML'
base_model: model
datasets:
  - path: rows/train.jsonl
    ds_type: json
    type: chat_template
chat_template: tokenizer_default
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
lora_mlp_kernel: false # on by default, this and the next three need a GPU
lora_qkv_kernel: false
lora_o_kernel: false
lora_embedding_kernel: false
sample_packing: true
sequence_len: 256
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 4
save_steps: 2
learning_rate: 0.01
optimizer: adamw_torch
lr_scheduler: constant
bf16: false
tf32: false
seed: 3
YAML
sed '$a plugins: [sts_plugin.STSPlugin]' plain.yaml >watched.yaml
axolotl train plain.yaml --output-dir plain
axolotl train watched.yaml --output-dir watched

check plain watched
