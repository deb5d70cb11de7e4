"""Every decoder family that transformers can build tiny: measured right, or refused in words. Writes ARCHITECTURES.md.

    python tests/guest/architectures.py results.jsonl [MODEL_TYPE ...]

Takes some ten minutes, so it is no test. What stands in the results is not run again; remove its line to run it anew.
"Right" means: activations, logits and gradients are those of a plain forward of each sequence alone; weights, attributes and mode
are as they were found; a second visit drifts by exactly 0, also after a `generate`.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from sts_callback import Monitor, ProbeConfig  # noqa: E402
from sts_callback.errors import StsError  # noqa: E402
from sts_callback.model.capture import Capture  # noqa: E402
from sts_callback.model.head import whole_logits  # noqa: E402
from sts_callback.model.hooks import find_layers, resolve, text_config  # noqa: E402
from sts_callback.model.undisturbed import undisturbed  # noqa: E402
from tiny import rotated_sae, rows, tiny_tokenizer  # noqa: E402

TABLE = Path(__file__).with_name("ARCHITECTURES.md")
HOOK = "blocks.2.hook_resid_post"
LIMIT_S, MOST_WEIGHTS, TOLERANCE = 60, 2 * 10**8, 1e-4
TYPES = sorted(
    {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    | {*modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
)

# What a configuration's attribute becomes, by its name; the first match wins.
SIZES = (
    (r"vocab_size|n_vocab|vocab_size_per_layer_input", 300),
    (r"pad_token_id", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id", 2),
    (r".*lora_rank|.*low_rank_dim|time_step_rank|hidden_size_per_layer_input|conv_dim|.*state_size|mamba_d_state", 8),
    (r"(.*_)?head_dim|mamba_d_head|d_kv|kv_channels|d_head", 8),
    (
        r"(text_|vision_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim|dim|model_dim|emb_dim|embedding_size|d_embed)"
        r"|(lm|out|projector|language|attention)_hidden_size|word_embed_proj_dim|output_dim|projection_dim|lru_width",
        32,
    ),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth|n_blocks", 4),
    (r"(.*_)?num_attention_heads|n_heads?|num_heads|((en|de)coder_)?attention_heads|linear_num_value_heads|index_n_heads", 4),
    (r"(.*_)?num_key_value_heads|multi_query_group_num|linear_num_key_heads|num_kv_heads|num_global_key_value_heads", 2),
    (r"moe_intermediate_size|(expert|moe)_ffn_hidden_size|moe_latent_size", 24),
    (r"(.*_)?intermediate_size(_mlp)?|.*ffn_hidden_size|((en|de)coder_)?ffn_dim|(d|n)_inner|inner_dim|d_ff|mlp_hidden_size", 48),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k", 2),
    (r"n_group|topk_group|n_groups|mamba_n_groups", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|seq_length|max_target_positions", 2048),
    (r"sliding_window(_size)?|attention_window_size|window_size|attention_chunk_size|local_attention_window", 8),
    (r"image_size|crop_size", 28),
    (r"(spatial_)?patch_size", 14),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"num_kv_shared_layers", 1),
    (r"num_codebooks", 2),
    (r"rotary_dim", 4),
    (
        r"index_topk",
        512,
    ),  # as in real ones, more than there are tokens: among fewer, exact ties of so few heads are cut at random
    (r"num_nextn_predict_layers|num_mtp_modules", 0),
)
DERIVED = ("head_dim", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")  # which may be None by default
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
MORE: dict[str, dict[str, Any]] = {  # what single types need beside
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 8},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "mistral4": {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}}},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 298},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 298},
    "bailing_hybrid": {"num_key_value_heads": 4},
}


class TooLongError(Exception):
    """A type took more than its time."""


def tiny_options(default: PretrainedConfig) -> dict[str, Any]:
    """Options that make a small configuration of a kind, from its default one."""
    options: dict[str, Any] = {}
    for name, value in vars(default).items():
        small = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
        if isinstance(value, PretrainedConfig):
            options[name] = {"model_type": value.model_type, **tiny_options(value)}
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            kinds = list(dict.fromkeys(value))
            options[name] = [kinds[i % len(kinds)] for i in range(4)]
        elif name == "rope_parameters" and "mrope_section" in getattr(default, "ignore_keys_at_rope_validation", ()):
            half = int(4 * (value or {}).get("partial_rotary_factor", 1))  # of a head's 8 dimensions
            section = {"mrope_section": [half - 2, 1, 1]}
            kinds = {kind: {**rope, **section} for kind, rope in (value or {}).items() if isinstance(rope, dict)}
            options[name] = kinds or {**(value or {}), **section}
        elif small is not None and (isinstance(value, int) or name in DERIVED) and not isinstance(value, bool):
            options[name] = small
    if getattr(default, "num_key_value_heads", None) == getattr(default, "num_attention_heads", 0):
        options["num_key_value_heads"] = 4
    return options


def tiny(model_type: str) -> PreTrainedModel:
    """A random model in training mode whose layers do something."""
    kind = CONFIG_MAPPING[model_type]
    options = tiny_options(kind())
    for name, more in MORE.get(model_type, {}).items():
        options[name] = {**options[name], **more} if name in options and isinstance(more, dict) else more
    config = kind(**options)
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind in AutoModelForCausalLM._model_mapping else AutoModelForMultimodalLM
    model: PreTrainedModel = auto.from_config(config)
    if sum(p.numel() for p in model.parameters()) > MOST_WEIGHTS:
        raise MemoryError("too large")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def plain(model: nn.Module, tokens: tuple[int, ...], n_skip: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, their gradient and logits of one sequence, by a plain forward and a backward."""
    kept: list[torch.Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        kept.append((output if isinstance(output, torch.Tensor) else output[0]).detach().requires_grad_())
        return kept[-1] if isinstance(output, torch.Tensor) else type(output)((kept[-1], *output[1:]))

    handle = find_layers(model)[2].register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, n_skip:]
            (gradient,) = torch.autograd.grad(loss([logits]).sum(), kept[-1])
    finally:
        handle.remove()
    return kept[-1][0, n_skip:].detach(), gradient[0, n_skip:], logits.detach()


