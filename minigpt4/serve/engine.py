"""One thread that answers for many: requests wait in a bounded queue and are taken in batches."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer, Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions

Part = str | Tensor  # text, or a processed picture [3, S, S]


class Busy(Exception):
    """The queue is full."""


@dataclass
class Request:
    """Messages (role, parts) to answer; ``tell`` gets an Answer as it grows, or at last an exception.

    Whoever loses interest sets ``cancelled``: the row then ends at its next token.
    """

    system: str
    messages: list[tuple[str, list[Part]]]
    options: GenerationOptions
    tell: Callable[[Answer | Exception], None]
    seconds: float = 300.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    begin: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether nobody waits any more or its time is up."""
        return self.cancelled.is_set() or time.monotonic() - self.begin > self.seconds


class Engine:
    """Answers requests in batches of those that wait; a single one goes on from what is kept of its chat.

    Args:
        chat: answers; from now on it belongs to the engine's thread.
        max_batch: requests in one batch.
        max_queue: requests that may wait.
        max_length: tokens of context and answer.
    """

    def __init__(self, chat: Chat, max_batch: int = 16, max_queue: int = 64, max_length: int = 2000) -> None:
        self.chat = chat
        self.max_batch = max_batch
        self.max_length = max_length
        self.waiting: queue.Queue[Request | None] = queue.Queue(max_queue)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Puts a request into the queue; raises Busy where that is full."""
        try:
            self.waiting.put_nowait(request)
        except queue.Full:
            raise Busy from None

    def close(self) -> None:
        """Ends the thread after the present batch."""
        self.waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.max_batch and not self.waiting.empty():
                if (following := self.waiting.get()) is None:
                    self._answer(batch)
                    return
                batch.append(following)
            self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        ready: list[tuple[Request, Conversation, list[Tensor]]] = []
        for request in batch:
            try:
                if request.is_over:
                    raise TimeoutError
                conv, images = self._conversation(request)
                self.chat.check_length(conv, images, request.options, self.max_length)
                ready.append((request, conv, images))
            except Exception as error:  # told to the one who asked; the server goes on
                _tell_error(request, error)
        if not ready:
            return
        requests, convs, img_lists = map(list, zip(*ready, strict=True))
        try:
            for row, answer in self.chat.stream_batch(convs, img_lists, [r.options for r in requests], self.max_length):
                requests[row].tell(answer)
        except Exception as error:  # out of memory, say: told to all, and the server goes on
            for request in requests:
                _tell_error(request, error)

    def _conversation(self, request: Request) -> tuple[Conversation, list[Tensor]]:
        conv, images = self.chat.template.copy(), []
        conv.system = f"{conv.system} {request.system}".strip()
        for role, parts in request.messages:
            if role == "assistant":
                conv.append_message(conv.roles[1], " ".join(map(str, parts)))
                continue
            for part in parts:
                if isinstance(part, Tensor):
                    self.chat.upload_img(part, conv, images)
            if text := " ".join(part for part in parts if isinstance(part, str)).strip():
                self.chat.ask(text, conv)
        plain_stop = request.options.stop
        request.options.stop = lambda ids: request.is_over or plain_stop(ids)
        return conv, images


def _tell_error(request: Request, error: Exception) -> None:
    if not isinstance(error, UserError | TimeoutError):
        logging.exception("A request failed.")
    request.tell(error)
