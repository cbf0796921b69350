"""/v1/chat/completions: loads a request's images, has the engine answer it, and sends the answer, whole or streamed."""

import asyncio
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from torch import Tensor

from minigpt4.common.errors import ContextTooLong, UserError
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve import api_requests, constrained
from minigpt4.serve.api_requests import ApiError, Body, Limits
from minigpt4.serve.engine import Engine
from minigpt4.serve.engine import Request as EngineRequest
from minigpt4.serve.image_decoder import ImageDecoder
from minigpt4.serve.image_sources import load_image
from minigpt4.serve.metrics import Metrics
from minigpt4.serve.remote_lm import RemoteError
from minigpt4.serve.responses import ResponseWriter

T = TypeVar("T")
_INTERNAL = {"status": 500, "code": "internal"}
_FAILED = "The model failed; the server's log has the reason."
_QUEUE_FULL = {"message": "Too many requests are waiting; try again later.", "status": 429, "code": "queue_full"}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect the events


class _Updates:
    """The latest update of each answer of a request; a reader that is late misses those before it.

    Many streams then cost the event loop one update each per round, however fast the model is.
    """

    def __init__(self) -> None:
        self._loop, self._arrived, self._lock = asyncio.get_running_loop(), asyncio.Event(), threading.Lock()
        self._latest: dict[int, Answer | Exception] = {}

    def put(self, index: int, update: Answer | Exception) -> None:
        """Called on the engine's thread."""
        with self._lock:
            is_first = not self._latest
            self._latest[index] = update
        if is_first:
            with suppress(RuntimeError):  # the loop is closed, as the server has ended
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> dict[int, Answer | Exception]:
        """What has arrived since the last call, by index; waits for it."""
        await self._arrived.wait()
        self._arrived.clear()
        with self._lock:
            latest, self._latest = self._latest, {}
        return latest


