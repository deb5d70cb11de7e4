"""Texts to tokens: a query is the same with and without demonstrations, the tokenizer is not altered, each query is read once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sts_callback.config import ProbeConfig
from sts_callback.data.batches import batches, segments
from sts_callback.data.probes import (
    ProbeSet,
    Query,
    check_lengths,
    filler_tokens,
    make_completion_set,
    make_probe_set,
    make_row_set,
)
from sts_callback.data.tokens import bos_tokens
from sts_callback.errors import DataError
from tiny import bos_tokenizer, rows, tiny_tokenizer

pytestmark = pytest.mark.versions

PAD, BOS, EOS = 0, 1, 2
SPECIAL = {PAD, BOS, EOS}
CONFIG = ProbeConfig(n_queries=6)
SEPARATOR = "\n\n"


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and `th` as one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*letters, "th"])}, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def made(
    some_rows: Any, config: ProbeConfig = CONFIG, tokenizer: Any = None, name: str = "far", n_demonstrations: int = 2
) -> ProbeSet:
    tokenizer = tokenizer or tiny_tokenizer()
    return make_probe_set(name, some_rows, tokenizer, config, n_demonstrations=n_demonstrations, field=f"domains[{name!r}]")


def text(tokens: tuple[int, ...]) -> str:
    return str(tiny_tokenizer().decode(tokens))


def shown(draw: tuple[int, ...]) -> list[str]:
    """The demonstrations of a draw, which ends in a separator."""
    *texts, nothing = text(draw).split(SEPARATOR)
    assert nothing == ""
    return texts


# What a query is


def test_queries_and_demonstrations_are_rows_as_they_stand() -> None:
    some, probes = rows(30), made(rows(30))
    texts = {row["prompt"]: row["completion"] for row in some}
    asked = [text(q.query) for q in probes.queries]
    assert len(asked) == 6
    assert [text(q.answer) for q in probes.queries] == [texts[a] for a in asked]
    assert len(probes.demo_sets) == 3
    for draw in probes.demo_sets:
        assert len(set(shown(draw))) == 2
        assert set(shown(draw)) <= {row["prompt"] + row["completion"] for row in some}
    assert probes.n_cut == 0


@pytest.mark.parametrize("n_demonstrations", [1, 2, 5])
def test_tokens_of_a_query_do_not_depend_on_what_stands_before_it(n_demonstrations: int) -> None:
    tokenizer = bos_tokenizer()
    probes = made(rows(30), tokenizer=tokenizer, n_demonstrations=n_demonstrations)
    assert bos_tokens(tokenizer) == (BOS,)
    for i, q in enumerate(probes.queries):
        draw = probes.demo_sets[probes.group(i)]
        assert len(shown(draw)) == n_demonstrations
        assert draw + q.tokens == tuple(tokenizer(text(draw) + text(q.tokens), add_special_tokens=False)["input_ids"])
        assert len(q.counts) == len(q.query)
        assert q.tokens == q.query + q.answer


def test_boundary_is_where_prompt_and_whole_part() -> None:
    tokenizer = merging_tokenizer()
    pair = {"prompt": "what cat", "completion": "hat, this"}  # `t` and `h` merge across the boundary
    (q, *_) = made([pair] * 6, tokenizer=tokenizer).queries
    assert tokenizer.convert_ids_to_tokens(q.query) == list("whatĠca")
    assert tokenizer.convert_ids_to_tokens(q.answer) == ["th", *"at,Ġ", "th", *"is"]


def test_tokenizer_without_bos_has_nothing_in_front() -> None:
    tokenizer = merging_tokenizer()
    assert tokenizer.bos_token_id is None
    assert bos_tokens(tokenizer) == ()
    assert all(all(q.counts) for q in made(rows(10), tokenizer=tokenizer).queries)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<bos>Q: why", "completion": " because"},
        {"text": "<bos>a running text"},
        {"input_ids": [BOS, 40, 41, 42, 43], "labels": [-100, -100, -100, 42, 43]},
        {"input_ids": [BOS, 40, 41, 42, 43]},
        {"prompt_ids": [BOS, 40, 41], "completion_ids": [42, 43]},
    ],
)
def test_bos_stands_in_front_only(row: dict[str, Any]) -> None:
    probes = made([row] * 6, tokenizer=bos_tokenizer())
    assert all(BOS not in draw for draw in probes.demo_sets)
    assert all(BOS not in q.tokens for q in probes.queries)
    assert len(probes.queries) == 4
    assert all(q.query for q in probes.queries)


def test_special_tokens_do_not_count() -> None:
    probes = made([{"prompt": "<bos>Q<eos><bos>: why<pad>", "completion": " so<eos>"}] * 6, tokenizer=bos_tokenizer())
    for q in probes.queries:
        assert [token for token, counts in zip(q.query, q.counts, strict=True) if not counts] == [EOS, BOS, PAD]
        assert not any(counts and token in SPECIAL for token, counts in zip(q.query, q.counts, strict=True))
        assert q.answer[-1] == EOS  # an answer keeps its end: training learns it


def added_mark_tokenizer() -> PreTrainedTokenizerFast:
    """A chat template whose marks are special, but stand among the added tokens only, as in Llama 3 and Qwen."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens(["<|turn|>"])
    tokenizer.chat_template = "<|turn|>be kind{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}{{ '<|turn|>' }}"
    return tokenizer


