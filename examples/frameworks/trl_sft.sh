#!/usr/bin/env bash
# TRL's own command, `trl sft`, which takes no callbacks: LoRA and packing on a CPU, with and without ours.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
environment torch==2.13.0 trl==1.16.0 peft==0.21.2
workplace

cat >sft.yaml <<'YAML'
model_name_or_path: model
dataset_name: pairs
use_peft: true
lora_r: 4
packing: true
max_length: 256
per_device_train_batch_size: 2
max_steps: 4
save_steps: 2
learning_rate: 0.01
use_cpu: true
bf16: false
report_to: none
YAML
trl sft --config sft.yaml --output_dir plain
sts-callback launch trl sft --config sft.yaml --output_dir watched

check plain watched
