"""The SAE registry reader, against the registry file of the installed sae_lens; no network."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sts_callback.errors import SaeError
from sts_callback.model import registry

ROOT = Path(__file__).parents[2]
GEMMA = "google/gemma-3-270m"


@pytest.fixture(scope="module")
def entries() -> list[registry.SaeEntry]:
    """All that the installed sae_lens lists."""
    spec = importlib.util.find_spec("sae_lens")
    assert spec is not None and spec.origin is not None
    listed = yaml.load(Path(spec.origin).with_name("pretrained_saes.yaml").read_text(), Loader=yaml.CSafeLoader)
    found = [registry.find(f"{release}/{sae['id']}") for release, fields in listed.items() for sae in fields["saes"]]
    return [entry for entry in found if entry is not None]


def test_known_entry_is_read_in_full() -> None:
    entry = registry.find("gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_medium")
    assert entry == registry.SaeEntry(
        release="gemma-scope-2-270m-pt-res",
        sae_id="layer_12_width_16k_l0_medium",
        model=GEMMA,
        hook_name="blocks.12.hook_resid_post",
        layer=12,
        width="16k",
        l0=60.0,
        kind="sae",
        neuronpedia_id="gemma-3-270m/12-gemmascope-2-res-16k",
    )
    assert registry.find(entry.spec) is entry


def test_sae_ids_may_hold_slashes() -> None:
    entry = registry.find("gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical")
    assert entry is not None
    assert entry.sae_id == "layer_12/width_16k/canonical"
    assert entry.l0 == 82.0  # from the path, average_l0_82: the entry itself has none


@pytest.mark.parametrize("spec", ["", "/", "gemma-scope-2-270m-pt-res", "gemma-scope-2-270m-pt-res/layer_99", "no/such"])
def test_unknown_spec_is_not_found(spec: str) -> None:
    assert registry.find(spec) is None


@pytest.mark.parametrize(
    ("spec", "hook_name", "width"),
    [
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "hook_embed", "4k"),
        ("gemma-scope-2b-pt-res-canonical/layer_5/width_1m/canonical", "blocks.5.hook_resid_post", "1m"),
        ("gemma-scope-2b-pt-mlp-canonical/layer_3/width_16k/canonical", "blocks.3.hook_mlp_out", "16k"),
        ("gemma-scope-2-270m-pt-att-all/layer_1_width_16k_l0_big", "blocks.1.attn.hook_z", "16k"),
        ("gpt2-small-hook-z-kk/blocks.6.hook_z", "blocks.6.attn.hook_z", None),
        ("gpt2-small-res-jb/blocks.6.hook_resid_pre", "blocks.6.hook_resid_pre", None),
        ("gpt2-small-res-jb-feature-splitting/blocks.8.hook_resid_pre_768", "blocks.8.hook_resid_pre", None),
        ("gpt2-small-resid-mid-v5-128k/blocks.2.hook_resid_mid", "blocks.2.hook_resid_mid", "128k"),
        ("pythia-70m-deduped-mlp-sm/blocks.3.hook_mlp_out", "blocks.3.hook_mlp_out", None),
        ("llama_scope_lxr_8x/l16r_8x", "blocks.16.hook_resid_post", "32k"),
        ("llama_scope_lxm_8x/l16m_8x", None, "32k"),
        ("llama_scope_r1_distill/l16r_400m_slimpajama_400m_openr1_math", "blocks.16.hook_resid_post", "32k"),
        ("qwen-scope-3-8b-base-w64k-l50/layer18", "blocks.18.hook_resid_post", "64k"),
        ("qwen2.5-7b-instruct-andyrdt/resid_post_layer_15_trainer_1", "blocks.15.hook_resid_post", None),
        (
            "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109/blocks.19.hook_resid_post__trainer_3",
            "blocks.19.hook_resid_post",
            "4k",
        ),
        ("gemma-2-2b-res-matryoshka-dc/blocks.12.hook_resid_post", "blocks.12.hook_resid_post", "32k"),
        ("mwhanna-qwen3-4b-transcoders/layer_18", None, None),
    ],
)
def test_hook_and_width_of_each_naming_scheme(spec: str, hook_name: str | None, width: str | None) -> None:
    entry = registry.find(spec)
    assert entry is not None
    assert (entry.hook_name, entry.width) == (hook_name, width)


def test_every_entry_has_a_layer_and_every_gemma_scope_sae_a_hook(entries: list[registry.SaeEntry]) -> None:
    assert len(entries) > 10_000
    assert {e.spec for e in entries if e.layer is None and e.hook_name != "hook_embed"} == set()
    unknown = {e.release for e in entries if e.kind == "sae" and e.hook_name is None}
    assert all(release.startswith(("llama_scope_lxa", "llama_scope_lxm")) for release in unknown), unknown


def test_transcoders_are_told_apart() -> None:
    kinds = {entry.release: entry.kind for entry in registry.saes_for(GEMMA)}
    assert kinds["gemma-scope-2-270m-pt-transcoders-all"] == "transcoder"
    assert kinds["gemma-scope-2-270m-pt-mlp-all"] == "sae"
    kinds = {entry.release: entry.kind for entry in registry.saes_for("gemma-2-2b")}
    assert kinds["mntss-gemma-2-2b-2.5m-clt-as-per-layer"] == "transcoder"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("gpt2-small-hook-z-kk/blocks.6.hook_z", "value bias"),
        ("gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76", "before its gain"),
        ("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "sequences"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "embedding"),
        ("mwhanna-qwen3-4b-transcoders/layer_18", None),
        ("gpt2-small-res-jb/blocks.6.hook_resid_pre", None),
    ],
)
def test_what_cannot_be_used_says_why(spec: str, reason: str | None) -> None:
    entry = registry.find(spec)
    assert entry is not None
    assert (entry.unusable is None) == (reason is None)
    assert reason is None or reason in str(entry.unusable)


def test_an_sae_is_found_by_its_place_on_the_hub() -> None:
    entry = registry.find("google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
    assert entry is not None
    assert entry.spec == "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"


def test_base_and_instruct_models_are_not_confused() -> None:
    base, instruct = registry.saes_for(GEMMA), registry.saes_for(f"{GEMMA}-it")
    assert {"gemma-scope-2-270m-pt-res", "gemma-scope-2-270m-pt-res-all"} <= {e.release for e in base}
    assert {"gemma-scope-2-270m-it-res", "gemma-scope-2-270m-it-res-all"} <= {e.release for e in instruct}
    assert all("-it-" not in entry.release for entry in base)
    assert all("-pt-" not in entry.release for entry in instruct)


def test_release_filed_under_the_wrong_model_is_corrected() -> None:
    assert all("-it-" not in entry.release for entry in registry.saes_for("google/gemma-2-9b"))
    assert "gemma-scope-9b-it-res" in {entry.release for entry in registry.saes_for("google/gemma-2-9b-it")}


@pytest.mark.parametrize(
    ("model_id", "registered"),
    [
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("gpt2-small", "gpt2-small"),
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("GEMMA-3-270M", GEMMA),
        ("/data/models/gemma-3-270m/", GEMMA),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped"),
        ("Qwen/Qwen3-4B", "qwen3-4b"),
        ("Qwen/Qwen3.5-2B-Base", "Qwen/Qwen3.5-2B-Base"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct"),
    ],
)
def test_models_are_found_by_every_usual_name(model_id: str, registered: str) -> None:
    assert {entry.model for entry in registry.saes_for(model_id)} == {registered}


def test_no_two_registered_models_share_a_key(entries: list[registry.SaeEntry]) -> None:
    for model in {entry.model for entry in entries}:
        assert {entry.model for entry in registry.saes_for(model)} == {model}


@pytest.mark.parametrize(
    "model_id", ["", "someone/unknown-model", "gpt2-medium", "mistralai/Mistral-7B-v0.3", "EleutherAI/pythia-70m"]
)
def test_unknown_model_has_no_saes(model_id: str) -> None:
    assert registry.saes_for(model_id) == ()
    with pytest.raises(
        SaeError,
        match=rf"{model_id!r}, and SAELens lists none among its 0 .*none. reads raw.*sae train.*sts-callback saes --model",
    ):
        registry.best_for(model_id, n_layers=12)


@pytest.mark.parametrize(("model_id", "why"), [("qwen3-4b", "transcoders only"), ("mistral-7b", "resid_pre only")])
def test_best_refuses_what_is_not_after_a_layer(model_id: str, why: str) -> None:
    assert registry.saes_for(model_id), why
    with pytest.raises(SaeError, match="after a layer"):
        registry.best_for(model_id, n_layers=36)


@pytest.mark.parametrize(
    ("model_id", "n_layers", "spec"),
    [
        (GEMMA, 18, "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_medium"),  # l0 60; small has 20, big 150
        ("google/gemma-2-2b", 26, "gemma-scope-2b-pt-res/layer_17/width_16k/average_l0_42"),
        ("gpt2", 12, "gpt2-small-resid-post-v5-32k/blocks.8.hook_resid_post"),
        ("meta-llama/Llama-3.1-8B", 32, "llama_scope_lxr_8x/l21r_8x"),
        ("Qwen/Qwen3-1.7B-Base", 28, "qwen-scope-3-1.7b-base-w32k-l50/layer19"),
    ],
)
def test_best_is_two_thirds_down_at_16k_and_l0_50(model_id: str, n_layers: int, spec: str) -> None:
    best = registry.best_for(model_id, n_layers)
    assert best.spec == spec
    assert best == registry.best_for(model_id, n_layers)


def test_the_choice_is_explained_in_one_line() -> None:
    why = registry.why_best(registry.best_for(GEMMA, 18), 18)
    assert "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_medium" in why
    assert "layer 12 of 18" in why
    assert "16k (it is 16k)" in why
    assert "50 (it is 60)" in why
    assert "\n" not in why
    assert "L0 nearest to 50 (it is not stated)" in registry.why_best(registry.best_for("Qwen/Qwen2.5-7B-Instruct", 28), 28)


def test_the_choice_is_never_one_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    temporal = registry.find("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post")
    assert temporal is not None and temporal.hook_name == "blocks.12.hook_resid_post"
    monkeypatch.setattr(registry, "saes_for", lambda model_id: (temporal,))
    with pytest.raises(SaeError, match="among its 1 "):
        registry.best_for("gemma-2-2b", n_layers=18)


def test_best_ignores_saes_saved_during_their_own_training(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = "sae_bench_gemma-2-2b_topk_width-2pow14_date-1109/blocks.19.hook_resid_post__trainer_0"
    half_trained, finished = registry.find(f"{spec}_step_0"), registry.find(spec)
    assert half_trained is not None
    assert finished is not None
    monkeypatch.setattr(registry, "saes_for", lambda model_id: (half_trained, finished))
    assert registry.best_for("gemma-2-2b", n_layers=26) is finished
    monkeypatch.setattr(registry, "saes_for", lambda model_id: (half_trained,))
    with pytest.raises(SaeError, match="among its 1 "):
        registry.best_for("gemma-2-2b", n_layers=26)


@pytest.mark.parametrize(
    "misspelt",
    [
        "gemma-scope-2-270m-pt-res/layer_12_width_16k_10_small",
        "gemma-scope2-270m-pt-res/layer_12_width_16k_l0_small",
        "gemma-scope-2-270m-res/layer_12_width_16k_l0_small",
        "Gemma-Scope-2-270m-pt-res/layer12_width16k_l0_small",
    ],
)
def test_near_names_hold_the_right_one(misspelt: str) -> None:
    names = registry.near_names(misspelt)
    assert "gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small" in names
    assert len(names) <= 5
    assert all(registry.find(name) for name in names)


def test_near_names_edges() -> None:
    assert registry.near_names("zzzz/qqqq") == ()
    assert len(registry.near_names("gemma-scope-2-270m-pt-res", n=2)) == 2
    exact = "gpt2-small-res-jb/blocks.6.hook_resid_pre"
    assert registry.near_names(exact, n=1) == (exact,)


def test_missing_sae_lens_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec(registry.__name__)
    assert spec is not None and spec.loader is not None
    unread = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unread)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SaeError, match="pip install --upgrade sae-lens"):
        unread.saes_for(GEMMA)


def _run_and_check_imports(body: str) -> subprocess.CompletedProcess[str]:
    check = "import sys; heavy = {'torch', 'sae_lens', 'transformer_lens', 'transformers'} & set(sys.modules)"
    code = f"{body}\n{check}\nsys.exit(f'loaded: {{sorted(heavy)}}' if heavy else 0)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_reading_the_registry_imports_neither_torch_nor_sae_lens() -> None:
    result = _run_and_check_imports(f"from sts_callback.model import registry\nassert registry.saes_for({GEMMA!r})")
    assert result.returncode == 0, result.stderr


def test_the_import_check_can_fail() -> None:
    result = _run_and_check_imports("import sys, types; sys.modules['torch'] = types.ModuleType('torch')")
    assert result.returncode == 1
    assert "loaded: ['torch']" in result.stderr
