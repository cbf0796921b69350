"""An OpenAI-compatible server: /v1/chat/completions with pictures, /v1/models, /health."""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.conversation.images import read_image
from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve import engine
from minigpt4.serve.api_requests import ApiError, Body, ContentPart, Limits, load_picture, parse, read_body

MAX_CONNECTIONS = 128  # each may hold a request's whole body in memory


def build_app(worker: engine.Engine, name: str, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The server's application.

    Args:
        worker: answers.
        name: of the model, which requests have to give.
        limits: what a client may ask for.
        api_key: what clients have to send as a bearer token; None lets everybody in.
    """
    app = FastAPI(title="MiniGPT-4", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}; see /v1/chat/completions, /v1/models, /health."
        return JSONResponse(ApiError(error.status_code, text, "not_found").body, error.status_code)

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
            raise ApiError(401, "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.", "bad_key")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": name, "waiting": worker.waiting.qsize()}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "minigpt4"}]}

    @app.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request) -> StreamingResponse | JSONResponse:
        check_key(request)
        body = parse(await read_body(request, limits.max_body_bytes))
        if body.model != name:
            raise ApiError(404, f"There is no model '{body.model}'; this server has '{name}'.", "no_model", "model")
        asked = await _request(body, limits, worker)
        if body.stream:
            first = await anext(asked.answers)  # an error is still an HTTP status then
            return StreamingResponse(_events(asked, first, body, name), media_type="text/event-stream")
        waiting = asyncio.create_task(_last(asked.answers))
        while not (await asyncio.wait({waiting}, timeout=0.5))[0]:
            if await request.is_disconnected():
                asked.request.cancelled.set()
        return JSONResponse(_completion(asked.id, name, waiting.result()))

    return app


def serve(app: FastAPI, host: str, port: int) -> None:
    """Runs the server until it is stopped; UserError where the port is taken."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--host {host} --port {port} cannot be used ({error.strerror}); give another.") from error
    uvicorn.run(app, host=host, port=port, log_level="warning", limit_concurrency=MAX_CONNECTIONS)


@dataclass
class _Asked:
    request: engine.Request
    answers: AsyncIterator[Answer]
    marks: list[str]  # texts that end the answer, whose beginnings are held back
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")


async def _request(body: Body, limits: Limits, worker: engine.Engine) -> _Asked:
    """Puts a request before the engine."""
    if body.messages[-1].role != "user":
        raise ApiError(400, "The last message has to be the user's.", "bad_request", "messages")
    messages: list[tuple[str, list[engine.Part]]] = []
    system, num_images = [], 0
    for i, message in enumerate(body.messages):
        content = message.content
        pieces = [ContentPart(type="text", text=content)] if isinstance(content, str) else content
        parts: list[engine.Part] = []
        for piece in pieces:
            if piece.type == "text":
                parts.append(piece.text)
                continue
            num_images += 1
            place = f"messages.{i}.content"
            if message.role != "user" or piece.image_url is None or num_images > limits.max_images:
                text = f"Pictures come as image_url in the user's messages, at most {limits.max_images} in all."
                raise ApiError(400, text, "bad_request", place)
            try:
                raw = await load_picture(piece.image_url.url, limits)
                async with limits.decoding:
                    # Processed at once, in a thread: what waits in the queue is small, however large the picture was.
                    parts.append(await asyncio.to_thread(lambda raw=raw: worker.chat.vis_processor(read_image(raw))))
            except UserError as error:
                raise ApiError(400, str(error), "bad_image", place) from error
        if message.role in ("system", "developer"):
            system += map(str, parts)
        else:
            messages.append((message.role, parts))
    texts = [*system, *(part for _, parts in messages for part in parts if isinstance(part, str))]
    if (length := sum(map(len, texts))) > limits.max_characters:
        text = f"The messages have {length} characters; at most {limits.max_characters} are read."
        raise ApiError(400, text, "too_long", "messages")
    if not any(isinstance(part, str) and part.strip() for part in messages[-1][1]):
        raise ApiError(400, "The question is empty; write what you want to know.", "bad_request", "messages")
    wanted = body.max_completion_tokens or body.max_tokens or min(300, limits.max_tokens)
    if wanted > limits.max_tokens:
        raise ApiError(400, f"max_tokens is {wanted}; at most {limits.max_tokens} are given.", "too_many", "max_tokens")
    stops = [stop for stop in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if stop]
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

    def tell(news: Answer | Exception) -> None:
        if isinstance(news, Answer):  # a copy, as the engine's grows on; the client's stop words cut its text too
            news = replace(news, ids=list(news.ids), decode=lambda ids, plain=news.decode: _cut(plain(ids), stops))
        loop.call_soon_threadsafe(arrived.put_nowait, news)

    decode = worker.chat.model.llama_tokenizer.decode
    options = GenerationOptions(
        max_new_tokens=wanted,
        do_sample=body.temperature > 0,
        temperature=body.temperature or 1.0,
        top_p=body.top_p,
        seed=body.seed,
        stop=lambda ids: any(stop in decode(ids) for stop in stops),
    )
    request = engine.Request(" ".join(system), messages, options, tell, limits.seconds)
    try:
        worker.submit(request)
    except engine.Busy:
        raise ApiError(429, "Too many requests are waiting; try again later.", "queue_full") from None
    return _Asked(request, _answers(request, arrived), [worker.chat.template.stop_string, *stops])