def uncounted(q: Query) -> str:
    return str(added_mark_tokenizer().decode([token for token, counts in zip(q.query, q.counts, strict=True) if not counts]))


def chats(texts: Sequence[str]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "so"}]} for text in texts]


def test_what_a_chat_template_puts_first_and_its_marks_do_not_count() -> None:
    probes = made(chats([f"{i} cats" for i in range(6)]), tokenizer=added_mark_tokenizer())
    assert {uncounted(q) for q in probes.queries} == {"<|turn|>be kind<|turn|>" + "<|turn|>"}


@pytest.mark.parametrize("extra", [0, 1, 9, 10, 11, 40])
def test_a_chat_that_is_cut_keeps_what_the_template_puts_first(extra: int) -> None:
    """Beside the opening 30 tokens fit; of a longer prompt the beginning of the question is cut, not the opening."""
    tokenizer, most = added_mark_tokenizer(), 30
    opening = "<|turn|>be kind<|turn|>"
    n_opening = len(tokenizer(opening, add_special_tokens=False)["input_ids"])
    question = "q" + "x" * (most - 3 + extra) + "?"
    probes = made(
        chats([*(f"{i} cats" for i in range(6)), question]),
        replace(CONFIG, max_tokens=most),
        tokenizer=tokenizer,
        n_demonstrations=1,
    )
    (long,) = [q for q in probes.queries if len(q.query) > n_opening + 10]
    kept = question if extra == 0 else question[-(most - 1) :]
    assert tokenizer.decode(long.query) == f"{opening}{kept}<|turn|>"
    assert uncounted(long) == opening + "<|turn|>"
    assert probes.n_cut == (extra > 0)


def test_an_opening_as_long_as_the_limit_is_cut() -> None:
    """Else a system prompt of any length would take any memory."""
    tokenizer, long = added_mark_tokenizer(), chats([f"{i}" + "x" * 40 for i in range(6)])
    mark, *rest = tokenizer("<|turn|>be kind<|turn|>", add_special_tokens=False)["input_ids"]
    n = 1 + len(rest)
    first = {
        most: {q.query[0] for q in made(long, replace(CONFIG, max_tokens=most), tokenizer=tokenizer).queries}
        for most in (n, n + 1)
    }
    assert mark not in first[n] and first[n + 1] == {mark}


def test_rows_and_completions_keep_what_the_template_puts_first() -> None:
    tokenizer, long, config = added_mark_tokenizer(), chats([f"{i}" + "x" * 40 for i in range(6)]), replace(CONFIG, max_tokens=30)
    whole, _ = make_row_set("train", long, tokenizer, config, field="train_data")
    completions = make_completion_set("train", long, tokenizer, config, field="train_data")
    starts = {str(tokenizer.decode(q.query))[:23] for q in whole.queries + completions.queries}
    assert starts == {"<|turn|>be kind<|turn|>"}


