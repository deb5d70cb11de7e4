"""The model with its SAE, all rows, and what is read of them before any training."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from gemma import loaded_gemma
from sts_callback import ProbeConfig
from sts_callback.data.probes import ProbeSet, Query, filler_tokens, make_completion_set, make_probe_set
from sts_callback.data.tokens import bos_tokens
from sts_callback.measure.accumulators import ProbeStats
from sts_callback.measure.runner import Context, ProbeRunner
from sts_callback.measure.sae_reader import Reference
from sts_callback.measure.scoring import DOMAIN_ICL, FILLER, TRAIN_ICL
from sts_callback.model.encoder import encoder_for
from sts_callback.model.undisturbed import undisturbed
from sts_callback.records import TRAIN
from validation.data import DOMAINS, Dealt, Row, deal
from validation.plan import SETTINGS, sae_folder

T = TypeVar("T")


class Lab:
    """Model, SAE and all rows; readings are kept in the work folder."""

    def __init__(
        self,
        rows: Mapping[str, Dealt],
        work_dir: Path,
        sae: str,
        *,
        config: ProbeConfig,
        domains: Sequence[str],
        fine_tunes: Sequence[str],
        with_answers: bool,
    ) -> None:
        """Load all of it.

        Args:
            rows: of all domains and fine-tunes.
            work_dir: of this SAE alone.
            sae: its folder's name, beside `validate.py`.
            config: of what is asked.
            domains: that are asked.
            fine_tunes: whose rows are trained on.
            with_answers: whether answers are read too; for shifts alone the model runs no further than the SAE's layer.

        """
        logging.set_verbosity_error()
        self._work_dir, self._with_answers = work_dir, with_answers
        work_dir.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = loaded_gemma()
        self.bos = bos_tokens(self.tokenizer)
        self.config = config
        self.runner = ProbeRunner(self.model, [encoder_for(sae_folder(sae), self.model)], self.config)
        (self.sae_reader,) = self.runner.sae_readers
        self.rows, self.domains, self.fine_tunes = rows, tuple(domains), tuple(fine_tunes)
        self.taught = {
            name: self.probes(TRAIN, self.rows[name].training, self.config.n_train_demonstrations) for name in self.fine_tunes
        }
        self.asked = {
            name: self.probes(name, self.rows[name].forecast, self.config.n_domain_demonstrations) for name in self.domains
        }
        self.sae_reader.adopt(self.kept("reference", self._calibrated))

    def train_reading(self, fine_tune: str) -> ProbeStats:
        def read() -> ProbeStats:
            with undisturbed(self.model):
                contexts = {TRAIN_ICL: self.taught_contexts[fine_tune], FILLER: [self.neutral]}
                return self.runner.read(self.taught[fine_tune], self.zero_shot(), contexts, with_gradients=True)[0]

        return self.kept(f"train-{fine_tune}", read)

    def domain_reading(self, name: str) -> ProbeStats:
        """Behind the demonstrations of all fine-tunes, each under its own name."""

        def read() -> ProbeStats:
            probes = self.asked[name]
            with undisturbed(self.model):
                own = self.contexts(probes.demo_sets, with_answers=False)
                contexts = {**self.taught_contexts, FILLER: [self.neutral], DOMAIN_ICL: own}
                return self.runner.read(probes, self.zero_shot(), contexts, with_gradients=True)[0]

        return self.kept(f"forecast-{name}", read)

    def bare_reading(self, key: str, probes: ProbeSet) -> ProbeStats:
        """Without demonstrations: what later checks of a set compare with."""

        def read() -> ProbeStats:
            require_untuned(self.model)
            with undisturbed(self.model):
                return self.runner.read(probes, self.zero_shot(), {})[0]

        return self.kept(key, read)

    @functools.cached_property
    def taught_contexts(self) -> dict[str, list[Context]]:
        sets = self.taught.items()
        return {name: self.contexts(probes.demo_sets, with_answers=self._with_answers) for name, probes in sets}

    @functools.cached_property
    def neutral(self) -> Context:
        lengths = [len(draw) for probes in self.taught.values() for draw in probes.demo_sets]
        return self.context(filler_tokens(self.tokenizer, sum(lengths) // len(lengths)), with_answers=self._with_answers)

    def probes(self, name: str, rows: Sequence[Row], n_demonstrations: int) -> ProbeSet:
        return make_probe_set(name, rows, self.tokenizer, self.config, n_demonstrations=n_demonstrations, field=name)

    def queries(self, rows: Sequence[Row]) -> list[Query]:
        """Tokens of prompts and completions, cut as in the forecast."""
        config = dataclasses.replace(self.config, n_queries=len(rows))
        whole = make_completion_set("rows", rows, self.tokenizer, config, field="rows").queries
        starts = [q.counts.index(True) for q in whole]
        return [Query(q.query[:n], q.query[n:], (True,) * n) for q, n in zip(whole, starts, strict=True)]

    def zero_shot(self) -> Context:
        """No demonstrations, run with the weights of now."""
        return self.context((), with_answers=self._with_answers)

    def context(self, tokens: Sequence[int], *, with_answers: bool) -> Context:
        return self.runner.context((*self.bos, *tokens), with_answers=with_answers)

    def contexts(self, draws: Sequence[Sequence[int]], *, with_answers: bool) -> list[Context]:
        return [self.context(draw, with_answers=with_answers) for draw in draws]

    def kept(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, kept in the work folder."""
        file = self._work_dir / f"{name}.pt"
        if not file.exists():
            started, scratch = time.monotonic(), file.with_suffix(f".{time.time_ns()}")
            torch.save(make(), scratch)
            scratch.rename(file)  # whole or not at all
            tqdm.write(f"{name}: {time.monotonic() - started:.0f} s")
        made: T = torch.load(file, weights_only=False)
        return made

    def _calibrated(self) -> Reference:
        with undisturbed(self.model):
            self.runner.calibrate(list(self.asked.values()), self.zero_shot())
        return self.sae_reader.reference


def first_round(data_dir: Path, work_dir: Path, sae: str, *, with_answers: bool) -> Lab:
    """That of `validate.py`.

    Args:
        data_dir: see there.
        work_dir: see `Lab`.
        sae: see `Lab`.
        with_answers: see `Lab`.

    """
    return Lab(
        deal(data_dir, SETTINGS["n_measured"], SETTINGS["seed"]),
        work_dir,
        sae,
        config=ProbeConfig(**SETTINGS["probes"], seed=SETTINGS["seed"]),
        domains=DOMAINS,
        fine_tunes=[*SETTINGS["fine_tunes"]["development"], *SETTINGS["fine_tunes"]["held_out"]],
        with_answers=with_answers,
    )


def require_untuned(model: nn.Module) -> None:
    """What is kept as step 0 must be."""
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules()), (
        "step 0 was asked for in the middle of a run"
    )
