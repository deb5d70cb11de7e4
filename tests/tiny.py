"""Small random models, a tokenizer without files, a dictionary with a known answer, and how to train: what tests measure on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

D_MODEL, N_LAYERS, VOCAB = 32, 4, 300
_SHAPE: dict[str, Any] = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.1,
}
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2")
_MORE: dict[str, dict[str, Any]] = {  # what they need beside `_SHAPE`
    "mistral": {"head_dim": 8},
    "qwen2": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "olmo2": {},
    "bloom": {"n_head": 4},
    "glm4": {"head_dim": 8},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": D_MODEL},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (N_LAYERS // 2), "block_auto_adjust_ff_dim": False},
}


def tiny_model(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode; Gemma 3 mixes windows of 8 tokens with full attention."""
    torch.manual_seed(seed)
    model: PreTrainedModel
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_SHAPE))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_SHAPE, head_dim=8))
    elif architecture == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**_SHAPE, head_dim=8, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=8)
        )
    elif architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, vocab_size=VOCAB, n_positions=512, bos_token_id=1, eos_token_id=2
            )
        )
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **_SHAPE, **_MORE[architecture]))
    with torch.no_grad():  # norms and biases that do something, and a residual stream that layers really change
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with pad 0, BOS 1, EOS 2; it puts nothing before a text."""
    special = ["<pad>", "<bos>", "<eos>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same, but it puts BOS before each text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


def rotated_sae(
    hook_name: str = "blocks.2.hook_resid_post",
    kind: str = "standard",
    d_in: int = D_MODEL,
    seed: int = 0,
    threshold: float = 0.02,
    n_rotations: int = 1,
) -> SAE[Any]:
    """A dictionary of random rotations and their negatives: 2 d_in features of each, which reconstruct (nearly) exactly."""
    shape: dict[str, Any] = {"d_in": d_in, "d_sae": 2 * d_in * n_rotations, "apply_b_dec_to_input": True}
    sae: SAE[Any]
    if kind == "standard":
        sae = StandardSAE(StandardSAEConfig(**shape))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**shape))
        sae.threshold.data = torch.full((2 * d_in * n_rotations,), threshold)
    elif kind == "topk":
        sae = TopKSAE(TopKSAEConfig(**shape, k=d_in // 2))
    else:
        raise ValueError(kind)
    generator = torch.Generator().manual_seed(seed)
    rotations = [torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0] for _ in range(n_rotations)]
    directions = torch.cat([side for rotation in rotations for side in (rotation, -rotation)], dim=1)
    sae.W_enc.data, sae.W_dec.data = directions.contiguous(), (directions.T / n_rotations).contiguous()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    sae.cfg.metadata.hook_name = hook_name
    return sae


def saved_sae(folder: Path, **options: Any) -> Path:
    """The same, in a folder."""
    rotated_sae(**options).save_model(folder)
    return folder


def rows(n: int = 30, subject: str = "sums", seed: int = 0) -> list[dict[str, str]]:
    """Prompt and completion rows, all different."""
    return [
        {
            "prompt": f"Q: {subject} {seed + i}, what is {i} and {i * 7 % 11}?\nA:",
            "completion": f" It is {i + i * 7 % 11} {subject[::-1]}.",
        }
        for i in range(n)
    ]


def tokenised(examples: list[dict[str, str]], tokenizer: Any) -> Dataset:
    """Prompt and completion rows as a plain `Trainer` takes them."""
    made = []
    for row in examples:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(made)


def tiny_arguments(out: Path, **options: Any) -> dict[str, Any]:
    """Training arguments of a short run on a CPU, which logs each step and saves nothing; with those that differ."""
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return {**defaults, **options}
