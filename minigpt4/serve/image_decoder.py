"""Images of clients, decoded in processes that are limited in time and memory, in turns among the clients."""

import heapq
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.common.images import MAX_PIXELS

QUICK_SECONDS = 1.0  # enough for nearly all images
MAX_SECONDS = 15.0
_COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("image_worker.py"))]
_MAX_LINE = 10_000  # of an answer
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}  # each thread would reserve address space
_ENDING = "The server is ending."


@dataclass
class _Job:
    data: bytes
    name: str
    size: tuple[int, int] | int | None
    client: str
    process: Callable[[Image.Image], Any] | None = None
    image: Future[Any] = field(default_factory=Future)


class ImageDecoder:
    """Decodes the images of untrusted clients as ``read_image`` does, but in processes that can be killed.

    Two processes decode what takes up to ``QUICK_SECONDS``. What takes longer is moved to a third one, so that slow
    images delay each other only; after ``MAX_SECONDS`` there it is refused. In both places the clients take turns.
    """

    def __init__(self) -> None:
        self._slow = _Lane(1, MAX_SECONDS, _refuse)
        self._quick = _Lane(2, QUICK_SECONDS, self._slow.put)

    def num_waiting(self, client: str) -> int:
        """The number of a client's images that no process decodes yet."""
        return self._quick.num_waiting(client) + self._slow.num_waiting(client)

    def decode(
        self, data: bytes, name: str = "the image", size: tuple[int, int] | int | None = None, client: str = ""
    ) -> Image.Image:
        """Decodes the bytes of an image file to RGB; waits for its turn and its end.

        Args:
            data: the content of the file.
            name: the image's name in messages.
            size: width and height to resize it to (bicubic), or the side that the larger one of a larger image is
                reduced to; by default it keeps its own.
            client: the name under which it takes turns with other clients, such as an address.

        Raises:
            UserError: as ``read_image``, or it takes too much time or memory, or the decoder is closed.
        """
        return self.submit(data, name, size, client).result()

    def submit(
        self,
        data: bytes,
        name: str = "the image",
        size: tuple[int, int] | int | None = None,
        client: str = "",
        process: Callable[[Image.Image], Any] | None = None,
    ) -> Future[Any]:
        """``decode`` without waiting; cancelling the future ends the work.

        ``process`` maps the image to the future's result before the next one is decoded: images may have 400 MB.
        """
        job = _Job(data, name, size, client, process)
        self._quick.put(job)
        return job.image

    def close(self) -> None:
        """Ends the processes, whatever they are doing; waiting and later images are refused."""
        self._quick.close()
        self._slow.close()


class _Lane:
    """Threads with a process each, which decode within ``seconds`` or pass the job to ``give_up``.

    Start-time fair queueing: of each client with waiting jobs, one is decoded before the second one of any.
    """

    def __init__(self, num_processes: int, seconds: float, give_up: Callable[[_Job], None]) -> None:
        self.seconds, self.give_up = seconds, give_up
        self._jobs: list[tuple[int, int, _Job]] = []  # a heap of (turn, number, job)
        self._turn, self._numbers = 0, itertools.count()
        self._next_turns: dict[str, int] = {}  # by client
        self._changed, self._is_closed = threading.Condition(), False
        self._processes: set[subprocess.Popen] = set()
        for _ in range(num_processes):
            threading.Thread(target=self._run, name="image decoder", daemon=True).start()

    def num_waiting(self, client: str) -> int:
        with self._changed:
            return sum(job.client == client for *_, job in self._jobs)

    def put(self, job: _Job) -> None:
        with self._changed:
            if not self._is_closed:
                turn = max(self._turn, self._next_turns.get(job.client, 0))
                self._next_turns[job.client] = turn + 1
                heapq.heappush(self._jobs, (turn, next(self._numbers), job))
                self._changed.notify()
                return
        _finish(job, UserError(_ENDING))

    def close(self) -> None:
        with self._changed:
            self._is_closed, waiting, self._jobs = True, self._jobs, []
            self._changed.notify_all()
        for *_, job in waiting:
            _finish(job, UserError(_ENDING))
        for process in list(self._processes):
            process.kill()

    def _take(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed)
            if self._is_closed:
                return None
            self._turn, _, job = heapq.heappop(self._jobs)
            self._next_turns = {client: turn for client, turn in self._next_turns.items() if turn > self._turn}
            return job

    def _run(self) -> None:
        process = None
        devices.set_threads(1)  # the processors are the engine's, see ``devices.release_threads``
        while job := self._take():
            try:
                if not job.image.cancelled():
                    process = process or self._start()
                    process = process if self._decode(job, process) else self._end(process)
            except Exception as error:  # no process or thread can be started
                _finish(job, UserError(_ENDING) if self._is_closed else error)
            del job  # its file would stay in memory until the next one
        self._end(process)

    def _start(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(_COMMAND, env=os.environ | _ENVIRONMENT, start_new_session=True, **pipes)
        self._processes.add(process)
        if self._is_closed:  # ``close`` may not have seen it
            process.kill()
        if process.stdout.readline() != b"ready\n":
            self._end(process)
            raise OSError(f"{' '.join(_COMMAND)} ended with status {process.returncode}")
        return process

    def _end(self, process: subprocess.Popen | None) -> None:
        if process is not None:
            process.kill()
            process.communicate()
            self._processes.discard(process)

    def _decode(self, job: _Job, process: subprocess.Popen) -> bool:
        """Whether the process can be used again."""
        is_late = threading.Event()
        timer = threading.Timer(self.seconds, lambda: (is_late.set(), process.kill()))
        job.image.add_done_callback(lambda image: image.cancelled() and process.kill())
        timer.start()
        try:
            outcome, is_alive = _ask(process, job, self.seconds), True
        except UserError as error:
            outcome, is_alive = error, True
        except Exception:  # it was killed or it crashed
            text = f"{job.name} cannot be decoded: it makes the decoder fail, or takes too much memory."
            outcome, is_alive = UserError(_ENDING if self._is_closed else text), False
        finally:
            timer.cancel()
        if is_late.is_set():
            self.give_up(job)
            return False
        try:
            outcome = job.process(outcome) if job.process and isinstance(outcome, Image.Image) else outcome
        except Exception as error:
            outcome = error
        return _finish(job, outcome) and is_alive


def _ask(process: subprocess.Popen, job: _Job, seconds: float) -> Image.Image:
    request = {"num_bytes": len(job.data), "name": job.name, "size": job.size, "seconds": seconds}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.write(job.data)
    process.stdin.flush()
    answer = json.loads(process.stdout.readline(_MAX_LINE))
    if "error" in answer:
        raise UserError(str(answer["error"]))
    width, height = answer["size"]
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(answer)
    return Image.frombytes("RGB", (width, height), process.stdout.read(3 * width * height))


def _finish(job: _Job, outcome: Any) -> bool:
    """Hands over a result or an error; False if the job is cancelled, as when its process is killed for that."""
    if not job.image.set_running_or_notify_cancel():
        return False
    if isinstance(outcome, Exception):
        job.image.set_exception(outcome)
    else:
        job.image.set_result(outcome)
    return True


def _refuse(job: _Job) -> None:
    text = f"{job.name} takes longer than {MAX_SECONDS:g} s to decode; save it in a simpler form, such as a plain JPEG."
    _finish(job, UserError(text))