def loss(columns: Iterable[torch.Tensor], places: slice = slice(None)) -> torch.Tensor:
    """NLL of one token everywhere."""
    return -whole_logits(columns, places).float().log_softmax(dim=-1)[:, 5]


def found(model: nn.Module, tokens: list[tuple[int, ...]], context: tuple[int, ...], not_right: Collection[str]) -> list[Any]:
    """The same of several sequences at once, as a monitor reads them."""
    capture = Capture(model, [resolve(model, HOOK)])
    capture.may_cache = "cache" not in not_right
    capture.splits_head = capture.can_split_head(tokens[0])
    select = torch.arange(max(map(len, tokens))) < torch.tensor([[len(t)] for t in tokens])
    run = capture.run(tokens, capture.prefix(context, whole=False)).activations[HOOK]
    whole = capture.prefix(context, whole=True)
    logits = capture.run(tokens, whole, select=select).read
    assert logits is not None
    gradient = capture.gradient(tokens, whole, select=select, read=loss).gradients[HOOK]
    each = logits.split([len(t) for t in tokens])
    return [(run[i, : len(t)], gradient[i, : len(t)], each[i]) for i, t in enumerate(tokens)]


def state(model: nn.Module) -> dict[Any, Any]:
    """What can be told of a model from outside: attributes, by identity, and weights and buffers, by value."""
    of_modules = {
        (name, key): id(value) if not isinstance(value, (bool, int, float)) else value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }
    return {**of_modules, "config": json.dumps(model.config.to_dict(), default=str)}


