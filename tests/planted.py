"""A model and a dictionary with a known answer: each kind of letter has a direction, a feature, and what reads it on."""

from __future__ import annotations

import random
import string

import torch
from sae_lens import StandardSAE
from transformers import PreTrainedModel

from tiny import D_MODEL, rotated_sae, tiny_model, tiny_tokenizer

KINDS = ("abcdef", "ghijkl", "mnopqr", "stuvwxyz", string.digits, "ABCDEFGHIJKLM", "NOPQRSTUVWXYZ")
"""Letters of a kind share a feature, whose index is that of the kind."""
_STRENGTH = 2.0


def lettered_model() -> PreTrainedModel:
    """The first layer adds the mean of all tokens so far, so that a context spreads its letters; the others do nothing."""
    model = tiny_model("llama")
    vocabulary = tiny_tokenizer().get_vocab()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        for token, i in vocabulary.items():
            kind = next((k for k, letters in enumerate(KINDS) if token in letters), len(KINDS))
            embedding[i, kind] += 1.0
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            attention = layer.self_attn
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                part.weight.zero_()
            layer.input_layernorm.weight.fill_(1.0)
            if number == 0:  # two key-value heads of 8 dimensions, each read by two of the four heads
                attention.v_proj.weight[:, :16] = torch.eye(16)
                for head, start in ((0, 0), (2, 8)):
                    attention.o_proj.weight[start : start + 8, 8 * head : 8 * head + 8] = torch.eye(8) * _STRENGTH / D_MODEL**0.5
    return model


def lettered_sae() -> StandardSAE:
    """Feature j is direction j, feature j + 32 its opposite: it reconstructs exactly."""
    sae = rotated_sae()
    identity = torch.eye(D_MODEL)
    sae.W_enc.data = torch.cat([identity, -identity], dim=1).contiguous()
    sae.W_dec.data = torch.cat([identity, -identity], dim=0).contiguous()
    return sae  # type: ignore[return-value]


def text_of(draw: random.Random, kinds: tuple[int, ...], n_words: int, foreign: tuple[int, ...] = (), share: float = 0.0) -> str:
    """Words of letters of some kinds, and a share of words of foreign ones."""
    words = []
    for _ in range(n_words):
        letters = "".join(KINDS[k] for k in (foreign if foreign and draw.random() < share else kinds))
        words.append("".join(draw.choice(letters) for _ in range(draw.randint(2, 6))))
    return " ".join(words)


def row_of(draw: random.Random, kinds: tuple[int, ...], **more: object) -> dict[str, str]:
    """A row of some kinds of letters, of any length."""
    return {
        "prompt": text_of(draw, kinds, draw.randint(4, 14), **more) + "?",  # type: ignore[arg-type]
        "completion": " " + text_of(draw, kinds, draw.randint(2, 8), **more),  # type: ignore[arg-type]
    }
