"""Checks what a run will need, and says of each thing what was found and what to do.

python -m minigpt4.doctor --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
python -m minigpt4.doctor --cfg-path F --deep                   # the LM's true loss, whatever its size
python -m minigpt4.doctor --cfg-path F --steps 5                # trains five steps: time, and memory measured
python -m minigpt4.doctor --cfg-path F --json                   # for programs

The exit status is 1 if there is an error, else 0. docs/TROUBLESHOOTING.md has the causes in full.
"""

import argparse
import gc
import logging
import os
import sys
import time
from pathlib import Path

_START = time.perf_counter()  # where the system does not say when the process began
gc.disable()  # importing makes a million objects that stay; looking through them again and again takes a second


def _seconds() -> float:
    """Since the process began (Linux), so that importing torch, which came before this file, is counted as well."""
    try:
        stat, uptime = (Path("/proc", name).read_text(encoding="utf-8") for name in ("self/stat", "uptime"))
        return float(uptime.split()[0]) - int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _START


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
    parser.add_argument("--samples", type=int, default=16, help="samples drawn from each source")
    parser.add_argument("--sheet", type=Path, help="where the contact sheet goes (output/doctor/NAME.png)")
    return parser.parse_args()


def main() -> None:
    """Prints the table; ends with the status."""
    args = parse_args()
    from minigpt4.doctor.checks import run_checks
    from minigpt4.doctor.findings import ERROR, as_json, as_table, worst

    logging.basicConfig(level=logging.ERROR, format="%(message)s", force=True)
    seconds_of_imports = _seconds()
    findings = run_checks(args)
    seconds = _seconds()
    if args.json:
        print(as_json(findings, seconds=round(seconds, 2), seconds_of_imports=round(seconds_of_imports, 2)))
    else:
        print(as_table(findings))
        verdicts = [finding.verdict for finding in findings]
        counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("ok", "warning", "error"))
        print(f"\n{counts}; {seconds:.1f} s, of which Python's imports {seconds_of_imports:.1f} s.")
    gc.freeze()  # nor need they be looked through at the end
    sys.exit(worst(findings) == ERROR)


if __name__ == "__main__":
    main()
