"""Asked to stop, all ranks stop after the same step."""

import logging
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from minigpt4.common import dist_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_SECONDS = 2.0  # a terminal or scheduler signals the ranks, and torchrun, signalled too, does so again


class StopRequest:
    """While entered, the first SIGTERM or SIGINT is remembered instead of obeyed; a later one ends the process.

    Launchers and schedulers signal the ranks one after the other, in the middle of different steps. Each step
    therefore starts a tiny sum over the ranks' flags on the host, which nobody waits for before the step after.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._vote: tuple[dist.Work, torch.Tensor] | None = None
        self._before: list[tuple[int, object]] = []

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = [(number, signal.signal(number, self._remember)) for number in _SIGNALS]
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)
        if self._vote is not None and kind is None:
            self._vote[0].wait()

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            logging.warning("Stopping: this step is finished and saved first. Once more to leave at once.")
        elif time.monotonic() - self._asked_at > _SAME_SECONDS:
            sys.exit(128 + number)

    def should_stop(self) -> bool:
        """Whether to stop now; called once a step by every rank, true on all of them at the same one."""
        if dist_utils.get_world_size() == 1:
            return self._asked_at is not None
        is_agreed = False
        if self._vote is not None:
            work, votes = self._vote
            work.wait()
            is_agreed = votes.item() > 0
        votes = torch.tensor([float(self._asked_at is not None)])
        self._vote = dist.all_reduce(votes, async_op=True), votes
        return is_agreed
