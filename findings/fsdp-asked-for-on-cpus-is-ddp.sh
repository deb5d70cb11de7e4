#!/usr/bin/env bash
# What: a Trainer of transformers that is asked for FSDP2 and started by torchrun on CPUs trains with DistributedDataParallel, each process
#   with the whole model. Nothing is raised, and no line of the output names FSDP. Accelerate makes an FSDP plugin for accelerators alone, and the
#   Trainer asks accelerate what it is. So a test of sharded training that runs on CPUs may have tested DDP.
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0.
# Observed: fsdp_config version 2, two processes, gloo: MULTI_CPU, wrapped in DistributedDataParallel, no parameter is a DTensor, no word on FSDP.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$place"
cat > train.py <<'PYTHON'
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
ids = list(range(1, 11))
args = TrainingArguments(
    "out", max_steps=1, use_cpu=True, ddp_backend="gloo", fsdp=True, fsdp_config={"version": 2}, report_to=[], save_strategy="no"
)
trainer = Trainer(LlamaForCausalLM(LlamaConfig(**shape)), args, train_dataset=[{"input_ids": ids, "labels": ids}] * 64)
trainer.train()
if trainer.is_world_process_zero():
    kinds = sorted({type(p).__name__ for p in trainer.model.parameters()})
    print("seen:", trainer.accelerator.distributed_type.value, type(trainer.model_wrapped).__name__, *kinds)
PYTHON
OMP_NUM_THREADS=1 "$place/venv/bin/torchrun" --standalone --nproc_per_node 2 train.py > output.txt 2>&1 || { tail -n 20 output.txt; exit 1; }
grep "^seen:" output.txt
echo "lines that name FSDP: $(grep -ci fsdp output.txt || true)"
grep -qx "seen: MULTI_CPU DistributedDataParallel Parameter" output.txt && ! grep -qi fsdp output.txt
