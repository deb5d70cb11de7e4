"""Every number against a second computation that shares nothing with the first: one query at a time, no cache, plain NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from sae_lens import SAE, Transcoder, TranscoderConfig
from torch import nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

from samples import EXAMINED, timeless
from sts_callback.config import PolicyConfig, ProbeConfig, Unit
from sts_callback.data.probes import ProbeSet, Query, filler_tokens
from sts_callback.errors import CannotTell, ConfigError, ModelError, SaeError
from sts_callback.measure import sae_reader
from sts_callback.measure.accumulators import ZERO_SHOT, DriftStats, ProbeStats
from sts_callback.measure.monitor import Monitor
from sts_callback.measure.runner import Context, ProbeRunner
from sts_callback.measure.scoring import DOMAIN_ICL, FILLER, TRAIN_ICL, step_zero_stats
from sts_callback.metrics.sums import SKETCH_WIDTH, sketch
from sts_callback.model.sae import SaeEncoder, load_encoder
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import DomainDrift, DriftSnapshot, Estimate, Forecast
from tiny import ARCHITECTURES, bos_tokenizer, rotated_sae, rows, tiny_model

pytestmark = pytest.mark.versions

LAYER, BOS = 2, (1,)
KINDS = ("standard", "jumprelu", "topk")
# A multiple so small that ordinary tokens of these random models are masked too, a few batches per set, and groups of
# unlike size: 3, 2 and 2 queries.
CONFIG = ProbeConfig(n_queries=7, n_features=8, n_domain_demonstrations=3, max_norm_multiple=1.3, batch_tokens=150)
TRAIN_ROWS, DOMAIN_ROWS = rows(20, "sums"), rows(20, "far away poems", seed=40)
Array = np.ndarray[Any, Any]
Tokens = tuple[int, ...]


def config_of(architecture: str) -> ProbeConfig:
    """So that some tokens are masked and most are not."""
    return CONFIG if architecture == "llama" else replace(CONFIG, max_norm_multiple=1.16)


def made_monitor(model: nn.Module, sae: Any, config: ProbeConfig = CONFIG, **options: Any) -> Monitor:
    given = {"sae": sae, "train_data": TRAIN_ROWS, "domains": {"poems": DOMAIN_ROWS}, "config": config, "progress": False}
    return Monitor(model, bos_tokenizer(), **{**given, **options})


def made_sae(kind: str) -> SAE[Any]:
    """One that fits: a TopK with room for most of the 32 features that a rotation activates."""
    sae = rotated_sae(kind=kind)
    if kind == "topk":
        sae.cfg.k = 27
        sae.activation_fn = sae.get_activation_fn()
    return sae


def made_encoder(sae: SAE[Any]) -> SaeEncoder:
    return load_encoder(sae, "tiny", 4)


@cache
def probe_sets(config: ProbeConfig = CONFIG) -> tuple[ProbeSet, ProbeSet]:
    """Training data and one domain."""
    monitor = made_monitor(tiny_model(), rotated_sae(), config)
    return monitor.train, monitor.domains["poems"]


def in_front(*names: str) -> dict[str, list[Tokens]]:
    """What stands before the domain's queries, for each group or for all of them."""
    train, domain = probe_sets()
    n_neutral = sum(map(len, train.demo_sets)) // len(train.demo_sets)
    everything = {
        ZERO_SHOT: [BOS],
        TRAIN_ICL: [BOS + draw for draw in train.demo_sets],
        FILLER: [BOS + filler_tokens(bos_tokenizer(), n_neutral)],
        DOMAIN_ICL: [BOS + draw for draw in domain.demo_sets],
    }
    return {name: everything[name] for name in names or everything}


def contexts(runner: ProbeRunner, tokens: Mapping[str, Sequence[Tokens]] | None = None) -> dict[str, list[Context]]:
    return {
        name: [runner.context(one, with_answers=name != DOMAIN_ICL) for one in draws]
        for name, draws in (in_front() if tokens is None else tokens).items()
        if name != ZERO_SHOT
    }


# The second computation


@dataclass(frozen=True)
class Alone:
    """What one query gives, run alone and whole."""

    x: Array
    """Hidden states of its query tokens, `(n_tokens, d)`."""
    nll: float
    """Of its answer, in nats."""
    right: tuple[bool, ...]
    """Whether each token of its answer is the likeliest one."""


def run_alone(model: PreTrainedModel, prefix: Tokens, query: Query) -> Alone:
    tokens = prefix + query.tokens
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    start, end = len(prefix), len(prefix) + len(query.query)
    logits = out.logits[0].double().numpy()
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    nll = -sum(log_p[position - 1, tokens[position]] for position in range(end, len(tokens)))
    right = tuple(bool(logits[position - 1].argmax() == tokens[position]) for position in range(end, len(tokens)))
    return Alone(out.hidden_states[LAYER + 1][0, start:end].double().numpy(), float(nll), right)


def features(sae: SAE[Any], x: Array) -> Array:
    w = {name: p.detach().double().numpy() for name, p in sae.named_parameters()}
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if sae.cfg.architecture() == "jumprelu":
        return np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    if sae.cfg.architecture() == "topk":
        return np.where(pre >= np.sort(pre, axis=1)[:, -sae.cfg.k, None], np.maximum(pre, 0), 0)
    return np.maximum(pre, 0)


def left(sae: SAE[Any], x: Array) -> Array:
    return x - features(sae, x) @ sae.W_dec.detach().double().numpy() - sae.b_dec.detach().double().numpy()


@dataclass(frozen=True)
class NumpyShift:
    features: Array
    raw: Array
    sae_error: Array


@dataclass(frozen=True)
class Sums:
    """Sums per query by the second computation."""

    n_tokens: Array
    n_masked: int
    activity: Array
    sq_norm: Array
    raw: Array
    raw_sq_norm: Array
    shifts: dict[str, NumpyShift]
    nll: dict[str, Array]
    kept: list[Array]
    """Per query, which tokens count."""
    x: list[Array]
    """Per query, activations without context of the tokens that count."""


def lower_median(values: Array) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def calibration_sample(model: PreTrainedModel, sets: tuple[ProbeSet, ...]) -> Array:
    """Tokens of the first four queries of each set, with BOS alone in front."""
    return np.concatenate([run_alone(model, BOS, q).x for s in sets for q in s.queries[:4]])


def numpy_median_norm(model: PreTrainedModel, sets: tuple[ProbeSet, ...]) -> float:
    return lower_median(np.linalg.norm(calibration_sample(model, sets), axis=1))


def summed(per_query: list[Array]) -> Array:
    return np.stack([one.sum(axis=0) for one in per_query])


def numpy_sums(
    model: PreTrainedModel, sae: SAE[Any], probes: ProbeSet, prefixes: Mapping[str, Sequence[Tokens]], limit: float
) -> Sums:
    found = {
        name: [run_alone(model, draws[i % len(probes.demo_sets) % len(draws)], q) for i, q in enumerate(probes.queries)]
        for name, draws in prefixes.items()
    }
    kept = []
    for per_context in zip(*found.values(), strict=True):
        norms = np.stack([np.linalg.norm(one.x, axis=1) for one in per_context])
        assert (np.abs(norms / limit - 1) > 1e-5).all()  # no token so close to the limit that rounding decides
        kept.append((norms < limit).all(axis=0))
    x = {name: [one.x[k] for one, k in zip(alone, kept, strict=True)] for name, alone in found.items()}
    zero_shot = x[ZERO_SHOT]
    return Sums(
        n_tokens=np.array([k.sum() for k in kept]),
        n_masked=int(sum((~k).sum() for k in kept)),
        activity=summed([features(sae, one) for one in zero_shot]),
        sq_norm=np.array([(features(sae, one) ** 2).sum() for one in zero_shot]),
        raw=summed(zero_shot),
        raw_sq_norm=np.array([(one**2).sum() for one in zero_shot]),
        shifts={name: numpy_shift(sae, there, zero_shot) for name, there in x.items() if name != ZERO_SHOT},
        nll={name: np.array([one.nll for one in alone]) for name, alone in found.items()},
        kept=kept,
        x=zero_shot,
    )


