"""One thread that answers for all clients by continuous batching: requests join the running batch at its next step."""

import hashlib
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from minigpt4.common import device as devices
from minigpt4.common.errors import UserError
from minigpt4.conversation.answer_batch import Answer, AnswerBatch, Plan, tokens_that_fit
from minigpt4.conversation.conversation import IMAGE_MESSAGE, Chat, Conversation
from minigpt4.serve.request_queue import Request, RequestQueue

MAX_IMAGES_PER_STEP = 4  # are encoded while running answers wait
MAX_KEPT_IMAGES = 256  # whose embeddings are kept for the next turns of their chats
MAX_KEPT_CHATS = 64  # whose keys and values are kept, within half of max_batch_tokens


@dataclass(eq=False)
class _Planned:
    """A request that joins as soon as there is room."""

    request: Request
    conv: Conversation
    pixels: list[Tensor]
    plan: Plan


@dataclass
class Stats:
    """What the engine is doing."""

    num_waiting: int = 0
    num_running: int = 0


class Engine:
    """Answers waiting requests together as far as ``max_batch_tokens`` allows, those of several clients in turns.

    Only the engine's thread may use ``chat`` from now on, ``preprocess_image`` apart. It computes with as many threads
    as the one that creates the engine, which should be the one that has loaded the model.

    Args:
        chat: its prefix cache is resized to keep the chats of many clients.
        max_batch: requests that are answered at the same time.
        max_queue: requests of one client that may wait.
        max_length: tokens of prompt and answer.
        max_batch_tokens: positions of the key-value cache for all running requests, padding included; by default what
            fits into the free memory. UserError if one request may need more.
        fills_batches: waits for requests while there is room in the batch, until ``close``.
        batch: computes the answers, by default with the chat's LM; ``max_length`` is then its own.
    """

    def __init__(
        self,
        chat: Chat,
        max_batch: int = 64,
        max_queue: int = 64,
        max_length: int = 2000,
        max_batch_tokens: int | None = None,
        fills_batches: bool = False,
        batch: AnswerBatch | None = None,
    ) -> None:
        if batch is not None:
            max_length, max_batch_tokens = batch.max_length, max_batch * batch.max_length
        self.chat, self.max_batch, self.max_length = chat, max_batch, max_length
        self.fills_batches = fills_batches
        if max_batch_tokens is None:
            max_batch_tokens = min(max_batch * max_length, max(max_length, tokens_that_fit(chat)))
        if max_batch_tokens < max_length:
            text = f"--max-batch-tokens is {max_batch_tokens}, but one request may need {max_length}: give more."
            raise UserError(text)
        self.max_batch_tokens = max_batch_tokens
        chat.prefixes.num_chats, chat.prefixes.max_tokens = MAX_KEPT_CHATS, self.max_batch_tokens // 2
        self.waiting = RequestQueue(max_queue)
        if batch is None:
            chat.records_steps = True
            batch = AnswerBatch(chat, max_length, max_batch_tokens, shortens_answers=True)
        self._batch = batch
        self._next: _Planned | None = None  # was taken from the queue, and waits for memory
        self._running: dict[int, tuple[Answer, Request]] = {}  # by the answers' ids
        self._embeddings: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()  # by client and content
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="engine", daemon=True)
        devices.release_threads()
        self._thread.start()

    @property
    def stats(self) -> Stats:
        """The present numbers."""
        return Stats(self.waiting.qsize() + (self._next is not None), len(self._running))

    @property
    def is_alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive()

    @property
    def problem(self) -> str:
        """Why requests cannot be answered now, as a sentence; empty where they can."""
        return self._batch.problem if self.is_alive else "The engine has ended; the log has the reason."

    def submit(self, *requests: Request) -> None:
        """Puts all requests of a client into the queue, or none; raises ``queue.Full`` if there is no place."""
        self.waiting.put(requests)

    def position(self, request: Request) -> int:
        """How many requests wait before one that was submitted; 0 once it is being answered."""
        position = self.waiting.position(request)
        return 0 if position is None else position + (self._next is not None)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Ends the thread after the waiting requests; stops waiting for it after ``timeout_seconds``."""
        self.waiting.close()
        self._thread.join(timeout_seconds)

    def _run(self, num_threads: int) -> None:
        devices.set_threads(num_threads)  # of this thread's operations; those that read images have one
        while self._running or self._next or not self.waiting.is_done:
            try:
                self._work()
            except Exception as error:  # out of memory, for example; the server continues
                requests = [request for _, request in self._running.values()]
                self._running.clear()
                self._batch.clear()
                _report_error(requests, error)

    def _work(self) -> None:
        self._admit()
        for answer, request in list(self._running.values()):
            if request.is_over:
                self._batch.remove(answer)
                answer.finish_reason = "stop"
                self._report(answer)
        if self._running:
            for answer in self._batch.step():
                self._report(answer)

    def _report(self, answer: Answer) -> None:
        _, request = self._running[id(answer)]
        if answer.finish_reason:
            del self._running[id(answer)]
        if answer.error is not None:
            _report_error([request], answer.error)
        else:
            _notify(request, answer)

    def _admit(self) -> None:
        """Adds waiting requests to the batch, as far as there is room; waits for one where there is nothing to do."""
        admitted: list[_Planned] = []
        while len(self._running) + len(admitted) < self.max_batch:
            if sum(len(planned.pixels) for planned in admitted) >= MAX_IMAGES_PER_STEP:
                break
            if self._next is not None and self._next.request.is_over:
                _report_error([self._next.request], TimeoutError())
                self._next = None
            may_wait = self.fills_batches or not (self._running or admitted)
            if self._next is None and not self._take(may_wait):
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
        request = self.waiting.take(may_wait)
        if request is None:
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
                conv.add_system(text)
        plan = self._batch.plan(conv, len(pixels), request.options)
        if plan.num_tokens > self.max_batch_tokens:
            text = f"--num-beams {plan.options.num_beams} needs the memory of {plan.num_tokens} tokens for this request"
            raise UserError(f"{text}, of {self.max_batch_tokens} (--max-batch-tokens); lower it, or ask for less.")
        return _Planned(request, conv, pixels, plan)

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
        _notify(request, error)


def _notify(request: Request, update: Answer | Exception) -> None:
    try:
        request.on_update(update)
    except Exception:  # of one client; the others' answers continue
        logging.exception("An update could not be delivered.")
