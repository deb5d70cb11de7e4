"""Find the largest scale of a trained LoRA adapter at which each protected domain keeps its budget.

Step 0 is the model without the adapter. Each scale is measured like a drift check, with the same tokens in the same batches.
Budget and interval decide about harm (`policy.judge_budget`), without the test of an alarm.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sts_callback.config import PlainBudget, PolicyConfig, ProbeConfig, require_protected
from sts_callback.data.chat import text_tokenizer
from sts_callback.data.probes import check_lengths, check_tokens, filler_tokens, make_probe_set
from sts_callback.data.reader import Source, read_rows
from sts_callback.data.tokens import bos_tokens
from sts_callback.errors import ConfigError, ModelError
from sts_callback.measure import diagnostics, scoring
from sts_callback.measure.accumulators import ZERO_SHOT
from sts_callback.measure.identity import identity_of
from sts_callback.measure.runner import Context, ProbeRunner
from sts_callback.model.encoder import encoder_for
from sts_callback.model.hooks import max_positions, model_name, vocab_size
from sts_callback.model.sae import SaeSource
from sts_callback.model.undisturbed import undisturbed
from sts_callback.policy import judge_budget
from sts_callback.progress import progress_bar
from sts_callback.records.remedies import AdapterScales, ScaledDomain, ScalePoint, gravest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_N_COMPARED = 64  # tokens on which scale 0 must give the same as the model without the adapter


def dial(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    sae: SaeSource,
    domains: Mapping[str, Source],
    budgets: Mapping[str, PlainBudget],
    scales: Sequence[float],
    config: ProbeConfig | None = None,
    progress: bool = True,
) -> AdapterScales:
    """Measure protected domains at several scales of an adapter. Its own scale is restored on every exit.

    Args:
        model: with a LoRA adapter, see `with_adapter`.
        tokenizer: its tokenizer; not altered.
        sae: see `model.sae.SaeSource`.
        domains: name to source.
        budgets: of protected domains; only these are measured.
        scales: of the adapter, above 0, up to 1.
        config: numbers, limits and seed.
        progress: whether to show a progress bar.

    Raises:
        ConfigError: if no domain is protected or a scale is not allowed.
        DataError, SaeError, ModelError, CannotTell: as for a forecast.

    """
    started = time.monotonic()
    require_possible(budgets, scales)
    knob = AdapterScaler(model, tokenizer, sae=sae, domains=domains, budgets=budgets, config=config)
    wanted = sorted(set(scales))
    with progress_bar("Scales", len(wanted), "scale", is_shown=progress) as bar:
        points = []
        for scale in wanted:
            points.append(knob.at(scale))
            bar.update()
    return AdapterScales(knob.identity, tuple(points), time.monotonic() - started)


def require_possible(budgets: Mapping[str, PlainBudget], scales: Sequence[float]) -> None:
    """Refuse what cannot be dialled, whatever the model.

    Args:
        budgets: budgets of the protected domains.
        scales: scales of the adapter.

    Raises:
        ConfigError: if no domain is protected or a scale is not allowed.

    """
    require_protected(budgets)
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise ConfigError(f"scales: got {list(scales)}; allowed are numbers above 0, up to 1.")


class AdapterScaler:
    """Measures protected domains without an adapter, then at any scale of it."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sae: SaeSource,
        domains: Mapping[str, Source],
        budgets: Mapping[str, PlainBudget],
        config: ProbeConfig | None = None,
    ) -> None:
        """Draw the probes and read them without the adapter. Arguments and errors are those of `dial`."""
        require_protected(budgets)
        tokenizer = text_tokenizer(tokenizer)
        self._bos = bos_tokens(tokenizer)
        config = replace(config or ProbeConfig(), n_features=1)  # none is selected: any width of SAE will do
        self._model, self._budgets = model, PolicyConfig(budgets).limits
        with undisturbed(model), _scaled(model, 0.0):
            encoder = encoder_for(sae, model)
            self._sets = [
                make_probe_set(
                    name,
                    read_rows(domains[name], field),
                    tokenizer,
                    config,
                    n_demonstrations=config.n_domain_demonstrations,  # then the queries are those of a forecast
                    field=field,
                    as_chat=config.chat_template == "always",  # no training data show whether the model is tuned on chats
                )
                for name, field in ((name, f"domains[{name!r}]") for name in budgets)
            ]
            check_lengths(self._sets, max_positions(model), len(self._bos))
            check_tokens(self._sets, vocab_size(model))
            self._runner = ProbeRunner(model, [encoder], config)
            self._runner.self_test(self._sets, [self._bos])
            zero_shot = self._bare()
            diagnostics.require_fit(diagnostics.examined_fits(self._runner, self._sets, zero_shot, model_name(model))[1])
            self._step_zero = {s.name: self._runner.read(s, zero_shot, {})[0] for s in self._sets}
        self.identity = identity_of(model, encoder, config, self._sets, self._runner.findings.precision)

    def at(self, scale: float) -> ScalePoint:
        """Measure at one scale: 1 is the adapter as it was trained, 0 the model without it. At 0 the drift is exactly 0."""
        found = {}
        with undisturbed(self._model), _scaled(self._model, scale):
            zero_shot = self._bare()
            for probes in self._sets:
                step_zero = self._step_zero[probes.name]
                reading = self._runner.read_drift(probes, zero_shot, [step_zero])[0]
                answers = scoring.answer_change(probes, reading, step_zero.zero_shot_nll, step_zero.right.get(ZERO_SHOT))
                budget = self._budgets[probes.name]
                harm = answers.harm_in(budget.unit)
                found[probes.name] = ScaledDomain(
                    name=probes.name,
                    n_queries=len(probes.queries),
                    relative_drift=scoring.relative_drift(reading, step_zero),
                    nll_change=answers.nll,
                    harm=harm,
                    budget=budget.plain,
                    finding=judge_budget(harm, budget),
                )
        return ScalePoint(scale, gravest(domain.finding for domain in found.values()), found)

    def _bare(self) -> Context:
        return self._runner.context(self._bos, with_answers=True)


