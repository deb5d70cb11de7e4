"""Bad input, kind by kind: refused before the first step, with the field, what was given and what to do; never with a traceback.

Four ways in: the command line, the arguments of `STSCallback`, the YAML file, and the Python interface. What a command can refuse
without its model is refused before the model is loaded.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import DatasetDict
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from guest.runs import PROBES, TINY_DOMAINS
from logs import whole_run, written
from samples import domain_drift, domain_forecast, forecast, snapshot
from sts_callback import Monitor, PolicyConfig, ProbeConfig, STSCallback, judge_drift, judge_forecast
from sts_callback.cli import main
from sts_callback.cli.common import CANNOT_TELL, WRONG_INPUT
from sts_callback.data.starter import choose_domains
from sts_callback.errors import CannotTell, StsError
from sts_callback.remedies.attribution import blame
from sts_callback.runs.directory import RunDirectory
from sts_callback.training.arguments import STSArguments
from test_callback import made_trainer
from tiny import rotated_sae, rows, saved_sae, tiny_model, tiny_tokenizer

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Kind:
    """Something wrong that somebody may give."""

    name: str
    given: Any
    field: str
    """As the message calls it."""
    value: str
    """What was given, as the message shows it."""
    remedy: str
    """Words of what is allowed or what to do."""
    needs_model: bool = False
    """Whether only the model can tell that it is wrong."""
    code: int = WRONG_INPUT

    def require_in(self, message: str, folder: Path) -> None:
        field, value, remedy = (part.replace("@", f"{folder}/") for part in (self.field, self.value, self.remedy))
        assert f"{field}:" in message
        assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message), f"{value} is not in: {message}"
        assert remedy in message
        for words in ("Traceback", "bug of ours", "fault of ours"):
            assert words not in message


def named(kinds: list[Kind]) -> Any:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.name)


# --- files ---

TEXTS = {
    "train.jsonl": "\n".join(map(json.dumps, rows(30))),
    "poems.jsonl": "\n".join(map(json.dumps, rows(30, "poems"))),
    "empty.jsonl": "",
    "blank.jsonl": "\n \n\n",
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "compl\n',
    "mixed.jsonl": '{"prompt": "a", "completion": "b"}\n["a", "b"]\n',
    "deep.jsonl": "[" * 100_000,
    "digits.jsonl": '{"prompt": ' + "9" * 5000 + "}",
    "table.csv": "prompt,completion\na,b\n",
    "object.json": '{"data": []}',
    "none.json": "[]",
    "lines.json": '{"text": "a"}\n{"text": "b"}\n',
    "columns.jsonl": "\n".join(json.dumps({"frage": "a", "antwort": "b"}) for _ in range(30)),
    "prompts.jsonl": "\n".join(json.dumps({"prompt": f"a {i}"}) for i in range(30)),
    "numbers.jsonl": "\n".join(json.dumps({"prompt": 7, "completion": 7}) for i in range(30)),
    "turns.jsonl": "\n".join(json.dumps({"messages": ["hello", "there"]}) for _ in range(30)),
    "roles.jsonl": "\n".join(json.dumps({"messages": [{"content": "a"}, {"content": "b"}]}) for _ in range(30)),
    "ids.jsonl": "\n".join(json.dumps({"input_ids": "abc"}) for _ in range(30)),
    "vocabulary.jsonl": "\n".join(json.dumps({"input_ids": [5, 6, 99_999, i]}) for i in range(30)),
    "long.jsonl": "\n".join(json.dumps({"prompt": f"{i} " * 600, "completion": "b"}) for i in range(30)),
    "few.jsonl": "\n".join(map(json.dumps, rows(5))),
    "not_zipped.jsonl.gz": '{"text": "a"}\n',
    "damaged.lock": "{",
    "other.lock": '{"schema_version": 99}',
    "number.lock": "7",
}
BYTES = {
    "binary.jsonl": bytes(range(256)),
    "latin.jsonl": '{"text": "é"}'.encode("latin-1"),
    "utf16.jsonl": '{"text": "a"}'.encode("utf-16"),
    "cut.jsonl.gz": gzip.compress("\n".join(map(json.dumps, rows(300))).encode())[:200],
    "damaged.jsonl.gz": gzip.compress(b"x" * 100)[:10] + b"\xff" * 40,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("bad")
    for name, text in TEXTS.items():
        (here / name).write_text(text)
    for name, content in BYTES.items():
        (here / name).write_bytes(content)
    for name in ("folder", "folder.jsonl", "folder.lock", "run/sts"):
        (here / name).mkdir(parents=True)
    _models(here)
    _saes(here)
    _adapters(here)
    (here / "taken").mkdir()
    (here / "taken" / "sts").touch()
    written(RunDirectory(here / "forecast_only" / "sts"), whole_run(checks=()))
    return here


def _models(here: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for name in ("model", "no_config", "broken_config", "no_weights", "cut_weights", "model_of_nothing"):
        model.save_pretrained(here / name)
        tokenizer.save_pretrained(here / name)
    model.save_pretrained(here / "no_tokenizer")
    (here / "no_config" / "config.json").unlink()
    (here / "broken_config" / "config.json").write_text("{")
    (here / "model_of_nothing" / "config.json").write_text('{"model_type": "nothing"}')
    (here / "no_weights" / "model.safetensors").unlink()
    weights = here / "cut_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    others = {
        "t5": T5Config(num_layers=2, d_model=32, d_ff=32, d_kv=8, num_heads=4, vocab_size=300),
        "classifier": LlamaForSequenceClassification(model.config),
        "bart": BartForConditionalGeneration(
            BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=300)
        ),
    }
    for name, other in others.items():
        other.save_pretrained(here / name)
        tokenizer.save_pretrained(here / name)


def _saes(here: Path) -> None:
    saved_sae(here / "sae")
    saved_sae(here / "narrow_sae", d_in=16)
    saved_sae(here / "hook_sae", hook_name="layer 2")
    saved_sae(here / "deep_sae", hook_name="blocks.9.hook_resid_post")
    for name in ("cut_sae", "no_cfg_sae", "broken_cfg_sae", "no_hook_sae", "odd_hook_sae", "odd_l0_sae", "other_width_sae"):
        shutil.copytree(here / "sae", here / name)
    weights = here / "cut_sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (here / "no_cfg_sae" / "cfg.json").unlink()
    (here / "broken_cfg_sae" / "cfg.json").write_text("{")
    for name, change in (
        ("no_hook_sae", {"hook_name": None}),
        ("odd_hook_sae", {"hook_name": 7}),
        ("odd_l0_sae", {"l0": "many"}),
    ):
        cfg = json.loads((here / name / "cfg.json").read_text())
        cfg["metadata"] |= change
        (here / name / "cfg.json").write_text(json.dumps(cfg))
    cfg = json.loads((here / "other_width_sae" / "cfg.json").read_text())
    (here / "other_width_sae" / "cfg.json").write_text(json.dumps(cfg | {"d_sae": 7}))
    infinite = rotated_sae()
    infinite.W_enc.data[0, 0] = NAN
    infinite.save_model(here / "nan_sae")
    torch.save({"W_enc": torch.zeros(2, 2)}, here / "sae.pt")


def _adapters(here: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    for name, architecture, config in (
        ("adapter", "llama", lora),
        ("broken_adapter", "llama", lora),
        ("odd_adapter", "llama", lora),
        ("no_weights_adapter", "llama", lora),
        ("gpt2_adapter", "gpt2", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
        ("ia3_adapter", "llama", IA3Config(target_modules=["v_proj"], feedforward_modules=[])),
    ):
        get_peft_model(tiny_model(architecture), config).save_pretrained(here / name, save_embedding_layers=False)
    (here / "broken_adapter" / "adapter_config.json").write_text("{")
    (here / "odd_adapter" / "adapter_config.json").write_text("[]")
    (here / "no_weights_adapter" / "adapter_model.safetensors").unlink()


# --- the command line ---

BASES = {
    "forecast": (
        "--model @model",
        "--train @train.jsonl",
        "--sae @sae",
        "--domain poems=@poems.jsonl",
        "--n-queries 6",
        "--n-features 8",
    ),
    "blame": (
        "--model @model",
        "--train @train.jsonl",
        "--sae @sae",
        "--domain poems=@poems.jsonl",
        "--protect poems",
        "--n-features 8",
    ),
    "dial": ("--model @model", "--adapter @adapter", "--sae @sae", "--domain poems=@poems.jsonl", "--protect poems"),
    "mix": ("--train @train.jsonl", "--replay verse=@poems.jsonl", "--protect poems"),
    "report": (),
    "card": (),
    "ledger": (),
    "saes": (),
}


def argv(folder: Path, command: str, *more: str) -> list[str]:
    """A command that would run, with options in place of its own; `!--option` takes one away."""
    changed = {word.lstrip("!").partition("=")[0] for word in more}
    words = [word for option in BASES[command] if option.split()[0] not in changed for word in option.split()]
    return [command, *(word.replace("@", f"{folder}/") for word in (*words, *more) if not word.startswith("!"))]


def told(name: str, given: str, field: str, value: str, remedy: str, **more: Any) -> Kind:
    """A kind of wrong arguments; a word that is empty is written as ''."""
    return Kind(name, tuple("" if word == "''" else word for word in given.split()), field, value, remedy, **more)


NUMBERS = [
    told("queries below none", "forecast --n-queries -3", "n_queries", "-3", "4 or more"),
    told("no queries", "forecast --n-queries 0", "n_queries", "0", "4 or more"),
    told("half a query", "forecast --n-queries 2.5", "--n-queries", "'2.5'", "invalid int value"),
    told("queries in words", "forecast --n-queries many", "--n-queries", "'many'", "invalid int value"),
    told("one draw", "forecast --n-draws 1", "n_draws", "1", "2 or more"),
    told("no features", "forecast --n-features 0", "n_features", "0", "1 or more"),
    told(
        "more features than the SAE can choose from",
        "forecast --n-features 60",
        "n_features",
        "60 of 64",
        "up to 32",
        needs_model=True,
    ),
    told("no tokens", "forecast --max-tokens 0", "max_tokens", "0", "8 or more"),
    told(
        "more tokens than positions",
        "forecast --max-tokens 9999 --train @long.jsonl",
        "train",
        "positions",
        "lower max_tokens",
        needs_model=True,
    ),
    told("a seed below zero", "forecast --seed -1", "seed", "-1", "0 or more"),
    told("a budget of nothing", "forecast --protect poems=0", "--protect poems", "'0'", "above 0"),
    told("a budget below nothing", "forecast --protect poems=-0.1", "--protect poems", "'-0.1'", "above 0"),
    told("a budget that is no number", "forecast --protect poems=nan", "--protect poems", "nan", "above 0"),
    told("a budget that can never be spent", "forecast --protect poems=inf", "--protect poems", "inf", "above 0"),
    told("a budget in words", "forecast --protect poems=much", "--protect poems", "'much'", "a number of nats a token"),
    told("a budget in a unit that is none", "forecast --protect poems=2%", "--protect poems", "'2%'", "'2 points'"),
    told("more points than there are", "forecast --protect poems=101points", "--protect poems", "'101points'", "up to 100"),
    told("no rows to read", "blame --rows 0", "rows", "0", "1 or more"),
    told("no rows to show", "blame --top -1", "top", "-1", "1 or more"),
    told("an adapter switched off", "dial --scales 0", "scales", "[0.0]", "above 0, up to 1"),
    told("an adapter beyond its scale", "dial --scales 0.5 2", "scales", "[0.5, 2.0]", "above 0, up to 1"),
    told("a scale that is no number", "dial --scales nan", "scales", "[nan]", "above 0, up to 1"),
    told("a scale in words", "dial --scales half", "--scales", "'half'", "invalid float value"),
    told("a mixture of no rows", "mix --rows 0", "rows", "0", "1 or more"),
    told("a mixture of more rows than there are", "mix --rows 5000", "rows", "5000", "up to 120"),
    told("a share that is no number", "mix --max-replay nan", "max_replay", "nan", "above 0, up to 1"),
    told("a share beyond the whole", "mix --max-replay 2", "max_replay", "2.0", "above 0, up to 1"),
    told("a source's share beyond the whole", "mix --max-share verse=2", "max_share verse", "2.0", "above 0, up to 1"),
    told("a source's share in words", "mix --max-share verse=half", "--max-share verse", "'half'", "a share"),
    told("a source's share without its name", "mix --max-share 0.5", "--max-share", "'0.5'", "NAME=X"),
    told("repeats below once", "mix --max-repeats 0.5", "max_repeats", "0.5", "1 or more"),
    told("repeats without end", "mix --max-repeats inf", "max_repeats", "inf", "1 or more"),
    told("repeats that are no number", "mix --max-repeats nan", "max_repeats", "nan", "1 or more"),
    told("a seed that datasets refuses", "mix --seed -1", "seed", "-1", "0 or more"),
]
NAMES = [
    told("a name nearly right", "forecast --protect poem", "protect", "'poem'", "did you mean 'poems'?"),
    told("a name of nothing", "forecast --protect xyzzy", "protect", "'xyzzy'", "Known are "),
    told("no name", "forecast --protect =0.1", "--protect", "'=0.1'", "NAME or NAME=BUDGET"),
    told("no budget", "forecast --protect poems=", "--protect", "'poems='", "NAME or NAME=BUDGET"),
    told("a name with two budgets", "forecast --protect poems=0.1 --protect poems=0.5", "--protect", "'poems'", "once"),
    told("two domains of one name", "forecast --domain a=@train.jsonl --domain a=@poems.jsonl", "--domain", "'a'", "once"),
    told("a domain called train", "forecast --domain train=@poems.jsonl", "domains", "'train'", "another name"),
    told("a domain without a file", "forecast --domain poems", "--domain", "'poems'", "NAME=FILE"),
    told("a domain without a name", "forecast --domain =@poems.jsonl", "--domain", "=@poems.jsonl", "NAME=FILE"),
    told(
        "an SAE nearly right",
        "forecast --sae gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_smal",
        "sae",
        "layer_12_width_16k_l0_smal",
        "layer_12_width_16k_l0_small",
    ),
    told("an SAE that is refused", "forecast --sae gpt2-small-hook-z-kk/blocks.2.hook_z", "sae", "hook_z", "take another"),
    told("an SAE of nothing", "forecast --sae nothing", "sae", "'nothing'", "sts-callback saes --model"),
    told("an unset variable as SAE", "forecast --sae ''", "--sae", "''", "empty"),
    told("an unset variable as model", "forecast --model ''", "--model", "''", "empty"),
    told("an unset variable as data", "forecast --train ''", "--train", "''", "empty"),
    told("an unset variable as run", "report ''", "report", "''", "empty"),
    told("an unset variable after an equals sign", "forecast --sae=", "--sae", "''", "empty"),
    told("an option nearly right", "forecast --protct poems", "unrecognized arguments", "--protct poems", "usage: "),
    told("a command nearly right", "forcast --model x", "COMMAND", "'forcast'", "forecast"),
    told("a share of no source", "mix --max-share prose=0.5", "max_share", "'prose'", "['verse']"),
    told("replay called train", "mix --replay train=@poems.jsonl", "replay", "'train'", "none by the name of"),
    told("replay without a name", "mix --replay @poems.jsonl", "--replay", "poems.jsonl", "NAME=FILE"),
    told("replay given twice", "mix --replay a=@poems.jsonl --replay a=@train.jsonl", "--replay", "'a'", "once"),
    told("nothing to mix in", "mix !--replay", "replay", "[]", "at least one source"),
    told("no pilots", "mix", "pilot", "[]", "one for each source, ['train', 'verse']"),
    told("a pilot of another source", "mix --pilot prose=@run", "pilot", "['prose']", "one for each source"),
    told("nothing protected to blame rows for", "blame !--protect", "protect", "got none", "name at least one domain"),
    told("nothing protected to dial for", "dial !--protect", "protect", "got none", "name at least one domain"),
    told("points to mix for", "mix --protect poems=2points", "protect['poems']", "'2 points'", "nats a token"),
    told("bits to mix for", "mix --protect poems=1bpb", "protect['poems']", "'1 bits/byte'", "nats a token"),
    told("nothing protected to mix for", "mix !--protect", "protect", "got none", "name at least one domain"),
    told("nothing to measure", "forecast !--domain", "protect", "nothing to measure", "name a domain to protect"),
    told("a number for an option", "forecast --sae", "--sae", "expected one argument", "usage: "),
    told("a model without SAEs", "saes --model nobody/nothing-7b", "--model", "'nobody/nothing-7b'", "check the name"),
    told("a device of nothing", "forecast --device gpu", "--device", "'gpu'", "cpu"),
    told("a device that is not there", "forecast --device cuda:77", "--device", "'cuda:77'", "cpu"),
    told("a device that holds no numbers", "forecast --device meta", "--device", "'meta'", "cpu"),
]
FORM = "JSON lines (.jsonl, .jsonl.gz) or a JSON list (.json)"
FILES = [
    told("no file", "forecast --train @nowhere.jsonl", "train_data", "@nowhere.jsonl", FORM),
    told("a folder for a file", "forecast --train @folder.jsonl", "train_data", "@folder.jsonl", FORM),
    told("a text for a file", "forecast --train " + 400 * "words", "train_data", 400 * "words", FORM),
    told("an empty file", "forecast --train @empty.jsonl", "train_data", "@empty.jsonl", "a few dozen"),
    told("blank lines", "forecast --train @blank.jsonl", "train_data", "@blank.jsonl", "a few dozen"),
    told("a file without text", "forecast --train @binary.jsonl", "train_data", "@binary.jsonl", FORM),
    told("a file in Latin-1", "forecast --train @latin.jsonl", "train_data", "@latin.jsonl", "UTF-8"),
    told("a file in UTF-16", "forecast --train @utf16.jsonl", "train_data", "@utf16.jsonl", "UTF-8"),
    told("a broken line", "forecast --train @broken.jsonl", "train_data", "@broken.jsonl, line 3", FORM),
    told("a line that is a list", "forecast --train @mixed.jsonl", "train_data", "it holds ['a', 'b']", "one JSON object a row"),
    told("lists without end", "forecast --train @deep.jsonl", "train_data", "@deep.jsonl, line 1", FORM),
    told("a number without end", "forecast --train @digits.jsonl", "train_data", "@digits.jsonl, line 1", FORM),
    told("a table", "forecast --train @table.csv", "train_data", "@table.csv, line 1", FORM),
    told("an object for a list", "forecast --train @object.json", "train_data", "@object.json", "one JSON object a row"),
    told("an empty list", "forecast --train @none.json", "train_data", "@none.json", "a few dozen"),
    told("lines called a list", "forecast --train @lines.json", "train_data", "@lines.json", "JSON lines go by .jsonl"),
    told("a file cut while it was zipped", "forecast --train @cut.jsonl.gz", "train_data", "@cut.jsonl.gz", ".gz"),
    told("a damaged zipped file", "forecast --train @damaged.jsonl.gz", "train_data", "@damaged.jsonl.gz", ".gz"),
    told("a file that is not zipped", "forecast --train @not_zipped.jsonl.gz", "train_data", "@not_zipped.jsonl.gz", ".gz"),
    told("a domain's missing file", "forecast --domain poems=@nowhere.jsonl", "domains['poems']", "@nowhere.jsonl", FORM),
    told("a domain's broken line", "forecast --domain poems=@broken.jsonl", "domains['poems']", "line 3", FORM),
    told("a domain's file to be dialled", "dial --domain poems=@nowhere.jsonl", "domains['poems']", "@nowhere.jsonl", FORM),
    told("a missing file to be mixed in", "mix --replay verse=@nowhere.jsonl", "--replay verse", "@nowhere.jsonl", FORM),
    told(
        "other columns",
        "forecast --train @columns.jsonl",
        "train_data",
        "['antwort', 'frage']",
        "allowed are text; messages",
        needs_model=True,
    ),
    told(
        "prompts alone",
        "forecast --train @prompts.jsonl",
        "train_data",
        "['prompt']",
        "add a completion column",
        needs_model=True,
    ),
    told("numbers for texts", "forecast --train @numbers.jsonl", "train_data", "[7, 7]", "allowed are texts", needs_model=True),
    told(
        "texts for turns",
        "forecast --train @turns.jsonl",
        "train_data",
        "'hello'",
        "messages with role and content",
        needs_model=True,
    ),
    told(
        "turns of nobody",
        "forecast --train @roles.jsonl",
        "train_data",
        "{'content': 'a'}",
        "messages with role and content",
        needs_model=True,
    ),
    told(
        "a text for token ids",
        "forecast --train @ids.jsonl",
        "train_data",
        "'abc'",
        "token ids, whole numbers",
        needs_model=True,
    ),
    told("tokens of another vocabulary", "forecast --train @vocabulary.jsonl", "train", "99999", "300", needs_model=True),
    told("five rows", "forecast --train @few.jsonl", "train_data", "5 usable rows", "add rows", needs_model=True),
]
MODELS = [
    told("no model", "forecast --model @nowhere", "--model", "@nowhere", "causal language model", needs_model=True),
    told(
        "a file for a model",
        "forecast --model @train.jsonl",
        "--model",
        "@train.jsonl",
        "causal language model",
        needs_model=True,
    ),
    told(
        "a model without configuration",
        "forecast --model @no_config",
        "--model",
        "@no_config",
        "causal language model",
        needs_model=True,
    ),
    told(
        "a model with a broken configuration",
        "forecast --model @broken_config",
        "--model",
        "@broken_config",
        "causal language model",
        needs_model=True,
    ),
    told(
        "a model of no known type",
        "forecast --model @model_of_nothing",
        "--model",
        "@model_of_nothing",
        "causal language model",
        needs_model=True,
    ),
    told(
        "a model without weights",
        "forecast --model @no_weights",
        "--model",
        "@no_weights",
        "causal language model",
        needs_model=True,
    ),
    told(
        "a model with cut weights",
        "forecast --model @cut_weights",
        "--model",
        "@cut_weights",
        "causal language model",
        needs_model=True,
    ),
    told(
        "a model without tokenizer",
        "forecast --model @no_tokenizer",
        "--model",
        "@no_tokenizer",
        "causal language model",
        needs_model=True,
    ),
    told("an encoder and decoder", "forecast --model @t5", "--model", "@t5", "causal language model", needs_model=True),
    told(
        "the decoder of one with an encoder",
        "forecast --model @bart",
        "--model",
        "@bart",
        "causal language model",
        needs_model=True,
    ),
    told("a classifier", "forecast --model @classifier", "--model", "lm_head.weight", "causal language model", needs_model=True),
]
SAES = [
    told("a folder without an SAE", "forecast --sae @folder", "sae", "@folder", "cfg.json", needs_model=True),
    told("an SAE without configuration", "forecast --sae @no_cfg_sae", "sae", "@no_cfg_sae", "cfg.json", needs_model=True),
    told(
        "an SAE with a broken configuration",
        "forecast --sae @broken_cfg_sae",
        "sae",
        "@broken_cfg_sae",
        "cfg.json",
        needs_model=True,
    ),
    told("an SAE whose weights are cut", "forecast --sae @cut_sae", "sae", "@cut_sae", "cut off or damaged", needs_model=True),
    told(
        "an SAE of another width than it says",
        "forecast --sae @other_width_sae",
        "sae",
        "@other_width_sae",
        "cfg.json",
        needs_model=True,
    ),
    told(
        "an SAE for a narrower model", "forecast --sae @narrow_sae", "sae", "width 16", "trained on this model", needs_model=True
    ),
    told(
        "an SAE that does not say where",
        "forecast --sae @no_hook_sae",
        "sae",
        "no_hook_sae",
        "metadata.hook_name",
        needs_model=True,
    ),
    told(
        "an SAE with a number for its place", "forecast --sae @odd_hook_sae", "sae", "7", "metadata.hook_name", needs_model=True
    ),
    told("an SAE that counts in words", "forecast --sae @odd_l0_sae", "sae", "many", "cfg.json", needs_model=True),
    told("an SAE at a place of no name", "forecast --sae @hook_sae", "hook_name", "'layer 2'", "blocks.N.", needs_model=True),
    told(
        "an SAE of a deeper model", "forecast --sae @deep_sae", "hook_name", "layer 9", "trained on this model", needs_model=True
    ),
    told(
        "an SAE with weights that are no numbers", "forecast --sae @nan_sae", "sae", "nan_sae", "not all finite", needs_model=True
    ),
    told("a file for an SAE's folder", "forecast --sae @sae.pt", "sae", "@sae.pt", "folder"),
    told("no SAE for this model", "forecast --sae auto", "sae", '"auto"', "There are three ways", needs_model=True),
]
PLACES = [
    told("JUnit into a folder", "forecast --protect poems --junit @folder", "--junit", "@folder", "give a file"),
    told(
        "JUnit below a file",
        "forecast --protect poems --junit @train.jsonl/a/out.xml",
        "--junit",
        "@train.jsonl/a",
        "give another file",
    ),
    told("JUnit about nothing", "forecast --junit @out.xml", "--junit", "no protected domain", "--protect"),
    told("no lock", "forecast --lock @nowhere.lock", "--lock", "@nowhere.lock", "--write-lock"),
    told("a lock that is a folder", "forecast --lock @folder.lock", "--lock", "@folder.lock", "--write-lock"),
    told("a damaged lock", "forecast --lock @damaged.lock", "--lock", "@damaged.lock", "--write-lock"),
    told("a lock of another version", "forecast --lock @other.lock", "--lock", "99", "--write-lock"),
    told("a lock that is a number", "forecast --lock @number.lock", "--lock", "@number.lock", "--write-lock"),
    told("a lock to be written nowhere", "forecast --write-lock", "--write-lock", "no file", "--lock"),
    told("rows kept in another format", "blame --out @kept.csv", "out", "@kept.csv", ".jsonl"),
    told("rows kept over their source", "blame --out @train.jsonl", "out", "@train.jsonl", "other than the training data's"),
    told("a mixture into a folder", "mix --out @folder", "--out", "@folder", "give a file"),
    told("blame for a run without forecast", "blame --run-dir @run", "--run-dir", "@run/sts", "output_dir"),
    told("no adapter", "dial --adapter @nowhere", "adapter", "@nowhere", "PEFT saved"),
    told("an adapter without configuration", "dial --adapter @folder", "adapter", "@folder", "PEFT saved"),
    told("an adapter with a broken configuration", "dial --adapter @broken_adapter", "adapter", "@broken_adapter", "PEFT saved"),
    told("an adapter whose configuration is a list", "dial --adapter @odd_adapter", "adapter", "@odd_adapter", "PEFT saved"),
    told("an adapter of another kind", "dial --adapter @ia3_adapter", "adapter", "IA3", "only LoRA"),
    told(
        "an adapter without weights",
        "dial --adapter @no_weights_adapter",
        "adapter",
        "@no_weights_adapter",
        "it was trained on",
        needs_model=True,
    ),
    told(
        "an adapter of another model",
        "dial --adapter @gpt2_adapter",
        "adapter",
        "@gpt2_adapter",
        "it was trained on",
        needs_model=True,
    ),
    told("pilots that are no runs", "mix --pilot train=@nowhere --pilot verse=@nowhere", "pilot train", "@nowhere", "output_dir"),
    told(
        "pilots without a check",
        "mix --pilot train=@forecast_only --pilot verse=@forecast_only",
        "pilot train",
        "@forecast_only",
        "output_dir",
    ),
    told("a report of nowhere", "report @nowhere", "report", "@nowhere", "output_dir"),
    told("a report of an empty folder", "report @folder", "report", "@folder", "output_dir"),
    told("a report of a file", "report @train.jsonl", "report", "@train.jsonl", "output_dir"),
    told("a card of an empty folder", "card @folder", "card", "@folder", "output_dir"),
    told("a card of a file", "card @train.jsonl", "card", "@train.jsonl", "output_dir"),
    told("a card that is not there", "card @forecast_only --into @nowhere.md", "card", "@nowhere.md", "model card that exists"),
    told("a card that is a folder", "card @forecast_only --into @folder", "card", "@folder", "model card that exists"),
    told("a card without text", "card @forecast_only --into @binary.jsonl", "card", "@binary.jsonl", "UTF-8"),
]
COMMANDS = [*NUMBERS, *NAMES, *FILES, *MODELS, *SAES, *PLACES]


@named(COMMANDS)
def test_the_command_line_refuses(
    kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not kind.needs_model:
        for place in ("common.loaded", "dial.loaded"):
            monkeypatch.setattr(f"sts_callback.cli.{place}", lambda *args: pytest.fail("the model was loaded"))
    command, *more = kind.given
    given = argv(folder, command, *more) if command in BASES else [command, *more]
    assert main(given) == kind.code
    captured = capsys.readouterr()
    kind.require_in(captured.err, folder)
    assert captured.out == ""


def test_a_ledger_that_cannot_be_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STS_LEDGER", str(folder / "folder"))
    assert main(["ledger"]) == WRONG_INPUT
    Kind("", (), "ledger", "@folder", "set STS_LEDGER").require_in(capsys.readouterr().err, folder)


def test_a_file_that_may_not_be_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Path.open

    def guarded(file: Path, *args: Any, **options: Any) -> Any:
        if file.name == "train.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(file, *args, **options)

    monkeypatch.setattr(Path, "open", guarded)  # not by its mode: root may read everything
    assert main(argv(folder, "forecast")) == WRONG_INPUT
    Kind("", (), "train_data", "@train.jsonl", FORM).require_in(capsys.readouterr().err, folder)


# --- the arguments of STSCallback ---

SAE, SHIPPED = "release/sae_id", {"sae": "release/sae_id", "protect": ["law"]}


def asked(name: str, field: str, value: str, remedy: str, **given: Any) -> Kind:
    """A kind of wrong arguments of `STSCallback`, in place of right ones."""
    return Kind(name, given, field, value, remedy)


ARGUMENTS = [
    asked("no SAE", "sae", "none", "There are three ways", sae=None),
    asked("an empty list of SAEs", "sae", "none", "There are three ways", sae=[]),
    asked("a list with no SAE in it", "sae", "none", "There are three ways", sae=[SAE, None]),
    asked("a number for an SAE", "sae", "7", "a folder", sae=7),
    asked("an SAE without a name", "sae", "''", "a folder", sae=""),
    asked("weights for an SAE", "sae", "{'W_enc': 1}", "a folder", sae={"W_enc": 1}),
    asked("a tensor for an SAE", "sae", "tensor(", "a folder", sae=torch.zeros(1)),
    asked("a text to protect", "protect", "'law'", "['law']", protect="law"),
    asked("a number to protect", "protect", "5", "a list of names", protect=5),
    asked("numbers to protect", "protect", "[5]", "a list of names", protect=[5]),
    asked("nothing for a name to protect", "protect", "['']", "a list of names", protect=[""]),
    asked("a name protected twice", "protect", "'law'", "once", protect=["law", "law"]),
    asked("an unknown domain", "protect", "'lwa'", "did you mean 'law'?", protect=["lwa"]),
    asked("a budget of nothing", "protect['law']", "0", "above 0", protect={"law": 0}),
    asked("a budget below nothing", "protect['law']", "-0.1", "above 0", protect={"law": -0.1}),
    asked("a budget that is no number", "protect['law']", "nan", "above 0", protect={"law": NAN}),
    asked("a budget without end", "protect['law']", "inf", "above 0", protect={"law": INF}),
    asked("a budget in words", "protect['law']", "'much'", "above 0", protect={"law": "much"}),
    asked("a budget in an unknown unit", "protect['law']", "'2 bits'", "'0.05 bits/byte'", protect={"law": "2 bits"}),
    asked("more points than there are", "protect['law']", "'101 points'", "up to 100", protect={"law": "101 points"}),
    asked("a budget that is no number but a yes", "protect['law']", "True", "above 0", protect={"law": True}),
    asked("a budget that is not there", "protect['law']", "None", "above 0", protect={"law": None}),
    asked("a list of budgets", "protect['law']", "[0.1]", "above 0", protect={"law": [0.1]}),
    asked("an infinite NumPy budget", "protect['law']", "inf", "above 0", protect={"law": np.float32("inf")}),
    asked("a list of domains", "domains", "['law.jsonl']", "a mapping", domains=["law.jsonl"]),
    asked("a file for domains", "domains", "'law.jsonl'", "a mapping", domains="law.jsonl"),
    asked("a domain with a number for a name", "domains", "[5]", "a mapping", domains={5: [{"text": "a"}]}),
    asked("a domain without a name", "domains", "['']", "a mapping", domains={"": [{"text": "a"}]}),
    asked("a domain called train", "domains", "'train'", "another name", domains={"train": [{"text": "a"}]}),
    asked("nothing to measure", "protect", "nothing to measure", "name a domain", protect=(), domains={}, train_data="x"),
    asked("checks never", "check_on", "'never'", "'save', 'evaluate'", check_on="never"),
    asked("checks every no steps", "check_on", "0", "a number of steps from 1", check_on=0),
    asked("checks every -1 steps", "check_on", "-1", "a number of steps from 1", check_on=-1),
    asked("checks every 2.5 steps", "check_on", "2.5", "a number of steps from 1", check_on=2.5),
    asked("checks: yes", "check_on", "True", "a number of steps from 1", check_on=True),
    asked("checks: nothing", "check_on", "None", "a number of steps from 1", check_on=None),
    asked("several events", "check_on", "['save', 'evaluate']", "a number of steps from 1", check_on=["save", "evaluate"]),
    asked("an action of no name", "action", "'halt'", "a function of the verdict", action="halt"),
    asked("no action", "action", "None", "a function of the verdict", action=None),
    asked("a refusal of no name", "on_forecast", "'stop'", "'warn', 'refuse'", on_forecast="stop"),
    asked("an error in the forecast", "on_forecast_error", "'warn'", "'train unwatched'", on_forecast_error="warn"),
    asked("an error in a check", "on_error", "True", "'warn', 'raise'", on_error=True),
    asked("no overhead at all", "max_overhead", "0", "above 0", max_overhead=0),
    asked("less than no overhead", "max_overhead", "-0.5", "above 0", max_overhead=-0.5),
    asked("an overhead in percent", "max_overhead", "5", "up to 1", max_overhead=5),
    asked("an overhead that is no number", "max_overhead", "nan", "up to 1", max_overhead=NAN),
    asked("an overhead in words", "max_overhead", "'1%'", "None for no limit", max_overhead="1%"),
    asked("a number for the training data", "train_data", "int", "a list of rows", train_data=7),
    asked("one row for the training data", "train_data", "dict", "a list of rows", train_data={"text": "a"}),
    asked("a number for a ledger", "ledger", "7", "a file", ledger=7),
    asked("a mapping for the probes", "probes", "{'n_queries': 8}", "ProbeConfig", probes={"n_queries": 8}),
    asked("an empty mapping for the probes", "probes", "{}", "ProbeConfig", probes={}),
    asked("a number for the policy", "policy", "0.1", "PolicyConfig", policy=0.1),
    asked("the probes for the policy", "policy", "ProbeConfig", "PolicyConfig", policy=ProbeConfig()),
    asked("budgets in two places", "policy.budgets", "{'law': 0.3}", "protect", policy=PolicyConfig({"law": 0.3})),
]


@named(ARGUMENTS)
def test_the_callback_refuses_its_arguments(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(StsError) as raised:
        STSCallback(**{**SHIPPED, **kind.given})
    kind.require_in(str(raised.value), tmp_path)


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path) -> None:
    callback = STSCallback(
        rotated_sae(),
        {"near": np.float32(0.5), "far": torch.tensor(0.25)},
        domains=TINY_DOMAINS,
        check_on=np.int64(5),
        max_overhead=np.float64(0.5),
        probes=replace(PROBES, n_queries=np.int64(8), seed=torch.tensor(3), max_norm_multiple=4),
        policy=PolicyConfig(patience=np.int32(2), alpha=torch.tensor(0.25)),
    )
    made_trainer("plain", tmp_path, [callback], max_steps=1).train()
    made = RunDirectory(tmp_path / "sts").read_all().settings
    assert made is not None
    assert made.policy == PolicyConfig({"near": 0.5, "far": 0.25}, patience=2, alpha=0.25)
    assert made.probes == replace(PROBES, seed=3, max_norm_multiple=4.0)
    assert (made.check_on, made.max_overhead) == ("5", 0.5)


# --- the YAML file ---

RIGHT = "sts_sae: x\nsts_protect: [law]\n"


def written_as(name: str, text: str, field: str, value: str, remedy: str) -> Kind:
    return Kind(name, text, field, value, remedy)


YAML = [
    written_as("a key nearly right", RIGHT + "sts_protct: [law]", "@sts.yaml", "sts_protct", "did you mean sts_protect?"),
    written_as("a key of nothing", RIGHT + "sts_xyzzyqqq: 1", "@sts.yaml", "sts_xyzzyqqq", "allowed are sts_sae, "),
    written_as("a key twice", RIGHT + "sts_seed: 1\nsts_seed: 2", "@sts.yaml", "'sts_seed'", "give each name once"),
    written_as(
        "a budget twice", "sts_sae: x\nsts_protect: {law: 1, law: 2}", "@sts.yaml", "'sts_protect.law'", "give each name once"
    ),
    written_as("a list", "- law", "STS_CALLBACK_CONFIG", "@sts.yaml", "give lines such as"),
    written_as("a text", "law", "STS_CALLBACK_CONFIG", "@sts.yaml", "give lines such as"),
    written_as("an empty file", "", "STS_CALLBACK_CONFIG", "@sts.yaml", "give lines such as"),
    written_as("a file without our keys", "learning_rate: 1", "sae", "none", "There are three ways"),
    written_as("a broken file", "a: [", "STS_CALLBACK_CONFIG", "@sts.yaml", "give a YAML file"),
    written_as("tabs", "a:\n\t- b", "STS_CALLBACK_CONFIG", "@sts.yaml", "give a YAML file"),
    written_as("an object of Python", "sts_sae: !!python/object:os.system {}", "STS_CALLBACK_CONFIG", "@sts.yaml", "YAML file"),
    written_as("no SAE", "sts_protect: [law]", "sae", "none", "There are three ways"),
    written_as("a number for an SAE", "sts_sae: 7\nsts_protect: [law]", "sae", "7", "a folder"),
    written_as("a mapping for an SAE", "sts_sae: {a: 1}\nsts_protect: [law]", "sae", "{'a': 1}", "a folder"),
    written_as("a number to protect", "sts_sae: x\nsts_protect: 7", "sts_protect", "7", "NAME or NAME=BUDGET"),
    written_as("lists to protect", "sts_sae: x\nsts_protect: [[law]]", "sts_protect", "['law']", "NAME or NAME=BUDGET"),
    written_as("a name twice", "sts_sae: x\nsts_protect: [law, law=2]", "sts_protect", "'law'", "once"),
    written_as("a budget in words", "sts_sae: x\nsts_protect: [law=much]", "sts_protect law", "'much'", "a number"),
    written_as("a budget in per cent", "sts_sae: x\nsts_protect: [law=2 %]", "sts_protect law", "'2 %'", "'2 points'"),
    written_as("a budget of yes", "sts_sae: x\nsts_protect: {law: yes}", "sts_protect law", "True", "above 0"),
    written_as("a domain without a file", RIGHT + "sts_domains: [mine]", "sts_domains", "'mine'", "NAME=FILE"),
    written_as("a number for a domain", RIGHT + "sts_domains: {mine: 7}", "domains['mine']", "int", "a file"),
    written_as("a number for the training data", RIGHT + "sts_train_data: 7", "train_data", "int", "a file"),
    written_as("queries in words", RIGHT + "sts_n_queries: many", "n_queries", "'many'", "a whole number"),
    written_as("queries as a text", RIGHT + "sts_n_queries: '32'", "n_queries", "'32'", "a whole number"),
    written_as("no queries", RIGHT + "sts_n_queries:", "n_queries", "None", "a whole number"),
    written_as("half a query", RIGHT + "sts_n_queries: 8.5", "n_queries", "8.5", "a whole number"),
    written_as("a list of queries", RIGHT + "sts_n_queries: [8]", "n_queries", "[8]", "a whole number"),
    written_as("a seed of yes", RIGHT + "sts_seed: yes", "seed", "True", "a whole number"),
    written_as("an alpha that is no number", RIGHT + "sts_alpha: .nan", "sts_alpha", "nan", "between 0 and 1"),
    written_as("an alpha in words", RIGHT + "sts_alpha: low", "sts_alpha", "'low'", "a number"),
    written_as("no patience", RIGHT + "sts_patience: 0", "patience", "0", "1 or more"),
    written_as("an overhead in percent", RIGHT + "sts_max_overhead: 1%", "sts_max_overhead", "'1%'", "a share above 0"),
    written_as("checks: yes", RIGHT + "sts_check_on: yes", "check_on", "True", "a number of steps"),
    written_as("checks every 2.5 steps", RIGHT + "sts_check_on: 2.5", "check_on", "2.5", "a number of steps"),
    written_as("checks every odd digit", RIGHT + "sts_check_on: ²", "check_on", "'²'", "a number of steps"),
    written_as("several actions", RIGHT + "sts_action: [warn, stop]", "action", "['warn', 'stop']", "'checkpoint'"),
]


@named(YAML)
def test_a_yaml_file_is_refused(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sts.yaml").write_text(kind.given, encoding="utf-8")
    monkeypatch.setenv("STS_CALLBACK_CONFIG", str(tmp_path / "sts.yaml"))
    with pytest.raises(StsError) as raised:
        STSCallback()
    kind.require_in(str(raised.value), tmp_path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", "folder"], ids=["missing", "binary", "folder"])
def test_a_yaml_file_that_cannot_be_read_is_refused(content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sts.yaml"
    if content == "folder":
        file.mkdir()
    elif content:
        file.write_bytes(content)
    monkeypatch.setenv("STS_CALLBACK_CONFIG", str(file))
    with pytest.raises(StsError) as raised:
        STSCallback()
    Kind("", (), "STS_CALLBACK_CONFIG", "@sts.yaml", "give a YAML file").require_in(str(raised.value), tmp_path)


def test_numbers_that_yaml_takes_for_texts_are_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sts.yaml").write_text(RIGHT + "sts_max_overhead: 1e-3\nsts_alpha: 5e-2\n")
    monkeypatch.setenv("STS_CALLBACK_CONFIG", str(tmp_path / "sts.yaml"))
    STSCallback()
    made = STSArguments.of_environment().options()
    assert (made["max_overhead"], made["policy"].alpha) == (0.001, 0.05)


# --- the Python interface ---


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """What a monitor takes."""
    return {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer(),
        "sae": rotated_sae(),
        "train_data": rows(30),
        "domains": {"poems": rows(30, "poems")},
        "config": PROBES,
        "progress": False,
    }


@pytest.fixture(scope="module")
def monitor(parts: Mapping[str, Any]) -> Monitor:
    return Monitor(**parts)


class _NoTokens:
    """What somebody may take for a tokenizer."""


MONITORS = [
    asked("no model", "model", "NoneType", "transformers", model=None),
    asked("a name for a model", "model", "str", "transformers", model="google/gemma-3-270m"),
    asked("a module of no transformer", "model", "Linear", "transformers", model=torch.nn.Linear(2, 2)),
    asked("an encoder and decoder", "model", "T5ForConditionalGeneration", "decoder-only", model="t5"),
    asked("no tokenizer", "tokenizer", "None", "AutoTokenizer", tokenizer=None),
    asked("a name for a tokenizer", "tokenizer", "'google/gemma-3-270m'", "AutoTokenizer", tokenizer="google/gemma-3-270m"),
    asked("something else for a tokenizer", "tokenizer", "_NoTokens", "AutoTokenizer", tokenizer=_NoTokens()),
    asked("a number for an SAE", "sae", "7", "a folder", sae=7),
    asked("no SAE", "sae", "none", "There are three ways", sae=None),
    asked("no SAEs", "sae", "none", "There are three ways", sae=[]),
    asked("no training data", "train_data", "NoneType", "a list of rows", train_data=None),
    asked("no training rows", "train_data", "list", "a few dozen", train_data=[]),
    asked("numbers for rows", "train_data", "the first is 7", "a list of rows", train_data=[7] * 30),
    asked("texts for rows", "train_data", "the first is 'text'", "a list of rows", train_data=["text"] * 30),
    asked("no domains", "domains", "{}", "at least one", domains={}),
    asked("a list of domains", "domains", "['poems']", "a mapping", domains=["poems"]),
    asked("a domain called train", "domains", "'train'", "another name", domains={"train": rows(30)}),
    asked("a number for a domain", "domains['law']", "int", "a list of rows", domains={"law": 7}),
    asked("a domain with no rows", "domains['law']", "list", "a few dozen", domains={"law": []}),
    asked("a domain with one row", "domains['law']", "1 usable rows", "add rows", domains={"law": rows(1)}),
    asked("a domain of other columns", "domains['law']", "['a']", "allowed are text", domains={"law": [{"a": 1}] * 30}),
    asked("a mapping for the settings", "config", "{'n_queries': 8}", "ProbeConfig", config={"n_queries": 8}),
    asked("a table of pandas", "train_data", "DataFrame", "a datasets.Dataset", train_data=pd.DataFrame(rows(30))),
    asked("splits of a data set", "train_data", "DatasetDict", "a datasets.Dataset", train_data=DatasetDict()),
]


@named(MONITORS)
def test_a_monitor_refuses(kind: Kind, parts: Mapping[str, Any], folder: Path) -> None:
    given = dict(kind.given)
    if given.get("model") == "t5":
        given["model"] = T5ForConditionalGeneration(T5Config.from_pretrained(folder / "t5"))
    with pytest.raises(StsError) as raised:
        Monitor(**{**parts, **given})
    kind.require_in(str(raised.value), folder)


def test_a_number_beyond_what_is_there_asks_for_all(parts: Mapping[str, Any]) -> None:
    asked_for = ProbeConfig(n_queries=10**30, n_draws=10**30, max_tokens=10**30, batch_tokens=10**30, seed=10**30, n_features=8)
    made = Monitor(**{**parts, "config": asked_for})
    assert len(made.train.queries) == 30 - asked_for.n_train_demonstrations
    assert len(made.forecast().domains) == 1


def test_names_may_come_one_by_one() -> None:
    assert set(choose_domains((name for name in ("law", "code")), None)[1]) == {"law", "code"}  # type: ignore[arg-type]
    STSCallback(SAE, (name for name in ("law", "code")))  # type: ignore[arg-type]


def call(name: str, field: str, value: str, remedy: str, code: int = WRONG_INPUT) -> Callable[[Callable[..., object]], Kind]:
    """A kind of wrong call, made with a monitor."""
    return lambda made: Kind(name, made, field, value, remedy, code=code)


CALLS = [
    call("queries below none", "n_queries", "-3", "4 or more")(lambda m: ProbeConfig(n_queries=-3)),
    call("queries in words", "n_queries", "'8'", "a whole number")(lambda m: ProbeConfig(n_queries="8")),  # type: ignore[arg-type]
    call("no queries", "n_queries", "None", "a whole number")(lambda m: ProbeConfig(n_queries=None)),  # type: ignore[arg-type]
    call("half a query", "n_queries", "8.5", "a whole number")(lambda m: ProbeConfig(n_queries=8.5)),  # type: ignore[arg-type]
    call("infinitely many queries", "n_queries", "inf", "a whole number")(lambda m: ProbeConfig(n_queries=INF)),  # type: ignore[arg-type]
    call("queries: yes", "n_queries", "True", "a whole number")(lambda m: ProbeConfig(n_queries=True)),
    call("a tensor of queries", "n_queries", "tensor([8, 9])", "a whole number")(
        lambda m: ProbeConfig(n_queries=torch.tensor([8, 9]))  # type: ignore[arg-type]
    ),
    call("a limit without end", "max_norm_multiple", "inf", "a finite number")(lambda m: ProbeConfig(max_norm_multiple=INF)),
    call("a complex limit", "max_norm_multiple", "2j", "a finite number")(lambda m: ProbeConfig(max_norm_multiple=2j)),  # type: ignore[arg-type]
    call("a seed of words", "seed", "'x'", "a whole number")(lambda m: ProbeConfig(seed="x")),  # type: ignore[arg-type]
    call("drift without end", "min_drift", "inf", "a finite number")(lambda m: PolicyConfig(min_drift=INF)),
    call("patience without end", "patience", "inf", "a whole number")(lambda m: PolicyConfig(patience=INF)),  # type: ignore[arg-type]
    call("a list of budgets", "protect", "['law']", "a mapping")(lambda m: PolicyConfig(["law"])),  # type: ignore[arg-type]
    call("a forecast of what was not measured", "protect", "'music'", "['law']")(
        lambda m: judge_forecast(forecast(domain_forecast("law")), PolicyConfig({"music": 0.1}))
    ),
    call("drift of what was not measured", "protect", "'music'", "['law']")(
        lambda m: judge_drift([snapshot(5, domain_drift("law"))], PolicyConfig({"music": 0.1}))
    ),
    call("a verdict on no checks", "history", "[]", "at least one")(lambda m: judge_drift([], PolicyConfig())),
    call("a check before the forecast", "step 0", "none", "forecast() or restore()", CANNOT_TELL)(lambda m: m.check(5)),
    call("examples before the forecast", "step 0", "none", "forecast() or restore()", CANNOT_TELL)(
        lambda m: m.top_activating_examples()
    ),
    call("a baseline that is not there", "baseline", "@nowhere", "step 0", CANNOT_TELL)(
        lambda m: m.restore(Path("@nowhere"), forecast(domain_forecast("poems")))
    ),
    call("blame for what was not measured", "protect", "'music'", "['poems']")(lambda m: blame(m, rows(30), ["music"])),
    call("blame for a text", "protect", "'poems'", "a list of names")(lambda m: blame(m, rows(30), "poems")),
    call("blame for nothing", "protect", "got none", "name at least one domain")(lambda m: blame(m, rows(30), [])),
    call("half a row to read", "rows", "2.5", "1 or more")(lambda m: blame(m, rows(30), ["poems"], n_rows=2.5)),  # type: ignore[arg-type]
    call("nothing to tap", "reward_funcs", "no function", "train_data=")(lambda m: STSCallback(**SHIPPED).tap(5)),
    call("a number to attach to", "trainer", "5", "a transformers.Trainer")(lambda m: STSCallback(**SHIPPED).attach(5)),  # type: ignore[arg-type]
]


@named(CALLS)
def test_a_call_is_refused(kind: Kind, monitor: Monitor, tmp_path: Path) -> None:
    with pytest.raises(StsError) as raised:
        kind.given(monitor)
    assert isinstance(raised.value, CannotTell) == (kind.code == CANNOT_TELL)
    kind.require_in(str(raised.value).replace("@", f"{tmp_path}/"), tmp_path)


# --- training ---


@dataclass(frozen=True)
class Start:
    """What a run is begun with: arguments of the callback and of the trainer, and what is done to it before."""

    callback: Mapping[str, Any]
    trainer: Mapping[str, Any]


def begun(name: str, field: str, value: str, remedy: str, *, code: int = WRONG_INPUT, trainer: Any = None, **given: Any) -> Kind:
    return Kind(name, Start(given, trainer or {}), field, value, remedy, code=code)


STARTS = [
    begun("no SAE of this name", "sae", "'nothing'", "sts-callback saes --model", sae="nothing"),
    begun("a folder without an SAE", "sae", "@folder", "cfg.json", sae="@folder"),
    begun("an SAE for a narrower model", "sae", "width 16", "trained on this model", sae="@narrow_sae"),
    begun("an SAE of a deeper model", "hook_name", "layer 9", "trained on this model", sae="@deep_sae"),
    begun(
        "more features than the SAE can choose from", "n_features", "60 of 64", "up to 32", probes=replace(PROBES, n_features=60)
    ),
    begun(
        "fewer queries than an alarm takes",
        "n_queries",
        "near has 4",
        "raise ProbeConfig(n_queries=...)",
        code=CANNOT_TELL,
        probes=replace(PROBES, n_queries=4),
        policy=PolicyConfig(alpha=0.001),
    ),
    begun("no training file", "train_data", "@nowhere.jsonl", FORM, train_data="@nowhere.jsonl"),
    begun(
        "training data of other columns", "train_data", "['antwort', 'frage']", "allowed are text", train_data="@columns.jsonl"
    ),
    begun("a broken domain", "domains['near']", "line 3", FORM, domains={"near": "@broken.jsonl"}),
    begun("a domain of few rows", "domains['near']", "5 usable rows", "add rows", domains={"near": "@few.jsonl"}),
    begun("a text for an answer", "domains['near']", "[7, 7]", "allowed are texts", domains={"near": "@numbers.jsonl"}),
    begun(
        "a best model by a misspelt number",
        "metric_for_best_model",
        "'sts/near/nll'",
        "sts/near/nll_change",
        trainer={"metric_for_best_model": "sts/near/nll"},
    ),
    begun(
        "a best model by a number of no evaluation",
        "check_on",
        "'save'",
        "check_on='evaluate'",
        trainer={"metric_for_best_model": "sts/near/nll_change", "greater_is_better": False},
    ),
    begun(
        "a best model with the most harm",
        "greater_is_better",
        "True",
        "greater_is_better=False",
        check_on="evaluate",
        trainer={"metric_for_best_model": "sts/near/nll_change", "greater_is_better": True},
    ),
    begun(
        "a checkpoint that will be dropped",
        "save_strategy",
        "'best'",
        "save_strategy='epoch'",
        check_on="evaluate",
        action="stop",
        trainer={"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
    ),
    begun("a file in place of our folder", "output_dir", "sts", "move it away", trainer={"output_dir": "@taken"}),
]


@named(STARTS)
def test_training_is_refused_before_its_first_step(kind: Kind, folder: Path, tmp_path: Path) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: placed(inner) for name, inner in value.items()}
        return value.replace("@", f"{folder}/") if isinstance(value, str) else value

    start: Start = kind.given
    callback = STSCallback(
        **{"sae": rotated_sae(), "protect": ["near"], "domains": TINY_DOMAINS, "probes": PROBES} | placed(start.callback)
    )
    trainer = made_trainer("plain", tmp_path, [callback], **placed(start.trainer))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    with pytest.raises(StsError) as raised:
        trainer.train()
    assert isinstance(raised.value, CannotTell) == (kind.code == CANNOT_TELL)
    kind.require_in(str(raised.value), folder)
    assert trainer.state.global_step == 0
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


def test_what_is_uploaded_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = STSCallback("nothing", ["near"], domains=TINY_DOMAINS, probes=PROBES)
    trainer = made_trainer("plain", tmp_path, [callback])
    trainer.args.push_to_hub = True
    with pytest.raises(StsError):
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, processing_class=tiny_tokenizer()
        )
    kind = Kind("", (), "push_to_hub", "features.jsonl and rollouts.jsonl", "leave push_to_hub out")
    kind.require_in(caplog.text.replace("\n", " "), folder)


def test_each_kind_has_a_name_of_its_own() -> None:
    for kinds in (COMMANDS, ARGUMENTS, YAML, MONITORS, CALLS, STARTS):
        assert len({kind.name for kind in kinds}) == len(kinds)
