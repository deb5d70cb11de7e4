"""Are planted training rows found? Questions of law among word problems, with law protected.

    python examples/blame.py --data-dir DIR

Gemma 3 270M, settings fixed beforehand: mixtures of 400 rows, once with 20 rows of MMLU-Pro's law category in places drawn at
random, once without any, three seeds each. `DIR` holds `mmlu_pro.jsonl.gz` (`category`, `question`, `options`, `answer_index`).
Precision and recall of the rows that `sts-callback blame` would leave out, and the recall of as many rows by score alone as were
planted, go to `blame.json` beside this file. How rows are scored was chosen on chemistry and translation among word problems and
history among instructions, not on this.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from demo import SAE_FOLDER
from gemma import loaded_gemma
from rows import law_rows
from sts_callback import Monitor, ProbeConfig
from sts_callback.data.starter import choose_domains
from sts_callback.remedies.attribution import blame
from word_problems import word_problems

PROBES = ProbeConfig(n_queries=24, max_tokens=128)
N_ROWS, N_PLANTED, SEEDS = 400, 20, (0, 1, 2)
PROTECTED = "law"


def planted_among(rows: list[dict[str, str]], culprits: list[dict[str, str]], seed: int) -> tuple[list[dict[str, str]], set[int]]:
    """Rows, some of which have given their places to culprits, and these places."""
    draw = random.Random(seed)
    places = draw.sample(range(len(rows)), len(culprits))
    mixed = list(rows)
    for place, culprit in zip(places, culprits, strict=True):
        mixed[place] = culprit
    return mixed, set(places)


def found_in(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], planted: set[int]
) -> dict[str, object]:
    """What blame names in one mixture, against what was planted."""
    domains, _ = choose_domains([PROTECTED], None)
    monitor = Monitor(model, tokenizer, sae=SAE_FOLDER, train_data=rows, domains=domains, config=PROBES)
    found = blame(monitor, rows, [PROTECTED], n_top=max(1, len(planted)))
    law, left_out = found.domains[PROTECTED], set(found.left_out)
    hits = len(left_out & planted)
    return {
        "n_planted": len(planted),
        "n_left_out": len(left_out),
        "precision": hits / len(left_out) if left_out else None,
        "recall": hits / len(planted) if planted else None,
        "recall_of_as_many_by_score": len({row.row for row in law.rows} & planted) / len(planted) if planted else None,
        "threshold": law.threshold,
        "median": law.median,
        "own_score": law.own_score,
        "n_standing_out": law.n_standing_out,
        "seconds": found.seconds,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    data_dir = parser.parse_args(argv).data_dir
    logging.set_verbosity_error()

    model, tokenizer = loaded_gemma()
    law, problems = law_rows(data_dir), word_problems(N_ROWS)
    results: dict[str, object] = {"settings": {"n_rows": N_ROWS, "n_queries": PROBES.n_queries, "max_tokens": PROBES.max_tokens}}
    for seed in SEEDS:
        culprits = random.Random(seed).sample(law, N_PLANTED)
        for label, some in (("planted", culprits), ("nothing planted", [])):
            rows, places = planted_among(problems, some, seed)
            results[f"{label}, seed {seed}"] = made = found_in(model, tokenizer, rows, places)
            print(f"{label}, seed {seed}: {json.dumps(made)}", flush=True)
    (Path(__file__).parent / "blame.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
