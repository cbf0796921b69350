"""Checks what a run will need, and reports for each item what was found and what to do.

python -m minigpt4.doctor --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
python -m minigpt4.doctor --cfg-path F --deep                   # the LM's true loss, whatever its size
python -m minigpt4.doctor --cfg-path F --steps 5                # trains five steps: time, and memory measured
python -m minigpt4.doctor --cfg-path F --memory 24GB            # would it fit on such a card?
python -m minigpt4.doctor --cfg-path F --json                   # for programs

The exit status is 1 if there is an error, else 0. docs/TROUBLESHOOTING.md has the causes in full.
"""

import argparse
import logging
import re
import sys
import time
from pathlib import Path


def num_bytes(text: str) -> float:
    """Bytes of a size such as 24GB, 80 GiB or 512MB."""
    units = {"gb": 1e9, "mb": 1e6, "gib": 2**30, "mib": 2**20}
    match = re.fullmatch(r"([\d.]+) *([a-z]+)", text.strip().lower())
    try:
        return float(match[1]) * units[match[2]]
    except (TypeError, ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; expected one such as 24GB or 24GiB") from None


def parse_args() -> argparse.Namespace:
    """The command line; parsed before anything heavy is imported."""
    parser = argparse.ArgumentParser(
        prog="python -m minigpt4.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run, or of the chat")
    parser.add_argument("--options", nargs="+", help="settings that override the file: run.max_epoch=2 …")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--deep", action="store_true", help="read the whole language model and compute its loss")
    parser.add_argument("--steps", type=int, default=0, help="train so many steps, for the time that is left")
    help_text = "judge memory by a card of this size, as 24GB, that need not be present; a tenth is kept for the card"
    parser.add_argument("--memory", type=num_bytes, help=help_text)
    parser.add_argument("--samples", type=int, default=16, help="samples drawn from each source")
    parser.add_argument("--sheet", type=Path, help="file of the contact sheet (output/doctor/NAME.png)")
    return parser.parse_args()


def main() -> None:
    """Prints the table; ends with the status."""
    args, start = parse_args(), time.perf_counter()
    from minigpt4.doctor.checks import run_checks
    from minigpt4.doctor.findings import ERROR, as_json, as_table, worst

    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    findings = run_checks(args)
    seconds = time.perf_counter() - start
    if args.json:
        print(as_json(findings, seconds=round(seconds, 2)))
    else:
        verdicts = [finding.verdict for finding in findings]
        counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("ok", "warning", "error"))
        print(f"{as_table(findings)}\n\n{counts}; {seconds:.1f} s.")
    sys.exit(worst(findings) == ERROR)


if __name__ == "__main__":
    main()
