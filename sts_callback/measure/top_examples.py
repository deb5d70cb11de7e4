"""Top activating examples: the places in the user's texts where a feature is most active."""

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
"""Snippets from each set, at most one from a query."""
_N_BEFORE, _N_AFTER = 12, 6  # tokens shown before and after the active one


def top_activating_examples(
    features: Sequence[tuple[int, float]],
    sets: Sequence[ProbeSet],
    step_zero: Mapping[str, StepZero],
    tokenizer: PreTrainedTokenizerBase,
    neuronpedia_id: str | None,
) -> tuple[TopActivatingExamples, ...]:
    """Find examples of features in the texts that were measured at step 0. No forward is run.

    Args:
        features: feature indices, each with its share of the shift or drift.
        sets: the probes of the training data and of all domains.
        step_zero: stats of each set at step 0, by name.
        tokenizer: decodes tokens.
        neuronpedia_id: the SAE's id on Neuronpedia, `model/source`, if it has one.

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
    """The places in one set where each feature is most active, the strongest first."""
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
    """Make a snippet of a token and the tokens around it.

    Args:
        tokens: tokens of the text.
        column: index of the active token.
        activation: the activation at this token.
        tokenizer: decodes tokens.

    """
    before, after = tokens[max(0, column - _N_BEFORE) : column], tokens[column + 1 : column + 1 + _N_AFTER]
    texts = [str(tokenizer.decode(list(part))) for part in (before, tokens[column : column + 1], after)]
    return Snippet(texts[0], texts[1], texts[2], activation)
