"""Soak: the table's lines, what a process holds, and what processes leave behind."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import NamedTuple

import psutil


class Verdict(NamedTuple):
    """A line of the table."""

    what: str
    actual: str
    expected: str
    is_good: bool


def expect_none(what: str, found: Sequence[str]) -> Verdict:
    """The line of a list that has to be empty."""
    most_common = "; ".join(f"{count} × {name}" for name, count in Counter(found).most_common(3))
    return Verdict(what, f"{len(found)}: {most_common}" if found else "0", "0", not found)


@dataclass
class Usage:
    """What a process holds at one moment; ``processes`` counts its children too."""

    mib: float
    files: int
    threads: int
    processes: int


@dataclass
class Watched:
    """A process that must not hold more at the end than after it has warmed up."""

    name: str
    process: psutil.Process
    rows: list[Usage] = field(default_factory=list)
    seconds: float = 3600  # of the whole run

    def sample(self) -> None:
        """Adds a row; none if the process ends meanwhile."""
        try:
            # All pages, not its own ones only: these become shared whenever a loader's worker is forked from it.
            memory, processes = self.process.memory_info().rss, 1 + len(self.process.children(recursive=True))
            self.rows.append(Usage(memory / 2**20, self.process.num_fds(), self.process.num_threads(), processes))
        except psutil.Error:
            return

    def verdicts(self) -> list[Verdict]:
        """Compares the minimum of the second quarter of the time with that of the last.

        What comes and goes, such as the workers of a validation, moves the maximum and not the minimum; a leak moves
        both.
        """
        quarter = len(self.rows) // 4
        if not quarter:
            return [Verdict(f"{self.name}: samples", str(len(self.rows)), "at least 4", False)]
        early, late = (
            [min(column) for column in zip(*map(astuple, rows), strict=True)]
            for rows in (self.rows[quarter : 2 * quarter], self.rows[-quarter:])
        )
        # Allows for a loader's worker and a few connections that happen to exist at every sample.
        names = ("MiB", "open files", "threads", "processes")
        # In a few seconds, not every kind of request was answered before the second quarter.
        num_more = 8 if self.seconds >= 300 else 64
        limits = (1.05 * early[0] + num_more, early[1] + 8, early[2] + 4, early[3] + 2)
        return [
            Verdict(f"{self.name}: {what}", f"{a:.0f} to {b:.0f}", f"at most {limit:.0f}", b <= limit)
            for what, a, b, limit in zip(names, early, late, limits, strict=True)
        ]


def remaining_children() -> list[str]:
    """The command lines of children, and of orphans adopted from killed ones, that do not end within 15 seconds."""
    deadline = time.monotonic() + 15
    while True:
        while (children := psutil.Process().children()) and os.waitpid(-1, os.WNOHANG)[0]:
            pass
        if not children or time.monotonic() > deadline:
            return [" ".join(child.cmdline())[:80] for child in children]
        time.sleep(0.2)
