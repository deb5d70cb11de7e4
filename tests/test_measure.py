"""Every number against a second computation that shares nothing with the first: one query at a time, no cache, plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

from sts_callback import measure
from sts_callback.config import ProbeConfig
from sts_callback.errors import CannotTell, ConfigError, ModelError, SaeError
from sts_callback.measure import BARE, Context, Gauge, Reading
from sts_callback.model.capture import undisturbed
from sts_callback.model.encoder import SaeEncoder, load_encoder
from sts_callback.model.probes import ProbeSet, Query
from sts_callback.monitor import Monitor
from sts_callback.records import DomainDrift, DriftSnapshot, Forecast
from tiny import ARCHITECTURES, rotated_sae, rows, tiny_model, tiny_tokenizer

LAYER, BOS = 2, (1,)
OWN, TAUGHT = "own", "taught"
KINDS = ("standard", "jumprelu", "topk")
# A multiple so small that ordinary tokens of these random models are masked too, and a few batches per set.
CONFIG = ProbeConfig(n_queries=6, n_features=8, n_domain_demonstrations=3, max_norm_multiple=1.3, batch_tokens=150)
TRAIN_ROWS, DOMAIN_ROWS = rows(20, "sums"), rows(20, "far away poems", seed=40)
Array = np.ndarray[Any, Any]


def config_of(architecture: str) -> ProbeConfig:
    """So that some tokens are masked and most are not."""
    return CONFIG if architecture == "llama" else replace(CONFIG, max_norm_multiple=1.16)


def made_monitor(model: nn.Module, sae: Any, config: ProbeConfig = CONFIG, **options: Any) -> Monitor:
    given = {"sae": sae, "train_data": TRAIN_ROWS, "domains": {"poems": DOMAIN_ROWS}, "config": config, "progress": False}
    return Monitor(model, tiny_tokenizer(), **{**given, **options})


def made_encoder(sae: SAE[Any]) -> SaeEncoder:
    return load_encoder(sae, "tiny", 4)


@cache
def probe_sets(config: ProbeConfig = CONFIG) -> tuple[ProbeSet, ProbeSet]:
    """Training data and one domain."""
    monitor = made_monitor(tiny_model(), rotated_sae(), config)
    return monitor.train, monitor.domains["poems"]


def contexts(train: ProbeSet, domain: ProbeSet) -> dict[str, Context]:
    return {
        BARE: Context(BOS, with_answers=True),
        TAUGHT: Context(BOS + train.demonstrations, with_answers=True),
        OWN: Context(BOS + domain.demonstrations, with_answers=False),
    }


# The second computation


@dataclass(frozen=True)
class Alone:
    """What one query gives, run alone and whole."""

    x: Array
    """Hidden states of its query tokens, `(n_tokens, d)`."""
    nll: float
    """Of its answer, in nats."""


def run_alone(model: PreTrainedModel, prefix: tuple[int, ...], query: Query) -> Alone:
    tokens = prefix + query.tokens
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    start, end = len(prefix), len(prefix) + len(query.query)
    logits = out.logits[0].double().numpy()
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    nll = -sum(log_p[position - 1, tokens[position]] for position in range(end, len(tokens)))
    return Alone(out.hidden_states[LAYER + 1][0, start:end].double().numpy(), float(nll))


def features(sae: SAE[Any], x: Array) -> Array:
    w = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if sae.cfg.architecture() == "jumprelu":
        return np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    if sae.cfg.architecture() == "topk":
        return np.where(pre >= np.sort(pre, axis=1)[:, -sae.cfg.k, None], np.maximum(pre, 0), 0)
    return np.maximum(pre, 0)


@dataclass(frozen=True)
class Sums:
    """Sums per query by the second computation."""

    n_tokens: Array
    n_masked: int
    activity: Array
    energy: Array
    shift: dict[str, Array]
    nll: dict[str, Array]
    kept: list[Array]
    """Per query, which tokens count."""
    acts: list[Array]
    """Per query, features without context of the tokens that count."""


def lower_median(values: Array) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def numpy_median_norm(model: PreTrainedModel, sets: tuple[ProbeSet, ...]) -> float:
    """Over the tokens of the first four queries of each set, with BOS alone in front."""
    found = [run_alone(model, BOS, q).x for s in sets for q in s.queries[:4]]
    return lower_median(np.linalg.norm(np.concatenate(found), axis=1))


def numpy_sums(
    model: PreTrainedModel, sae: SAE[Any], probes: ProbeSet, prefixes: dict[str, tuple[int, ...]], limit: float
) -> Sums:
    found = {name: [run_alone(model, prefix, q) for q in probes.queries] for name, prefix in prefixes.items()}
    kept = []
    for per_context in zip(*found.values(), strict=True):
        norms = np.stack([np.linalg.norm(one.x, axis=1) for one in per_context])
        assert (np.abs(norms / limit - 1) > 1e-5).all()  # no token so close to the limit that rounding decides
        kept.append((norms < limit).all(axis=0))
    h = {name: [features(sae, one.x[k]) for one, k in zip(alone, kept, strict=True)] for name, alone in found.items()}
    return Sums(
        n_tokens=np.array([k.sum() for k in kept]),
        n_masked=int(sum((~k).sum() for k in kept)),
        activity=np.stack([one.sum(0) for one in h[BARE]]),
        energy=np.array([(one**2).sum() for one in h[BARE]]),
        shift={
            name: np.stack([((a - b) ** 2).sum(0) for a, b in zip(acts, h[BARE], strict=True)])
            for name, acts in h.items()
            if name != BARE
        },
        nll={name: np.array([one.nll for one in alone]) for name, alone in found.items()},
        kept=kept,
        acts=h[BARE],
    )


@cache
def expected(architecture: str, kind: str) -> tuple[Sums, Sums, float]:
    """Of training data and domain; and the median norm."""
    train, domain = probe_sets()
    model, sae = tiny_model(architecture), rotated_sae(kind=kind)
    median = numpy_median_norm(model, (train, domain))
    prefixes = {name: context.tokens for name, context in contexts(train, domain).items()}
    limit = config_of(architecture).max_norm_multiple * median
    own = prefixes.pop(OWN)
    return (
        numpy_sums(model, sae, train, prefixes, limit),
        numpy_sums(model, sae, domain, {**prefixes, OWN: own}, limit),
        median,
    )


def top(mean_shift: Array, n: int) -> set[int]:
    order = np.argsort(-mean_shift)
    assert mean_shift[order[n - 1]] > mean_shift[order[n]] * (1 + 1e-3)  # no tie at the border
    return set(order[:n].tolist())


def assert_close(found: Any, wanted: Any, rtol: float = 1e-4) -> None:
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


# Readings


@contextmanager
def gauge_of(model: nn.Module, sae: SAE[Any], config: ProbeConfig = CONFIG) -> Iterator[Gauge]:
    with undisturbed(model):
        gauge = Gauge(model, made_encoder(sae), config)
        gauge.calibrate(probe_sets(), BOS)
        yield gauge


def read_domain(model: nn.Module, sae: SAE[Any], config: ProbeConfig = CONFIG) -> Reading:
    train, domain = probe_sets()
    with gauge_of(model, sae, config) as gauge:
        return gauge.read(domain, contexts(train, domain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_are_those_of_numpy(architecture: str, kind: str) -> None:
    _, wanted, median = expected(architecture, kind)
    train, domain = probe_sets()
    with gauge_of(tiny_model(architecture), rotated_sae(kind=kind), config_of(architecture)) as gauge:
        found = gauge.read(domain, contexts(train, domain))
        assert gauge.reference.median_norm == pytest.approx(median, rel=1e-5)
    assert found.n_tokens.tolist() == wanted.n_tokens.tolist()
    assert found.n_masked == wanted.n_masked
    assert 0 < found.n_masked < found.counted.numel() / 2
    assert int(found.counted.sum()) == wanted.n_tokens.sum()
    assert_close(found.activity, wanted.activity)
    assert_close(found.energy, wanted.energy)
    assert set(found.shift) == {TAUGHT, OWN}
    for name, shift in found.shift.items():
        assert_close(shift, wanted.shift[name])
    assert set(found.nll) == {BARE, TAUGHT}  # not asked for with the domain's own demonstrations
    for name, nll in found.nll.items():
        assert_close(nll, wanted.nll[name])
    assert found.n_answer.tolist() == [len(q.answer) for q in domain.queries]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_numpy(architecture: str, kind: str) -> None:
    train, domain, median = expected(architecture, kind)
    found = made_monitor(tiny_model(architecture), rotated_sae(kind=kind), config_of(architecture)).forecast()
    mean = {
        (s, name): one.shift[name].sum(0) / one.n_tokens.sum()
        for s, one, names in (("train", train, [TAUGHT]), ("poems", domain, [TAUGHT, OWN]))
        for name in names
    }
    shifted = top(mean["train", TAUGHT], 8)
    j = sorted(shifted)
    assert set(found.features) == shifted
    assert list(mean["train", TAUGHT][list(found.features)]) == sorted(mean["train", TAUGHT][j], reverse=True)
    assert found.features_share == pytest.approx(mean["train", TAUGHT][j].sum() / mean["train", TAUGHT].sum(), rel=1e-4)
    assert found.median_norm == pytest.approx(median, rel=1e-5)
    for record, one, own, taught in (
        (found.train, train, mean["train", TAUGHT], mean["train", TAUGHT]),
        (found.domains["poems"], domain, mean["poems", OWN], mean["poems", TAUGHT]),
    ):
        n_answer = sum(len(q.answer) for q in probe_sets()[record.name == "poems"].queries)
        assert record.sts_act == pytest.approx((one.activity.sum(0) / one.n_tokens.sum())[j].sum(), rel=1e-4)
        assert record.sts_icl == pytest.approx(own[j].sum(), rel=1e-4)
        assert record.sts_rel == pytest.approx(own[j].sum() / own.sum(), rel=1e-4)
        assert record.sts_cross == pytest.approx(taught[j].sum() / taught.sum(), rel=1e-4)
        assert record.relative_shift == pytest.approx(taught.sum() / (one.energy.sum() / one.n_tokens.sum()), rel=1e-4)
        assert record.nll == pytest.approx(one.nll[BARE].sum() / n_answer, rel=1e-4)
        assert record.nll_change == pytest.approx((one.nll[TAUGHT] - one.nll[BARE]).sum() / n_answer, rel=1e-3, abs=1e-5)
        assert (record.n_queries, record.n_tokens, record.n_masked) == (6, one.n_tokens.sum(), one.n_masked)
        assert record.n_answer_tokens == n_answer


def test_kept_activations_are_those_of_numpy() -> None:
    _, wanted, _ = expected("llama", "topk")
    found = read_domain(tiny_model(), rotated_sae(kind="topk"), replace(CONFIG, batch_tokens=1))  # one query a batch
    _, domain = probe_sets()
    visited = sorted(range(6), key=lambda i: len(domain.queries[i].tokens))
    dense = found.acts.dense(0, len(found.acts.n_active), 64, torch.device("cpu"))
    assert_close(dense, np.concatenate([wanted.acts[i] for i in visited]))
    assert found.counted.tolist() == np.concatenate([wanted.kept[i] for i in visited]).tolist()
    assert found.acts.n_active.max() <= 16  # k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_streamed_sums_are_those_of_one_batch(batch_tokens: int, kind: str) -> None:
    whole = read_domain(tiny_model(), rotated_sae(kind=kind))
    parts = read_domain(tiny_model(), rotated_sae(kind=kind), replace(CONFIG, batch_tokens=batch_tokens))
    assert parts.n_tokens.tolist() == whole.n_tokens.tolist()
    assert parts.n_masked == whole.n_masked
    assert_close(parts.activity, whole.activity, rtol=1e-5)
    assert_close(parts.energy, whole.energy, rtol=1e-5)
    for name in (TAUGHT, OWN):
        assert_close(parts.shift[name], whole.shift[name], rtol=1e-4)
    for name in (BARE, TAUGHT):
        assert_close(parts.nll[name], whole.nll[name], rtol=1e-5)


@pytest.mark.parametrize("n_tokens_at_once", [0, 1, 7])
def test_chunks_of_tokens_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, n_tokens_at_once: int) -> None:
    whole = read_domain(tiny_model(), rotated_sae())
    sizes: list[int] = []
    encode = SaeEncoder.encode

    def counted_encode(self: SaeEncoder, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(SaeEncoder, "encode", counted_encode)
    monkeypatch.setattr(measure, "_CHUNK_ELEMENTS", 64 * n_tokens_at_once)
    parts = read_domain(tiny_model(), rotated_sae())
    assert max(sizes) == max(1, n_tokens_at_once)
    assert_close(parts.activity, whole.activity, rtol=1e-5)
    for name in (TAUGHT, OWN):
        assert_close(parts.shift[name], whole.shift[name], rtol=1e-5)
    assert torch.equal(parts.acts.n_active, whole.acts.n_active)
    assert_close(parts.acts.values, whole.acts.values, rtol=1e-5)


def test_progress_is_told_of_every_query() -> None:
    train, domain = probe_sets()
    done: list[int] = []
    with gauge_of(tiny_model(), rotated_sae()) as gauge:
        reading = gauge.read(domain, contexts(train, domain), done.append)
        assert sum(done) == 6
        gauge.read_drift(domain, contexts(train, domain)[BARE], reading.counted, reading.acts, done.append)
    assert sum(done) == 12


def test_training_mode_and_dropout_do_not_enter() -> None:
    model = tiny_model().train()
    found = read_domain(model, rotated_sae())
    assert model.training
    assert torch.equal(found.activity, read_domain(tiny_model(), rotated_sae()).activity)


def test_bos_free_model_is_read_with_an_empty_bare_context() -> None:
    model, sae, (train, domain) = tiny_model("qwen3"), rotated_sae(), probe_sets()
    prefixes = {BARE: (), TAUGHT: train.demonstrations}
    with undisturbed(model):
        gauge = Gauge(model, made_encoder(sae), replace(CONFIG, max_norm_multiple=1e9))
        gauge.calibrate((train, domain), ())
        found = gauge.read(domain, {name: Context(tokens, with_answers=True) for name, tokens in prefixes.items()})
    wanted = numpy_sums(tiny_model("qwen3"), sae, domain, prefixes, limit=1e9)
    assert_close(found.activity, wanted.activity)
    assert_close(found.shift[TAUGHT], wanted.shift[TAUGHT])
    assert_close(found.nll[BARE], wanted.nll[BARE])


# Calibration


def test_reference_is_that_of_numpy() -> None:
    model, sae, sets, config = tiny_model(), rotated_sae(kind="topk"), probe_sets(), replace(CONFIG, max_norm_multiple=1.16)
    x = np.concatenate([run_alone(tiny_model(), BOS, q).x for s in sets for q in s.queries[:4]])
    norms = np.linalg.norm(x, axis=1)
    ordinary = norms < config.max_norm_multiple * lower_median(norms)
    left = x[ordinary] - features(sae, x[ordinary]) @ sae.W_dec.detach().double().numpy()
    fvu = (left**2).sum() / ((x[ordinary] - x[ordinary].mean(0)) ** 2).sum()
    with gauge_of(model, sae, config) as gauge:
        assert 0 < ordinary.sum() < len(x)
        assert gauge.reference.median_norm == pytest.approx(lower_median(norms), rel=1e-5)
        assert gauge.reference.mean_norm == pytest.approx(norms[ordinary].mean(), rel=1e-5)
        assert gauge.reference.unexplained == pytest.approx(fvu, rel=1e-4)
    assert 0.01 < fvu < 1


def test_sae_trained_on_scaled_activations_is_scaled_once_and_for_all(tmp_path: Path) -> None:
    def scaled_sae() -> SAE[Any]:
        sae = rotated_sae(kind="jumprelu", threshold=0.5)
        sae.cfg.normalize_activations = "expected_average_only_in"
        return sae

    model = tiny_model()
    with gauge_of(model, scaled_sae()) as gauge:
        scale = math.sqrt(32) / gauge.reference.mean_norm
    by_hand = rotated_sae(kind="jumprelu", threshold=0.5)
    by_hand.W_enc.data *= scale
    by_hand.W_dec.data /= scale
    found = read_domain(model, scaled_sae())
    assert_close(found.activity, read_domain(model, by_hand).activity)
    monitor = made_monitor(model, scaled_sae())
    first, again = monitor.forecast(), monitor.forecast()
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    assert monitor.baseline is not None
    monitor.baseline.save(tmp_path / "baseline")
    resumed = made_monitor(tiny_model(), scaled_sae())
    for one in (resumed, monitor):
        one.restore(tmp_path / "baseline", first)
        assert one.check(3).train.relative_drift == 0


def test_sae_of_another_width_is_refused() -> None:
    with pytest.raises(
        SaeError, match=r"sae: SAE object reads activations of width 16, but blocks.2.hook_resid_post .* width 32"
    ):
        made_monitor(tiny_model(), rotated_sae(d_in=16)).forecast()


def negated(sae: SAE[Any]) -> SAE[Any]:
    sae.W_dec.data.neg_()
    return sae


def silent(sae: SAE[Any]) -> SAE[Any]:
    sae.b_enc.data.sub_(1e9)
    return sae


@pytest.mark.parametrize("spoilt", [negated, silent])
def test_sae_no_better_than_a_constant_is_refused(spoilt: Any) -> None:
    with pytest.raises(
        SaeError, match=r"leaves \d+\.\d\d of the variance at blocks.2.hook_resid_post unexplained, no better than a"
    ):
        made_monitor(tiny_model(), spoilt(rotated_sae())).forecast()


@pytest.mark.parametrize("n_features", [33, 64, 100])
def test_more_features_than_half_are_no_selection(n_features: int) -> None:
    wanted = f"n_features: {n_features} of 64 features are no selection; allowed is up to 32"
    with pytest.raises(SaeError, match=wanted):
        made_monitor(tiny_model(), rotated_sae(), replace(CONFIG, n_features=n_features))
    assert made_monitor(tiny_model(), rotated_sae(), replace(CONFIG, n_features=32))


def test_hook_point_that_the_model_lacks_is_refused_at_set_up() -> None:
    with pytest.raises(ModelError, match="asks for layer 9, but the model has 4 layers"):
        made_monitor(tiny_model(), rotated_sae("blocks.9.hook_resid_post"))


@pytest.mark.parametrize("domains", [{}, {"train": DOMAIN_ROWS}])
def test_domains_are_needed_and_none_is_called_train(domains: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"domains: got .*; give at least one, and none by the name of 'train'"):
        made_monitor(tiny_model(), rotated_sae(), domains=domains)


# Attention sinks

COMMA = tiny_tokenizer().convert_tokens_to_ids(",")


def model_with_sinks(architecture: str = "llama") -> PreTrainedModel:
    """Every comma carries a massive activation from the first layer on."""
    model = tiny_model(architecture)

    def enlarge(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        commas = seen.pop() == COMMA
        return torch.where(commas[..., None], output * 1000, output)

    seen: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.get_input_embeddings().register_forward_hook(enlarge, with_kwargs=True)
    return model


def n_commas(probes: ProbeSet) -> int:
    return sum(token == COMMA for q in probes.queries for token in q.query)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sinks_are_masked_and_counted(architecture: str) -> None:
    forecast = made_monitor(model_with_sinks(architecture), rotated_sae(), replace(CONFIG, max_norm_multiple=3.0)).forecast()
    for record, probes in zip((forecast.train, forecast.domains["poems"]), probe_sets(), strict=True):
        assert record.n_masked == n_commas(probes) == 6
        assert record.n_tokens == sum(len(q.query) for q in probes.queries) - 6


def test_sinks_dominate_where_they_are_not_masked() -> None:
    masked = made_monitor(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=3.0)).forecast()
    open_to_all = made_monitor(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=1e9)).forecast()
    assert open_to_all.train.n_masked == 0
    assert open_to_all.domains["poems"].sts_act > 5 * masked.domains["poems"].sts_act
    train, domain = probe_sets()
    with gauge_of(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=1e9)) as gauge:
        everything = gauge.read(domain, contexts(train, domain)).energy.sum()
    with gauge_of(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=3.0)) as gauge:
        content = gauge.read(domain, contexts(train, domain)).energy.sum()
    assert everything > 1000 * content


def test_token_that_is_a_sink_in_one_context_only_is_masked_in_all() -> None:
    train, domain = probe_sets()
    model = tiny_model()

    def enlarge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """The first token after BOS, unless a context stands before it."""
        first = torch.zeros(output.shape[:2], dtype=torch.bool)
        first[:, 0] = bare[0]
        return torch.where(first[..., None], output * 100, output)

    bare = [False]
    model.model.layers[LAYER].register_forward_hook(enlarge)
    with undisturbed(model):
        gauge = Gauge(model, made_encoder(rotated_sae()), replace(CONFIG, max_norm_multiple=3.0))
        gauge.calibrate((train, domain), BOS)
        run = gauge._run

        def run_and_know(queries: Any, prefix: Any, **options: Any) -> Any:
            bare[0] = prefix.token_ids == BOS
            return run(queries, prefix, **options)

        gauge._run = run_and_know  # type: ignore[method-assign]
        found = gauge.read(domain, contexts(train, domain))
    assert found.n_masked == 6
    assert found.n_tokens.tolist() == [len(q.query) - 1 for q in domain.queries]


def test_domain_of_sinks_alone_has_no_score() -> None:
    monitor = made_monitor(
        model_with_sinks(),
        rotated_sae(),
        replace(CONFIG, max_norm_multiple=3.0),
        domains={"poems": DOMAIN_ROWS, "commas": [{"prompt": "," * (3 + i), "completion": " x"} for i in range(20)]},
    )
    found = monitor.forecast().domains["commas"]
    assert found.n_tokens == 0
    assert found.n_masked == sum(len(q.query) for q in monitor.domains["commas"].queries)
    assert all(
        math.isnan(score) for score in (found.sts_act, found.sts_icl, found.sts_rel, found.sts_cross, found.relative_shift)
    )
    assert math.isfinite(found.nll)


# Drift


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """As training would: all weights a little, among them those below the hook point."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def assert_still(snapshot: DriftSnapshot) -> None:
    for record in (snapshot.train, *snapshot.domains.values()):
        assert record.relative_drift == 0
        assert record.nll_change == 0
        assert record.nll_change_se == 0
        assert record.n_masked == 0
        assert record.top_features == ()
    assert snapshot.realised_features == ()
    assert snapshot.n_shared == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drift_of_unchanged_weights_is_exactly_zero(architecture: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(architecture).to(dtype)
    monitor = made_monitor(model, rotated_sae(kind=kind), config_of(architecture))
    forecast = monitor.forecast()
    assert forecast.train.n_masked > 0
    assert_still(monitor.check(0))
    assert monitor.baseline is not None
    monitor.baseline.save(tmp_path / "baseline.safetensors")
    resumed = made_monitor(tiny_model(architecture).to(dtype), rotated_sae(kind=kind), config_of(architecture))
    resumed.restore(tmp_path / "baseline.safetensors", Forecast.from_json(forecast.to_json()))
    assert_still(resumed.check(5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drift_sums_are_those_of_numpy(architecture: str, kind: str) -> None:
    def trained() -> PreTrainedModel:
        """With new sinks, so massive that they are sinks by any median."""
        model = perturbed(tiny_model(architecture))
        with torch.no_grad():
            model.get_input_embeddings().weight[COMMA] *= 100
        return model

    _, domain = probe_sets()
    model, sae, config = tiny_model(architecture), rotated_sae(kind=kind), replace(CONFIG, max_norm_multiple=3.0)
    with gauge_of(model, sae, config) as gauge:
        before = gauge.read(domain, {BARE: Context(BOS, with_answers=True)})
        model.load_state_dict(trained().state_dict())
        found = gauge.read_drift(domain, Context(BOS, with_answers=True), before.counted, before.acts)
    then, now = ([run_alone(m, BOS, q) for q in domain.queries] for m in (tiny_model(architecture), trained()))
    kept = [np.array(q.query) != COMMA for q in domain.queries]
    wanted = [((features(sae, b.x[k]) - features(sae, a.x[k])) ** 2).sum(0) for a, b, k in zip(then, now, kept, strict=True)]
    assert before.n_masked == 0
    assert found.n_masked == n_commas(domain) == 6
    assert found.n_tokens.tolist() == [k.sum() for k in kept]
    assert_close(found.drift, np.stack(wanted))
    assert found.nll is not None
    assert_close(found.nll, np.array([b.nll for b in now]))
    assert (np.stack(wanted).sum(axis=1) > 0).all()


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_streamed_drift_is_that_of_one_batch(batch_tokens: int) -> None:
    def read(config: ProbeConfig) -> measure.DriftReading:
        _, domain = probe_sets()
        model = tiny_model()
        with gauge_of(model, rotated_sae(), config) as gauge:
            before = gauge.read(domain, {BARE: Context(BOS, with_answers=True)})
            perturbed(model)
            return gauge.read_drift(domain, Context(BOS, with_answers=True), before.counted, before.acts)

    config = replace(CONFIG, max_norm_multiple=1.1)
    parts, whole = read(replace(config, batch_tokens=batch_tokens)), read(config)
    assert whole.n_masked > 0
    assert parts.n_tokens.tolist() == whole.n_tokens.tolist()
    assert parts.n_masked == whole.n_masked
    assert_close(parts.drift, whole.drift)
    assert parts.nll is not None and whole.nll is not None
    assert_close(parts.nll, whole.nll)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drift_record_is_that_of_numpy(architecture: str) -> None:
    sae, (train, domain), config = rotated_sae(), probe_sets(), replace(CONFIG, max_norm_multiple=1e9)
    model = tiny_model(architecture)
    monitor = made_monitor(model, sae, config)
    forecast = monitor.forecast()
    perturbed(model)
    found = monitor.check(17)
    plain, moved = tiny_model(architecture), perturbed(tiny_model(architecture))

    def drift(probes: ProbeSet) -> tuple[Array, float, float]:
        """Mean drift per feature, relative drift and change of NLL per token."""
        then, now = ([run_alone(m, BOS, q) for q in probes.queries] for m in (plain, moved))
        a, b = (features(sae, np.concatenate([one.x for one in some])) for some in (then, now))
        n_answer = sum(len(q.answer) for q in probes.queries)
        change = sum(two.nll - one.nll for one, two in zip(then, now, strict=True)) / n_answer
        return ((b - a) ** 2).mean(0), ((b - a) ** 2).sum() / (a**2).sum(), change

    realised = top(drift(train)[0], 8)
    assert found.step == 17
    assert set(found.realised_features) == realised
    assert found.n_shared == len(realised & set(forecast.features))
    for record, probes in ((found.train, train), (found.domains["poems"], domain)):
        mean, relative, change = drift(probes)
        assert record.relative_drift == pytest.approx(relative, rel=1e-4)
        assert record.share_on_forecast == pytest.approx(mean[list(forecast.features)].sum() / mean.sum(), rel=1e-4)
        assert record.nll_change == pytest.approx(change, rel=1e-3, abs=1e-5)
        assert [j for j, _ in record.top_features] == np.argsort(-mean)[:10].tolist()
        assert_close([share for _, share in record.top_features], np.sort(mean)[::-1][:10] / mean.sum())
    j = sorted(realised)
    prefixes = {name: context.tokens for name, context in contexts(train, domain).items()}
    step_zero = numpy_sums(plain, sae, domain, prefixes, limit=1e9)
    own, taught = (step_zero.shift[name].sum(0) / step_zero.n_tokens.sum() for name in (OWN, TAUGHT))
    record = found.domains["poems"]
    assert record.sts_act == pytest.approx((step_zero.activity.sum(0) / step_zero.n_tokens.sum())[j].sum(), rel=1e-4)
    assert record.sts_icl == pytest.approx(own[j].sum(), rel=1e-4)
    assert record.sts_rel == pytest.approx(own[j].sum() / own.sum(), rel=1e-4)
    assert record.sts_cross == pytest.approx(taught[j].sum() / taught.sum(), rel=1e-4)


def test_token_that_becomes_a_sink_is_left_out_and_counted() -> None:
    config = replace(CONFIG, max_norm_multiple=3.0)
    model = tiny_model()
    monitor = made_monitor(model, rotated_sae(), config)
    before = monitor.forecast()
    assert before.train.n_masked == 0
    with torch.no_grad():
        model.get_input_embeddings().weight[COMMA] *= 1000
    found = monitor.check(1)
    for record, probes in zip((found.train, found.domains["poems"]), probe_sets(), strict=True):
        assert record.n_masked == 6
        assert record.n_tokens == sum(len(q.query) for q in probes.queries) - 6


# Without a head


def classifier() -> nn.Module:
    language_model = tiny_model()
    model = LlamaForSequenceClassification(language_model.config)
    model.model.load_state_dict(language_model.model.state_dict())
    return model.eval()


@pytest.mark.parametrize("make", [classifier, lambda: tiny_model().model], ids=["classifier", "backbone"])
def test_model_without_head_is_scored_without_likelihood(make: Any) -> None:
    model = make()
    monitor, reference = made_monitor(model, rotated_sae()), made_monitor(tiny_model(), rotated_sae())
    found, wanted = monitor.forecast(), reference.forecast()
    assert set(found.features) == set(wanted.features)
    for one, other in ((found.train, wanted.train), (found.domains["poems"], wanted.domains["poems"])):
        assert math.isnan(one.nll) and math.isnan(one.nll_change) and math.isnan(one.nll_change_se)
        for score in ("sts_act", "sts_icl", "sts_rel", "sts_cross", "relative_shift"):
            assert getattr(one, score) == pytest.approx(getattr(other, score), rel=1e-4)
    still = monitor.check(0)
    assert still.train.relative_drift == 0
    assert math.isnan(still.train.nll) and math.isnan(still.train.nll_change)
    perturbed(model)
    assert monitor.check(1).domains["poems"].relative_drift > 0


# The monitor's records


def drift_numbers(record: DomainDrift) -> tuple[float, ...]:
    return (
        record.relative_drift,
        record.sts_act,
        record.sts_icl,
        record.sts_rel,
        record.sts_cross,
        record.nll,
        record.nll_change,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_records_agree_with_one_another(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    monitor = made_monitor(model, rotated_sae(), config_of(architecture))
    forecast = monitor.forecast()
    assert forecast.train.sts_rel == forecast.train.sts_cross == forecast.features_share
    assert len(forecast.features) == len(set(forecast.features)) == 8
    assert set(forecast.domains) == {"poems"}
    assert forecast.identity == monitor.identity
    still = monitor.check(0)
    assert still.domains["poems"].nll == forecast.domains["poems"].nll
    assert still.train.n_tokens == forecast.train.n_tokens
    perturbed(model)
    moved = monitor.check(2)
    assert moved.train.sts_rel == moved.train.sts_cross
    assert len(moved.realised_features) == 8
    assert 0 <= moved.n_shared <= 8
    for record in (moved.train, *moved.domains.values()):
        assert record.relative_drift > 0
        assert 0 <= record.share_on_forecast <= 1
        assert 0 < sum(share for _, share in record.top_features) <= 1
        assert all(map(math.isfinite, drift_numbers(record)))
        assert record.nll_change_se > 0
    assert monitor.baseline is not None
    monitor.baseline.save(tmp_path / "baseline")
    resumed = made_monitor(model, rotated_sae(), config_of(architecture))
    resumed.restore(tmp_path / "baseline", forecast)
    assert replace(resumed.check(2), seconds=0.0) == replace(moved, seconds=0.0)


def test_measuring_twice_gives_the_same_and_leaves_no_trace() -> None:
    model = tiny_model().train()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    sae = rotated_sae()
    torch.manual_seed(2)
    one = made_monitor(model, sae).forecast()
    drawn = torch.rand(1)
    two = made_monitor(model, sae).forecast()
    torch.manual_seed(2)
    assert replace(one, seconds=0.0) == replace(two, seconds=0.0)
    assert torch.equal(drawn, torch.rand(1))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


@pytest.mark.parametrize(
    "other",
    [
        {"config": replace(CONFIG, seed=1)},
        {"config": replace(CONFIG, max_norm_multiple=2.0)},
        {"sae": rotated_sae(seed=1)},
        {"domains": MappingProxyType({"other": DOMAIN_ROWS})},
        {"model": tiny_model("qwen3")},
    ],
    ids=["seed", "mask", "sae", "domains", "model"],
)
def test_baseline_of_another_measurement_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    monitor = made_monitor(tiny_model(), rotated_sae())
    forecast = monitor.forecast()
    assert monitor.baseline is not None
    monitor.baseline.save(tmp_path / "baseline")
    different = made_monitor(**{"model": tiny_model(), "sae": rotated_sae(), **other})
    with pytest.raises(
        CannotTell, match="baseline: baseline was made with another model, SAE or probes; drift can be measured only"
    ):
        different.restore(tmp_path / "baseline", forecast)