def with_adapter(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> nn.Module:
    """Put a LoRA adapter on a model.

    Args:
        model: the model that the adapter was trained on; altered.
        tokenizer: its tokenizer; not altered.
        folder: folder that PEFT saved.

    Raises:
        ModelError: if PEFT is missing, the folder holds no LoRA adapter for this model, or the adapter changes more of the model
            than its scale reaches.

    """
    require_lora(folder)

    from peft import PeftModel

    tokens = torch.tensor([[*bos_tokens(tokenizer), *filler_tokens(tokenizer, _N_COMPARED)]])
    with undisturbed(model):
        alone = _logits(model, tokens)
        try:
            adapted: nn.Module = PeftModel.from_pretrained(model, str(folder))
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"adapter: {folder} does not fit the model ({error}); give the one it was trained on.") from error
    with undisturbed(adapted), _scaled(adapted, 0.0):
        if not torch.equal(_logits(adapted, tokens), alone):
            raise ModelError(
                f"adapter: {folder} changes the model even at scale 0; only plain LoRA can be dialled, without DoRA, "
                "modules_to_save, trained biases or an initialisation that changes the model (PiSSA, OLoRA and the like)."
            )
    return adapted


def require_lora(folder: str | Path) -> None:
    """Refuse a folder that holds no LoRA adapter.

    Args:
        folder: folder that PEFT saved.

    Raises:
        ModelError: if PEFT is missing or the folder holds no LoRA adapter.

    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ModelError("adapter: PEFT is not installed; install it with `pip install peft`.") from error
    remedy = "give a folder that PEFT saved a LoRA adapter in"
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise ModelError(f"adapter: {folder} holds no adapter_config.json; {remedy}.")
    try:
        kind = str(PeftConfig.from_pretrained(str(folder)).peft_type).rpartition(".")[2]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"adapter: {folder}/adapter_config.json cannot be read ({error!r}); {remedy}.") from error
    if kind != "LORA":
        raise ModelError(f"adapter: {folder} holds one of kind {kind}; only LoRA adapters have a scale.")


def _logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens.to(next(model.parameters()).device)).logits
    return logits


@contextmanager
def _scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the adapter's scale. On every exit its own scale is restored."""
    from peft.helpers import rescale_adapter_scale

    with rescale_adapter_scale(model, scale):
        yield
