"""Console logging: one line format; ranks above 0 log warnings only."""

import logging
from collections import Counter

from minigpt4.common import dist_utils


def setup_logger() -> None:
    """Sends log records to the console; ranks above 0 only from WARNING on, with their number."""
    is_main = dist_utils.is_main_process()
    rank = "" if is_main else f"[rank {dist_utils.get_rank()}] "
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, format=f"%(asctime)s [%(levelname)s] {rank}%(message)s", force=True)
    for name in ("httpx", "httpcore", "filelock", "PIL", "urllib3", "matplotlib"):  # verbose at INFO
        logging.getLogger(name).setLevel(logging.WARNING)


TRUNCATED = "truncated conversation"  # among the kinds: trained, but without its end


def log_skipped(skipped: Counter, name: str) -> None:
    """Logs how many samples of a data set were skipped so far, by kind, and how many were truncated."""
    if num_truncated := skipped.get(TRUNCATED):
        logging.warning("%s: %d conversations so far were longer than the context and truncated.", name, num_truncated)
    if skipped := Counter({kind: count for kind, count in skipped.items() if kind != TRUNCATED}):
        kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(skipped.items()))
        logging.warning("%s: skipped %d samples so far (%s).", name, sum(skipped.values()), kinds)
