"""Does the forecast come true? Forecasts, real fine-tunes and what they changed, on Gemma 3 270M.

    python examples/validate.py forecast --data-dir DIR               what is expected of each fine-tune
    python examples/validate.py candidates --data-dir DIR             two more forms of the score, for the development half
    python examples/validate.py costs --data-dir DIR                  what each score costs
    python examples/validate.py train --data-dir DIR [--share 1/2]    the fine-tunes; each is stored as it ends
    python examples/validate.py mix --data-dir DIR [--share 1/2]      fine-tunes on mixtures of the development half's rows
    python examples/validate.py layer --data-dir DIR [--share 1/2]    forecast and movement by the SAE of another layer
    python examples/validate.py report [--open]                       tables and plots, with the held-out half if it is opened

`validation/PROTOCOL.md` says what is done and why, `validation/settings.yaml` has the numbers. `DIR` holds `mmlu_pro`, `gsm8k`,
`translate`, `toolcall`, `instruct` and `corpus`, each `.jsonl.gz`. All stages can be stopped and begun again; results are lines
of JSON in `validation/`, and what only this machine needs again is in `--work-dir`. Two processes with one thread each
(`OMP_NUM_THREADS=1`, `--share 1/2` and `--share 2/2`) use two cores best.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["forecast", "candidates", "costs", "train", "mix", "layer", "report"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/validation"))
    parser.add_argument("--share", default="1/1", help="of the fine-tunes, which part this process runs")
    parser.add_argument("--open", action="store_true", help="show the held-out half")
    args = parser.parse_args(argv)
    if args.stage == "report":
        from validation.pages import write_report

        write_report(opened=args.open)
        return
    if args.data_dir is None:
        parser.error(f"--data-dir: {args.stage} needs the data")
    part, n_parts = (int(number) for number in args.share.split("/"))
    if not 1 <= part <= n_parts:
        parser.error(f"--share: got {args.share}; allowed is i/n with i from 1 to n")
    from validation import forecasts, layers, runs
    from validation.lab import first_round
    from validation.plan import SETTINGS

    if args.stage == "layer":
        other: str = SETTINGS["other_sae"]
        layers.ablate(first_round(args.data_dir, args.work_dir / other, other, with_answers=False), part - 1, n_parts)
        return
    lab = first_round(args.data_dir, args.work_dir, SETTINGS["sae"], with_answers=True)
    if args.stage in ("forecast", "candidates", "costs"):
        getattr(forecasts, args.stage)(lab)
    else:
        getattr(runs, args.stage)(lab, part - 1, n_parts)


if __name__ == "__main__":
    main(sys.argv[1:])
