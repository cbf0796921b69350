"""An OpenAI-compatible server: /v1/chat/completions with images, /v1/models, /health."""

import asyncio
import hmac
import json
import queue
import socket
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve import api_requests
from minigpt4.serve.api_requests import ApiError, Body, Limits, read_body
from minigpt4.serve.engine import Engine
from minigpt4.serve.engine import Request as EngineRequest

MAX_CONNECTIONS = 128  # each may hold a request's whole body in memory


def build_app(engine: Engine, name: str, limits: Limits, api_key: str | None = None) -> FastAPI:
    """Builds the server's application.

    Args:
        engine: answers the requests.
        name: of the model; requests have to give it.
        limits: what a request may ask for.
        api_key: the bearer token that clients have to send; None accepts all clients.
    """
    app = FastAPI(title="MiniGPT-4", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}; see /v1/chat/completions, /v1/models, /health."
        return JSONResponse(ApiError(text, code="not_found").body, error.status_code)

    def check_key(request: Request) -> None:
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(key.encode(), api_key.encode()):
            text = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            raise ApiError(text, status=401, code="bad_key")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": engine.waiting.qsize()}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "minigpt4"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request) -> StreamingResponse | JSONResponse:
        check_key(request)
        body = await read_body(request, limits.max_body_bytes)
        if body.model != name:
            text = f"There is no model '{body.model}'; this server has '{name}'."
            raise ApiError(text, "model", status=404, code="no_model")
        pending = await _submit(body, limits, engine)
        if body.stream:
            first = await anext(pending.answers)  # until here, an error still has its HTTP status
            return StreamingResponse(_events(pending, first, body), media_type="text/event-stream")
        last = asyncio.create_task(_last(pending.answers))
        while not (await asyncio.wait({last}, timeout=0.5))[0]:
            if await request.is_disconnected():
                pending.request.cancelled.set()
        return JSONResponse(_completion(last.result(), name))

    return app


def serve(app: FastAPI, host: str, port: int) -> None:
    """Runs the server until it is interrupted; UserError if the port is in use."""
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be used ({error.strerror}); give another.") from error
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)
    uvicorn.Server(config).run([listener])


class _Pending(NamedTuple):
    """A submitted request: its growing answer, and the strings whose beginning is held back in a stream."""

    request: EngineRequest
    answers: AsyncIterator[Answer]
    stop_strings: list[str]


async def _submit(body: Body, limits: Limits, engine: Engine) -> _Pending:
    """Checks a request, loads its images and puts it into the engine's queue."""
    chat = engine.chat
    api_requests.check_messages(body.messages, limits)
    options, stop_strings = api_requests.read_options(body, limits, chat.model.llama_tokenizer.decode)
    system, messages = await api_requests.load_messages(body.messages, limits, chat.preprocess_image)
    loop, updates = asyncio.get_running_loop(), asyncio.Queue()

    def truncate(text: str) -> str:
        return min((text.split(stop)[0] for stop in stop_strings), key=len, default=text)

    def on_update(update: Answer | Exception) -> None:  # called on the engine's thread
        if isinstance(update, Answer):  # a snapshot, as the engine's own grows
            decode = update.decode
            update = replace(update, ids=list(update.ids), decode=lambda ids: truncate(decode(ids)))
        loop.call_soon_threadsafe(updates.put_nowait, update)

    request = EngineRequest(system, messages, options, on_update, limits.timeout_seconds)
    try:
        engine.submit(request)
    except queue.Full:
        raise ApiError("Too many requests are waiting; try again later.", status=429, code="queue_full") from None
    return _Pending(request, _receive(request, updates), [chat.template.stop_string, *stop_strings])


async def _receive(request: EngineRequest, updates: asyncio.Queue) -> AsyncIterator[Answer]:
    """The answer as it grows; closing the iterator cancels the request."""
    try:
        while True:
            remaining = request.arrival + request.timeout_seconds - time.monotonic()
            try:
                update = await asyncio.wait_for(updates.get(), max(remaining, 0))
                if isinstance(update, TimeoutError):
                    raise update
            except TimeoutError as error:
                text = f"The answer took longer than {request.timeout_seconds:g} s."
                raise ApiError(text, status=503, code="timeout") from error
            if isinstance(update, UserError):
                raise ApiError(str(update), "messages")
            if isinstance(update, Exception):
                raise ApiError("The model failed; the server's log has the reason.", status=500, code="internal")
            yield update
            if update.finish_reason is not None:
                return
    finally:
        request.cancelled.set()


async def _last(answers: AsyncIterator[Answer]) -> Answer:
    async for answer in answers:
        last = answer
    return last


def _head(kind: str, name: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.ids),
        "total_tokens": answer.prompt_tokens + len(answer.ids),
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _completion(answer: Answer, name: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    return _head("chat.completion", name) | {"choices": [choice], "usage": _usage(answer)}


async def _events(pending: _Pending, answer: Answer, body: Body) -> AsyncIterator[str]:
    """The server-sent events of a stream; ``answer`` is its first update."""
    head = _head("chat.completion.chunk", body.model)

    def event(delta: dict[str, str], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps(head | {'choices': [choice]})}\n\n"

    sent = ""
    yield event({"role": "assistant", "content": ""})
    try:
        while True:
            is_final = answer.finish_reason is not None
            text = answer.text if is_final else hold_back_partial_stop(answer.text, pending.stop_strings)
            if text.startswith(sent) and len(text) > len(sent):
                yield event({"content": text[len(sent) :]})
                sent = text
            if is_final:
                break
            answer = await anext(pending.answers)
        yield event({}, answer.finish_reason)
        if body.stream_options.get("include_usage"):
            yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(answer)})}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        pending.request.cancelled.set()
        await pending.answers.aclose()
