"""An adapter's scales: nothing at 0, the adapter itself at 1, more in between, and all as it was afterwards."""

from __future__ import annotations

import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from samples import IDENTITY
from sts_callback.config import Budget, PlainBudget, ProbeConfig, Unit
from sts_callback.data.probes import make_probe_set
from sts_callback.errors import ConfigError, ModelError
from sts_callback.measure.runner import ProbeRunner
from sts_callback.policy import judge_budget
from sts_callback.records import Estimate
from sts_callback.records.remedies import AdapterScales, BudgetFinding, ScalePoint
from sts_callback.remedies.adapter_scale import AdapterScaler, dial, with_adapter
from tiny import bos_tokenizer, rotated_sae, rows, tiny_model

CONFIG = ProbeConfig(n_queries=8, n_domain_demonstrations=2, batch_tokens=200)
DOMAINS = {"poems": rows(20, "far away poems", seed=40), "sums": rows(20, "sums")}
BUDGETS = {"poems": 0.1}


def saved_adapter(folder: Path, *, size: float = 0.3, seed: int = 0, of: PreTrainedModel | None = None, **options: Any) -> Path:
    """A LoRA adapter that does something, as PEFT saves it."""
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    made = get_peft_model(of or tiny_model(), LoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def adapted(tmp_path: Path) -> nn.Module:
    return with_adapter(tiny_model(), bos_tokenizer(), saved_adapter(tmp_path / "adapter"))


def made_knob(model: nn.Module, budgets: dict[str, PlainBudget] | None = None) -> AdapterScaler:
    return AdapterScaler(model, bos_tokenizer(), sae=rotated_sae(), domains=DOMAINS, budgets=budgets or BUDGETS, config=CONFIG)


def made_dial(
    model: nn.Module, scales: tuple[float, ...] = (0.5, 1.0), budgets: dict[str, PlainBudget] | None = None
) -> AdapterScales:
    options: dict[str, Any] = {"domains": DOMAINS, "config": CONFIG, "progress": False, "scales": scales}
    return dial(model, bos_tokenizer(), sae=rotated_sae(), budgets=BUDGETS if budgets is None else budgets, **options)


def scalings(model: nn.Module) -> list[dict[str, float]]:
    return [dict(module.scaling) for module in model.modules() if isinstance(module, LoraLayer)]


def test_without_the_adapter_nothing_has_moved(adapted: nn.Module) -> None:
    found = made_knob(adapted).at(0.0).domains["poems"]
    assert found.relative_drift == Estimate(0, 0, 0)
    assert found.nll_change == Estimate(0, 0, 0)


def run_alone(model: nn.Module, tokens: list[int], n_query: int) -> tuple[torch.Tensor, float]:
    """Hidden states of a query and the NLL of its answer, one at a time, without cache."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[1, *tokens]]), use_cache=False, output_hidden_states=True)
    losses = nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(tokens), reduction="none")
    return out.hidden_states[3][0, 1 : 1 + n_query], float(losses[n_query:].sum())


def test_scale_one_is_the_adapter_as_it_was_trained(adapted: nn.Module, tmp_path: Path) -> None:
    knob = made_knob(adapted)
    found = knob.at(1.0).domains["poems"]
    base, sae = tiny_model(), rotated_sae()
    drift = activity = rise = n_answer = 0.0
    probes = make_probe_set("poems", DOMAINS["poems"], bos_tokenizer(), CONFIG, n_demonstrations=2, field="poems")
    for query in probes.queries:
        (then, nll_then), (now, nll_now) = (run_alone(m, list(query.tokens), len(query.query)) for m in (base, adapted))
        a, b = (torch.relu(x @ sae.W_enc.detach()) for x in (then, now))
        drift, activity = drift + float((b - a).square().sum()), activity + float(a.square().sum())
        rise, n_answer = rise + nll_now - nll_then, n_answer + len(query.answer)
    assert found.relative_drift.value == pytest.approx(drift / activity, rel=1e-4)
    assert found.nll_change.value == pytest.approx(rise / n_answer, rel=1e-3)
    assert found.relative_drift.value > 0.01


def test_drift_grows_with_the_scale(adapted: nn.Module) -> None:
    found = made_dial(adapted, (1.0, 0.25, 0.75, 0.5, 0.25))
    assert [point.scale for point in found.points] == [0.25, 0.5, 0.75, 1.0]
    drifts = [point.domains["poems"].relative_drift.value for point in found.points]
    assert drifts == sorted(drifts)
    assert 0 < drifts[0] < drifts[-1] / 2


def test_only_protected_domains_are_measured_each_against_its_own_budget(adapted: nn.Module) -> None:
    both = made_dial(adapted, (1.0,), {"poems": 0.2, "sums": 0.3}).points[0]
    assert {name: domain.budget for name, domain in both.domains.items()} == {"poems": 0.2, "sums": 0.3}
    one = made_dial(adapted, (1.0,)).points[0]
    assert set(one.domains) == {"poems"}
    assert one.domains["poems"].relative_drift == both.domains["poems"].relative_drift


def test_the_largest_scale_within_budget_is_found(tmp_path: Path) -> None:
    for seed in range(8):  # an adapter that does harm
        model = with_adapter(tiny_model(), bos_tokenizer(), saved_adapter(tmp_path / str(seed), seed=seed))
        change = made_dial(model, (1.0,)).points[0].domains["poems"].nll_change
        if change.low > 0:
            break
    else:
        raise AssertionError("none of them does")
    found = made_dial(model, (0.1, 1.0), {"poems": 0.9 * change.value})
    assert [point.finding for point in found.points] == ["within", "beyond"]
    assert (found.largest, found.finding) == (0.1, "within")
    strict = made_dial(model, (1.0,), {"poems": 0.5 * change.value})
    assert (strict.largest, strict.finding) == (None, "beyond")
    assert made_dial(model, (1.0,), {"poems": 10 * change.high}).largest == 1.0


def test_each_budget_is_judged_in_its_own_unit(adapted: nn.Module) -> None:
    """One probe set by three names: its harm in bits is that in nats by ln 2 and by the tokens over the bytes of its answers."""
    rows = DOMAINS["poems"]
    budgets: dict[str, PlainBudget] = {"poems": 9.0, "bits": "9 bits/byte", "points": "90 points"}
    knob = AdapterScaler(
        adapted, bos_tokenizer(), sae=rotated_sae(), domains=dict.fromkeys(budgets, rows), budgets=budgets, config=CONFIG
    )
    still, found = knob.at(0.0).domains, knob.at(1.0).domains
    assert {name: domain.budget for name, domain in found.items()} == budgets
    assert {domain.finding for domain in found.values()} == {"within"}
    assert {domain.harm for domain in still.values()} == {Estimate(0, 0, 0)}
    assert found["poems"].harm == found["poems"].nll_change
    probes = make_probe_set("bits", rows, bos_tokenizer(), CONFIG, n_demonstrations=2, field="bits")
    texts = [q.answer for q in probes.queries]
    n_bytes = sum(len(str(bos_tokenizer().decode(list(answer))).encode()) for answer in texts)
    in_bits = found["bits"].nll_change.value / math.log(2) * sum(map(len, texts)) / n_bytes
    assert found["bits"].harm.value == pytest.approx(in_bits)
    assert found["points"].harm == Estimate(0, 0, 0)  # a random model gets no token right, and loses none


def test_all_is_as_it_was_afterwards_also_after_an_error(adapted: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = scalings(adapted)
    assert before and all(value == 3 for one in before for value in one.values())
    adapted.train()
    made_dial(adapted)
    assert scalings(adapted) == before
    assert all(module.training for module in adapted.modules())

    def failing(*args: object, **options: object) -> None:
        assert scalings(adapted) != before
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ProbeRunner, "read_drift", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        made_dial(adapted)
    assert scalings(adapted) == before


@pytest.mark.parametrize(
    ("findings", "largest", "finding"),
    [
        (("within", "beyond"), 0.5, "within"),
        (("within", "within"), 1.0, "within"),
        (("beyond", "within"), 1.0, "within"),
        (("cannot tell", "beyond"), None, "cannot tell"),
        (("beyond", "beyond"), None, "beyond"),
    ],
)
def test_what_several_scales_come_to(findings: tuple[BudgetFinding, ...], largest: float | None, finding: BudgetFinding) -> None:
    points = tuple(ScalePoint(scale, found, {}) for scale, found in zip((0.5, 1.0), findings, strict=True))
    found = AdapterScales(IDENTITY, points, 1.0)
    assert (found.largest, found.finding) == (largest, finding)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (Estimate(0.05, 0.01, 0.09), "within"),
        (Estimate(-0.2, -0.3, -0.1), "within"),
        (Estimate(0.05, -0.01, 0.11), "cannot tell"),
        (Estimate(0.1, 0.05, 0.15), "beyond"),
        (Estimate(0.2, -0.01, 0.41), "cannot tell"),
        (Estimate(float("nan"), float("nan"), float("nan")), "cannot tell"),
    ],
)
def test_a_budget_is_judged_by_its_interval(change: Estimate, finding: BudgetFinding) -> None:
    for unit in get_args(Unit):
        assert judge_budget(change, Budget(0.1, unit)) == finding


@pytest.mark.parametrize("scales", [(), (0.0, 1.0), (1.5,), (float("nan"),)])
def test_scales_that_are_none_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"scales: got .* above 0, up to 1"):
        made_dial(tiny_model(), scales)


def test_a_model_that_mixes_rows_is_refused(adapted: nn.Module) -> None:
    layer: Any = adapted.get_submodule("base_model.model.model.layers.1.mlp")
    layer.register_forward_hook(lambda module, args, output: output + output.mean(dim=0))
    with pytest.raises(ModelError, match="mixes rows"):
        made_knob(adapted)


def test_without_a_protected_domain_there_is_nothing_to_dial_for(adapted: nn.Module) -> None:
    with pytest.raises(ConfigError, match="protect: got none"):
        made_dial(adapted, budgets={})


# What is no LoRA adapter for this model


def put_on(folder: Path) -> None:
    with warnings.catch_warnings():  # PEFT warns of what it finds, too
        warnings.simplefilter("ignore")
        with_adapter(tiny_model(), bos_tokenizer(), folder)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        put_on(tmp_path)


@dataclass(frozen=True)
class Broken:
    """What is done to a good folder."""

    file: str
    content: str | None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Broken("adapter_config.json", "{"), "cannot be read"),
        (Broken("adapter_config.json", '{"peft_type": "MAGIC"}'), "cannot be read"),
        (Broken("adapter_model.safetensors", None), "does not fit the model"),
    ],
)
def test_a_damaged_folder_is_refused(broken: Broken, message: str, tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    if broken.content is None:
        (folder / broken.file).unlink()
    else:
        (folder / broken.file).write_text(broken.content)
    with pytest.raises(ModelError, match=message):
        put_on(folder)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    config: PeftConfig = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ModelError, match="of kind IA3; only LoRA"):
        put_on(tmp_path)


def test_the_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, of=tiny_model("gpt2"), target_modules=["c_proj"], fan_in_fan_out=True)
    with pytest.raises(ModelError, match="does not fit the model"):
        put_on(folder)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["DoRA", "modules to save"])
def test_an_adapter_that_its_scale_does_not_reach_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="even at scale 0; only plain LoRA"):
        put_on(saved_adapter(tmp_path, **options))


def test_an_adapter_that_changes_the_model_as_it_is_put_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="even at scale 0; only plain LoRA"):
        put_on(saved_adapter(tmp_path, init_lora_weights="pissa"))


def test_without_peft_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        put_on(tmp_path)
