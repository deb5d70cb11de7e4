#!/usr/bin/env bash
# LLaMA-Factory's own command, `llamafactory-cli train`, and its Python entry: LoRA and packing on a CPU, with and without the callback.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare torch==2.14.1 llamafactory==0.9.5

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
cat >train_with_sts.py <<'PYTHON'
from llamafactory.train.tuner import run_exp

from sts_callback import STSCallback

if __name__ == "__main__":
    run_exp(callbacks=[STSCallback()])
PYTHON
llamafactory-cli train sft.yaml output_dir=plain
sts-callback launch llamafactory-cli train sft.yaml output_dir=launched
python train_with_sts.py sft.yaml output_dir=called

check plain launched
check plain called
