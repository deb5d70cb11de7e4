"""The card of an SAE in words, for a reader and for the hub."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sts_callback.sae_training.texts import CONTEXT

if TYPE_CHECKING:
    from sts_callback.sae_training.train import Made


def readme(made: Made, model_name: str, n_tokens: int, sink_share: float) -> str:
    """Markdown with what was measured and how it was made.

    Args:
        made: the SAE.
        model_name: of the model that it reads.
        n_tokens: whose activations it was trained on.
        sink_share: of the tokens that were read, the share of attention sinks.

    """
    card, config = made.card, made.config
    kept = "unknown: the mean does no harm" if math.isnan(card.loss_kept) else f"{card.loss_kept:.1%}"
    faults = "".join(f"\nBelow the floor, so `sts-callback` refuses it: {fault}.\n" for fault in card.faults())
    texts = ", ".join(f"{read.name} ({read.n_used:,} of {read.n_rows:,} rows)" for read in made.reads)
    return f"""# SAE for {model_name}, {config.hook_name}

Made by `sts-callback sae train` with SAELens' trainer, in SAELens format: `sae="FOLDER"`, or `SAE.load_from_disk(FOLDER)`.
Measured on held-out texts ({card.n_tokens:,} tokens), without BOS, special tokens and attention sinks.
{faults}
| | |
|---|---|
| features (`d_sae`) | {card.d_sae:,} |
| fraction of variance unexplained | {card.fvu:.3f} |
| L0, active features a token | {card.l0:.1f} |
| dead features, active on no training token that was read for it | {card.dead_fraction:.2%} |
| NLL of the next token | {card.nll:.3f} nats |
| the same, reconstruction in place of the activations | {card.nll_reconstructed:.3f} nats |
| the same, their mean in their place | {card.nll_mean:.3f} nats |
| share of the loss kept | {kept} |
| tokens read, passes through them, seed | {n_tokens:,}, {config.n_passes:g}, {config.seed} |
| context | {CONTEXT} tokens |
| attention sinks left out | {sink_share:.2%} of tokens |

Texts: {texts}.
"""
