"""The second round of the validation: rehearsals and runs on data that nobody has seen, on Gemma 3 270M.

    python examples/validate_second.py calibrate             from five steps to the end, by the first round's stored runs
    python examples/validate_second.py run --data-dir DIR    forecasts, rehearsals, runs; each is stored as it ends
    python examples/validate_second.py report [--open]       tables, with outcomes if they are opened

`validation/second/PROTOCOL.md` says what is done and why, `validation/second/settings.yaml` has the numbers. `DIR` holds what
`validate.py` needs, `exams` and `statements`, each `.jsonl.gz`. `run` can be stopped and begun again; several processes share the
work by locks in `--work-dir` (two with `OMP_NUM_THREADS=1` use two cores best). What is stored is not made again.
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
    parser.add_argument("stage", choices=["calibrate", "run", "report"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/validation-second"))
    parser.add_argument("--open", action="store_true", help="show the outcomes")
    args = parser.parse_args(argv)
    if args.stage == "calibrate":
        from validation.second.calibration import choose

        choose()
        return
    if args.stage == "report":
        from validation.second.pages import write_report

        write_report(opened=args.open)
        return
    if args.data_dir is None:
        parser.error(f"--data-dir: {args.stage} needs the data")
    from validation.second.runs import work

    work(args.data_dir, args.work_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
