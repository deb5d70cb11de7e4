"""Fine-tune a real language model on arithmetic word problems and watch what happens to what it knew before.

    python examples/demo.py             a harsh run: a protected domain is harmed, and the alarm says so
    python examples/demo.py --gentle    a small learning rate: domains move, none is harmed

Runs on two CPU cores in a few minutes, without the hub: Gemma 3 270M comes from PyPI (see gemma.py) and the SAE from this folder.
Other models need an SAE of their own, for instance, where the hub is in reach:

    python examples/demo.py --model google/gemma-3-270m --sae gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
SAE_FOLDER = HERE / "gemma-3-270m-layer-12"
PROTECTED = ["law", "health", "history", "chemistry", "code", "translation"]
HARSH, GENTLE = 2e-3, 5e-5  # LoRA learning rates


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gentle", action="store_true", help=f"learning rate {GENTLE} instead of {HARSH}")
    parser.add_argument("--model", help="folder or hub id (default: Gemma 3 270M from PyPI)")
    parser.add_argument("--sae", help="SAELens release/sae_id or folder (default: the one in this folder)")
    parser.add_argument("--train", type=Path, help="rows to train on, JSON lines (default: word problems)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps")
    parser.add_argument("--queries", type=int, default=10, help="queries measured in each domain")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/demo or runs/demo-gentle)")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.sae):
        parser.error("--model and --sae go together: an SAE fits one model")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if args.model is None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print("Loading libraries and model ...", flush=True)

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging
    from trl import SFTConfig, SFTTrainer

    from gemma import cached_gemma
    from sts_callback import ProbeConfig, STSCallback
    from word_problems import word_problems

    logging.set_verbosity_error()
    # TRL and PEFT still use the old name of activation checkpointing.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    set_seed(0)
    name = args.model or cached_gemma()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    out = args.out or Path("runs") / ("demo-gentle" if args.gentle else "demo")

    callback = STSCallback(
        sae=args.sae or SAE_FOLDER,
        protect=PROTECTED,
        check_on=max(1, args.steps // 2),
        max_overhead=None,  # a few minutes of training: any check is more than 1 % of it
        # Small, for two CPU cores: it finds great harm only. Take 28 queries or more for less.
        probes=ProbeConfig(n_queries=args.queries, max_tokens=48, n_domain_demonstrations=2),
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(out),
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=GENTLE if args.gentle else HARSH,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            logging_steps=max(1, args.steps // 2),
            save_strategy="no",
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            gradient_checkpointing=False,
            seed=0,
        ),
        train_dataset=Dataset.from_json(str(args.train)) if args.train else Dataset.from_list(word_problems(400)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    callback.attach(trainer)
    trainer.train()
    trainer.save_model()  # the adapter, which `sts-callback dial` can turn down


if __name__ == "__main__":
    main(sys.argv[1:])
