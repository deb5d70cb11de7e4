"""Without an SAE: raw activations in its place, from the forecast to the report, and never a word of features."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from guest.runs import PROBES, TINY_DOMAINS, Shelf, finished, made_trainer
from sts_callback import ProbeConfig, STSCallback
from sts_callback.cli import main
from sts_callback.errors import CannotTell, ConfigError, SaeError
from sts_callback.measure.accumulators import ZERO_SHOT
from sts_callback.measure.monitor import Monitor
from sts_callback.measure.scoring import FILLER, TRAIN_ICL
from sts_callback.model import registry
from sts_callback.records import Verdict
from sts_callback.records.run import Given
from sts_callback.report.advice import advice_on
from sts_callback.runs.directory import RunDirectory
from tiny import rows, saved_sae, tiny_arguments, tiny_model, tiny_tokenizer

TRAIN = rows(20, "sums")


def monitor(sae: Any = "none", model: Any = None, **config: Any) -> Monitor:
    probes = ProbeConfig(**{"n_queries": 8, "n_features": 8, **config})
    return Monitor(
        model or tiny_model(),
        tiny_tokenizer(),
        sae=sae,
        train_data=TRAIN,
        domains=TINY_DOMAINS,
        config=probes,
        progress=False,
    )


def test_the_forecast_is_that_of_hidden_states() -> None:
    """Nothing is masked; every query runs alone, with its context before it."""
    model = tiny_model()
    ours = monitor("none:2", model, max_norm_multiple=1e6)
    found = ours.forecast()

    @torch.no_grad()
    def hidden(context: tuple[int, ...], query: Any) -> torch.Tensor:
        states = model(torch.tensor([[*ours._bos, *context, *query.query]]), output_hidden_states=True).hidden_states[3]
        return states[0, -len(query.query) :][torch.tensor(query.counts)]

    n_draws = len(ours.train.demo_sets)
    for probes in ours.domains.values():
        sums = dict.fromkeys((TRAIN_ICL, FILLER, ZERO_SHOT), 0.0)
        for i, query in enumerate(probes.queries):
            alone, demos = hidden((), query), ours.train.demo_sets[probes.group(i) % n_draws]
            sums[ZERO_SHOT] += float(alone.square().sum())
            sums[TRAIN_ICL] += float((hidden(demos, query) - alone).square().sum())
            sums[FILLER] += float((hidden(ours._filler, query) - alone).square().sum())
        domain = found.domains[probes.name]
        over_prose = sums[TRAIN_ICL] / sums[FILLER]
        assert domain.raw_over_prose.value == pytest.approx(over_prose, rel=1e-3)
        assert domain.sts_net.value == pytest.approx(1 - 1 / over_prose, abs=1e-3)
        assert domain.relative_shift.value == pytest.approx(sums[TRAIN_ICL] / sums[ZERO_SHOT], rel=1e-3)


def test_domains_are_ordered_as_by_the_raw_shift_over_that_by_prose() -> None:
    domains = monitor().forecast().domains.values()
    assert sorted(domains, key=lambda d: d.sts_net.value) == sorted(domains, key=lambda d: d.raw_over_prose.value)


def test_drift_is_exactly_0_without_training_and_above_after() -> None:
    model = tiny_model()
    ours = monitor(model=model)
    forecast = ours.forecast()
    assert forecast.identity.hook_name == "blocks.3.hook_resid_post"  # of 4 layers: 3 is as near to two thirds as any after 2
    still = ours.check(0)
    assert all(d.relative_drift.value == d.raw_drift == 0 for d in still.domains.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    moved = ours.check(1)
    assert all(d.relative_drift.value == d.raw_drift > 0 for d in moved.domains.values())
    assert moved.realised_features == forecast.features == ()
    assert ours.top_activating_examples() == ()


def test_a_baseline_with_an_sae_is_refused_and_the_other_way_round(tmp_path: Path) -> None:
    with_sae, without = monitor(saved_sae(tmp_path / "sae")), monitor()
    for one, other in ((with_sae, without), (without, with_sae)):
        forecast = one.forecast()
        assert one.step_zero is not None
        one.step_zero.save(tmp_path / "baseline")
        with pytest.raises(CannotTell, match=r"baseline: it was made with .* at .*, not with .* at .*; resume"):
            other.restore(tmp_path / "baseline", forecast)


def test_layers_that_are_none_are_refused() -> None:
    with pytest.raises(SaeError, match="layer: got 4; allowed is 0 to 3"):
        monitor("none:4")
    with pytest.raises(ConfigError, match='layer: got 2; allowed is none unless sae="none"'):
        STSCallback(sae="auto", layer=2, protect=["law"])
    with pytest.raises(ConfigError, match="layer: got -1"):
        STSCallback(sae="none", layer=-1, protect=["law"])


def test_without_any_sae_three_ways_are_named() -> None:
    with pytest.raises(ConfigError, match=r'sae: got none. There are three ways: "none" .*sae train.*base model'):
        STSCallback(protect=["law"])
    assert registry.base_of("me/gemma-3-270m-ours") == registry.base_of("gemma-3-270m-mine")
    assert "its base model, if that is gpt2-small: `sts-callback saes --model gpt2-small`" in registry.ways_without(
        "me/gpt2-small-a"
    )
    assert registry.base_of("a-model-of-mine") is None
    assert '"auto" takes one of' in registry.ways_without("gpt2")


FEATURE_WORDS = (
    " named ",  # of features, which none were
    "Feature ",
    "directions in the model's activations",
    "The SAE leaves",
    "SAE cannot",
    "outside the SAE",
    "gradient",
    "nan",
)


def feature_words(text: str) -> list[str]:
    """What is said of features, which there are none of."""
    return [words for words in FEATURE_WORDS if words in text]


def trainer(out: Path, **options: Any) -> SFTTrainer:
    callback = STSCallback(
        **{"sae": "none", "layer": 2, "protect": ["near"], "domains": TINY_DOMAINS, "probes": PROBES, "check_on": 1, **options}
    )
    made = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(**tiny_arguments(out, max_steps=2, save_strategy="steps", save_steps=1)),
        train_dataset=Dataset.from_list(rows(40)),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
    )
    callback.attach(made)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was rehearsed, checked twice and put into a ledger."""
    out = tmp_path_factory.mktemp("run")
    trainer(out, rehearse=True, max_overhead=None, ledger=out / "ledger.jsonl").train()
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter, rows and an SAE."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, subject in (("train", "sums"), ("poems", "poems")):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(30, subject)))
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    saved_sae(folder / "sae")
    return folder


