"""The SAE script, on a tiny model: what it saves can be loaded, fits the model, and its README holds what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sts_callback.model.sae import load_encoder
from tiny import rows, tiny_model, tiny_tokenizer
from train_sae import main


@pytest.mark.filterwarnings("ignore")  # SAELens' trainer warns of its own defaults
def test_it_trains_saves_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    texts = [row["prompt"] + row["completion"] for row in rows(300)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = {"--model": "model", "--text": "texts.jsonl", "--out": "sae", "--hook-name": "blocks.2.hook_resid_post"}
    numbers = {"--d-sae": 64, "--k": 16, "--collect": 4000, "--train": 20_000, "--batch": 256, "--lr": 3e-3}
    monkeypatch.chdir(tmp_path)
    main([str(part) for pair in {**options, **numbers}.items() for part in pair])

    encoder = load_encoder(tmp_path / "sae", "model", 4)
    metrics = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    assert (encoder.architecture, encoder.d_in, encoder.d_sae) == ("jumprelu", 32, 64)
    assert encoder.hook_name == "blocks.2.hook_resid_post"
    assert metrics["fvu"] < 0.6
    assert 4 < metrics["l0"] < 32
    readme = (tmp_path / "sae" / "README.md").read_text()
    assert f"| {metrics['fvu']:.3f} |" in readme
    assert "--hook-name blocks.2.hook_resid_post" in readme
