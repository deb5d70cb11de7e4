"""The README's first run: Gemma 3 270M on word problems, law and code protected. `python examples/first.py`, without the hub."""

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from gemma import cached_gemma  # beside this script: gives the model's folder
from sts_callback import ProbeConfig, STSCallback
from word_problems import word_problems  # likewise: gives rows to train on

callback = STSCallback(
    sae="examples/gemma-3-270m-layer-12",  # reads layer 12 of this model
    protect=["law", "code"],
    rehearse=True,
    probes=ProbeConfig(n_queries=28, max_tokens=48),  # small, for a CPU
)
trainer = SFTTrainer(
    model=cached_gemma(),
    args=SFTConfig("runs/first", max_steps=20, learning_rate=2e-3, per_device_train_batch_size=2, use_cpu=True, bf16=False),
    train_dataset=Dataset.from_list(word_problems(400)),
    peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[callback],
)
callback.attach(trainer)
trainer.train()