@dataclass
class Completions:
    """Chat completions of the model ``name``; ``defaults`` are the options of requests that do not set them."""

    engine: Engine
    name: str
    limits: Limits
    metrics: Metrics
    defaults: GenerationOptions = field(default_factory=GenerationOptions)
    decoder: ImageDecoder = field(default_factory=ImageDecoder)
    _vocabulary: constrained.Vocabulary | None = None
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for the name of another model."""
        if name != self.name:
            text = f"There is no model '{name}'; this server has '{self.name}'."
            raise ApiError(text, "model", status=404, code="model_not_found")

    async def create(self, request: Request, client: str) -> JSONResponse | StreamingResponse:
        """The response to a request; ApiError if it is refused. A client that disconnects cancels it."""
        arrival = time.monotonic()
        try:
            async with asyncio.timeout(self.limits.timeout_seconds):
                body = await api_requests.read_body(request, self.limits.max_body_bytes)
                self.check_model(body.model)
                updates = await _unless_disconnected(request, self._submit(body, client, arrival))
        except TimeoutError as error:
            raise self._timeout() from error
        counted = _count_tokens(updates, request)
        chat = self.engine.chat
        writer = ResponseWriter(body, [chat.template.stop_string, *body.stop], self._vocabulary, chat.has_boxes)
        if body.stream:
            first = await _unless_disconnected(request, anext(counted))  # an error still has its HTTP status
            events = writer.events(counted, first)
            return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)
        answers = await _unless_disconnected(request, _last(counted))
        return JSONResponse(writer.whole([answers[i] for i in range(body.n)]))

    async def _submit(self, body: Body, client: str, arrival: float) -> AsyncIterator[tuple[int, Answer]]:
        """Checks a request, loads its images and puts it into the engine's queue; returns the growing answers."""
        api_requests.check_messages(body.messages, self.limits)
        tokenizer = self.engine.chat.model.llama_tokenizer
        options = api_requests.read_options(body, self.limits, self.defaults, tokenizer.decode)
        if body.logit_bias:
            num_tokens = self.engine.chat.model.llama_model.get_input_embeddings().num_embeddings
            bias = constrained.add_bias(body.logit_bias, num_tokens)
            options = replace(options, logits_processors=[*options.logits_processors, bias])
        if body.logprobs or body.response_format.type != "text":
            vocabulary = await self._read_vocabulary("logprobs" if body.logprobs else "response_format")
        grammar = None
        if body.response_format.type != "text":
            grammar = await asyncio.to_thread(constrained.compile_format, body.response_format, vocabulary)
        messages = await api_requests.load_messages(body.messages, lambda url: self._load_image(url, client))
        requests, checks, updates = [], [], _Updates()
        for i in range(body.n):
            own = options if options.seed is None else replace(options, seed=options.seed + i)
            if grammar is not None:
                processor = constrained.GrammarProcessor(vocabulary, grammar)
                own = replace(own, logits_processors=[*own.logits_processors, processor])
                checks.append(processor.check)
            on_update = self._updater(i, updates, body, arrival)
            requests.append(
                EngineRequest(messages, own, on_update, self.limits.timeout_seconds, client, arrival=arrival)
            )
        try:
            self.engine.submit(*requests)
        except queue.Full:
            raise ApiError(**_QUEUE_FULL) from None
        return self._receive(requests, updates, checks)

    async def _read_vocabulary(self, param: str) -> constrained.Vocabulary:
        """The vocabulary, which is read once; an error names the field ``param`` that needs it."""
        async with self._reading:
            if self._vocabulary is None:
                chat = self.engine.chat
                arguments = (chat.model.llama_tokenizer, chat.model.eos_ids, chat.template.stop_string, param)
                self._vocabulary = await asyncio.to_thread(constrained.read_vocabulary, *arguments)
        return self._vocabulary

    def _updater(
        self, index: int, updates: _Updates, body: Body, arrival: float
    ) -> Callable[[Answer | Exception], None]:
        """What the engine calls on its thread with one answer as it grows, which goes into ``updates``."""
        observe, stop = self.metrics.observer(arrival), body.stop
        eos_ids = set(self.engine.chat.model.eos_ids)

        def decode(answer: Answer, ids: Sequence[int]) -> str:
            text = answer.decode([i for i in ids if i not in eos_ids])  # some templates keep the end token
            return min((text.split(end)[0] for end in stop), key=len, default=text)

        def on_update(update: Answer | Exception) -> None:
            if isinstance(update, Answer):  # a snapshot, as the engine's own grows
                observe(update)
                if not body.stream and update.finish_reason is None:
                    return
                own = functools.partial(decode, update)
                update = replace(update, ids=list(update.ids), logprobs=list(update.logprobs), decode=own)
            updates.put(index, update)

        return on_update

    async def _load_image(self, url: str, client: str) -> Tensor:
        data = await load_image(url, self.limits)
        if self.decoder.num_waiting(client) >= self.engine.waiting.maxsize:
            raise ApiError(**_QUEUE_FULL)
        size = getattr(self.engine.chat.vis_processor, "first_size", None)
        try:
            process = self.engine.chat.preprocess_image
            return await asyncio.wrap_future(self.decoder.submit(data, size=size, client=client, process=process))
        except UserError:
            raise
        except Exception as error:
            logging.exception("An image could not be processed.")
            raise ApiError("An image could not be processed; the server's log has the reason.", **_INTERNAL) from error

    async def _receive(
        self, requests: Sequence[EngineRequest], updates: _Updates, checks: Sequence[Callable[[], None]]
    ) -> AsyncIterator[tuple[int, Answer]]:
        """(Index, answer) as the answers of ``requests`` grow; closing the iterator cancels them."""
        try:
            num_running, end = len(requests), requests[0].arrival + self.limits.timeout_seconds
            while num_running:
                arrived = await asyncio.wait_for(updates.get(), max(end - time.monotonic(), 0))
                for index, update in arrived.items():
                    if isinstance(update, UserError | TimeoutError):
                        raise update
                    if isinstance(update, Exception):  # the engine has logged it
                        raise ApiError(_FAILED, **_INTERNAL) from update
                    if time.monotonic() > end:  # the engine ends answers that are out of time, too
                        raise TimeoutError
                    if update.finish_reason is not None:
                        num_running -= 1
                        if checks:  # those of answers that go on are used by the engine's thread
                            checks[index]()
                    yield index, update
        except TimeoutError as error:
            raise self._timeout() from error
        except RemoteError as error:
            raise ApiError(str(error), status=502, code="language_model_server") from error
        except UserError as error:
            code = "context_length_exceeded" if isinstance(error, ContextTooLong) else "bad_request"
            raise ApiError(str(error), "messages", code=code) from error
        except ApiError:
            raise
        except Exception as error:
            logging.exception("A request failed.")
            raise ApiError(_FAILED, **_INTERNAL) from error
        finally:
            for request in requests:
                request.cancelled.set()

    def _timeout(self) -> ApiError:
        text = f"The answer took longer than {self.limits.timeout_seconds:g} s."
        return ApiError(text, status=503, code="timeout")


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client disconnects."""

    async def disconnection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(disconnection())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError("The client disconnected.", status=499, code="disconnected")
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _count_tokens(
    updates: AsyncIterator[tuple[int, Answer]], request: Request
) -> AsyncIterator[tuple[int, Answer]]:
    """Passes updates on; the access log reads their number of tokens, and the reason of an error."""
    counts: dict[int, int] = {}
    async with aclosing(updates):
        try:
            async for index, answer in updates:
                counts[index] = len(answer.ids)
                request.state.num_tokens = sum(counts.values())
                yield index, answer
        except ApiError as error:
            request.state.reason = error.code
            raise


async def _last(updates: AsyncIterator[tuple[int, Answer]]) -> dict[int, Answer]:
    """The final answers by their index."""
    async with aclosing(updates):
        return {index: answer async for index, answer in updates}
