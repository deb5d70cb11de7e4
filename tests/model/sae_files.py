"""What becomes of SAE files of every kind, through a local stand-in for the hub. Writes SAE_FILES.md.

    python tests/model/sae_files.py

Each of SAELens' loaders finds what its real files hold, by name, key and shape, with small random weights. "Features as SAELens'"
means: the hook point is in a tiny model of that architecture, and the features of the activations there are, bit for bit, those
of SAELens' own `from_pretrained` and `encode`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import sae_lens
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from sts_callback.errors import StsError  # noqa: E402
from sts_callback.model.capture import Capture  # noqa: E402
from sts_callback.model.encoder import encoder_for  # noqa: E402
from sts_callback.model.hooks import resolve  # noqa: E402
from tiny import D_MODEL, tiny_model  # noqa: E402

TABLE = Path(__file__).with_name("SAE_FILES.md")
D_SAE, LAYER = 128, 2
AS_SAE_LENS = "read, features as SAELens'"
IDS = tuple(range(20, 60))


def drawn(*shape: int) -> torch.Tensor:
    """Weights; those of one shape are always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def own_weights(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """By SAELens' names and in its shapes."""
    named = {"W_enc": drawn(D_MODEL, D_SAE), "b_enc": drawn(D_SAE), "W_dec": drawn(D_SAE, D_MODEL), "b_dec": drawn(D_MODEL)}
    return {**named, **more}


def linear_weights(encoder: str, decoder: str) -> dict[str, torch.Tensor]:
    """As two `nn.Linear` have them."""
    return {
        f"{encoder}.weight": drawn(D_SAE, D_MODEL),
        f"{encoder}.bias": drawn(D_SAE),
        f"{decoder}.weight": drawn(D_MODEL, D_SAE),
        f"{decoder}.bias": drawn(D_MODEL),
    }


def in_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def in_safetensors(file: Path, weights: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)


def in_pickle(file: Path, weights: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, file)


Write = Callable[[Path, str], None]
"""Writes the files of an SAE: the repository's folder, the SAE's path in it."""


def of_sae_lens_5(**config: Any) -> Write:
    """SAELens before version 6: all settings in one list."""

    def write(root: Path, path: str) -> None:
        known = {"d_in": D_MODEL, "d_sae": D_SAE, "dtype": "torch.float32", "model_name": "gpt2-small", "prepend_bos": True}
        in_json(root / path / "cfg.json", {**known, "activation_fn_str": "relu", "apply_b_dec_to_input": True, **config})
        in_safetensors(root / path / "sae_weights.safetensors", own_weights())

    return write


def of_sae_lens_6(root: Path, path: str) -> None:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_MODEL, d_sae=D_SAE))
    sae.load_state_dict(own_weights(threshold=drawn(D_SAE).abs()))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = f"blocks.{LAYER}.hook_resid_post", "gemma-2-2b"
    sae.save_model(root / path)


def of_connor_rob(root: Path, path: str) -> None:
    config = {"act_size": D_MODEL, "dict_size": D_SAE, "act_name": f"blocks.{LAYER}.attn.hook_z"}
    in_json(root / f"{path.split('.pt')[0]}_cfg.json", config)
    in_pickle(root / path, own_weights())


def of_gemma_scope(root: Path, path: str) -> None:
    weights = own_weights(threshold=drawn(D_SAE).abs())
    named = {name.replace("W_", "w_"): weight.numpy() for name, weight in weights.items()}
    (root / path).mkdir(parents=True)
    np.savez(root / path / "params.npz", **named)


def of_gemma_scope_2(hook: str, *, affine: bool = False) -> Write:
    def write(root: Path, path: str) -> None:
        weights = own_weights(threshold=drawn(D_SAE).abs())
        named = {name.replace("W_", "w_"): weight for name, weight in weights.items()}
        if affine:
            named["affine_skip_connection"] = drawn(D_MODEL, D_MODEL)
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": hook}
        in_json(root / path / "config.json", {**config, "affine_connection": affine})
        in_safetensors(root / path / "params.safetensors", named)

    return write


def of_llama_scope(site: str) -> Write:
    def write(root: Path, path: str) -> None:
        norm = {"dataset_average_activation_norm": {"in": 5.0, "out": 5.0}, "jump_relu_threshold": 0.3}
        in_json(root / path / "hyperparams.json", {"d_model": D_MODEL, "d_sae": D_SAE, "hook_point_in": site, **norm})
        in_safetensors(root / path / "checkpoints" / "final.safetensors", linear_weights("encoder", "decoder"))

    return write