def test_a_run_from_forecast_to_report(run: Path) -> None:
    logged = RunDirectory(run / "sts").read_all()
    assert (logged.faults, logged.unreadable) == ((), ())
    assert logged.forecast is not None and logged.rehearsal is not None and logged.rehearsal_verdict is not None
    identity = logged.forecast.identity
    assert (identity.sae, identity.sae_name, identity.hook_name) == ("none", "raw activations", "blocks.2.hook_resid_post")
    assert logged.rehearsal.doses[0].check.domains["near"].relative_drift.value > 0
    last = logged.checks[-1]
    assert not last.snapshot.has_sae
    assert last.snapshot.domains["near"].relative_drift.value > 0
    assert last.verdict.states["near"]
    page = (run / "sts" / "report.html").read_text().partition("<body")[2]
    assert page.count("This needs an SAE, and raw activations have none: sts-callback sae train") == 3
    assert "read without an SAE at blocks.2.hook_resid_post" in page
    assert "how far a domain&#x27;s raw activations have moved" in page
    assert not feature_words(page)


def test_the_screen_says_nothing_of_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, rehearse=True, max_overhead=None, protect={"near": 1e-9}).train()
    shown = capsys.readouterr().out
    assert "STS rehearsal" in shown
    assert "STS step 2" in shown
    assert not feature_words(shown)


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    shelf = Shelf.filled(tmp_path / "shelf")
    options: dict[str, Any] = {"protect": ["near"], "domains": TINY_DOMAINS, "probes": PROBES, "check_on": 1}
    alone = finished(made_trainer("SFT", shelf, tmp_path / "alone", []))
    watched = finished(made_trainer("SFT", shelf, tmp_path / "watched", [STSCallback(sae="none", **options)]))
    assert watched.differences(alone) == []


def test_a_run_is_resumed_as_it_began_alone(tmp_path: Path) -> None:
    trainer(tmp_path, max_overhead=None).train()
    whole = RunDirectory(tmp_path / "sts").read_all().checks[-1].snapshot
    checkpoint = str(tmp_path / "checkpoint-1")
    for other in ({"sae": saved_sae(tmp_path / "sae"), "layer": None}, {"layer": 1}):
        with pytest.raises(CannotTell, match="resume the run with the sae= that it began with"):
            trainer(tmp_path, **other).train(resume_from_checkpoint=checkpoint)
    trainer(tmp_path, max_overhead=None).train(resume_from_checkpoint=checkpoint)
    again = RunDirectory(tmp_path / "sts").read_all().checks[-1].snapshot
    assert (again.step, again.domains["near"].relative_drift) == (whole.step, whole.domains["near"].relative_drift)