def test_prompts_that_are_all_alike_count() -> None:
    probes = made(chats(["cats"] * 6), tokenizer=added_mark_tokenizer())
    assert {uncounted(q) for q in probes.queries} == {"<|turn|>" * 3}


def test_what_plain_prompts_have_in_common_counts() -> None:
    probes = made([{"prompt": f"be kind to {i}", "completion": " so"} for i in range(6)])
    assert all(all(q.counts) for q in probes.queries)


@pytest.mark.parametrize(("n", "n_asked"), [(10, 5), (11, 6)])
def test_running_text_is_split_in_halves(n: int, n_asked: int) -> None:
    whole = "abcdefghijklmnop"[:n]
    probes = made([{"text": whole}] * 6)
    assert {(text(q.query), text(q.answer)) for q in probes.queries} == {(whole[:n_asked], whole[n_asked:])}


def test_long_prompts_keep_their_end_and_long_answers_their_start() -> None:
    long = [{"prompt": f"{i:02d} " + "x" * 30 + " end?", "completion": f" start {i:02d}" + "y" * 30} for i in range(3)]
    assert len(made(long + rows(5), replace(CONFIG, n_queries=7), n_demonstrations=1).queries) == 7
    probes = made(long + rows(5), replace(CONFIG, max_tokens=8, n_queries=7), n_demonstrations=1)
    assert probes.n_cut == 8  # all: those of `rows` are longer than 8 too
    probes = made(long + rows(5), replace(CONFIG, max_tokens=36, n_queries=7), n_demonstrations=1)
    assert probes.n_cut == 3
    for q in probes.queries:
        assert len(q.query) <= 36 and len(q.answer) <= 36
        if "x" in text(q.query):
            assert text(q.query).endswith("xx end?")
            assert text(q.answer).startswith(" start")
            assert (len(q.query), len(q.answer)) == (36, 36)


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, with spaces as Llama 2 has them: decoding drops the one that a text begins with."""
    letters = {letter: i for i, letter in enumerate(["\u2581", *"abcdefghijklmnopqrstuvwxyz?é"])}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("answer", "max_tokens", "n_bytes"),
    [
        (" so", 512, 3),
        (" so<eos>", 512, 3),  # what ends an answer is no text
        (" größer 大", 512, 13),
        (" " + "y" * 30, 8, 8),  # what was cut is not counted
        ("", 512, 0),
    ],
)
def test_the_bytes_of_an_answer_are_those_of_the_text_that_is_read(answer: str, max_tokens: int, n_bytes: int) -> None:
    probes = made([{"prompt": "why?", "completion": answer or "<eos>"}] * 6, replace(CONFIG, max_tokens=max_tokens))
    assert probes.answer_bytes == (n_bytes,) * len(probes.queries)


def test_tokens_that_the_tokenizer_does_not_have_are_no_text() -> None:
    row = {"input_ids": [5, 6, len(tiny_tokenizer()), 7], "labels": [-100, 6, len(tiny_tokenizer()), 7]}
    assert set(made([row] * 6).answer_bytes) == {2}


def test_a_space_that_a_tokenizer_drops_before_a_text_is_counted_before_an_answer() -> None:
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode(tokenizer(" so")["input_ids"]) == "so"
    probes = made([{"prompt": "why?", "completion": " so é"}] * 6, tokenizer=tokenizer)
    assert set(probes.answer_bytes) == {6}


# Groups and their demonstrations


@pytest.mark.parametrize(
    ("n_queries", "wanted", "n_draws"), [(6, 8, 3), (7, 8, 3), (16, 8, 8), (32, 8, 8), (6, 2, 2), (4, 8, 2), (10, 3, 3)]
)
def test_every_group_has_at_least_two_queries(n_queries: int, wanted: int, n_draws: int) -> None:
    probes = made(rows(80), ProbeConfig(n_queries=n_queries, n_draws=wanted))
    assert len(probes.queries) == n_queries
    assert len(probes.demo_sets) == n_draws
    sizes = Counter(probes.group(i) for i in range(n_queries))
    assert sorted(sizes) == list(range(n_draws))
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert min(sizes.values()) >= 2
    assert [probes.group(i) for i in range(n_draws + 1)] == [*range(n_draws), 0]


def test_no_query_stands_among_its_own_demonstrations_but_may_among_those_of_others() -> None:
    shared = 0
    for seed in range(20):
        probes = made(rows(8), ProbeConfig(n_queries=6, seed=seed))
        asked = [text(q.tokens) for q in probes.queries]
        assert len(set(asked)) == 6
        for group, draw in enumerate(probes.demo_sets):
            assert len(set(shown(draw))) == 2
            own = {one for i, one in enumerate(asked) if probes.group(i) == group}
            assert own.isdisjoint(shown(draw))
            shared += len(set(asked) & set(shown(draw)))
    assert shared > 0  # 8 rows do not suffice for 6 queries and 3 draws of 2 others


def test_draws_differ_from_one_another() -> None:
    probes = made(rows(60), ProbeConfig(n_queries=16))
    assert len({frozenset(shown(draw)) for draw in probes.demo_sets}) == 8


def test_no_more_rows_are_read_than_needed() -> None:
    read: list[int] = []

    class Endless:
        def __len__(self) -> int:
            return 10**5

        def __getitem__(self, i: int) -> dict[str, str]:
            read.append(i)
            return {"prompt": f"Q: {i}?", "completion": f" {i}."}

    made(Endless(), ProbeConfig(n_queries=6, n_draws=3))
    assert len(read) == 6 + 2 * 3


# Plain prose in their place


@pytest.mark.parametrize("n_tokens", [0, 1, 100, 1469, 5000])
def test_neutral_text_has_as_many_tokens_as_asked_for(n_tokens: int) -> None:
    found = filler_tokens(tiny_tokenizer(), n_tokens)
    assert len(found) == n_tokens
    assert found == filler_tokens(tiny_tokenizer(), 5000)[:n_tokens]
    assert SPECIAL.isdisjoint(found)


def test_neutral_text_starts_again_where_it_ends() -> None:
    once = text(filler_tokens(tiny_tokenizer(), 10_000)).split("The path ran along")
    assert len(once) > 6
    assert once[0] == ""
    assert len(set(once[1:-1])) == 1
    assert once[1].startswith(once[-1])


def test_neutral_text_neither_asks_nor_answers() -> None:
    assert set("?:=").isdisjoint(text(filler_tokens(tiny_tokenizer(), 10_000)))


# What is drawn


def test_draw_hangs_on_seed_and_name_alone() -> None:
    fingerprints = [
        made(rows(40), replace(CONFIG, seed=seed), name=name).fingerprint
        for seed, name in itertools.product((0, 1), ("near", "far"))
    ]
    assert len(set(fingerprints)) == 4
    assert made(rows(40), name="near").fingerprint == fingerprints[0]
    assert made(tuple(rows(40)), name="near").fingerprint == fingerprints[0]


def test_fingerprint_changes_with_anything_that_is_measured_on() -> None:
    one = replace(made(rows(40)), written="")
    q, *others = one.queries
    changed = [
        replace(one, name="near"),
        replace(one, demo_sets=(one.demo_sets[0][:-1], *one.demo_sets[1:])),
        replace(one, demo_sets=one.demo_sets[::-1]),
        replace(one, demo_sets=one.demo_sets[:-1]),
        replace(one, queries=(q, *others[::-1])),
        replace(one, queries=tuple(others)),
        replace(one, queries=(replace(q, answer=q.answer[:-1]), *others)),
        replace(one, queries=(Query(q.query[:-1], q.query[-1:] + q.answer, q.counts[:-1]), *others)),
        replace(one, queries=(replace(q, counts=(False, *q.counts[1:])), *others)),
    ]
    assert len({p.fingerprint for p in [one, *changed]}) == 1 + len(changed)
    assert replace(one, n_cut=9).fingerprint == one.fingerprint


def test_unusable_rows_are_replaced_by_others() -> None:
    empty = [{"prompt": "", "completion": " x"}, {"prompt": "x", "completion": ""}] * 20
    assert len(made(empty + rows(8)).queries) == 6


def test_fewer_rows_than_asked_for_are_all_used() -> None:
    assert len(made(rows(7), replace(CONFIG, n_queries=32)).queries) == 5


@pytest.mark.parametrize(
    ("some", "n_usable"),
    [(rows(5), 5), (rows(5) + [{"prompt": "", "completion": "x"}] * 9, 5), ([{"text": "a"}, *rows(3)], 4)],
)
def test_too_few_rows_are_refused(some: list[dict[str, str]], n_usable: int) -> None:
    wanted = rf"domains\['far'\]: {n_usable} usable rows, but 2 demonstrations and at least 4 queries are needed; add rows or ask"
    with pytest.raises(DataError, match=wanted):
        made(some)


@pytest.mark.parametrize(
    "nothing",
    [
        {"prompt_ids": [BOS], "completion_ids": [40, 41]},
        {"prompt": "<eos>", "completion": " x"},
        {"prompt": "<bos><pad>", "completion": " x"},
    ],
)
def test_queries_without_a_token_that_counts_are_no_usable_rows(nothing: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="usable rows, but 2 demonstrations and at least 4 queries are needed"):
        made([nothing] * 20)


# What the model can take


def test_probes_that_fit_exactly_pass_and_longer_ones_do_not() -> None:
    def made_set(name: str, n_longest_draw: int, n_query: int, n_answer: int) -> ProbeSet:
        draws = ((7,) * (n_longest_draw - 3), (7,) * n_longest_draw)
        short, long = Query((5,), (6,), (True,)), Query((5,) * n_query, (6,) * n_answer, (True,) * n_query)
        return ProbeSet(name, (short, long), draws, 0)

    sets = [made_set("train", 30, 5, 5), made_set("law", 20, 10, 9), made_set("code", 40, 4, 4)]
    check_lengths(sets, 50)  # law: 1 + 30 + 19
    check_lengths(sets, None)
    with pytest.raises(
        DataError, match="law: demonstrations, query and answer take 50 tokens, but the model has 49 positions; lower"
    ):
        check_lengths(sets, 49)
    with pytest.raises(DataError, match="train: demonstrations, query and answer take 41 tokens, but the model has 40 positions"):
        check_lengths(sets, 40)
    with pytest.raises(DataError, match="code: demonstrations, query and answer take 49 tokens, but the model has 48 positions"):
        check_lengths([sets[0], sets[2]], 48)


# Batches


def queries_of(*lengths: tuple[int, int]) -> list[Query]:
    return [Query((5,) * n, (6,) * m, (True,) * n) for n, m in lengths]


MIXED = queries_of(*[(1 + 7 * i % 13, 1 + 5 * i % 9) for i in range(40)])


EVERYONE = range(len(MIXED))


@pytest.mark.parametrize("members", [EVERYONE, [3, 39, 7, 0, 20, 21, 22], [5]])
@pytest.mark.parametrize("batch_tokens", [1, 16, 40, 100, 10_000])
def test_batches_hold_every_member_once_and_no_more_tokens_than_allowed(batch_tokens: int, members: Sequence[int]) -> None:
    found = list(batches(MIXED, members, batch_tokens, vocab_size=300, n_prefix=1))
    assert sorted(i for batch in found for i in batch) == sorted(members)
    for batch in found:
        padded = len(batch) * max(len(MIXED[i].tokens) for i in batch)
        assert padded <= batch_tokens or len(batch) == 1
    if batch_tokens in (1, 10_000):
        assert len(found) == {1: len(members), 10_000: 1}[batch_tokens]
    assert found == list(batches(MIXED, members, batch_tokens, vocab_size=300, n_prefix=1))
    assert found == list(batches(MIXED, list(members)[::-1], batch_tokens, vocab_size=300, n_prefix=1))


@pytest.mark.parametrize("most", [1, 7, 30])
def test_batches_bound_the_memory_of_logits(most: int) -> None:
    vocab_size = 2**28 // 4 // most  # as many places as 256 MiB of float32 hold
    found = list(batches(MIXED, EVERYONE, 10_000, vocab_size, n_prefix=1))
    assert sorted(i for batch in found for i in batch) == list(EVERYONE)
    for batch in found:
        columns = {column for i in batch for column in range(len(MIXED[i].query) - 1, len(MIXED[i].tokens) - 1)}
        assert len(batch) * len(columns) <= most or len(batch) == 1
    assert len(found) > 1
    assert list(batches(MIXED, EVERYONE, 10_000, None, n_prefix=1)) == [sorted(EVERYONE, key=lambda i: (len(MIXED[i].tokens), i))]


@pytest.mark.parametrize("n_prefix", [100, 700, 5000])
def test_batches_bound_the_memory_of_keys(n_prefix: int) -> None:
    found = list(batches(MIXED, EVERYONE, 200, vocab_size=300, n_prefix=n_prefix))
    assert sorted(i for batch in found for i in batch) == list(EVERYONE)
    for batch in found:
        assert len(batch) * (n_prefix + max(len(MIXED[i].tokens) for i in batch)) <= 16 * 200 or len(batch) == 1
    assert max(map(len, found)) == {100: 18, 700: 4, 5000: 1}[n_prefix]


@pytest.mark.parametrize(("n_draws", "batch_tokens"), [(1, 1), (1, 60), (3, 40), (8, 10_000)])
def test_segments_hold_every_query_in_order_and_about_a_batch_a_group(n_draws: int, batch_tokens: int) -> None:
    probes = ProbeSet("law", tuple(MIXED), ((7,),) * n_draws, 0)
    found = list(segments(probes, batch_tokens))
    assert [i for segment in found for i in segment] == list(EVERYONE)
    for segment in found:
        assert sum(len(MIXED[i].tokens) for i in segment) <= n_draws * batch_tokens or len(segment) == 1
    for segment, following in itertools.pairwise(found):  # none is smaller than need be
        assert sum(len(MIXED[i].tokens) for i in [*segment, following[0]]) > n_draws * batch_tokens
    assert len(found) == (1 if batch_tokens == 10_000 else len(found)) and (batch_tokens == 10_000 or len(found) > 3)


def test_batches_waste_little_on_padding() -> None:
    found = list(batches(MIXED, EVERYONE, 60, vocab_size=300, n_prefix=1))
    padded = sum(len(batch) * max(len(MIXED[i].tokens) for i in batch) for batch in found)
    assert padded < 1.2 * sum(len(q.tokens) for q in MIXED)


def test_no_members_make_no_batches() -> None:
    assert list(batches(MIXED, [], 1024, 300, 1)) == []


# The user's tokenizer


def state(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    names = ("padding_side", "truncation_side", "model_max_length", "chat_template", "special_tokens_map", "init_kwargs")
    return [tokenizer.backend_tokenizer.to_str(), *(str(getattr(tokenizer, name)) for name in names)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokenizer_is_left_as_it_was(side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = side
    tokenizer.model_max_length = 10
    before = state(tokenizer)
    made(rows(30), tokenizer=tokenizer)
    made([{"text": "a running text"}] * 9, tokenizer=tokenizer)
    filler_tokens(tokenizer, 100)
    assert state(tokenizer) == before


def test_padding_and_truncation_that_the_user_set_stay_and_are_not_used() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer(["one", "another"], padding=True, truncation=True, max_length=9)  # stays set in the backend
    before = state(tokenizer)
    assert before != state(tiny_tokenizer())
    assert made(rows(30), tokenizer=tokenizer) == made(rows(30))
    assert filler_tokens(tokenizer, 100) == filler_tokens(tiny_tokenizer(), 100)
    assert state(tokenizer) == before