def of_llama_scope_r1(root: Path, path: str) -> None:
    shape = {"d_model": D_MODEL, "expansion_factor": D_SAE // D_MODEL, "hook_point_in": f"blocks.{LAYER}.hook_resid_post"}
    in_json(root / path / "config.json", shape)
    weights = {**linear_weights("encoder", "decoder"), "log_jumprelu_threshold": drawn(D_SAE)}
    in_safetensors(root / path / "sae_weights.safetensors", weights)


def dictionary_weights(kind: str) -> dict[str, torch.Tensor]:
    """What each class of dictionary_learning saves."""
    linear = linear_weights("encoder", "decoder")
    bias = linear.pop("decoder.bias")
    k, threshold = {"k": torch.tensor(6, dtype=torch.int32)}, {"threshold": torch.tensor(0.4)}
    if kind == "AutoEncoder":
        return {"bias": bias, **linear}
    if kind == "AutoEncoderNew":
        return {"decoder.bias": bias, **linear}
    if kind == "GatedAutoEncoder":
        linear.pop("encoder.bias")
        return {"decoder_bias": bias, **{name: drawn(D_SAE) for name in ("r_mag", "gate_bias", "mag_bias")}, **linear}
    if kind == "JumpReluAutoEncoder":
        return own_weights(threshold=drawn(D_SAE).abs())
    if kind == "MatryoshkaBatchTopKSAE":
        return {**k, **threshold, "group_sizes": torch.tensor([D_SAE // 2, D_SAE // 2]), **own_weights()}
    return {**k, **threshold, "b_dec": bias, **linear}  # AutoEncoderTopK, BatchTopKSAE


def of_dictionary_learning(kind: str, **trainer: Any) -> Write:
    def write(root: Path, path: str) -> None:
        about = {"dict_class": kind, "activation_dim": D_MODEL, "dict_size": D_SAE, "layer": LAYER, "k": 6}
        named = {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": f"resid_post_layer_{LAYER}"}
        config = {"trainer": {**about, **named, **trainer}, "buffer": {"d_submodule": D_MODEL, "io": "out", "ctx_len": 128}}
        in_json(root / path / "config.json", config)
        in_pickle(root / path / "ae.pt", dictionary_weights(kind))

    return write


def of_deepseek_r1(root: Path, path: str) -> None:
    in_pickle(root / path, linear_weights("encoder", "decoder"))


def of_qwen_scope(root: Path, path: str) -> None:
    in_pickle(root / path, {name: weight.T if weight.ndim == 2 else weight for name, weight in own_weights().items()})


def of_goodfire(root: Path, path: str) -> None:
    in_pickle(root / path, linear_weights("encoder_linear", "decoder_linear"))


def of_mwhanna(root: Path, path: str) -> None:
    wandb = {"d_model": {"value": D_MODEL}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 64}}
    in_json(root / "config.yaml", {"model_name": "Qwen/Qwen3-0.6B"})  # JSON is YAML
    in_json(root / "wandb-config.yaml", wandb)
    in_safetensors(root / path, {**own_weights(), "W_enc": drawn(D_SAE, D_MODEL)})


def of_mntss(root: Path, path: str) -> None:
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(yaml.safe_dump({"model_name": "google/gemma-2-2b", **hooks}))
    encoder = {"W_enc": drawn(D_SAE, D_MODEL), "b_enc": drawn(D_SAE), "b_dec": drawn(D_MODEL)}
    in_safetensors(root / f"W_enc_{path}.safetensors", {f"{name}_{path}": weight for name, weight in encoder.items()})
    in_safetensors(root / f"W_dec_{path}.safetensors", {f"W_dec_{path}": drawn(D_SAE, 4, D_MODEL)})


def of_nothing(root: Path, path: str) -> None:
    """What is refused before anything is loaded needs no files."""


@dataclass(frozen=True)
class Case:
    """An SAE of the registry, what its files hold and the architecture of its model."""

    spec: str
    write: Write
    model: str
    sized: bool = False
    """Whether its loader has the real sizes written in, so that SAELens' overrides must set those of the stand-in."""

    @property
    def entry(self) -> Any:
        return get_pretrained_saes_directory()[self.spec.partition("/")[0]]

    @property
    def loader(self) -> str:
        return self.entry.conversion_func or "sae_lens"

    @property
    def path(self) -> str:
        return str(self.entry.saes_map[self.spec.partition("/")[2]])


RESID = f"blocks.{LAYER}.hook_resid_post"
LAYERS = f"model.layers.{LAYER}"
CASES = (
    Case("gpt2-small-res-jb/blocks.2.hook_resid_pre", of_sae_lens_5(hook_point="blocks.2.hook_resid_pre"), "gpt2"),
    Case(
        "gpt2-small-resid-post-v5-32k/blocks.2.hook_resid_post",
        of_sae_lens_5(
            hook_name=RESID, activation_fn_str="topk", activation_fn_kwargs={"k": 8}, normalize_activations="layer_norm"
        ),
        "gpt2",
    ),
    Case("gpt2-small-attn-out-v5-32k/blocks.2.hook_attn_out", of_sae_lens_5(hook_name="blocks.2.hook_attn_out"), "gpt2"),
    Case("gpt2-small-mlp-tm/blocks.2.hook_mlp_out", of_sae_lens_5(hook_name="blocks.2.hook_mlp_out"), "gpt2"),
    Case("mistral-7b-res-wg/blocks.8.hook_resid_pre", of_sae_lens_5(hook_name="blocks.2.hook_resid_pre"), "mistral"),
    Case("pythia-70m-deduped-mlp-sm/blocks.2.hook_mlp_out", of_sae_lens_5(hook_name="blocks.2.hook_mlp_out"), "gpt_neox"),
    Case("gemma-2-2b-res-matryoshka-dc/blocks.2.hook_resid_post", of_sae_lens_6, "gemma2"),
    Case("gpt2-small-hook-z-kk/blocks.2.hook_z", of_connor_rob, "gpt2"),
    Case("gemma-scope-2b-pt-res-canonical/layer_2/width_16k/canonical", of_gemma_scope, "gemma2", sized=True),
    Case("gemma-scope-2b-pt-att-canonical/layer_2/width_16k/canonical", of_gemma_scope, "gemma2", sized=True),
    Case("gemma-scope-2b-pt-mlp-canonical/layer_2/width_16k/canonical", of_gemma_scope, "gemma2", sized=True),
    Case("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", of_gemma_scope, "gemma2", sized=True),
    Case("gemma-scope-2-270m-pt-res-all/layer_2_width_16k_l0_small", of_gemma_scope_2(f"{LAYERS}.output"), "gemma3"),
    Case(
        "gemma-scope-2-270m-pt-att-all/layer_2_width_16k_l0_small", of_gemma_scope_2(f"{LAYERS}.self_attn.o_proj.input"), "gemma3"
    ),
    Case(
        "gemma-scope-2-270m-pt-mlp-all/layer_2_width_16k_l0_small",
        of_gemma_scope_2(f"{LAYERS}.post_feedforward_layernorm.output"),
        "gemma3",
    ),
    Case(
        "gemma-scope-2-270m-pt-transcoders-all/layer_2_width_16k_l0_small",
        of_gemma_scope_2(f"{LAYERS}.pre_feedforward_layernorm.output"),
        "gemma3",
    ),
    Case(
        "gemma-scope-2-270m-pt-transcoders-all/layer_2_width_16k_l0_small_affine",
        of_gemma_scope_2(f"{LAYERS}.pre_feedforward_layernorm.output", affine=True),
        "gemma3",
    ),
    Case("llama_scope_lxr_8x/l2r_8x", of_llama_scope(RESID), "llama"),
    Case("llama_scope_lxa_8x/l2a_8x", of_llama_scope("blocks.2.hook_attn_out"), "llama"),
    Case("llama_scope_lxm_8x/l2m_8x", of_llama_scope("blocks.2.hook_mlp_out"), "llama"),
    Case("llama_scope_r1_distill/l2r_800m_slimpajama", of_llama_scope_r1, "llama"),
    Case(
        "sae_bench_pythia70m_sweep_standard_ctx128_0712/blocks.3.hook_resid_post__trainer_10",
        of_dictionary_learning("AutoEncoder"),
        "gpt_neox",
    ),
    Case(
        "sae_bench_pythia70m_sweep_gated_ctx128_0730/blocks.3.hook_resid_post__trainer_0",
        of_dictionary_learning("GatedAutoEncoder"),
        "gpt_neox",
    ),
    Case(
        "sae_bench_pythia70m_sweep_topk_ctx128_0730/blocks.3.hook_resid_post__trainer_0",
        of_dictionary_learning("AutoEncoderTopK"),
        "gpt_neox",
    ),
    Case("qwen2.5-7b-instruct-andyrdt/resid_post_layer_3_trainer_1", of_dictionary_learning("BatchTopKSAE"), "qwen2"),
    Case(
        "saebench_gemma-2-2b_width-2pow12_date-0108/blocks.12.hook_resid_post__trainer_0",
        of_dictionary_learning("MatryoshkaBatchTopKSAE"),
        "gemma2",
    ),
    Case(
        "saebench_gemma-2-2b_width-2pow12_date-0108/blocks.12.hook_resid_post__trainer_1",
        of_dictionary_learning("JumpReluAutoEncoder"),
        "gemma2",
    ),
    Case("deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post", of_deepseek_r1, "llama", sized=True),
    Case("qwen-scope-3-1.7b-base-w32k-l50/layer2", of_qwen_scope, "qwen3", sized=True),
    Case("qwen-scope-3.5-2b-base-w32k-l50/layer2", of_qwen_scope, "qwen3", sized=True),
    Case("gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76", of_nothing, "gemma2"),
    Case("mwhanna-qwen3-0.6b-transcoders-lowl0/layer_2", of_mwhanna, "qwen3"),
    Case("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_2", of_mntss, "gemma2"),
    Case("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", of_nothing, "gemma2"),
    Case("goodfire-llama-3.1-8b-instruct/layer_19", of_goodfire, "llama", sized=True),
)


@contextlib.contextmanager
def stand_in(root: Path, overrides: dict[str, Any] | None = None) -> Iterator[None]:
    """Inside, SAELens finds on the hub what lies in `root/OWNER/REPOSITORY`, whole or in ranges, and nothing else."""

    def download(repo_id: str, filename: str, subfolder: str | None = None, **options: Any) -> str:
        file = root / repo_id / (subfolder or "") / filename
        if not file.is_file():
            raise EntryNotFoundError(f"404 Client Error: {filename} is not in {repo_id}")
        return str(file)

    def get(url: str, headers: dict[str, str]) -> SimpleNamespace:
        repo_id, _, filename = url.removeprefix("https://huggingface.co/").partition("/resolve/main/")
        first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        return SimpleNamespace(content=Path(download(repo_id, filename)).read_bytes()[first : last + 1])

    overridden = loaders.get_config_overrides
    with (
        mock.patch.object(loaders, "hf_hub_download", download),
        mock.patch.object(loaders, "_get_with_rate_limit_retry", get),
        mock.patch.object(sae_lens.saes.sae, "get_config_overrides", lambda *of: {**overridden(*of), **(overrides or {})}),
    ):
        yield


def examine(case: Case, root: Path) -> tuple[str, str, str]:
    """Architecture by SAELens' name, hook point and result of a case, whose files are written under `root`."""
    case.write(root / case.entry.repo_id, case.path)
    overrides: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE} if case.sized else {}
    if case.loader in ("deepseek_r1", "goodfire"):  # the real layer is beyond a tiny model's last
        overrides["hook_name"] = RESID
    with stand_in(root, overrides), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_model(case.model)
        try:
            encoder = encoder_for(case.spec, model)
            point = resolve(model, encoder.hook_name)
        except StsError as error:
            return "", "", f"refused: {error}"
        capture = Capture(model, [point])
        (x,) = capture.run([IDS], capture.prefix((), whole=False)).activations[encoder.hook_name]
        theirs = SAE.from_pretrained(*case.spec.split("/", 1))
        theirs.turn_off_forward_pass_hook_z_reshaping()
        with torch.no_grad():
            expected = theirs.encode(x - x.mean(dim=1, keepdim=True) if encoder.centred else x)
    same = torch.equal(encoder.encode(x), expected) and bool((expected != 0).any())
    return encoder.architecture, encoder.hook_name, AS_SAE_LENS if same else "features differ from SAELens'"


def row(case: Case, root: Path) -> str:
    """The row of a case in the table, from a run."""
    return f"| {' | '.join((case.loader, case.spec, case.model, *examine(case, root)))} |"


def main() -> None:
    """Write the table."""
    with contextlib.ExitStack() as stack:
        rows = [row(case, Path(stack.enter_context(tempfile.TemporaryDirectory()))) for case in CASES]
    lines = [
        "# SAE files, and what becomes of them",
        "",
        f"SAEs of every kind that sae-lens {sae_lens.__version__} loads from its registry, with tiny models. Written by",
        "`tests/model/sae_files.py`, where it says what stands in for the hub and what counts as right, and run by its test.",
        "No release is of the loader `sparsify`; folders of that library are read by `sts_callback/model/sae_formats.py`.",
        "",
        "| SAELens' loader | SAE | model | architecture | hook point | result |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