def examine(model_type: str) -> tuple[str, str, str]:
    """Class, result and cause."""
    try:
        model = tiny(model_type)
    except Exception as error:
        return "", "not built", short(error)
    name = type(model).__name__
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = state(model)
    try:
        d_in = int(getattr(text_config(model), "hidden_size", 32))
        monitor = Monitor(
            model,
            tiny_tokenizer(),
            sae=rotated_sae(HOOK, d_in=d_in),
            train_data=rows(30),
            domains={"near": rows(16, seed=50)},
            config=ProbeConfig(n_queries=8, n_features=8),
            progress=False,
        )
        not_right = {check.name for check in monitor.forecast().checks if check.name in ("cache", "gradients")}
        first = monitor.check(1).domains["near"].relative_drift.value
        wrong = [what for what, is_wrong in (("state", state(model) != before), ("drift", first != 0)) if is_wrong]
        wrong += [f"weight {k}" for k, v in model.state_dict().items() if not torch.equal(v, weights[k])][:1]
        wrong += compared(model, monitor, not_right)
        with contextlib.suppress(Exception), torch.no_grad():  # not all can
            model.eval().generate(torch.tensor([[1, 40, 41], [1, 42, 43]]), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        model.train()
        if monitor.check(2).domains["near"].relative_drift.value != 0:
            wrong.append("drift after generate")
    except StsError as error:
        return name, "refused" if reads_text(model) else "refused, reads no plain text", short(error)
    except TooLongError:
        raise
    except Exception as error:
        return name, "CRASHED", short(error)
    notes = ["measured without the model's cache"] if "cache" in not_right else []
    notes += ["no gradient score"] if "gradients" in not_right else []
    return name, "WRONG" if wrong else "right", "; ".join(wrong or notes)


def reads_text(model: nn.Module) -> bool:
    """Whether a plain forward of text alone works, in the model as it is made here."""
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 40, 41]]))
    except Exception:
        return False
    return True


def compared(model: PreTrainedModel, monitor: Monitor, not_right: Collection[str]) -> list[str]:
    """Where batches behind a long context differ from each sequence alone, without what the self-test found not right."""
    context = (1, *max(monitor.train.demo_sets, key=len))
    tokens = [q.tokens for q in monitor.domains["near"].queries[:3]]
    tokens[1] = tokens[1][:-5]
    with undisturbed(model):
        wanted = [plain(model, context + t, len(context)) for t in tokens]
        got = found(model, tokens, context, not_right)
    errors = {
        what: max(float((g[i] - w[i]).abs().max() / w[i].abs().max()) for g, w in zip(got, wanted, strict=True))
        for i, what in enumerate(("activations", "gradients", "logits"))
        if what not in not_right
    }
    return [f"{what} by {error:.0e}" for what, error in errors.items() if not error < TOLERANCE]


def short(error: Exception) -> str:
    """One line of a table."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").replace("|", "/")[:300]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises inside after some time."""

    def stop(*args: object) -> None:
        raise TooLongError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def write_table(results: list[dict[str, str]]) -> None:
    """What became of each type."""
    counts = Counter(r["result"] for r in results)
    lines = [
        "# Architectures, and what becomes of them",
        "",
        f"Tiny random models of every type that transformers {transformers.__version__} maps to a language model, run by "
        "`tests/guest/architectures.py`, where it says what",
        f"counts as right. {len(results)} types: {', '.join(f'{n} {result}' for result, n in counts.most_common())}.",
        "",
        "| model type | class | result | cause |",
        "|---|---|---|---|",
        *(f"| {r['type']} | {r['class']} | {r['result']} | {r['cause']} |" for r in sorted(results, key=lambda r: r["type"])),
    ]
    TABLE.write_text("\n".join(lines) + "\n")


def main(file: Path, types: list[str]) -> None:
    """Run what has not been run, and write the table once all types have."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for model_type in types or [t for t in TYPES if t not in {r["type"] for r in done}]:
        try:
            with limited(LIMIT_S):
                name, result, cause = examine(model_type)
        except TooLongError as error:
            name, result, cause = "", "not run", str(error)
        sys.stdout.write(f"{model_type:28} {result:10} {name}: {cause}\n")
        done = [r for r in done if r["type"] != model_type]
        done.append({"type": model_type, "class": name, "result": result, "cause": cause})
        file.write_text("".join(json.dumps(r) + "\n" for r in done))
    if len(done) == len(TYPES):
        write_table(done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
