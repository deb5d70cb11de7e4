"""Train a sparse autoencoder on one hook point of any language model, from any text files, with SAELens' own trainer.

    python examples/train_sae.py --text corpus.jsonl.gz --out my-sae [--model DIR_OR_ID] [--hook-name blocks.12.hook_resid_post]

Text files are JSON lines (`.gz` allowed) with a `text` column. Attention sinks, BOS and special tokens are left out of
training and of all figures. The SAE is trained as BatchTopK and saved as JumpReLU in SAELens format, in bfloat16, with its
held-out quality in `metrics.json` and a README written from it. Collected activations can be kept (`--activations FILE`)
for another try.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gemma import cached_gemma
from sts_callback.metrics.sums import is_not_outlier
from sts_callback.model.capture import Capture, Prefix
from sts_callback.model.hooks import find_layers, resolve
from sts_callback.model.undisturbed import undisturbed

CONTEXT = 256  # tokens, BOS included
ROWS = 8  # contexts in a forward
MAX_NORM_MULTIPLE = 3.0  # see sts_callback.metrics.sums
HELD_OUT = 0.02  # share of the texts that only measures


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: Gemma 3 270M from PyPI)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="JSON lines with a text column")
    parser.add_argument("--out", type=Path, required=True, help="folder for the SAE")
    parser.add_argument("--hook-name", default="blocks.12.hook_resid_post")
    parser.add_argument("--corpus-note", default="", help="a sentence on the corpus and its licences, for the README")
    parser.add_argument("--d-sae", type=int, default=4096, help="number of features")
    parser.add_argument("--k", type=float, default=47.0, help="mean number of active features a token")
    parser.add_argument("--collect", type=int, default=1_300_000, help="tokens to collect")
    parser.add_argument("--train", type=int, default=5_000_000, help="tokens to train on (collected ones, repeated)")
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a training step")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate, decayed to zero in the last 40 %%")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--activations", type=Path, help="file to keep collected activations in, or to take them from")
    return parser.parse_args(argv)


def read_texts(files: list[Path], seed: int) -> tuple[list[str], list[str]]:
    """Texts for training and held-out texts, shuffled."""
    texts = []
    for file in files:
        with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
            texts += [json.loads(line)["text"] for line in lines]
    random.Random(seed).shuffle(texts)
    n_held_out = max(1, round(len(texts) * HELD_OUT))
    return texts[n_held_out:], texts[:n_held_out]


def contexts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Pieces of at most `CONTEXT - 1` tokens, without special tokens."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), CONTEXT - 1):
            piece = ids[start : start + CONTEXT - 1]
            if len(piece) > 8:
                yield piece


def batched(items: Iterable[list[int]], size: int) -> Iterator[tuple[list[int], ...]]:
    """Successive tuples of at most `size` items (`itertools.batched` of Python 3.12)."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch


class Activations:
    """Residual activations of ordinary tokens, in forwards of `ROWS` contexts behind BOS."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hook_name: str) -> None:
        self.capture = Capture(model, [resolve(model, hook_name)])
        self.tokenizer = tokenizer
        self.hook_name = hook_name
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.special = torch.tensor(tokenizer.all_special_ids)
        self.median_norm: float | None = None
        self.n_seen = self.n_left_out = 0

    def of(self, texts: list[str]) -> Iterator[torch.Tensor]:
        """Activations of each batch, `(n_tokens, d_in)`, float32."""
        prefix = self.capture.prefix(self.bos, whole=False)
        for pool in batched(contexts(texts, self.tokenizer), ROWS * 64):
            rows_of_like_length = list(batched(sorted(pool, key=len), ROWS))  # little is wasted on padding
            random.Random(len(pool)).shuffle(rows_of_like_length)
            for rows in rows_of_like_length:
                yield self._one_batch(rows, prefix)

    def _one_batch(self, rows: Sequence[list[int]], prefix: Prefix) -> torch.Tensor:
        acts = self.capture.run(rows, prefix).activations[self.hook_name].float()
        keep = torch.cat([acts[i, : len(row)] for i, row in enumerate(rows)])
        keep = keep[~torch.isin(torch.tensor(list(chain(*rows))), self.special)]
        norms = keep.norm(dim=1)
        if self.median_norm is None:
            self.median_norm = norms.median().item()
        not_outlier = is_not_outlier(norms, self.median_norm, MAX_NORM_MULTIPLE)
        self.n_seen += len(norms)
        self.n_left_out += int((~not_outlier).sum())
        return keep[not_outlier]


def collect(source: Activations, texts: list[str], n_tokens: int) -> torch.Tensor:
    """The first `n_tokens` activations of the texts, `(n_tokens, d_in)`, float16."""
    parts, n_have = [], 0
    with tqdm(total=n_tokens, desc="Collecting activations", unit="tok") as bar:
        for batch in source.of(texts):
            parts.append(batch.half())
            n_have += len(batch)
            bar.update(len(batch))
            if n_have >= n_tokens:
                break
    return torch.cat(parts)[:n_tokens]


def shuffled_batches(data: torch.Tensor, mean: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless epochs of random batches less the mean, float32."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data), generator=generator).split(size):
            if len(rows) == size:
                yield data[rows].float() - mean


def train(data: torch.Tensor, args: argparse.Namespace) -> BatchTopKTrainingSAE:
    torch.manual_seed(args.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=data.shape[1],
            d_sae=args.d_sae,
            k=args.k,
            normalize_activations="expected_average_only_in",
            apply_b_dec_to_input=True,
        )
    )
    steps = args.train // args.batch
    config = SAETrainerConfig(
        total_training_samples=args.train,
        train_batch_size_samples=args.batch,
        lr=args.lr,
        lr_end=0.0,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps * 2 // 5,
        dead_feature_window=100,
        n_batches_for_norm_estimate=50,
        logger=LoggingConfig(log_to_wandb=False),
    )
    # The mean is most of a residual stream's norm: features need not learn it first. It goes into b_dec afterwards.
    mean = data[:200_000].float().mean(dim=0)
    sae = SAETrainer(cfg=config, sae=sae, data_provider=shuffled_batches(data, mean, args.batch, args.seed)).fit()
    sae.b_dec.data += mean
    return sae


@torch.no_grad()
def reconstruction_quality(sae: SAE, data: torch.Tensor) -> dict[str, float]:
    """FVU, L0 and dead share over activations `(n_tokens, d_in)`; a feature is dead that never fires on them."""
    mean = data.double().mean(dim=0)
    residual = total = 0.0
    fired, n_active = torch.zeros(sae.cfg.d_sae, dtype=torch.bool), 0
    for x in data.split(4096):
        acts = sae.encode(x.float())
        residual += (x - sae.decode(acts)).double().square().sum().item()
        total += (x.double() - mean).square().sum().item()
        fired |= (acts > 0).any(dim=0)
        n_active += int((acts > 0).sum())
    return {"fvu": residual / total, "l0": n_active / len(data), "dead_share": 1 - fired.float().mean().item()}


@torch.no_grad()
def spliced_cross_entropy(model: PreTrainedModel, sae: SAE, source: Activations, texts: list[str]) -> dict[str, float]:
    """Next-token loss in nats with the layer's output as it is, replaced by its reconstruction, and by its mean.

    Sinks and BOS keep their own activation in all three: the SAE was not trained on them.
    """
    layer = find_layers(model)[resolve(model, source.hook_name).layer]
    mean = torch.cat(list(source.of(texts[:20]))).mean(dim=0)
    replacements = {
        "plain": lambda x: x,
        "spliced": lambda x: sae.decode(sae.encode(x)),
        "mean_ablated": lambda x: mean.expand_as(x),
    }
    sums, n_tokens = dict.fromkeys(replacements, 0.0), 0
    pieces = list(contexts(texts, source.tokenizer))[:48]
    for piece in tqdm(pieces, desc="Cross-entropy with the SAE spliced in"):
        ids = torch.tensor([source.bos + piece])
        for name, replace in replacements.items():

            def hook(module: object, args: object, output: torch.Tensor, replace: object = replace) -> torch.Tensor:
                not_outlier = is_not_outlier(output.norm(dim=-1), source.median_norm, MAX_NORM_MULTIPLE)
                return torch.where(not_outlier[..., None], replace(output), output)

            handle = layer.register_forward_hook(hook)
            logits = model(input_ids=ids).logits[0, :-1]
            handle.remove()
            sums[name] += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        n_tokens += ids.shape[1] - 1
    return {f"cross_entropy_{name}": total / n_tokens for name, total in sums.items()}


def readme(metrics: dict[str, float], args: argparse.Namespace, model_name: str, command: str) -> str:
    m = metrics
    loss_kept = (m["cross_entropy_mean_ablated"] - m["cross_entropy_spliced"]) / (
        m["cross_entropy_mean_ablated"] - m["cross_entropy_plain"]
    )
    return f"""# SAE for {model_name}, {args.hook_name}