async def _answers(request: engine.Request, arrived: asyncio.Queue) -> AsyncIterator[Answer]:
    """The answer as it grows; whoever stops listening cancels it."""
    try:
        while True:
            left = request.begin + request.seconds - time.monotonic()
            try:
                news = await asyncio.wait_for(arrived.get(), max(left, 0))
                if isinstance(news, TimeoutError):
                    raise news
            except TimeoutError as error:
                raise ApiError(503, f"The answer took longer than {request.seconds:g} s.", "timeout") from error
            if isinstance(news, UserError):
                raise ApiError(400, str(news), "bad_request", "messages")
            if isinstance(news, Exception):
                raise ApiError(500, "The model failed; the server's log says how.", "internal")
            yield news
            if news.finish_reason is not None:
                return
    finally:
        request.cancelled.set()


def _cut(text: str, stops: list[str]) -> str:
    """The text before the first of the stop words."""
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


async def _last(answers: AsyncIterator[Answer]) -> Answer:
    async for answer in answers:
        last = answer
    return last


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.ids),
        "total_tokens": answer.prompt_tokens + len(answer.ids),
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _completion(identity: str, name: str, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": None}
    head = {"id": identity, "object": "chat.completion", "created": int(time.time()), "model": name}
    return head | {"choices": [choice], "usage": _usage(answer)}


async def _events(asked: _Asked, answer: Answer, body: Body, name: str) -> AsyncIterator[str]:
    """Server-sent events of a stream, the first answer being there already."""
    head = {"id": asked.id, "object": "chat.completion.chunk", "created": int(time.time()), "model": name}

    def event(delta: dict[str, str], end: str | None = None) -> str:
        chunk = head | {"choices": [{"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}]}
        return f"data: {json.dumps(chunk)}\n\n"

    sent = ""
    yield event({"role": "assistant", "content": ""})
    try:
        while True:
            shown = answer.text if answer.finish_reason else hold_back_partial_stop(answer.text, asked.marks)
            if shown.startswith(sent) and len(shown) > len(sent):
                yield event({"content": shown[len(sent) :]})
                sent = shown
            if answer.finish_reason:
                break
            answer = await anext(asked.answers)
        yield event({}, answer.finish_reason)
        if body.stream_options.include_usage:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(answer)})}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        asked.request.cancelled.set()
        await asked.answers.aclose()
