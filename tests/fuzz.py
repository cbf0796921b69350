"""Properties of every reader of outside data, and how many drawn cases hold them.

    python -m tests.fuzz --cases 100000 [--seed 0] [--targets shards,weights]

Cases are drawn by hypothesis. Readers of bytes get small valid files, changed at random; each case has to end within
seconds in a result or in one of the exceptions that the reader names. test_fuzz.py runs a few cases of each target.
"""

import argparse
import logging
import math
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one, wherever it is started

import fuzz_clients  # noqa: F401  (importing them registers their targets)
import fuzz_config  # noqa: F401
import fuzz_data  # noqa: F401
import fuzz_model  # noqa: F401
from confined import Hangs
from fuzz_cases import TARGETS

SECONDS_A_CASE = 10


def run(name: str, cases: int, seed: int, keep_on: bool) -> tuple[int, Counter]:
    """Draws cases; returns how many ran and what was raised, with the place where it was."""
    raised: Counter = Counter()
    count = 0

    def case(value: Any) -> None:
        nonlocal count
        count += 1
        signal.alarm(SECONDS_A_CASE)
        try:
            TARGETS[name].check(value)
        except (Exception, Hangs) as error:
            if not keep_on:
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "minigpt4/" in f.filename] or [None]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames[-1] else "fuzz.py"
            if not raised[f"{type(error).__name__} at {where}"]:
                print(f"{name}: {value!r}"[:1500], file=sys.stderr)
                traceback.print_exception(error)
            raised[f"{type(error).__name__} at {where}"] += 1
        finally:
            signal.alarm(0)

    def stop(*_: Any) -> None:
        raise Hangs(f"{name} hangs")

    before = signal.signal(signal.SIGALRM, stop)
    settings = hypothesis.settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hypothesis.seed(seed)(settings(hypothesis.given(TARGETS[name].strategy)(case)))()
    finally:
        signal.signal(signal.SIGALRM, before)
    return count, raised


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", help="some of: " + ", ".join(TARGETS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    names = args.targets.split(",") if args.targets else list(TARGETS)
    shares, total, num_raised = sum(TARGETS[name].share for name in names), 0, 0
    print("| target | cases | unhandled exceptions | seconds |\n|---|---|---|---|", flush=True)
    for name in names:
        begin = time.monotonic()
        cases = math.ceil(args.cases * TARGETS[name].share / shares)
        count, raised = run(name, cases, args.seed, keep_on=True)
        total, num_raised = total + count, num_raised + sum(raised.values())
        told = f" ({', '.join(f'{n} × {what}' for what, n in raised.items())})" if raised else ""
        label = name.replace("_", " ")
        print(f"| {label} | {count:,} | {sum(raised.values())}{told} | {time.monotonic() - begin:.0f} |", flush=True)
    print(f"| all | {total:,} | {num_raised} | |")
    return int(num_raised > 0)


if __name__ == "__main__":
    sys.exit(main())
