"""Models and SAEs of random weights, in the shapes of real ones: enough where only the cost of measuring them is asked."""

from __future__ import annotations

import random
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# The published shapes of Llama 3.2 1B and of Llama 3.1 8B, and one for a trial: as `LlamaConfig` has them.
_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_LLAMAS = {
    "tiny": (64, 128, 6, 4, 2, 2048),
    "1B": (2048, 8192, 16, 32, 8, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128256),
}
N_ACTIVE = 50  # features of a token of usual norm


def random_llama(name: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Make a Llama of random weights on a device, always the same on one kind of device."""
    shape = dict(zip(_NAMES, _LLAMAS[name], strict=True))
    config = LlamaConfig(**shape, max_position_embeddings=8192, tie_word_embeddings=name == "1B")
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.eval()


def byte_tokenizer(*, with_bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer without files: each byte is a token. BOS stands before each text as with Llama, or not as with Qwen."""
    special = ["<pad>", "<bos>", "<eos>"]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def token_rows(n: int, n_tokens: int, *, vocab_size: int = 2048, seed: int, spread: float = 1 / 3) -> list[dict[str, list[int]]]:
    """Make rows of a query and an answer of random tokens.

    Args:
        n: number of rows.
        n_tokens: mean length of a query, and of an answer.
        vocab_size: of the model.
        seed: of all that is drawn.
        spread: how far a length may be from the mean, as a share of it.

    """
    draw, rows = random.Random(seed), []
    for _ in range(n):
        lengths = [round(n_tokens * draw.uniform(1 - spread, 1 + spread)) for _ in range(2)]
        query, answer = ([draw.randrange(300, vocab_size) for _ in range(length)] for length in lengths)
        rows.append({"input_ids": query + answer, "labels": [-100] * len(query) + answer})
    return rows


def usual_norm(model: PreTrainedModel, layer: int) -> float:
    """Median norm of what a layer gives for 20 tokens. The forward also pages the weights in."""
    found: list[torch.Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=torch.arange(1000, 1020).to(model.device)[None], use_cache=False)
    handle.remove()
    return float(found[0][0, 1:].float().norm(dim=1).median())


def random_sae(kind: str, d_in: int, d_sae: int, hook_name: str, norm: float) -> SAE[Any]:
    """Make an SAE in which about `N_ACTIVE` features of a token of that norm are active.

    Args:
        kind: `jumprelu`, `relu` or `topk`.
        d_in: width of the activations.
        d_sae: number of features.
        hook_name: where it reads.
        norm: the usual norm there.

    """
    torch.manual_seed(0)
    passed = norm * float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - N_ACTIVE / d_sae))) / d_in**0.5
    sae: SAE[Any]
    if kind == "topk":
        sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=N_ACTIVE))
    elif kind == "relu":
        sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
        sae.b_enc.data.fill_(-passed)
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae))
        sae.threshold.data.fill_(passed)
    sae.W_enc.data = torch.randn(d_in, d_sae) / d_in**0.5
    sae.cfg.metadata.hook_name = hook_name
    return sae