def numpy_shift(sae: SAE[Any], there: list[Array], here: list[Array]) -> NumpyShift:
    pairs = list(zip(there, here, strict=True))
    return NumpyShift(
        summed([(features(sae, a) - features(sae, b)) ** 2 for a, b in pairs]),
        np.array([((a - b) ** 2).sum() for a, b in pairs]),
        np.array([((left(sae, a) - left(sae, b)) ** 2).sum() for a, b in pairs]),
    )


@cache
def expected(architecture: str, kind: str) -> tuple[Sums, Sums, float]:
    """Of training data and domain; and the median norm."""
    train, domain = probe_sets()
    model, sae = tiny_model(architecture), made_sae(kind)
    median = numpy_median_norm(model, (train, domain))
    limit = config_of(architecture).max_norm_multiple * median
    return (
        numpy_sums(model, sae, train, in_front(ZERO_SHOT, TRAIN_ICL, FILLER), limit),
        numpy_sums(model, sae, domain, in_front(), limit),
        median,
    )


def top(mean_shift: Array, n: int) -> set[int]:
    order = np.argsort(-mean_shift)
    assert mean_shift[order[n - 1]] > mean_shift[order[n]] * (1 + 1e-3)  # no tie at the border
    return set(order[:n].tolist())


def assert_close(found: Any, wanted: Any, rtol: float = 1e-4, scale: float | None = None) -> None:
    """Close against the largest number, or against a given scale where all may be next to nothing."""
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * (np.abs(wanted).max() if scale is None else scale))


def assert_same_shift(found: Any, wanted: Any, rtol: float = 1e-4) -> None:
    assert_close(found.features, wanted.features, rtol)
    assert_close(found.raw, wanted.raw, rtol)
    assert_close(found.sae_error, wanted.sae_error, rtol, scale=float(np.abs(np.asarray(wanted.raw)).max()))


# Readings


@contextmanager
def gauge_of(model: nn.Module, sae: SAE[Any], config: ProbeConfig = CONFIG) -> Iterator[tuple[ProbeRunner, Context]]:
    """With the context of BOS alone."""
    with undisturbed(model):
        runner = ProbeRunner(model, [made_encoder(sae)], config)
        zero_shot = runner.context(BOS, with_answers=True)
        runner.calibrate(probe_sets(), zero_shot)
        yield runner, zero_shot


def read_domain(model: nn.Module, sae: SAE[Any], config: ProbeConfig = CONFIG) -> ProbeStats:
    with gauge_of(model, sae, config) as (runner, zero_shot):
        return runner.read(probe_sets()[1], zero_shot, contexts(runner))[0]


def test_groups_of_unlike_size_are_measured() -> None:
    for probes in probe_sets():
        assert [sum(probes.group(i) == group for i in range(7)) for group in range(3)] == [3, 2, 2]
        assert len(set(probes.demo_sets)) == len(probes.demo_sets) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_are_those_of_numpy(architecture: str, kind: str) -> None:
    _, wanted, median = expected(architecture, kind)
    _, domain = probe_sets()
    with gauge_of(tiny_model(architecture), made_sae(kind), config_of(architecture)) as (runner, zero_shot):
        (found,) = runner.read(domain, zero_shot, contexts(runner))
        assert runner.sae_readers[0].reference.median_norm == pytest.approx(median, rel=1e-5)
    assert found.n_tokens.tolist() == wanted.n_tokens.tolist()
    assert found.n_masked == wanted.n_masked
    assert 0 < found.n_masked < found.counted.numel() / 2
    assert found.counted.tolist() == np.concatenate(wanted.kept).tolist()
    for name in ("activity", "sq_norm", "raw", "raw_sq_norm"):
        assert_close(getattr(found, name), getattr(wanted, name))
    assert set(found.shifts) == {TRAIN_ICL, FILLER, DOMAIN_ICL}
    for name, shift in found.shifts.items():
        assert_same_shift(shift, wanted.shifts[name])
    assert set(found.nll) == {ZERO_SHOT, TRAIN_ICL, FILLER}  # not asked for with the domain's own demonstrations
    for name, nll in found.nll.items():
        assert_close(nll, wanted.nll[name])
    assert found.n_answer.tolist() == [len(q.answer) for q in domain.queries]


def test_every_group_is_read_behind_its_own_demonstrations() -> None:
    _, wanted, _ = expected("llama", "standard")
    _, domain = probe_sets()
    with gauge_of(tiny_model(), rotated_sae()) as (runner, zero_shot):
        turned = in_front(TRAIN_ICL)[TRAIN_ICL][1:] + in_front(TRAIN_ICL)[TRAIN_ICL][:1]
        (found,) = runner.read(domain, zero_shot, contexts(runner, in_front() | {TRAIN_ICL: turned}))
    apart = np.abs(found.nll[TRAIN_ICL].numpy() - wanted.nll[TRAIN_ICL])
    assert (apart > 1e-3).all()
    assert_close(found.nll[FILLER], wanted.nll[FILLER])


def partly_foretold(model: PreTrainedModel) -> ProbeSet:
    """Answers that a model would write itself, but for every third token, which is another one."""
    _, domain = probe_sets()
    queries = []
    for n, query in enumerate(domain.queries):
        tokens = list(query.query)
        for place in range(5 + n):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*BOS, *tokens]]), use_cache=False).logits[0, -1]
            best, second = logits.topk(2).indices.tolist()
            tokens.append(second if place % 3 == 2 else best)
        queries.append(replace(query, answer=tuple(tokens[len(query.query) :])))
    return replace(domain, queries=tuple(queries))


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_right_that_the_model_would_write_itself(architecture: str, batch_tokens: int) -> None:
    """Before and after, in whatever batches, with a backward and without; the longest answer has 11 tokens."""
    model, config = tiny_model(architecture), replace(config_of(architecture), batch_tokens=batch_tokens)
    probes = partly_foretold(model)
    pattern = [[place < 5 + n and place % 3 != 2 for place in range(11)] for n in range(7)]
    with gauge_of(model, rotated_sae(), config) as (runner, zero_shot):
        for with_gradients in (False, True):
            (before,) = runner.read(probes, zero_shot, contexts(runner), with_gradients=with_gradients)
            assert before.right[ZERO_SHOT].tolist() == pattern
        (same,) = runner.read_drift(probes, zero_shot, [before])
        assert same.right is not None and same.right.tolist() == pattern
        perturbed(model, size=0.002)
        (moved,) = runner.read_drift(probes, runner.context(BOS, with_answers=True), [before])
    assert moved.right is not None
    assert moved.right.tolist() == [
        [*one.right, *(False,) * (11 - len(one.right))] for one in (run_alone(model, BOS, q) for q in probes.queries)
    ]
    assert moved.right.any() and not torch.equal(moved.right, same.right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 150])
def test_what_is_kept_of_step_zero_is_that_of_numpy_in_the_order_of_queries(kind: str, batch_tokens: int) -> None:
    _, wanted, _ = expected("llama", kind)
    sae = made_sae(kind)
    found = read_domain(tiny_model(), sae, replace(CONFIG, batch_tokens=batch_tokens))
    x = np.concatenate(wanted.x)
    assert found.counted.tolist() == np.concatenate(wanted.kept).tolist()
    assert_close(found.acts.dense(0, len(x), 64, torch.device("cpu")), features(sae, x))
    assert found.acts.n_active.max() <= (27 if kind == "topk" else 32)
    projection = sketch(torch.eye(32)).double().numpy()
    assert found.sketches.shape == (len(x), 2, SKETCH_WIDTH)
    assert_close(found.sketches[:, 0], x @ projection)
    assert_close(found.sketches[:, 1], left(sae, x) @ projection, scale=float(np.abs(x @ projection).max()))