def test_an_alarm_sends_nobody_to_blame(run: Path) -> None:
    def told(*, has_sae: bool) -> list[str]:
        verdict = Verdict("no-go", ("near",), {"near": "over"}, 2)
        found = advice_on(verdict, run, 1, Given(learning_rate=1e-3), {}, has_sae=has_sae)
        return [" ".join(one.command[:3]) for one in found if one.command]

    assert told(has_sae=True) == ["sts-callback blame --model", "sts-callback rehearse --model"]
    assert told(has_sae=False) == ["sts-callback sae train", "sts-callback rehearse --model"]


def test_a_notebook_shows_it(run: Path) -> None:
    logged = RunDirectory(run / "sts").read_all()
    assert logged.forecast is not None and logged.rehearsal is not None
    assert "Forecast by raw activations at blocks.2.hook_resid_post" in logged.forecast._repr_html_()
    assert "drift of the domain's raw activations" in html.unescape(logged.checks[-1].snapshot._repr_html_())
    for record in (logged.forecast, logged.rehearsal, logged.checks[-1].snapshot, logged.checks[-1].verdict):
        assert not feature_words(record._repr_html_())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("card RUN", "no SAE: `raw activations` at `blocks.2.hook_resid_post`"),
        ("report RUN", "report.html"),
        ("watch --once RUN", "STS step 2"),
        ("ledger", "raw activations\nat blocks.2.hook_resid_post"),
        (
            "mix --train FILES/train.jsonl --replay poems=FILES/poems.jsonl --protect near --pilot train=RUN --pilot poems=RUN",
            "near",
        ),
    ],
)
def test_commands_on_a_run(
    command: str,
    expected: str,
    run: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STS_LEDGER", str(run / "ledger.jsonl"))
    code = main([word.replace("RUN", str(run)).replace("FILES", str(files)) for word in command.split()])
    shown = capsys.readouterr()
    assert expected in shown.out, shown
    assert code != 1
    assert not feature_words(shown.out)


def command(name: str, files: Path, *more: str, sae: str | None = "none:2") -> int:
    train = [] if name == "dial" else ["--train", str(files / "train.jsonl")]
    given = [word.replace("FILES", str(files)) for word in more]
    numbers = ["--n-queries", "8", "--domain", f"poems={files / 'poems.jsonl'}", "--protect", "poems"]
    return main([name, "--model", str(files / "model"), *train, *([] if sae is None else ["--sae", sae]), *numbers, *given])


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("forecast", ("--words", "--details"), "--words: This needs an SAE"),
        ("forecast", ("--sae", "FILES/sae", "--sae", "none:1", "--n-features", "8"), "transfer by SAE"),
        ("doctor", (), "none: raw activations after layer 2"),
        ("rehearse", ("--steps-planned", "10", "--learning-rate", "1e-3"), "poems"),
        ("dial", ("--adapter", "FILES/adapter"), "raw activations"),
    ],
)
def test_commands_that_measure(
    name: str, more: tuple[str, ...], expected: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(name, files, *more) in (0, 3, 4)
    shown = capsys.readouterr()
    assert expected in shown.out, shown
    assert not feature_words(shown.out.replace(" nan", ""))  # two domains have no order that could agree


@pytest.mark.parametrize(
    ("name", "sae", "more", "expected"),
    [
        ("blame", "none:2", (), "--sae: got none:2. This needs an SAE"),
        ("blame", None, (), "--sae: got none. This needs an SAE"),
        ("blame", "FILES/sae", ("--run-dir", "RUN"), "--run-dir: RUN/sts is of a run without an SAE"),
        ("forecast", None, (), "--sae: got none. There are three ways"),
        ("dial", None, ("--adapter", "FILES/adapter"), "--sae: got none. There are three ways"),
        ("forecast", "none:9", (), "layer: got 9; allowed is 0 to 3"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_measured(
    name: str, sae: str | None, more: tuple[str, ...], expected: str, files: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("RUN", str(run)) for word in more]
    assert command(name, files, *given, sae=sae and sae.replace("FILES", str(files))) == 2
    shown = capsys.readouterr()
    assert expected.replace("RUN", str(run)) in shown.err
    assert shown.out == ""


def test_json_and_lock(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "forecast.lock"
    assert command("forecast", files, "--json", "--lock", str(lock), "--write-lock") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is not JSON
    assert json.dumps(found).count('"raw activations"') == 1
    assert command("forecast", files, "--json", "--lock", str(lock)) == 0
    capsys.readouterr()
    for other in ("none:1", "FILES/sae"):
        assert command("forecast", files, "--n-features", "8", "--lock", str(lock), sae=other.replace("FILES", str(files))) == 2
        assert "give --sae none:LAYER, where it read blocks.2.hook_resid_post" in capsys.readouterr().err
