#!/usr/bin/env bash
# LLaMA-Factory's own command, `llamafactory-cli train`, which takes no callbacks: LoRA and packing on a CPU, with and without ours.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
environment torch==2.13.0 llamafactory==0.9.5
# Nothing here sees or hears, and what pip finds fails beside a torch for CPUs. torchaudio is imported all the same, so an empty
# module stands in for it.
python -m pip uninstall -q -y torchvision torchaudio
workplace
touch torchaudio.py
export PYTHONPATH=.

cat >dataset_info.json <<'JSON'
{
  "rows": {
    "file_name": "rows/train.jsonl",
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
  }
}
JSON
cat >sft.yaml <<'YAML'
model_name_or_path: model
template: chatml
stage: sft
do_train: true
dataset_dir: .
dataset: rows
finetuning_type: lora
lora_rank: 4
packing: true
cutoff_len: 256
per_device_train_batch_size: 2
max_steps: 4
save_steps: 2
learning_rate: 0.01
use_cpu: true
report_to: none
YAML
llamafactory-cli train sft.yaml output_dir=plain
sts-callback launch llamafactory-cli train sft.yaml output_dir=watched

check plain watched
