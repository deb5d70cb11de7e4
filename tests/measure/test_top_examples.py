"""Features are told by the places in the user's texts where they fire most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sts_callback.data.probes import ProbeSet, Query
from sts_callback.measure.top_examples import N_SNIPPETS, top_activating_examples
from sts_callback.metrics.sums import SparseActs
from tiny import tiny_tokenizer

TEXTS = ("red apple", "big red house", "a red", "blue", "red red")


@dataclass(frozen=True)
class Kept:
    counted: torch.Tensor
    acts: SparseActs
    sketches: torch.Tensor


def kept_of(probes: ProbeSet, firing: dict[tuple[int, int], dict[int, float]], masked: tuple[tuple[int, int], ...] = ()) -> Kept:
    """What a reading would keep if features fired at these (query, column) places; masked ones do not count."""
    places = [(i, column) for i, q in enumerate(probes.queries) for column, counts in enumerate(q.counts) if counts]
    counted = torch.tensor([place not in masked for place in places])
    dense = torch.zeros(int(counted.sum()), 8)
    rows = [place for place in places if place not in masked]
    for place, features in firing.items():
        for feature, value in features.items():
            dense[rows.index(place), feature] = value
    return Kept(counted, SparseActs.of(dense), torch.zeros(len(rows), 2, 64))


def probe_set(*texts: str, name: str = "train") -> ProbeSet:
    tokens = [tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in texts]
    return ProbeSet(name, tuple(Query(t, (), (True,) * len(t)) for t in tokens), ((),), 0)


def test_the_strongest_place_of_each_query_comes_first_and_is_shown_in_its_text() -> None:
    probes = probe_set(*TEXTS)
    firing = {(0, 2): {5: 1.0}, (1, 6): {5: 3.0, 2: 9.0}, (2, 4): {5: 2.0}, (4, 0): {5: 0.5}, (4, 4): {5: 0.75}}
    (found,) = top_activating_examples([(5, 0.25)], [probes], {"train": kept_of(probes, firing)}, tiny_tokenizer(), None)
    assert (found.feature, found.share, found.link) == (5, 0.25, "")
    shown = [(s.before, s.token, s.after, s.activation) for s in found.snippets["train"]]
    assert shown == [("big re", "d", " house", 3.0), ("a re", "d", "", 2.0), ("re", "d", " apple", 1.0)]
    assert len(shown) == N_SNIPPETS


def test_no_two_snippets_come_from_one_query_and_a_silent_feature_has_none() -> None:
    probes = probe_set(*TEXTS)
    kept = kept_of(probes, {(4, 0): {5: 0.5}, (4, 4): {5: 0.75}})
    found = top_activating_examples([(5, 0.1), (6, 0.1)], [probes], {"train": kept}, tiny_tokenizer(), None)
    assert [[s.activation for s in f.snippets["train"]] for f in found] == [[0.75], []]


def test_masked_tokens_do_not_shift_the_places_of_others() -> None:
    probes = probe_set(*TEXTS)
    kept = kept_of(probes, {(1, 0): {5: 1.0}}, masked=((0, 0), (0, 1), (0, 5)))
    (found,) = top_activating_examples([(5, 0.1)], [probes], {"train": kept}, tiny_tokenizer(), None)
    assert [(s.before, s.token) for s in found.snippets["train"]] == [("", "b")]


def test_each_set_has_its_own_snippets_and_neuronpedia_is_linked_not_asked() -> None:
    sets = [probe_set("red", name="train"), probe_set("a red", name="law")]
    kept = {"train": kept_of(sets[0], {(0, 1): {3: 1.0}}), "law": kept_of(sets[1], {(0, 2): {3: 2.0}})}
    (found,) = top_activating_examples([(3, 0.5)], sets, kept, tiny_tokenizer(), "gemma-2-2b/12-gemmascope-res-16k")
    assert found.link == "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/3"
    assert {name: s[0].token for name, s in found.snippets.items()} == {"train": "e", "law": "r"}


def test_only_a_few_tokens_around_are_shown() -> None:
    probes = probe_set("x" * 40 + "y" + "z" * 40)
    (found,) = top_activating_examples(
        [(0, 1.0)], [probes], {"train": kept_of(probes, {(0, 40): {0: 1.0}})}, tiny_tokenizer(), None
    )
    assert found.snippets["train"][0].before == "x" * 12
    assert found.snippets["train"][0].after == "z" * 6
