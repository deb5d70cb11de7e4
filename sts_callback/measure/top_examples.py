"""Top activating examples: where in the user's own texts a feature is most active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sts_callback.data.probes import ProbeSet
from sts_callback.measure.accumulators import StepZero
from sts_callback.records import Snippet, TopActivatingExamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_SNIPPETS = 3
"""Snippets of each set, no two from one query."""
_N_BEFORE, _N_AFTER = 12, 6  # tokens shown around the active one


def top_activating_examples(
    features: Sequence[tuple[int, float]],
    sets: Sequence[ProbeSet],
    step_zero: Mapping[str, StepZero],
    tokenizer: PreTrainedTokenizerBase,
    neuronpedia_id: str | None,
) -> tuple[TopActivatingExamples, ...]:
    """Look features up in the texts that were measured, before training; no further forward is run.

    Args:
        features: indices with the share of the shift or drift that each holds.
        sets: the training data and all domains.
        step_zero: of each, by name.
        tokenizer: for reading tokens as text.
        neuronpedia_id: `model/source`, if the SAE is explained there.

    """
    snippets = {s.name: _strongest(s, step_zero[s.name], [j for j, _ in features], tokenizer) for s in sets}
    return tuple(
        TopActivatingExamples(
            feature=j,
            share=share,
            link=f"https://www.neuronpedia.org/{neuronpedia_id}/{j}" if neuronpedia_id else "",
            snippets={s.name: snippets[s.name][j] for s in sets},
        )
        for j, share in features
    )


def _strongest(
    probes: ProbeSet, step_zero: StepZero, features: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> dict[int, tuple[Snippet, ...]]:
    """Per feature, where it is most active in one set, the strongest first."""
    places = [(i, column) for i, q in enumerate(probes.queries) for column, counts in enumerate(q.counts) if counts]
    counted = step_zero.counted.nonzero()[:, 0].tolist()
    acts = step_zero.acts
    token_of = torch.repeat_interleave(torch.arange(len(acts.n_active)), acts.n_active.long())
    found: dict[int, tuple[Snippet, ...]] = {}
    for feature in features:
        at = (acts.features == feature).nonzero()[:, 0]
        at = at[acts.values[at].argsort(descending=True, stable=True)]
        best: dict[int, Snippet] = {}
        for entry in at.tolist():
            query, column = places[counted[int(token_of[entry])]]
            if query not in best:
                best[query] = snippet(probes.queries[query].query, column, float(acts.values[entry]), tokenizer)
            if len(best) == N_SNIPPETS:
                break
        found[feature] = tuple(best.values())
    return found


def snippet(tokens: tuple[int, ...], column: int, activation: float, tokenizer: PreTrainedTokenizerBase) -> Snippet:
    """A token of a text with what stands around it.

    Args:
        tokens: of the text.
        column: which of them activates.
        activation: how strongly.
        tokenizer: for reading tokens as text.

    """
    before, after = tokens[max(0, column - _N_BEFORE) : column], tokens[column + 1 : column + 1 + _N_AFTER]
    texts = [str(tokenizer.decode(list(part))) for part in (before, tokens[column : column + 1], after)]
    return Snippet(texts[0], texts[1], texts[2], activation)
