"""One thread that answers for all clients by continuous batching: requests join the running batch at its next step."""

import hashlib
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby

from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.answer_batch import Answer, AnswerBatch, Plan, tokens_that_fit
from minigpt4.conversation.conversation import IMAGE_MESSAGE, Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions

MAX_IMAGES_PER_STEP = 4  # are encoded while running answers wait
MAX_KEPT_IMAGES = 256  # whose embeddings are kept for the next turns of their chats
MAX_KEPT_CHATS = 64  # whose keys and values are kept, within half of max_batch_tokens


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


@dataclass(eq=False)
class _Planned:
    """A request that joins as soon as there is room."""

    request: Request
    conv: Conversation
    pixels: list[Tensor]
    plan: Plan


@dataclass
class Stats:
    """What the engine is doing, and how many tokens it has generated."""

    num_waiting: int = 0
    num_running: int = 0
    num_tokens: int = 0


class Engine:
    """Answers waiting requests together, in the order of their arrival, as far as ``max_batch_tokens`` has room.

    Only the engine's thread may use ``chat`` from now on, ``preprocess_image`` apart.

    Args:
        chat: its prefix cache is resized to keep the chats of many clients.
        max_batch: requests that are answered at the same time.
        max_queue: requests that may wait.
        max_length: tokens of prompt and answer.
        max_batch_tokens: positions of the key-value cache for all running requests, padding included; by default what
            fits into the free memory. UserError if one request may need more.
    """

    def __init__(
        self,
        chat: Chat,
        max_batch: int = 64,
        max_queue: int = 64,
        max_length: int = 2000,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.chat, self.max_batch, self.max_length = chat, max_batch, max_length
        if max_batch_tokens is None:
            max_batch_tokens = min(max_batch * max_length, max(max_length, tokens_that_fit(chat)))
        if max_batch_tokens < max_length:
            text = f"--max-batch-tokens is {max_batch_tokens}, but one request may need {max_length}: give more."
            raise UserError(text)
        self.max_batch_tokens = max_batch_tokens
        chat.prefixes.num_chats, chat.prefixes.max_tokens = MAX_KEPT_CHATS, self.max_batch_tokens // 2
        self.waiting: queue.Queue[Request | None] = queue.Queue(max_queue)  # None ends the thread
        self._batch = AnswerBatch(chat, max_length, self.max_batch_tokens, shortens_answers=True)
        self._next: _Planned | None = None  # the first in the queue, which waits for room
        self._running: dict[int, tuple[Answer, Request]] = {}  # by the answers' ids
        self._embeddings: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()  # by client and content
        self._num_tokens, self._is_closing = 0, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> Stats:
        """The present numbers."""
        return Stats(self.waiting.qsize() + (self._next is not None), len(self._running), self._num_tokens)

    def submit(self, request: Request) -> None:
        """Puts a request into the queue; raises ``queue.Full`` if there is no place."""
        self.waiting.put_nowait(request)

    def position(self, request: Request) -> int:
        """How many requests wait before one that was submitted; 0 once it is being answered."""
        with self.waiting.mutex:
            waiting = [*([self._next.request] if self._next else []), *self.waiting.queue]
        return waiting.index(request) if request in waiting else 0

    def close(self, timeout_seconds: float | None = None) -> None:
        """Ends the thread after the waiting requests; stops waiting for it after ``timeout_seconds``."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=timeout_seconds)
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while self._running or self._next or not self._is_closing:
            self._admit()
            for answer, request in list(self._running.values()):
                if request.is_over:
                    self._batch.remove(answer)
                    answer.finish_reason = "stop"
                    self._report(answer)
            if self._running:
                self._step()

    def _step(self) -> None:
        try:
            grown = self._batch.step()
        except Exception as error:  # out of memory, for example; the server continues
            requests = [request for _, request in self._running.values()]
            self._running.clear()
            _report_error(requests, error)
            return
        for answer in grown:
            self._num_tokens += 1
            self._report(answer)

    def _report(self, answer: Answer) -> None:
        _, request = self._running[id(answer)]
        if answer.finish_reason:
            del self._running[id(answer)]
        request.on_update(answer)

    def _admit(self) -> None:
        """Adds waiting requests to the batch, as far as there is room; waits for one where there is nothing to do."""
        admitted: list[_Planned] = []
        while len(self._running) + len(admitted) < self.max_batch:
            if sum(len(planned.pixels) for planned in admitted) >= MAX_IMAGES_PER_STEP:
                break
            if self._next is None and not self._take(may_wait=not (self._running or admitted)):
                break
            if self._next is None:  # it cannot be answered
                continue
            if not self._batch.has_room([planned.plan for planned in (*admitted, self._next)]):
                break
            admitted.append(self._next)
            self._next = None
        try:
            embeddings = self._encode(admitted)
        except Exception as error:
            _report_error([planned.request for planned in admitted], error)
            return
        for planned, images in zip(admitted, embeddings, strict=True):
            answer = self._batch.add(planned.conv, images, planned.plan)
            self._running[id(answer)] = answer, planned.request

    def _take(self, may_wait: bool) -> bool:
        """Takes a request from the queue, and plans it as the next one where possible; False if there is none."""
        try:
            request = self.waiting.get(block=may_wait) if not self._is_closing else None
        except queue.Empty:
            return False
        if request is None:
            self._is_closing = True
            return False
        try:
            self._next = self._plan(request)
        except Exception as error:  # concerns this request only
            _report_error([request], error)
        return True

    def _plan(self, request: Request) -> _Planned:
        """A request's conversation, whose parts keep their order; raises whatever makes it unanswerable."""
        if request.is_over:
            raise TimeoutError
        conv, pixels = replace(self.chat.template.copy(), owner=request.client), []
        for role, parts in request.messages:
            if role not in ("system", "developer", "assistant"):
                for is_image, group in groupby(parts, lambda part: isinstance(part, Tensor)):
                    if is_image:
                        images = list(group)
                        pixels += images
                        conv.messages += [[conv.roles[0], IMAGE_MESSAGE] for _ in images]
                    elif text := " ".join(group).strip():
                        self.chat.ask(text, conv)
                continue
            text = " ".join(part for part in parts if isinstance(part, str))
            if role == "assistant":
                conv.append_message(conv.roles[1], text or " ")  # without a text, the separator would be left out
            else:
                conv.system = f"{conv.system} {text}".strip()
        return _Planned(request, conv, pixels, self._batch.plan(conv, len(pixels), request.options))

    def _encode(self, admitted: list[_Planned]) -> list[list[Tensor]]:
        """The embeddings [1, Q, L] of each request's images; those of earlier turns are known."""
        keys = [
            [(planned.request.client, hashlib.sha256(image.numpy().tobytes()).digest()) for image in planned.pixels]
            for planned in admitted
        ]
        pixels = {
            key: image
            for planned, own in zip(admitted, keys, strict=True)
            for key, image in zip(own, planned.pixels, strict=True)
        }
        new = {key: image for key, image in pixels.items() if key not in self._embeddings}
        embeddings = list(new.values())
        self.chat.encode_img(embeddings)
        self._embeddings |= zip(new, embeddings, strict=True)
        for key in pixels:
            self._embeddings.move_to_end(key)
        found = [[self._embeddings[key] for key in own] for own in keys]
        while len(self._embeddings) > MAX_KEPT_IMAGES:
            self._embeddings.popitem(last=False)
        return found


def _report_error(requests: list[Request], error: Exception) -> None:
    if not isinstance(error, UserError | TimeoutError):
        logging.error("A request failed.", exc_info=error)
    for request in requests:
        request.on_update(error)