Written by `examples/train_sae.py`; every figure is measured by it on held-out texts ({HELD_OUT:.0%} of the corpus,
{m["n_held_out_tokens"]:,} tokens), from the saved bfloat16 weights with float32
arithmetic, BOS, special tokens and attention sinks left out.

| | |
|---|---|
| width (`d_sae`) | {args.d_sae:,} |
| fraction of variance unexplained | {m["fvu"]:.3f} |
| L0 (active features a token) | {m["l0"]:.1f} |
| dead features (never fire on the training activations) | {m["dead_share"]:.2%} |
| cross-entropy, plain | {m["cross_entropy_plain"]:.3f} nats |
| cross-entropy, reconstruction spliced in | {m["cross_entropy_spliced"]:.3f} nats |
| cross-entropy, layer output replaced by its mean | {m["cross_entropy_mean_ablated"]:.3f} nats |
| share of the loss that the reconstruction keeps | {loss_kept:.1%} |
| tokens collected / trained on | {m["n_collected"]:,} / {args.train:,} |
| attention sinks left out | {m["sink_share"]:.2%} of tokens |
| seed | {args.seed} |
| time to train | {m["train_seconds"] / 60:.0f} minutes on {torch.get_num_threads()} CPU cores |

Corpus: {args.corpus_note or "see the command."}

Command:

    {command}
"""


def shown_command(argv: list[str], args: argparse.Namespace) -> str:
    """The command with files by their names alone, not one machine's folders."""
    files = {str(file): file.name for file in (*args.text, args.out, args.activations) if file}
    return "python examples/train_sae.py " + shlex.join(files.get(word, word) for word in argv)


def main(argv: list[str]) -> None:
    args = arguments(argv)
    name = args.model or cached_gemma()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model_name = args.model or "google/gemma-3-270m"
    texts, held_out = read_texts(args.text, args.seed)
    with undisturbed(model):
        source = Activations(model, tokenizer, args.hook_name)
        held = collect(source, held_out, 30_000)
        if args.activations and args.activations.exists():
            data = load_file(args.activations)["activations"]
        else:
            data = collect(source, texts, args.collect)
            if args.activations:
                save_file({"activations": data}, args.activations)

    started = time.monotonic()
    sae = train(data, args)
    seconds = time.monotonic() - started
    sae.cfg.metadata.model_name = model_name
    sae.cfg.metadata.hook_name = args.hook_name
    sae.cfg.metadata.context_size = CONTEXT
    sae.cfg.metadata.prepend_bos = bool(source.bos)
    sae.save_inference_model(args.out)
    SAE.load_from_disk(args.out, dtype="bfloat16").save_model(args.out)

    saved = SAE.load_from_disk(args.out, dtype="float32").eval()
    metrics = reconstruction_quality(saved, held)
    metrics["dead_share"] = reconstruction_quality(saved, data[:200_000])["dead_share"]
    metrics |= {"n_held_out_tokens": len(held), "n_collected": len(data), "train_seconds": seconds}
    metrics["sink_share"] = source.n_left_out / source.n_seen
    with undisturbed(model):
        metrics |= spliced_cross_entropy(model, saved, source, held_out)
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (args.out / "README.md").write_text(readme(metrics, args, model_name, shown_command(argv, args)))
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
