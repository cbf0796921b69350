"""One thread that answers for all clients: requests wait in a bounded queue and are answered in batches."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer, Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions


@dataclass
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


class Engine:
    """Answers up to ``max_batch`` waiting requests together; a single one reuses the cached prefix of its chat.

    Only the engine's thread may use ``chat`` from now on, ``preprocess_image`` apart. Up to ``max_queue`` requests may
    wait; prompt and answer have at most ``max_length`` tokens.
    """

    def __init__(self, chat: Chat, max_batch: int = 16, max_queue: int = 64, max_length: int = 2000) -> None:
        self.chat, self.max_batch, self.max_length = chat, max_batch, max_length
        self.waiting: queue.Queue[Request | None] = queue.Queue(max_queue)  # None ends the thread
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Puts a request into the queue; raises ``queue.Full`` if there is no place."""
        self.waiting.put_nowait(request)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Ends the thread after the waiting requests; stops waiting for it after ``timeout_seconds``."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=timeout_seconds)
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        batch: list[Request | None] = []
        while None not in batch:
            batch = [self.waiting.get()]
            while len(batch) < self.max_batch and not self.waiting.empty():
                batch.append(self.waiting.get())
            self._answer([request for request in batch if request is not None])

    def _answer(self, batch: list[Request]) -> None:
        ready: list[tuple[Request, Conversation, list[Tensor], GenerationOptions]] = []
        for request in batch:
            try:
                ready.append((request, *self._prepare(request)))
            except Exception as error:  # concerns this request only
                _report([request], error)
        if not ready:
            return
        requests, *arguments = map(list, zip(*ready, strict=True))
        try:
            for row, answer in self.chat.stream_batch(*arguments, self.max_length):
                requests[row].on_update(answer)
        except Exception as error:  # out of memory, for example; the server continues
            _report(requests, error)

    def _prepare(self, request: Request) -> tuple[Conversation, list[Tensor], GenerationOptions]:
        """Encodes a request's images and checks its length; raises whatever makes it unanswerable."""
        if request.is_over:
            raise TimeoutError
        conv, images = replace(self.chat.template.copy(), owner=request.client), []
        for role, parts in request.messages:
            text = " ".join(part for part in parts if isinstance(part, str))
            if role in ("system", "developer"):
                conv.system = f"{conv.system} {text}".strip()
            elif role == "assistant":
                conv.append_message(conv.roles[1], text)
            else:
                for image in (part for part in parts if isinstance(part, Tensor)):
                    self.chat.upload_img(image, conv, images)
                if text.strip():
                    self.chat.ask(text.strip(), conv)
        self.chat.check_length(conv, images, request.options, self.max_length)
        stop = request.options.stop
        return conv, images, replace(request.options, stop=lambda ids: request.is_over or stop(ids))


def _report(requests: list[Request], error: Exception) -> None:
    if not isinstance(error, UserError | TimeoutError):
        logging.exception("A request failed.")
    for request in requests:
        request.on_update(error)
