"""An OpenAI-compatible server: /v1/chat/completions with images, /v1/models, /health."""

import asyncio
import hmac
import json
import queue
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve import api_requests
from minigpt4.serve.access import OriginCheck, check_api_key
from minigpt4.serve.api_requests import ApiError, Body, Limits
from minigpt4.serve.engine import Engine
from minigpt4.serve.engine import Request as EngineRequest


def build_app(
    engine: Engine,
    name: str,
    limits: Limits,
    api_key: str | None = None,
    host: str = "127.0.0.1",
    origins: Sequence[str] = (),
) -> OriginCheck:
    """Builds the server of the model ``name``; ``host`` and ``origins`` are those of ``OriginCheck``.

    Clients have to send ``api_key``, if there is one, as a bearer token. Raises UserError if no client could send it.
    """
    check_api_key(api_key)
    app = FastAPI(title="MiniGPT-4", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}; see /v1/chat/completions, /v1/models, /health."
        return JSONResponse(ApiError(text, code="not_found").body, error.status_code)

    async def check_key(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), (api_key or "").encode())
        if api_key is not None and not is_right:
            text = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            raise ApiError(text, status=401, code="bad_key")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": engine.waiting.qsize()}

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "minigpt4"}]}

    @app.post("/v1/chat/completions", response_model=None, dependencies=[Depends(check_key)])
    async def complete(request: Request) -> StreamingResponse | JSONResponse:
        body = await api_requests.read_body(request, limits.max_body_bytes)
        if body.model != name:
            text = f"There is no model '{body.model}'; this server has '{name}'."
            raise ApiError(text, "model", status=404, code="no_model")
        answers = await _submit(body, limits, engine)
        if body.stream:
            first = await anext(answers)  # until here, an error still has its HTTP status
            stop_strings = [engine.chat.template.stop_string, *body.stop]
            return StreamingResponse(_events(answers, first, body, stop_strings), media_type="text/event-stream")
        async with aclosing(answers):
            async for answer in answers:
                if answer.finish_reason or await request.is_disconnected():
                    break
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
        return JSONResponse(_head("chat.completion", name) | {"choices": [choice], "usage": _usage(answer)})

    return OriginCheck(app, host, origins)


async def _submit(body: Body, limits: Limits, engine: Engine) -> AsyncIterator[Answer]:
    """Checks a request, loads its images and puts it into the engine's queue; returns the growing answer."""
    api_requests.check_messages(body.messages, limits)
    options = api_requests.read_options(body, limits, engine.chat.model.llama_tokenizer.decode)
    messages = await api_requests.load_messages(body.messages, limits, engine.chat.preprocess_image)
    loop, updates = asyncio.get_running_loop(), asyncio.Queue()

    def truncate(text: str) -> str:
        return min((text.split(stop)[0] for stop in body.stop), key=len, default=text)

    def on_update(update: Answer | Exception) -> None:  # called on the engine's thread
        if isinstance(update, Answer):  # a snapshot, as the engine's own grows
            decode = update.decode
            update = replace(update, ids=list(update.ids), decode=lambda ids: truncate(decode(ids)))
        loop.call_soon_threadsafe(updates.put_nowait, update)

    request = EngineRequest(messages, options, on_update, limits.timeout_seconds)
    try:
        engine.submit(request)
    except queue.Full:
        raise ApiError("Too many requests are waiting; try again later.", status=429, code="queue_full") from None
    return _receive(request, updates)


async def _receive(request: EngineRequest, updates: asyncio.Queue) -> AsyncIterator[Answer]:
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
        text = f"The answer took longer than {request.timeout_seconds:g} s."
        raise ApiError(text, status=503, code="timeout") from error
    except UserError as error:
        raise ApiError(str(error), "messages") from error
    except Exception as error:
        raise ApiError("The model failed; the server's log has the reason.", status=500, code="internal") from error
    finally:
        request.cancelled.set()


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
