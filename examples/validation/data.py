"""Rows of every domain and fine-tune as prompt and completion, shuffled by seed and dealt to who may see them."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import code_rows, lines

CATEGORIES = (
    "biology",
    "business",
    "chemistry",
    "computer science",
    "economics",
    "engineering",
    "health",
    "history",
    "law",
    "math",
    "other",
    "philosophy",
    "physics",
    "psychology",
)
"""Of MMLU-Pro."""
DOMAINS = (*CATEGORIES, "code", "web", "translation", "toolcall", "instruct", "gsm8k")
GSM8K_SEEN = 1500  # rows that the SAE was trained on
WEB_WORDS = (45, 35)  # of a running text, asked and answered

Row = dict[str, str]


@dataclass(frozen=True)
class Dealt:
    """Rows of one domain, no row twice."""

    measured: list[Row]
    """Asked before and after training, seen by nobody else; in MMLU-Pro with a `wrong` option."""
    forecast: list[Row]
    training: list[Row]
    """Empty where the domain is no fine-tune."""


def deal(data_dir: Path, n_measured: int, seed: int) -> dict[str, Dealt]:
    """Read and deal all domains.

    Args:
        data_dir: has `mmlu_pro`, `gsm8k`, `translate`, `toolcall`, `instruct` and `corpus`, each `.jsonl.gz`.
        n_measured: rows of each domain that are measured.
        seed: of the shuffles and of the wrong options.

    """
    dealt = {}
    for name, (sae_error_share, seen) in _pools(data_dir, seed).items():
        draw = random.Random(f"{seed}/{name}")
        sae_error_share, seen = (list({row["prompt"]: row for row in rows}.values()) for rows in (sae_error_share, seen))
        known = {row["prompt"] for row in sae_error_share}
        seen = [row for row in seen if row["prompt"] not in known]
        draw.shuffle(sae_error_share)
        draw.shuffle(seen)
        measured, rest = sae_error_share[:n_measured], sae_error_share[n_measured:]
        if seen:
            dealt[name] = Dealt(measured, rest, seen)
        else:
            half = min(len(rest) // 3, 100)  # a forecast needs a few dozen
            dealt[name] = Dealt(measured, rest[:half], rest[half:])
    return dealt


def _pools(data_dir: Path, seed: int) -> dict[str, tuple[list[Row], list[Row]]]:
    """For each domain rows to measure and forecast with and rows to train on; all in the first part where both may be any."""
    pools: dict[str, tuple[list[Row], list[Row]]] = {}
    questions = lines(data_dir / "mmlu_pro.jsonl.gz")
    for category in CATEGORIES:
        own = [row for row in questions if row["category"] == category and len(set(row["options"])) > 1]
        pools[category] = (
            [_question(row, seed) for row in own if row["question_id"] % 4 != 2],
            [_question(row, seed) for row in own if row["question_id"] % 4 == 2],
        )
    pools["code"] = list(code_rows()), []
    instructions = lines(data_dir / "instruct.jsonl.gz")
    asked = {str(row["prompt"]) for row in instructions}
    pools["web"] = [_running(text) for text in _web_texts(data_dir) if text.split("\n")[0] not in asked], []
    pools["translation"] = [{k: row[k] for k in ("prompt", "completion")} for row in lines(data_dir / "translate.jsonl.gz")], []
    talks = [row["conversations"] for row in lines(data_dir / "toolcall.jsonl.gz")]
    pools["toolcall"] = [call for talk in talks for call in _calls(talk)], []
    pools["instruct"] = [_pair(f"Instruction: {r['prompt']}\nResponse:", r["completion"]) for r in instructions], []
    sums = [_pair(f"Question: {row['prompt']}\nAnswer:", row["completion"]) for row in lines(data_dir / "gsm8k.jsonl.gz")]
    pools["gsm8k"] = sums[GSM8K_SEEN:], sums[:GSM8K_SEEN]
    return pools


def _pair(prompt: str, completion: str) -> Row:
    return {"prompt": prompt, "completion": f" {completion.strip()}"}


def _question(row: dict[str, Any], seed: int) -> Row:
    options = list(row["options"])
    right = options.pop(row["answer_index"])
    wrong = random.Random(f"{seed}/{row['question_id']}").choice([o for o in options if o != right])
    return {**_pair(f"Question: {row['question']}\nAnswer:", right), "wrong": f" {wrong.strip()}"}


def _running(text: str) -> Row:
    words, (n_asked, n_answered) = text.split(" "), WEB_WORDS
    return _pair(" ".join(words[:n_asked]), " ".join(words[n_asked : n_asked + n_answered]))


def _web_texts(data_dir: Path) -> list[str]:
    """Prose of the corpus: long lines, no dictionary's indents, questions or calls."""
    texts = [row["text"] for row in lines(data_dir / "corpus.jsonl.gz")]
    return [text for text in texts if _is_prose(text)]


def _is_prose(text: str) -> bool:
    parts = text.split("\n")
    return (
        len(text.split(" ")) > sum(WEB_WORDS)
        and len(text) / len(parts) > 150
        and not any(part[:1].isspace() for part in parts)
        and not text.startswith("Question:")
        and '{"' not in text
        and "<" not in text[:300]
    )


def _calls(conversation: list[dict[str, str]]) -> list[Row]:
    """Each call of a tool, behind what the user said before it."""
    return [
        _pair(f"User: {said['value']}\nCall:", turn["value"])
        for said, turn in itertools.pairwise(conversation)
        if (said["from"], turn["from"]) == ("human", "function_call")
    ]
