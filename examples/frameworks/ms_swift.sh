#!/usr/bin/env bash
# ms-swift's own command, `swift sft`: LoRA on a CPU, with and without the callback.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
environment torch==2.13.0 ms-swift==4.6.0
workplace

cat >sts_swift.py <<'PYTHON'
from swift.callbacks import callbacks_map

from sts_callback import STSCallback

callbacks_map["sts"] = lambda args, trainer: STSCallback().attach(trainer)
PYTHON
cat >sft.yaml <<'YAML'
model: model
model_type: llama
template: chatml
dataset: [rows/train.jsonl]
tuner_type: lora
lora_rank: 4
max_length: 256
per_device_train_batch_size: 2
max_steps: 4
save_steps: 2
learning_rate: 0.01
use_cpu: true
torch_dtype: float32
attn_impl: sdpa
add_version: false
report_to: none
YAML
swift sft sft.yaml --output_dir plain
swift sft sft.yaml --output_dir watched --external_plugins sts_swift.py --callbacks sts

check plain watched
