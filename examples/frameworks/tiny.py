"""What the scripts beside it train on: a tiny random model with a chat template, an SAE, rows; and what a run must have left.

python tiny.py make                    into the working directory
python tiny.py check PLAIN WATCHED     two output folders of the same training, the second with the callback
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
D_MODEL = 32
ANSWER_TOKENS = (12, 13)
"""Of each row: eleven letters, the end of the turn and, in some frameworks, the line break behind it."""
SETTINGS = """\
sts_sae: sae
sts_protect: [law]
sts_check_on: save
sts_n_queries: 8
sts_n_features: 16
sts_max_tokens: 64
sts_max_overhead: null
sts_rehearse: true
"""


def make() -> None:
    """Write model, tokenizer, SAE, rows and settings."""
    import torch
    from sae_lens import StandardSAE, StandardSAEConfig
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocab = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained("model")

    torch.manual_seed(0)
    shape = {"hidden_size": D_MODEL, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 4}
    special_ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    config = LlamaConfig(**shape, **special_ids, num_key_value_heads=2, vocab_size=len(vocab), max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained("model")

    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=2 * D_MODEL))  # a rotation and its negative reconstruct exactly
    rotation = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL))[0]
    sae.W_enc.data = torch.cat([rotation, -rotation], dim=1).contiguous()
    sae.W_dec.data = torch.cat([rotation.T, -rotation.T]).contiguous()
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    sae.save_model("sae")

    Path("rows").mkdir(exist_ok=True)
    Path("pairs").mkdir(exist_ok=True)
    with Path("rows/train.jsonl").open("w") as rows, Path("pairs/train.jsonl").open("w") as pairs:
        for i in range(60):
            a, b = 100 + 7 * i % 400, 100 + 31 * i % 400
            asked = {"role": "user", "content": f"What is {a} and {b}?"}
            answered = {"role": "assistant", "content": f"It is {a + b:04d}."}
            print(json.dumps({"messages": [asked, answered]}), file=rows)
            print(json.dumps({"prompt": [asked], "completion": [answered]}), file=pairs)
    Path("sts.yaml").write_text(SETTINGS)


def last_adapter(run: Path) -> Path:
    """Some frameworks write it beside the checkpoints, some only into them."""
    return max(run.rglob("adapter_model.safetensors"), key=lambda file: file.stat().st_mtime)


def check(plain: Path, watched: Path) -> None:
    """Print what was seen, and fail where it is not as it must be."""
    made = watched / "sts" / "forecast.json"
    forecast = json.loads(made.read_text())["forecast"]
    train = forecast["train"]
    rehearsal = json.loads((watched / "sts" / "rehearsal.json").read_text())["rehearsal"]
    rehearsed = [f"{dose['n_steps']} steps at {dose['multiple']:g} times the rate" for dose in rehearsal["doses"]]
    steps = [json.loads(line)["snapshot"]["step"] for line in (watched / "sts" / "drift.jsonl").read_text().splitlines()]
    first_checkpoint = min(watched.glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    hashes = [hashlib.sha256(last_adapter(run).read_bytes()).hexdigest() for run in (plain, watched)]
    seen = {
        "the forecast is older than the first checkpoint": made.stat().st_mtime < first_checkpoint.stat().st_mtime,
        f"{train['n_queries']} training queries, {train['n_answer_tokens']} tokens of answers, {ANSWER_TOKENS[0]} or "
        f"{ANSWER_TOKENS[1]} each": train["n_answer_tokens"] in {n * train["n_queries"] for n in ANSWER_TOKENS},
        f"rehearsed: {', '.join(rehearsed) or rehearsal['skipped']}": bool(rehearsed or rehearsal["skipped"]),
        f"checks after steps {steps}": {2, 4} <= set(steps),
        "report.html is there": (watched / "sts" / "report.html").exists(),
        "no faults.jsonl": not (watched / "sts" / "faults.jsonl").exists(),
        f"the adapter's SHA-256 is {hashes[1][:16]} with and {hashes[0][:16]} without the callback": hashes[0] == hashes[1],
    }
    names = ("torch", "transformers", "trl", "peft", "accelerate", "sae-lens")
    print(f"Python {sys.version.split()[0]}", *(f"{name} {version(name)}" for name in names), sep=", ")
    for words, holds in seen.items():
        print("yes" if holds else "NO ", words)
    if not all(seen.values()):
        sys.exit(1)


if __name__ == "__main__":
    make() if sys.argv[1:] == ["make"] else check(*map(Path, sys.argv[2:]))
