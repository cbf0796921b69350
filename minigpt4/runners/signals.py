"""Stops all ranks after the same step when one of them is signalled."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import popen_fork
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from minigpt4.common import device as devices
from minigpt4.common import dist_utils

_REPEAT_SECONDS = 2.0  # torchrun repeats a signal that a terminal or scheduler has sent to the ranks already


class StopWaiting(BaseException):
    """Ends the wait for a batch; not an Exception, as readers of data catch these."""


def _is_forking(frame: FrameType | None) -> bool:
    """Whether a worker is being started; Python ignores what is raised amid a fork, and its locks could stay locked."""
    while frame is not None and frame.f_code.co_filename != popen_fork.__file__:
        frame = frame.f_back
    return frame is not None


class StopRequest:
    """Context in which the first of the ``STOP_SIGNALS`` only sets a flag; a later one ends the process.

    Schedulers signal the ranks during different steps, so every step starts an asynchronous sum of the ranks' flags in
    host memory, whose result is read at the next step.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._previous: dict[int, object] = {}
        self._is_waiting = False  # for data

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            is_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            numbers = [n for n in dist_utils.STOP_SIGNALS if n != signal.SIGHUP or not is_nohup]
            self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:
            self._pending[0].wait()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            logging.warning("Stopping after this step, with a checkpoint. Send the signal again to stop at once.")
            if self._is_waiting and not _is_forking(frame):
                raise StopWaiting
        elif time.monotonic() - self._requested_at > _REPEAT_SECONDS:
            sys.exit(128 + number)

    def next_batch(self, source: Iterator[Any]) -> Any:
        """``next(source)``; raises StopWaiting if a run of one process is signalled before it has returned.

        Without workers, data are read in this process with a random state of their own, amid which the signal may
        come; the state of before is restored.
        """
        state = devices.random_state(torch.device("cpu"))
        self._is_waiting = dist_utils.get_world_size() == 1
        try:
            if self._is_waiting and self._requested_at is not None:  # since the last step
                raise StopWaiting
            return next(source)
        except StopWaiting:
            devices.set_random_state(state, torch.device("cpu"))
            raise
        finally:
            self._is_waiting = False

    def should_stop(self) -> bool:
        """Returns whether to stop now, the same on all ranks; every rank calls it once per step."""
        if dist_utils.get_world_size() == 1:
            return self._requested_at is not None
        previous = self._pending
        flag = torch.tensor([float(self._requested_at is not None)])
        if previous is not None:
            previous[0].wait()
        self._pending = dist.all_reduce(flag, async_op=True), flag
        return previous is not None and previous[1].item() > 0
