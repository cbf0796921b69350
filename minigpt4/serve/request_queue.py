"""The requests that wait for the engine: bounded, with a share for each client."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minigpt4.conversation.answer_batch import Answer
from minigpt4.conversation.generation import GenerationOptions

NUM_SHARES = 4  # clients that may fill their share of the queue at the same time


@dataclass(eq=False)
class Request:
    """A conversation to answer: its messages are (role, parts), a part being a text or a processed image [3, S, S].

    ``on_update`` is called on the engine's thread with the growing Answer or, at the end, with an exception. Setting
    ``cancelled`` ends the answer at its next token. Keys and values of earlier turns are used for the same ``client``.
    """

    messages: list[tuple[str, list[str | Tensor]]]
    options: GenerationOptions
    on_update: Callable[[Answer | Exception], None]
    timeout_seconds: float = 300.0
    client: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrival: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether the request is cancelled or out of time."""
        return self.cancelled.is_set() or time.monotonic() - self.arrival > self.timeout_seconds


class RequestQueue:
    """Waiting requests, which clients get answered in turns; for several threads.

    Args:
        maxsize: requests of one client that may wait; of all clients ``NUM_SHARES`` times as many.
    """

    def __init__(self, maxsize: int) -> None:
        self.maxsize, self._is_closed = maxsize, False
        self._clients: dict[str, deque[Request]] = {}  # the client whose turn is next comes first
        self._changed = threading.Condition()

    def qsize(self) -> int:
        """Number of waiting requests."""
        with self._changed:
            return sum(map(len, self._clients.values()))

    def put(self, requests: Sequence[Request]) -> None:
        """Adds all of a client's requests or none; ``queue.Full`` where there is no place, or after ``close``.

        Requests that are over make place for others. Their clients have left or know that the time is up.
        """
        client = requests[0].client
        with self._changed:
            own, total = self._clients.get(client, deque()), sum(map(len, self._clients.values()))
            if len(own) + len(requests) > self.maxsize or total + len(requests) > NUM_SHARES * self.maxsize:
                self._drop_finished()
                own, total = self._clients.get(client, deque()), sum(map(len, self._clients.values()))
            is_full = len(own) + len(requests) > self.maxsize or total + len(requests) > NUM_SHARES * self.maxsize
            if self._is_closed or is_full:
                raise queue.Full
            self._clients.setdefault(client, own).extend(requests)
            self._changed.notify()

    def take(self, may_wait: bool) -> Request | None:
        """The next request; None where there is none and ``may_wait`` is not set, or after ``close``."""
        with self._changed:
            while may_wait and not self._clients and not self._is_closed:
                self._changed.wait()
            if not self._clients:
                return None
            client, own = next(iter(self._clients.items()))
            request = own.popleft()
            del self._clients[client]
            if own:  # its next turn comes after those of the others
                self._clients[client] = own
            return request

    def position(self, request: Request) -> int | None:
        """How many requests are taken before one; None where it does not wait."""
        with self._changed:
            own = self._clients.get(request.client, ())
            if request not in own:
                return None
            index, count, is_before = own.index(request), 0, True
            for client, others in self._clients.items():
                is_own = client == request.client
                count += index if is_own else min(len(others), index + is_before)
                is_before = is_before and not is_own
            return count

    def close(self) -> None:
        """Nothing more is accepted; the waiting requests can still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    @property
    def is_done(self) -> bool:
        """Whether it is closed and empty."""
        with self._changed:
            return self._is_closed and not self._clients

    def _drop_finished(self) -> None:
        waiting = {client: deque(r for r in own if not r.is_over) for client, own in self._clients.items()}
        self._clients = {client: own for client, own in waiting.items() if own}
