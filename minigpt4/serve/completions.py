"""/v1/chat/completions: loads a request's images, has the engine answer it, and sends the answer, whole or streamed."""

import asyncio
import json
import logging
import queue
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve import api_requests
from minigpt4.serve.api_requests import ApiError, Body, Limits
from minigpt4.serve.engine import Engine
from minigpt4.serve.engine import Request as EngineRequest
from minigpt4.serve.image_decoder import ImageDecoder

T = TypeVar("T")
_INTERNAL = {"status": 500, "code": "internal"}
_QUEUE_FULL = {"message": "Too many requests are waiting; try again later.", "status": 429, "code": "queue_full"}


@dataclass
class Completions:
    """Chat completions of the model ``name``."""

    engine: Engine
    name: str
    limits: Limits
    decoder: ImageDecoder = field(default_factory=ImageDecoder)
    # An own processor may get images of 400 MB.
    processing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    async def create(self, request: Request) -> JSONResponse | StreamingResponse:
        """The response to a request; ApiError if it is refused. A client that disconnects cancels it."""
        arrival, client = time.monotonic(), request.client.host if request.client else ""
        try:
            async with asyncio.timeout(self.limits.timeout_seconds):
                body = await api_requests.read_body(request, self.limits.max_body_bytes)
                if body.model != self.name:
                    text = f"There is no model '{body.model}'; this server has '{self.name}'."
                    raise ApiError(text, "model", status=404, code="no_model")
                answers = await _unless_disconnected(request, self._submit(body, client, arrival))
        except TimeoutError as error:
            raise self._timeout() from error
        if body.stream:
            first = await _unless_disconnected(request, anext(answers))  # an error still has its HTTP status
            stop_strings = [self.engine.chat.template.stop_string, *body.stop]
            return StreamingResponse(_events(answers, first, body, stop_strings), media_type="text/event-stream")
        answer = await _unless_disconnected(request, _last(answers))
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return JSONResponse(_head("chat.completion", self.name) | {"choices": [choice], "usage": _usage(answer)})

    async def _submit(self, body: Body, client: str, arrival: float) -> AsyncIterator[Answer]:
        """Checks a request, loads its images and puts it into the engine's queue; returns the growing answer."""
        api_requests.check_messages(body.messages, self.limits)
        options = api_requests.read_options(body, self.limits, self.engine.chat.model.llama_tokenizer.decode)
        messages = await api_requests.load_messages(
            body.messages, self.limits, lambda data: self._process_image(data, client)
        )
        loop, updates = asyncio.get_running_loop(), asyncio.Queue()

        def truncate(text: str) -> str:
            return min((text.split(stop)[0] for stop in body.stop), key=len, default=text)

        def on_update(update: Answer | Exception) -> None:  # called on the engine's thread
            if isinstance(update, Answer):  # a snapshot, as the engine's own grows
                decode = update.decode
                update = replace(update, ids=list(update.ids), decode=lambda ids: truncate(decode(ids)))
            with suppress(RuntimeError):  # the loop is closed, as the server has ended
                loop.call_soon_threadsafe(updates.put_nowait, update)

        request = EngineRequest(messages, options, on_update, self.limits.timeout_seconds, client, arrival=arrival)
        try:
            self.engine.submit(request)
        except queue.Full:
            raise ApiError(**_QUEUE_FULL) from None
        return self._receive(request, updates)

    async def _process_image(self, data: bytes, client: str) -> Tensor:
        if self.decoder.num_waiting(client) >= self.engine.waiting.maxsize:
            raise ApiError(**_QUEUE_FULL)
        size = getattr(self.engine.chat.vis_processor, "first_size", None)
        try:
            image = await asyncio.wrap_future(self.decoder.submit(data, size=size, client=client))
            async with self.processing:
                return await asyncio.to_thread(self.engine.chat.preprocess_image, image)
        except UserError:
            raise
        except Exception as error:
            logging.exception("An image could not be processed.")
            raise ApiError("An image could not be processed; the server's log has the reason.", **_INTERNAL) from error

    async def _receive(self, request: EngineRequest, updates: asyncio.Queue) -> AsyncIterator[Answer]:
        """The answer as it grows; closing the iterator cancels the request."""
        try:
            is_over = False
            while not is_over:
                remaining = request.arrival + request.timeout_seconds - time.monotonic()
                update = await asyncio.wait_for(updates.get(), max(remaining, 0))
                if isinstance(update, Exception):
                    raise update
                is_over = update.finish_reason is not None
                yield update
        except TimeoutError as error:
            raise self._timeout() from error
        except UserError as error:
            raise ApiError(str(error), "messages") from error
        except Exception as error:
            raise ApiError("The model failed; the server's log has the reason.", **_INTERNAL) from error
        finally:
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
            raise ApiError("The client disconnected.")
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _last(answers: AsyncIterator[Answer]) -> Answer:
    async with aclosing(answers):
        while not (answer := await anext(answers)).finish_reason:
            pass
    return answer


def _head(kind: str, name: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, completion = answer.prompt_tokens, len(answer.ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usage | {"prompt_tokens_details": {"cached_tokens": answer.cached_tokens}}


async def _events(
    answers: AsyncIterator[Answer], answer: Answer, body: Body, stop_strings: Sequence[str]
) -> AsyncIterator[str]:
    """The server-sent events of a stream; ``answer`` is its first update."""
    head = _head("chat.completion.chunk", body.model)

    def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    sent = ""
    yield event({"role": "assistant", "content": ""})
    try:
        while True:
            text = answer.text if answer.finish_reason else hold_back_partial_stop(answer.text, stop_strings)
            if text.startswith(sent) and text != sent:
                yield event({"content": text[len(sent) :]})
                sent = text
            if answer.finish_reason:
                break
            answer = await anext(answers)
        yield event({}, answer.finish_reason)
        if body.stream_options.get("include_usage"):
            yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(answer)})}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        await answers.aclose()