def assert_same_reading(parts: ProbeStats, whole: ProbeStats) -> None:
    assert parts.n_tokens.tolist() == whole.n_tokens.tolist()
    assert parts.n_masked == whole.n_masked
    assert torch.equal(parts.counted, whole.counted)
    for name in ("activity", "sq_norm", "raw", "raw_sq_norm"):
        assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5)
    for name in (TRAIN_ICL, FILLER, DOMAIN_ICL):
        assert_same_shift(parts.shifts[name], whole.shifts[name])
    for name in (ZERO_SHOT, TRAIN_ICL, FILLER):
        assert_close(parts.nll[name], whole.nll[name], rtol=1e-5)
    assert_close(parts.sketches, whole.sketches, rtol=1e-5)
    dense = [one.acts.dense(0, len(one.acts.n_active), 64, torch.device("cpu")) for one in (parts, whole)]
    assert_close(*dense, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_streamed_sums_are_those_of_one_batch(batch_tokens: int, kind: str) -> None:
    whole = read_domain(tiny_model(), made_sae(kind))
    assert_same_reading(read_domain(tiny_model(), made_sae(kind), replace(CONFIG, batch_tokens=batch_tokens)), whole)


def encode_at_once(monkeypatch: pytest.MonkeyPatch, n_tokens: int) -> None:
    monkeypatch.setattr(sae_reader, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(sae_reader, "_FEWEST_TOKENS", n_tokens)


@pytest.mark.parametrize("n_tokens_at_once", [1, 7])
def test_chunks_of_tokens_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch, n_tokens_at_once: int) -> None:
    whole = read_domain(tiny_model(), rotated_sae())
    sizes: list[int] = []
    prepare = SAE_CLASS.process_sae_in

    def counted(self: SAE[Any], x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return prepare(self, x)

    monkeypatch.setattr(SAE_CLASS, "process_sae_in", counted)
    encode_at_once(monkeypatch, n_tokens_at_once)
    parts = read_domain(tiny_model(), rotated_sae())
    assert max(sizes[9:]) == n_tokens_at_once  # the first 9 ask the SAE whether it encodes token by token
    assert_same_reading(parts, whole)


SAE_CLASS = type(rotated_sae())


def test_gradients_change_no_other_number() -> None:
    """Not even in the last bit, since a check has no backward and is compared with them."""
    for architecture in ARCHITECTURES:
        with gauge_of(tiny_model(architecture), rotated_sae()) as (runner, zero_shot):
            (plain,), (differentiated,) = (
                runner.read(probe_sets()[1], zero_shot, contexts(runner), with_gradients=wanted) for wanted in (False, True)
            )
        assert plain.gradients is None and differentiated.gradients is not None
        for name in ("activity", "sq_norm", "raw", "raw_sq_norm", "sketches"):
            assert torch.equal(getattr(plain, name), getattr(differentiated, name))
        for name in (ZERO_SHOT, TRAIN_ICL, FILLER):
            assert torch.equal(plain.nll[name], differentiated.nll[name])
            assert torch.equal(plain.right[name], differentiated.right[name])


@pytest.mark.parametrize("with_answers", [True, False])
def test_several_saes_see_what_each_would_see_alone_in_one_run_of_the_model(with_answers: bool) -> None:
    """Two at one hook point, one below and one above, in another site."""
    saes = [
        rotated_sae(),
        rotated_sae(kind="topk", seed=1),
        rotated_sae("blocks.1.hook_resid_pre"),
        rotated_sae("blocks.3.hook_mlp_out", kind="jumprelu"),
    ]
    model = tiny_model()
    forwards: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *args: forwards.append(1))

    def read(*some: SAE[Any]) -> tuple[list[ProbeStats], int]:
        with undisturbed(model):
            runner = ProbeRunner(model, [made_encoder(sae) for sae in some], CONFIG)
            zero_shot = runner.context(BOS, with_answers=with_answers)
            runner.calibrate(probe_sets(), zero_shot)
            before = len(forwards)
            found = runner.read(probe_sets()[1], zero_shot, contexts(runner), with_gradients=True)
            n_forwards = len(forwards) - before
            runner.read_drift(probe_sets()[1], zero_shot, found)
            return found, n_forwards

    together, n_together = read(*saes)
    alone = [read(sae) for sae in saes]
    assert {n for _, n in alone} == {n_together}
    assert len(together) == 4
    for one, ((other,), _) in zip(together, alone, strict=True):
        assert one.n_masked == other.n_masked
        assert torch.equal(one.counted, other.counted)
        for name in ("activity", "sq_norm", "raw", "sketches"):
            assert_close(getattr(one, name), getattr(other, name), rtol=1e-5)
        for name, shift in other.shifts.items():
            assert_same_shift(one.shifts[name], shift)
        assert (one.gradients is None) == (other.gradients is None) == (not with_answers)
        if one.gradients is not None:
            assert_close(one.gradients, other.gradients, rtol=1e-5)
    handle.remove()


def test_several_saes_forecast_what_each_would_forecast_alone() -> None:
    saes = [rotated_sae(), rotated_sae("blocks.1.hook_resid_post", kind="jumprelu")]
    together = made_monitor(tiny_model(), saes)
    for found, sae in zip(together.forecasts(), saes, strict=True):
        wanted = made_monitor(tiny_model(), sae).forecast()
        assert found.identity == wanted.identity
        assert found.features == wanted.features
        for one, other in ((found.train, wanted.train), (found.domains["poems"], wanted.domains["poems"])):
            for name in ("sts_act", "sts_icl", "sts_rel", "sts_cross", "relative_shift", "nll_change", "gradient_change"):
                assert getattr(one, name).value == pytest.approx(getattr(other, name).value, rel=1e-5, abs=1e-6)
    assert_still(together.check(0))


def test_progress_is_told_of_every_query_once_a_context() -> None:
    _, domain = probe_sets()
    done: list[int] = []
    with gauge_of(tiny_model(), rotated_sae()) as (runner, zero_shot):
        for with_gradients in (False, True):
            readings = runner.read(domain, zero_shot, contexts(runner), done.append, with_gradients=with_gradients)
            assert sum(done) == 4 * 7
            done.clear()
        runner.read_drift(domain, zero_shot, readings, done.append)
        assert sum(done) == 7


def test_training_mode_and_dropout_do_not_enter() -> None:
    model = tiny_model().train()
    found = read_domain(model, rotated_sae())
    assert model.training
    assert torch.equal(found.activity, read_domain(tiny_model(), rotated_sae()).activity)


def test_bos_free_model_is_read_with_an_empty_bare_context() -> None:
    model, sae, (train, domain) = tiny_model("qwen3"), rotated_sae(), probe_sets()
    prefixes = {ZERO_SHOT: [()], TRAIN_ICL: list(train.demo_sets)}
    with undisturbed(model):
        runner = ProbeRunner(model, [made_encoder(sae)], replace(CONFIG, max_norm_multiple=1e9))
        zero_shot = runner.context((), with_answers=True)
        runner.calibrate((train, domain), zero_shot)
        (found,) = runner.read(domain, zero_shot, contexts(runner, prefixes))
    wanted = numpy_sums(tiny_model("qwen3"), sae, domain, prefixes, limit=1e9)
    assert_close(found.activity, wanted.activity)
    assert_same_shift(found.shifts[TRAIN_ICL], wanted.shifts[TRAIN_ICL])
    assert_close(found.nll[ZERO_SHOT], wanted.nll[ZERO_SHOT])


# Forecasts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_numpy(architecture: str, kind: str) -> None:
    train, domain, median = expected(architecture, kind)
    found = made_monitor(tiny_model(architecture), made_sae(kind), config_of(architecture)).forecast()

    def mean(one: Sums, name: str) -> Array:
        return np.asarray(one.shifts[name].features.sum(0) / one.n_tokens.sum())

    on_train = mean(train, TRAIN_ICL)
    j = sorted(top(on_train, 8))
    assert sorted(found.features) == j
    assert list(on_train[list(found.features)]) == sorted(on_train[j], reverse=True)
    assert found.features_share == pytest.approx(on_train[j].sum() / on_train.sum(), rel=1e-4)
    assert found.median_norm == pytest.approx(median, rel=1e-5)
    assert 0 <= found.noise_floor < 1e-9
    for record, one, own_name in ((found.train, train, TRAIN_ICL), (found.domains["poems"], domain, DOMAIN_ICL)):
        own, taught, neutral = (mean(one, name) for name in (own_name, TRAIN_ICL, FILLER))
        shift, activity = one.shifts[TRAIN_ICL], one.activity.sum(0) / one.n_tokens.sum()
        n_answer = sum(len(q.answer) for q in probe_sets()[record.name == "poems"].queries)
        assert record.sts_act.value == pytest.approx(activity[j].sum(), rel=1e-4)
        assert record.sts_icl.value == pytest.approx(own[j].sum(), rel=1e-4)
        assert record.sts_rel.value == pytest.approx(own[j].sum() / own.sum(), rel=1e-4)
        assert record.sts_cross.value == pytest.approx(taught[j].sum() / taught.sum(), rel=1e-4)
        assert record.sts_net.value == pytest.approx((taught - neutral)[j].sum() / taught.sum(), rel=1e-4, abs=1e-6)
        assert record.relative_shift.value == pytest.approx(shift.features.sum() / one.sq_norm.sum(), rel=1e-4)
        assert record.raw_shift.value == pytest.approx(shift.raw.sum() / one.raw_sq_norm.sum(), rel=1e-4)
        assert record.sae_error_share == pytest.approx(shift.sae_error.sum() / shift.raw.sum(), rel=1e-4, abs=1e-6)
        a, b = one.raw.sum(0), train.raw.sum(0)
        assert record.cosine == pytest.approx((a @ b) / math.sqrt((a @ a) * (b @ b)), rel=1e-5)
        assert record.nll.value == pytest.approx(one.nll[ZERO_SHOT].sum() / n_answer, rel=1e-4)
        change = (one.nll[TRAIN_ICL] - one.nll[FILLER]).sum() / n_answer
        assert record.nll_change.value == pytest.approx(change, rel=1e-3, abs=1e-5)
        assert (record.n_queries, record.n_tokens, record.n_masked) == (7, one.n_tokens.sum(), one.n_masked)
        assert record.n_answer_tokens == n_answer
    assert (found.domains["poems"].sae_error_share > 0.001) == (kind == "topk")


# Top activating examples


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_words_are_those_around_the_strongest_places(architecture: str) -> None:
    sums, sae = dict(zip(("train", "poems"), expected(architecture, "standard"), strict=False)), rotated_sae()
    monitor, tokenizer = made_monitor(tiny_model(architecture), sae, config_of(architecture)), bos_tokenizer()
    forecast = monitor.forecast()
    found = monitor.top_activating_examples()
    assert tuple(one.feature for one in found) == forecast.features
    assert sum(one.share for one in found) == pytest.approx(forecast.features_share, rel=1e-6)
    for one in found:
        for probes in probe_sets():
            places: dict[tuple[str, str, str], list[float]] = {}
            peaks = []
            for q, x, kept in zip(probes.queries, sums[probes.name].x, sums[probes.name].kept, strict=True):
                acts = features(sae, x)[:, one.feature]
                peaks.append(acts.max())
                for at, activation in zip(np.flatnonzero(kept).tolist(), acts.tolist(), strict=True):
                    parts = q.query[max(0, at - 12) : at], q.query[at : at + 1], q.query[at + 1 : at + 7]
                    before, token, after = (tokenizer.decode(list(part)) for part in parts)
                    places.setdefault((before, token, after), []).append(activation)
            snippets = one.snippets[probes.name]
            assert_close([snippet.activation for snippet in snippets], sorted((p for p in peaks if p > 0), reverse=True)[:3])
            for snippet in snippets:  # of queries that begin alike, rounding says which comes first
                there = places[snippet.before, snippet.token, snippet.after]
                assert min(abs(activation - snippet.activation) for activation in there) < 1e-4 * snippet.activation


def test_words_are_the_same_after_a_resume(tmp_path: Path) -> None:
    monitor, resumed = (made_monitor(tiny_model(), rotated_sae()) for _ in range(2))
    forecast = monitor.forecast()
    assert monitor.step_zero is not None
    monitor.step_zero.save(tmp_path / "baseline")
    resumed.restore(tmp_path / "baseline", forecast)
    assert resumed.top_activating_examples() == monitor.top_activating_examples()
    assert [one.share for one in resumed.top_activating_examples([(5, 0.5), (63, 0.25)])] == [0.5, 0.25]


# Gradients


def gradient_alone(model: PreTrainedModel, sae: SAE[Any], query: Query, limit: float) -> Array:
    """Of the answer's NLL by each feature, over ordinary tokens of query and answer; by autograd through one whole forward."""
    tokens, start = BOS + query.tokens, len(BOS) + len(query.query)
    out = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    hidden = out.hidden_states[LAYER + 1]
    nll = -out.logits[0].log_softmax(dim=-1)[range(start - 1, len(tokens) - 1), tokens[start:]].sum()
    (gradient,) = torch.autograd.grad(nll, hidden)
    x, g = (tensor[0, len(BOS) :].detach().double().numpy() for tensor in (hidden, gradient))
    kept = np.linalg.norm(x, axis=1) < limit
    by_feature = g @ sae.W_dec.detach().double().numpy().T
    return np.asarray(np.where(features(sae, x) > 0, by_feature, 0)[kept].sum(axis=0))


def read_gradients(runner: ProbeRunner, probes: ProbeSet, zero_shot: Context) -> torch.Tensor:
    (reading,) = runner.read(probes, zero_shot, {}, with_gradients=True)
    assert reading.gradients is not None
    return reading.gradients


@cache
def expected_gradients(architecture: str, kind: str) -> tuple[Array, Array]:
    """Of training data and domain, `(n_queries, d_sae)`."""
    model, sae, limit = tiny_model(architecture), made_sae(kind), config_of(architecture).max_norm_multiple
    limit *= numpy_median_norm(model, probe_sets())
    train, domain = (np.stack([gradient_alone(model, sae, q, limit) for q in s.queries]) for s in probe_sets())
    unmasked = np.stack([gradient_alone(model, sae, q, 1e9) for q in probe_sets()[1].queries])
    assert np.abs(unmasked - domain).max() > 0.003 * np.abs(domain).max()  # some tokens are left out, and that shows
    return train, domain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_whole_forwards(architecture: str, kind: str) -> None:
    for probes, wanted in zip(probe_sets(), expected_gradients(architecture, kind), strict=True):
        with gauge_of(tiny_model(architecture), made_sae(kind), config_of(architecture)) as (runner, zero_shot):
            assert_close(read_gradients(runner, probes, zero_shot), wanted, rtol=2e-4)


def test_gradients_are_finite_differences() -> None:
    """GPT-2, whose norms are in the model's own dtype, so that steps may be small."""
    model, sae, (_, domain) = tiny_model("gpt2").double(), rotated_sae(), probe_sets()
    with gauge_of(tiny_model("gpt2"), sae, replace(CONFIG, max_norm_multiple=1e9)) as (runner, zero_shot):
        found = read_gradients(runner, domain, zero_shot)
    decoder = sae.W_dec.detach().double()

    def nll(query: Query, step: float, feature: int) -> float:
        def more(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            active = torch.from_numpy(features(sae, output[0].numpy())[:, feature] > 0)
            active[: len(BOS)] = False
            return output + step * active[:, None] * decoder[feature]

        handle = model.transformer.h[LAYER].register_forward_hook(more)
        loss = run_alone(model, BOS, query).nll
        handle.remove()
        return loss

    for i in (0, 6):
        for feature in np.argsort(-np.abs(found[i].numpy()))[[0, 5, 20]].tolist():
            difference = (nll(domain.queries[i], 1e-5, feature) - nll(domain.queries[i], -1e-5, feature)) / 2e-5
            assert float(found[i, feature]) == pytest.approx(difference, rel=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_streamed_gradients_are_those_of_one_batch(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(config: ProbeConfig) -> torch.Tensor:
        with gauge_of(tiny_model(), rotated_sae(), config) as (runner, zero_shot):
            return read_gradients(runner, probe_sets()[1], zero_shot)

    whole = read(CONFIG)
    encode_at_once(monkeypatch, 7)
    assert_close(read(replace(CONFIG, batch_tokens=batch_tokens)), whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expected_change_by_gradients_is_that_of_numpy(architecture: str) -> None:
    train, domain = expected_gradients(architecture, "standard")
    found = made_monitor(tiny_model(architecture), rotated_sae(), config_of(architecture)).forecast()
    n_train, n_domain = (sum(len(q.answer) for q in s.queries) for s in probe_sets())
    products = [train[i] @ train[k] for i in range(7) for k in range(7) if i != k]
    fall = np.mean(products) * 7**2 / n_train**2  # of the training data's NLL a token, by a step of one along its gradient
    assert fall > 0
    for record, gradients, n in ((found.train, train, n_train), (found.domains["poems"], domain, n_domain)):
        change = -(gradients.sum(0) / n) @ (train.sum(0) / n_train) / fall
        assert record.gradient_change.value == pytest.approx(change, rel=1e-3)
    assert found.train.gradient_change.value < -0.9  # its own NLL falls by a nat, give or take the noise of 7 queries


def transcoder() -> SAE[Any]:
    made: SAE[Any] = Transcoder(TranscoderConfig(d_in=32, d_out=32, d_sae=64, apply_b_dec_to_input=False))
    made.W_enc.data = rotated_sae().W_enc.data.clone()
    made.cfg.metadata.hook_name = rotated_sae().cfg.metadata.hook_name
    return made


def sharded() -> nn.Module:
    model = tiny_model()
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize(("make", "sae"), [(tiny_model, transcoder), (sharded, rotated_sae)], ids=["transcoder", "sharded"])
def test_where_no_gradient_can_be_had_the_forecast_does_without(make: Any, sae: Any) -> None:
    model = make()
    found, wanted = made_monitor(model, sae()).forecast(), made_monitor(tiny_model(), rotated_sae()).forecast()
    for record, other in ((found.train, wanted.train), (found.domains["poems"], wanted.domains["poems"])):
        assert math.isnan(record.gradient_change.value)
        assert math.isfinite(other.gradient_change.value)
        assert record.sts_cross.value == pytest.approx(other.sts_cross.value, rel=1e-4)
        assert record.nll_change.value == pytest.approx(other.nll_change.value, rel=1e-3)
    assert [math.isnan(x) for x in (found.fvu, found.train.sae_error_share)] == [sae is transcoder] * 2


# Calibration


@pytest.mark.parametrize("kind", KINDS)
def test_reference_and_fit_are_those_of_numpy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_at_once(monkeypatch, 50)
    model, sae, config = tiny_model(), made_sae(kind), replace(CONFIG, max_norm_multiple=1.16)
    x = calibration_sample(tiny_model(), probe_sets())
    norms = np.linalg.norm(x, axis=1)
    not_outlier = norms < config.max_norm_multiple * lower_median(norms)
    acts = features(sae, x[not_outlier])
    fvu = (left(sae, x[not_outlier]) ** 2).sum() / ((x[not_outlier] - x[not_outlier].mean(0)) ** 2).sum()
    with undisturbed(model):
        runner = ProbeRunner(model, [made_encoder(sae)], config)
        (fit,) = runner.calibrate(probe_sets(), runner.context(BOS, with_answers=True))
    assert 50 < not_outlier.sum() < len(x)
    assert runner.sae_readers[0].reference.median_norm == pytest.approx(lower_median(norms), rel=1e-5)
    assert runner.sae_readers[0].reference.mean_norm == pytest.approx(norms[not_outlier].mean(), rel=1e-5)
    assert runner.sae_readers[0].point.layer == LAYER
    assert fit.n_tokens == not_outlier.sum()
    assert fit.fvu == pytest.approx(fvu, rel=1e-4, abs=1e-9)
    assert (fvu > 0.001) == (kind == "topk")
    assert fit.l0 == pytest.approx((acts > 0).sum(1).mean(), rel=1e-6)
    assert fit.dead_fraction == (acts == 0).all(axis=0).mean() > 0


@pytest.mark.parametrize("hook_name", ["blocks.2.hook_resid_post", "model.layers.2.output"])
def test_fit_by_layer_is_that_of_numpy(hook_name: str) -> None:
    model, sae, (train, _) = tiny_model(), rotated_sae(hook_name, kind="topk"), probe_sets()
    config = replace(CONFIG, max_norm_multiple=1.16)
    with gauge_of(tiny_model(), sae, config) as (runner, zero_shot):
        found = runner.fit_by_layer(train, zero_shot, runner.sae_readers[0])
    seen: dict[int, list[Array]] = {layer: [] for layer in range(4)}
    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(
            lambda module, args, output, layer=layer: seen[layer].append(output[0, len(BOS) :].double().numpy())
        )
    for q in train.queries[:4]:
        with torch.no_grad():
            model(input_ids=torch.tensor([BOS + q.query]), use_cache=False)
    assert set(found) == {0, 1, 2, 3}
    for layer, outputs in seen.items():
        x = np.concatenate(outputs)
        norms = np.linalg.norm(x, axis=1)
        x = x[norms < 1.16 * lower_median(norms)]
        assert 0 < len(x) < len(norms)
        assert found[layer] == pytest.approx((left(sae, x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)


def test_layers_without_the_site_are_left_out_of_the_fit_by_layer() -> None:
    model = tiny_model()
    model.model.layers[1].mlp = nn.Identity()  # as where architectures mix kinds of layers
    sae = rotated_sae("blocks.2.mlp.hook_post", d_in=48)
    with undisturbed(model):
        runner = ProbeRunner(model, [made_encoder(sae)], CONFIG)
        found = runner.fit_by_layer(probe_sets()[0], runner.context(BOS, with_answers=False), runner.sae_readers[0])
    assert set(found) == {0, 2, 3}


def test_sae_trained_on_scaled_activations_is_scaled_once_and_for_all(tmp_path: Path) -> None:
    def scaled_sae() -> SAE[Any]:
        sae = rotated_sae(kind="jumprelu", threshold=0.5)
        sae.cfg.normalize_activations = "expected_average_only_in"
        return sae

    model = tiny_model()
    with gauge_of(model, scaled_sae()) as (runner, _):
        scale = math.sqrt(32) / runner.sae_readers[0].reference.mean_norm
    by_hand = rotated_sae(kind="jumprelu", threshold=0.5)
    by_hand.W_enc.data *= scale
    by_hand.W_dec.data /= scale
    assert_same_reading(read_domain(model, scaled_sae()), read_domain(model, by_hand))
    monitor = made_monitor(model, scaled_sae())
    monitor.examine(PolicyConfig())
    first, again = monitor.forecast(), monitor.forecast()
    assert timeless(first) == timeless(again)
    assert monitor.step_zero is not None
    monitor.step_zero.save(tmp_path / "baseline")
    resumed = made_monitor(tiny_model(), scaled_sae())
    for one in (resumed, monitor):
        one.restore(tmp_path / "baseline", first)
        assert one.check(3).train.relative_drift == STILL


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
def test_sae_that_leaves_most_of_the_variance_is_refused(spoilt: Any) -> None:
    monitor = made_monitor(tiny_model(), spoilt(rotated_sae()))
    with pytest.raises(CannotTell, match=r"explained variance: none: .* take an SAE that was trained on this model"):
        monitor.forecast()
    assert monitor.step_zero is None
    assert monitor.fits[0].fvu >= 1


@pytest.mark.parametrize("n_features", [33, 64, 100])
def test_more_features_than_half_are_no_selection(n_features: int) -> None:
    wanted = f"n_features: {n_features} of 64 features are no selection; allowed is up to 32"
    with pytest.raises(SaeError, match=wanted):
        made_monitor(tiny_model(), rotated_sae(), replace(CONFIG, n_features=n_features))
    assert made_monitor(tiny_model(), rotated_sae(), replace(CONFIG, n_features=32))


def test_hook_point_that_the_model_lacks_is_refused_at_set_up() -> None:
    with pytest.raises(ModelError, match="asks for layer 9, but the model has 4 layers"):
        made_monitor(tiny_model(), rotated_sae("blocks.9.hook_resid_post"))


@pytest.mark.parametrize(
    ("domains", "message"),
    [({}, "domains: got {}; allowed is at least one"), ({"train": DOMAIN_ROWS}, "domains: got 'train'; allowed is another name")],
)
def test_domains_are_needed_and_none_is_called_train(domains: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made_monitor(tiny_model(), rotated_sae(), domains=domains)


# Examination


def test_examination_says_what_the_doctor_finds_and_changes_nothing() -> None:
    model = tiny_model().train()
    monitor = made_monitor(model, rotated_sae())
    torch.manual_seed(2)
    checks = {check.name: check for check in monitor.examine(PolicyConfig(budgets={"poems": 0.1}))}
    drawn = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(drawn, torch.rand(1))
    assert list(checks) == EXAMINED
    assert checks["explained variance"].status == checks["layer"].status == checks["noise floor"].status == "pass"
    assert all(m.training for m in model.modules())
    assert monitor.step_zero is None
    untouched = made_monitor(tiny_model(), rotated_sae()).forecast()
    assert timeless(monitor.forecast()) == timeless(untouched)


def test_examination_ends_where_the_sae_does_not_fit() -> None:
    checks = made_monitor(tiny_model(), negated(rotated_sae())).examine(PolicyConfig())
    assert [check.status for check in checks if check.name == "explained variance"] == ["refuse"]
    assert {check.name for check in checks} == {"explained variance", "layer", "L0", "silent features", "trained on"}


def test_examination_refuses_probes_without_the_power_for_an_alarm() -> None:
    policy = PolicyConfig(budgets={"poems": 0.1})
    enough, few = (made_monitor(tiny_model(), rotated_sae(), replace(CONFIG, n_queries=n)).examine(policy) for n in (5, 4))
    assert [check.status for check in few if check.name == "alarm power"] == ["refuse"]
    assert [check.status for check in enough if check.name == "alarm power"] != ["refuse"]


# Attention sinks

COMMA = bos_tokenizer().convert_tokens_to_ids(",")


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
        assert record.n_masked == n_commas(probes) == 7
        assert record.n_tokens == sum(len(q.query) for q in probes.queries) - 7


def test_sinks_dominate_where_they_are_not_masked() -> None:
    masked = made_monitor(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=3.0)).forecast()
    open_to_all = made_monitor(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=1e9)).forecast()
    assert open_to_all.train.n_masked == 0
    assert open_to_all.domains["poems"].sts_act.value > 3 * masked.domains["poems"].sts_act.value
    everything = read_domain(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=1e9))
    content = read_domain(model_with_sinks(), rotated_sae(), replace(CONFIG, max_norm_multiple=3.0))
    assert everything.sq_norm.sum() > 1000 * content.sq_norm.sum()
    assert everything.raw_sq_norm.sum() > 1000 * content.raw_sq_norm.sum()


def test_sinks_have_no_gradient() -> None:
    model, sae, (_, domain) = model_with_sinks(), rotated_sae(), probe_sets()
    limit = 3 * numpy_median_norm(model, probe_sets())
    with gauge_of(model, sae, replace(CONFIG, max_norm_multiple=3.0)) as (runner, zero_shot):
        found = read_gradients(runner, domain, zero_shot)
    assert_close(found, np.stack([gradient_alone(model_with_sinks(), sae, q, limit) for q in domain.queries]))


def test_token_that_is_a_sink_in_one_context_only_is_masked_in_all() -> None:
    train, domain = probe_sets()
    model = tiny_model()

    def enlarge(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """The first token after BOS, unless a context stands before it."""
        first = torch.zeros(output.shape[:2], dtype=torch.bool)
        first[:, 0] = zero_shot[0]
        return torch.where(first[..., None], output * 100, output)

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        cache = kwargs["cache"] if "cache" in kwargs else kwargs["past_key_values"]  # by transformers' version
        zero_shot[0] = cache.get_seq_length() == len(BOS)

    zero_shot = [False]
    model.register_forward_pre_hook(look, with_kwargs=True)
    model.model.layers[LAYER].register_forward_hook(enlarge)
    with undisturbed(model):
        runner = ProbeRunner(model, [made_encoder(rotated_sae())], replace(CONFIG, max_norm_multiple=3.0))
        bare_context = runner.context(BOS, with_answers=True)
        runner.calibrate((train, domain), bare_context)
        (found,) = runner.read(domain, bare_context, contexts(runner))
    assert found.n_masked == 7
    assert found.n_tokens.tolist() == [len(q.query) - 1 for q in domain.queries]


def test_domain_of_sinks_alone_has_no_score() -> None:
    monitor = made_monitor(
        model_with_sinks(),
        rotated_sae(),
        replace(CONFIG, max_norm_multiple=3.0),
        domains={"poems": DOMAIN_ROWS, "commas": [{"prompt": "," * (3 + i), "completion": " x"} for i in range(20)]},
    )
    forecast = monitor.forecast()
    found = forecast.domains["commas"]
    assert found.n_tokens == 0
    assert found.n_masked == sum(len(q.query) for q in monitor.domains["commas"].queries)
    for score in ("sts_act", "sts_icl", "sts_rel", "sts_cross", "relative_shift", "raw_shift", "raw_over_prose"):
        assert math.isnan(getattr(found, score).value)
    assert math.isfinite(found.nll.value)
    assert math.isfinite(forecast.domains["poems"].sts_cross.value)
    assert Forecast.from_json(forecast.to_json()).domains["commas"].n_tokens == 0
    drift = monitor.check(1).domains["commas"]
    assert math.isnan(drift.relative_drift.value)
    assert drift.nll_change.value == 0


# Drift


def perturbed(model: PreTrainedModel, size: float = 0.02) -> PreTrainedModel:
    """As training would: all weights a little, among them those below the hook point."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


STILL = Estimate(0.0, 0.0, 0.0)


def assert_still(snapshot: DriftSnapshot) -> None:
    for record in (snapshot.train, *snapshot.domains.values()):
        assert record.relative_drift == record.nll_change == record.bits_change == STILL
        assert record.accuracy is not None
        assert record.accuracy.change == STILL
        assert record.accuracy.then == record.accuracy.now
        assert record.accuracy.n_lost == record.accuracy.n_gained == record.accuracy.n_queries_lost == 0
        assert record.raw_drift == 0
        assert record.p_worse == 1
        assert record.n_masked == 0
        assert record.top_features == ()
    assert snapshot.realised_features == ()
    assert snapshot.n_shared == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drift_of_unchanged_weights_is_exactly_zero(architecture: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(architecture).to(dtype)
    monitor = made_monitor(model, made_sae(kind), config_of(architecture))
    forecast = monitor.forecast()
    assert forecast.train.n_masked > 0
    assert_still(monitor.check(0))
    assert monitor.step_zero is not None
    monitor.step_zero.save(tmp_path / "baseline.safetensors")
    resumed = made_monitor(tiny_model(architecture).to(dtype), made_sae(kind), config_of(architecture))
    resumed.restore(tmp_path / "baseline.safetensors", Forecast.from_json(forecast.to_json()))
    assert_still(resumed.check(5))


def test_accuracy_of_unchanged_weights_is_exactly_that_of_step_zero_also_after_a_resume(tmp_path: Path) -> None:
    """Answers of five to eleven tokens, of which every third is wrong."""
    foretold = [
        {"input_ids": [*q.query, *q.answer], "labels": [-100] * len(q.query) + list(q.answer)}
        for q in partly_foretold(tiny_model()).queries
    ]
    domains = {"poems": foretold}
    monitor = made_monitor(tiny_model(), rotated_sae(), domains=domains)
    forecast = monitor.forecast()
    n = [len(q.answer) for q in monitor.domains["poems"].queries]
    share = sum(length - length // 3 for length in n) / sum(n)
    assert forecast.domains["poems"].accuracy == share
    assert monitor.step_zero is not None
    monitor.step_zero.save(tmp_path / "baseline.safetensors")
    model = tiny_model()
    resumed = made_monitor(model, rotated_sae(), domains=domains)
    resumed.restore(tmp_path / "baseline.safetensors", forecast)
    for snapshot in (monitor.check(0), resumed.check(3)):
        assert_still(snapshot)
        found = snapshot.domains["poems"].accuracy
        assert found is not None
        assert (found.then, found.now) == (share, share)
    perturbed(model)
    moved = resumed.check(4).domains["poems"].accuracy
    assert moved is not None
    assert moved.then == share > moved.now
    assert moved.n_lost - moved.n_gained == -sum(moved.query_changes) == round((share - moved.now) * sum(n))
    assert 0 < moved.n_queries_lost <= len(n)


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
    model, sae, config = tiny_model(architecture), made_sae(kind), replace(CONFIG, max_norm_multiple=3.0)
    with gauge_of(model, sae, config) as (runner, zero_shot):
        (before,) = runner.read(domain, zero_shot, {})
        model.load_state_dict(trained().state_dict())
        (found,) = runner.read_drift(domain, runner.context(BOS, with_answers=True), [before])
    then, now = ([run_alone(m, BOS, q) for q in domain.queries] for m in (tiny_model(architecture), trained()))
    kept = [np.array(q.query) != COMMA for q in domain.queries]
    x_then, x_now = ([one.x[k] for one, k in zip(alone, kept, strict=True)] for alone in (then, now))
    wanted = numpy_shift(sae, x_now, x_then)
    assert before.n_masked == 0
    assert found.n_masked == n_commas(domain) == 7
    assert found.n_tokens.tolist() == [k.sum() for k in kept]
    assert_close(found.shift.features, wanted.features)
    assert found.nll is not None
    assert_close(found.nll, np.array([b.nll for b in now]))
    assert (wanted.features.sum(axis=1) > 0).all()
    # From sketches: exactly those of the projected activations, and about those of the activations themselves.
    projection = sketch(torch.eye(32)).double().numpy()
    pairs = list(zip(x_now, x_then, strict=True))
    raw = [(((a - b) @ projection) ** 2).sum() for a, b in pairs]
    sae_error = [(((left(sae, a) - left(sae, b)) @ projection) ** 2).sum() for a, b in pairs]
    assert_close(found.shift.raw, raw)
    assert_close(found.shift.sae_error, sae_error, scale=max(raw))
    assert float(found.shift.raw.sum()) == pytest.approx(wanted.raw.sum(), rel=0.3)
    assert float(found.shift.sae_error.sum()) == pytest.approx(wanted.sae_error.sum(), rel=0.3, abs=1e-4 * wanted.raw.sum())


def read_moved(config: ProbeConfig, **options: Any) -> DriftStats:
    _, domain = probe_sets()
    model = tiny_model()
    with gauge_of(model, made_sae("topk"), config) as (runner, zero_shot):
        (before,) = runner.read(domain, zero_shot, {})
        perturbed(model)
        return runner.read_drift(domain, runner.context(BOS, with_answers=True), [before], **options)[0]


@pytest.mark.parametrize("batch_tokens", [1, 90, 10_000])
def test_streamed_drift_is_that_of_one_batch(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, max_norm_multiple=1.1)
    whole = read_moved(config)
    assert whole.n_masked > 0
    encode_at_once(monkeypatch, 7)
    # Each segment has its own median, so that segments are compared where nothing is masked.
    unmasked, in_segments = (read_moved(replace(CONFIG, max_norm_multiple=1e9, batch_tokens=n)) for n in (10_000, batch_tokens))
    for parts, wanted in ((read_moved(config, batch_tokens=batch_tokens), whole), (in_segments, unmasked)):
        assert parts.n_tokens.tolist() == wanted.n_tokens.tolist()
        assert parts.n_masked == wanted.n_masked
        assert_same_shift(parts.shift, wanted.shift)
        assert parts.nll is not None and wanted.nll is not None
        assert_close(parts.nll, wanted.nll)


def test_a_baseline_is_as_good_a_step_zero_as_the_reading() -> None:
    _, domain = probe_sets()
    model = tiny_model()
    with gauge_of(model, rotated_sae()) as (runner, zero_shot):
        (before,) = runner.read(domain, zero_shot, contexts(runner))
        perturbed(model)
        now = runner.context(BOS, with_answers=True)
        one, other = (runner.read_drift(domain, now, [step_zero])[0] for step_zero in (before, step_zero_stats(before)))
    assert all(torch.equal(getattr(one.shift, f.name), getattr(other.shift, f.name)) for f in fields(one.shift))
    assert float(one.shift.features.sum()) > 0


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-9), (torch.bfloat16, 1e-2)])
def test_another_batch_layout_moves_next_to_nothing(dtype: torch.dtype, most: float) -> None:
    _, domain = probe_sets()
    layouts: dict[int, list[int]] = {150: [], 10_000: []}
    with gauge_of(tiny_model().to(dtype), rotated_sae()) as (runner, zero_shot):
        (before,) = runner.read(domain, zero_shot, {})
        same, other = (
            runner.read_drift(domain, zero_shot, [before], sizes.append, batch_tokens=tokens)[0]
            for tokens, sizes in layouts.items()
        )
    assert max(layouts[10_000]) > max(layouts[150]) > 1
    assert sum(layouts[10_000]) == sum(layouts[150]) == 7
    assert float(same.shift.features.sum()) == float(same.shift.raw.sum()) == float(same.shift.sae_error.sum()) == 0
    assert float(other.shift.features.sum()) < most * float(before.sq_norm.sum())
    assert float(other.shift.raw.sum()) < most * float(before.raw_sq_norm.sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drift_record_is_that_of_numpy(architecture: str) -> None:
    sae, (train, domain), config = rotated_sae(), probe_sets(), replace(CONFIG, max_norm_multiple=1e9)
    model = tiny_model(architecture)
    monitor = made_monitor(model, sae, config)
    forecast = monitor.forecast()
    perturbed(model)
    found = monitor.check(17)
    plain, moved = tiny_model(architecture), perturbed(tiny_model(architecture))

    def drift(probes: ProbeSet) -> tuple[Array, float, float, float]:
        """Mean drift per feature, relative drift of features and of activations, and change of NLL per token."""
        then, now = ([run_alone(m, BOS, q) for q in probes.queries] for m in (plain, moved))
        x, y = (np.concatenate([one.x for one in some]) for some in (then, now))
        a, b = features(sae, x), features(sae, y)
        n_answer = sum(len(q.answer) for q in probes.queries)
        change = sum(two.nll - one.nll for one, two in zip(then, now, strict=True)) / n_answer
        return ((b - a) ** 2).mean(0), ((b - a) ** 2).sum() / (a**2).sum(), ((y - x) ** 2).sum() / (x**2).sum(), change

    realised = top(drift(train)[0], 8)
    assert found.step == 17
    assert set(found.realised_features) == realised
    assert found.n_shared == len(realised & set(forecast.features))
    for record, probes in ((found.train, train), (found.domains["poems"], domain)):
        mean, relative, raw, change = drift(probes)
        assert record.relative_drift.value == pytest.approx(relative, rel=1e-4)
        assert record.raw_drift == pytest.approx(raw, rel=0.3)  # from sketches
        assert record.share_on_forecast == pytest.approx(mean[list(forecast.features)].sum() / mean.sum(), rel=1e-4)
        assert record.nll_change.value == pytest.approx(change, rel=1e-3, abs=1e-5)
        assert record.bits_change.value == pytest.approx(change / math.log(2), rel=1e-3, abs=1e-5)  # a token is a byte
        assert record.sae_error_share < 1e-4
        assert [j for j, _ in record.top_features] == np.argsort(-mean)[:10].tolist()
        assert_close([share for _, share in record.top_features], np.sort(mean)[::-1][:10] / mean.sum())
    j = sorted(realised)
    step_zero = numpy_sums(plain, sae, domain, in_front(), limit=1e9)
    own, taught, prose = (
        step_zero.shifts[name].features.sum(0) / step_zero.n_tokens.sum() for name in (DOMAIN_ICL, TRAIN_ICL, FILLER)
    )
    record = found.domains["poems"]
    assert record.sts_act == pytest.approx((step_zero.activity.sum(0) / step_zero.n_tokens.sum())[j].sum(), rel=1e-4)
    assert record.sts_icl == pytest.approx(own[j].sum(), rel=1e-4)
    assert record.sts_rel == pytest.approx(own[j].sum() / own.sum(), rel=1e-4)
    assert record.sts_cross == pytest.approx(taught[j].sum() / taught.sum(), rel=1e-4)
    assert record.sts_net == pytest.approx((taught - prose)[j].sum() / taught.sum(), rel=1e-3, abs=1e-6)


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
        assert record.n_masked == 7
        assert record.n_tokens == sum(len(q.query) for q in probes.queries) - 7


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
        assert all(math.isnan(e.value) for e in (one.nll, one.nll_change, one.gradient_change))
        for score in ("sts_act", "sts_icl", "sts_rel", "sts_cross", "relative_shift", "raw_shift", "raw_over_prose"):
            assert getattr(one, score).value == pytest.approx(getattr(other, score).value, rel=1e-4)
    still = monitor.check(0)
    assert still.train.relative_drift == STILL
    assert all(math.isnan(x) for x in (still.train.nll, still.train.nll_change.value, still.train.p_worse))
    assert still.train.accuracy is None
    assert all(math.isnan(still.train.harm_in(unit).value) for unit in get_args(Unit))
    assert all(math.isnan(x) for x in (found.train.accuracy, found.train.accuracy_change.value, found.train.bits_change.value))
    perturbed(model)
    assert monitor.check(1).domains["poems"].relative_drift.value > 0
    checks = {check.name: check for check in monitor.examine(PolicyConfig(budgets={"poems": 0.1}))}
    assert checks["alarm power"].found == "the model has no language-model head, so harm cannot be measured"


# The monitor's records


def drift_numbers(record: DomainDrift) -> tuple[float, ...]:
    return (
        *vars(record.relative_drift).values(),
        record.raw_drift,
        record.sae_error_share,
        record.sts_act,
        record.sts_icl,
        record.sts_rel,
        record.sts_cross,
        record.sts_net,
        record.nll,
        *vars(record.nll_change).values(),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_records_agree_with_one_another(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    monitor = made_monitor(model, rotated_sae(), config_of(architecture))
    forecast = monitor.forecast()
    assert forecast.train.sts_rel.value == pytest.approx(forecast.features_share, rel=1e-6)
    assert replace(forecast.train.sts_rel, random=0.0) == replace(forecast.train.sts_cross, random=0.0)
    assert len(forecast.features) == len(set(forecast.features)) == 8
    assert set(forecast.domains) == {"poems"}
    assert forecast.domains["poems"].sts_cross.own == forecast.train.sts_cross.value
    assert forecast.domains["poems"].rank == (1, 1)
    assert forecast.identity == monitor.identity
    assert forecast.fvu == monitor.fits[0].fvu
    still = monitor.check(0)
    assert still.domains["poems"].nll == forecast.domains["poems"].nll.value
    assert still.train.n_tokens == forecast.train.n_tokens
    perturbed(model)
    moved = monitor.check(2)
    assert moved.train.sts_rel == moved.train.sts_cross
    assert len(moved.realised_features) == 8
    assert 0 <= moved.n_shared <= 8
    for record in (moved.train, *moved.domains.values()):
        assert record.relative_drift.value > 0
        assert record.relative_drift.low < record.relative_drift.value < record.relative_drift.high
        assert record.nll_change.low < record.nll_change.value < record.nll_change.high
        assert 0 <= record.share_on_forecast <= 1
        assert 0 < sum(share for _, share in record.top_features) <= 1
        assert all(map(math.isfinite, drift_numbers(record)))
        assert 0 < record.p_worse <= 1
        assert record.n_queries == 7
    assert monitor.step_zero is not None
    monitor.step_zero.save(tmp_path / "baseline")
    resumed = made_monitor(model, rotated_sae(), config_of(architecture))
    resumed.restore(tmp_path / "baseline", forecast)
    assert timeless(resumed.check(2)) == timeless(moved)


def test_measuring_twice_gives_the_same_and_leaves_no_trace() -> None:
    model = tiny_model().train()
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    sae = rotated_sae()
    torch.manual_seed(2)
    one = made_monitor(model, sae).forecast()
    drawn = torch.rand(1)
    two = made_monitor(model, sae).forecast()
    torch.manual_seed(2)
    assert timeless(one) == timeless(two)
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
    assert monitor.step_zero is not None
    monitor.step_zero.save(tmp_path / "baseline")
    different = made_monitor(**{"model": tiny_model(), "sae": rotated_sae(), **other})
    with pytest.raises(
        CannotTell, match="baseline: baseline was made with another model, SAE or probes; drift can be measured only"
    ):
        different.restore(tmp_path / "baseline", forecast)


def test_baseline_of_another_precision_is_refused(tmp_path: Path) -> None:
    monitor = made_monitor(tiny_model(), rotated_sae())
    forecast = monitor.forecast()
    assert monitor.step_zero is not None
    monitor.step_zero.save(tmp_path / "baseline")
    coarser = made_monitor(tiny_model().bfloat16(), rotated_sae())
    with pytest.raises(CannotTell, match="baseline: it was made in float32, and the model now computes in bfloat16; resume"):
        coarser.restore(tmp_path / "baseline", forecast)
    unknown = replace(forecast, identity=replace(forecast.identity, precision=""))  # as an earlier version recorded it
    coarser.restore(tmp_path / "baseline", unknown)
