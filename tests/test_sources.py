"""Sources measured in context: each as if it were alone, and no row both taught and asked."""

from __future__ import annotations

from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.monitor import Monitor
from sts_callback.sources import _apart, context_effects
from tiny import rotated_sae, rows, tiny_model, tiny_tokenizer

CONFIG = ProbeConfig(n_queries=8, n_features=8, n_domain_demonstrations=2, max_tokens=64)


def test_each_source_is_forecast_as_if_it_were_alone() -> None:
    verse = rows(30, "far away poems", seed=40)
    identity, effects = context_effects(
        tiny_model(),
        tiny_tokenizer(),
        sae=rotated_sae(),
        sources={"train": rows(30, "sums"), "verse": verse},
        domains={"poems": rows(20, "poems")},
        policy=PolicyConfig({"poems": 0.1}),
        config=CONFIG,
        progress=False,
    )
    assert list(effects) == ["train", "verse"]
    options = {"sae": rotated_sae(), "train_data": verse, "domains": {"poems": rows(20, "poems")}}
    alone = Monitor(tiny_model(), tiny_tokenizer(), **options, config=CONFIG, progress=False).forecast()  # type: ignore[arg-type]
    poems = alone.domains["poems"]
    assert effects["verse"].nll_change == {"poems": poems.nll_change}
    assert effects["verse"].unseen == {"poems": poems.unseen}
    assert (effects["verse"].n_rows, effects["verse"].doubts) == (30, {})
    assert identity.sae == alone.identity.sae


def test_what_cannot_be_read_is_told_with_its_reason() -> None:
    _, effects = context_effects(
        tiny_model(),
        tiny_tokenizer(),
        sae=rotated_sae(),
        sources={"train": rows(30, "sums")},
        domains={"poems": rows(20, "poems")},
        policy=PolicyConfig({"poems": 0.1}, min_drift=1e-20),
        config=CONFIG,
        progress=False,
    )
    assert "unchanged weights alone drift" in effects["train"].doubts["poems"]


def test_rows_of_a_source_are_not_asked_as_well() -> None:
    law, other = rows(20, "law"), rows(20, "others")
    teaching, asking = _apart({"train": other, "cases": [*law, *other[:5]]}, {"law": law, "others": other[:4]})
    taught = [row["prompt"] for own in teaching.values() for row in own]
    asked = [row["prompt"] for own in asking.values() for row in own]
    assert not set(taught) & set(asked)
    assert len(asking["law"]) == 10 and len(asking["others"]) == 2
    assert len(teaching["train"]) == 18
