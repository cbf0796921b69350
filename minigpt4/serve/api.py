"""An OpenAI-compatible server: /v1/chat/completions with pictures, /v1/models, /health."""

import asyncio
import base64
import binascii
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.conversation.pictures import read_picture
from minigpt4.serve import engine
from minigpt4.serve.terminal import steady


@dataclass
class Limits:
    """What a client may ask for."""

    max_body_bytes: int = 32 * 2**20
    max_images: int = 16
    max_tokens: int = 1000
    seconds: float = 300.0  # from arrival to the last token
    allowed_hosts: list[str] = field(default_factory=list)  # of http(s) pictures
    allowed_folder: Path | None = None  # of file:// pictures


class ImageUrl(BaseModel):
    """Where a picture is: a data URL, or what the server's flags allow."""

    url: str


class ContentPart(BaseModel):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """Who says what."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    include_usage: bool = False


class Body(BaseModel):
    """A chat completion request; fields that this model has no use for are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Literal[1] = 1


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


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
        body = _parse(await _read_body(request, limits.max_body_bytes))
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
    uvicorn.run(app, host=host, port=port, log_level="warning")


async def _read_body(request: Request, most: int) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise ApiError(413, f"The request is larger than {most} bytes; send smaller pictures.", "too_large")
    return bytes(data)


def _parse(data: bytes) -> Body:
    try:
        return Body.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:  # pydantic's own among them
        details = getattr(error, "errors", lambda: [])()
        place = ".".join(map(str, details[0]["loc"])) if details else None
        text = f"{place}: {details[0]['msg']}" if details else f"The body is not JSON ({str(error)[:100]})"
        raise ApiError(400, text + ".", "bad_request", place) from error


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
                parts.append(await _load_picture(piece.image_url.url, limits))
            except UserError as error:
                raise ApiError(400, str(error), "bad_image", place) from error
        if message.role in ("system", "developer"):
            system += map(str, parts)
        else:
            messages.append((message.role, parts))
    if not any(isinstance(part, str) and part.strip() for part in messages[-1][1]):
        raise ApiError(400, "The question is empty; write what you want to know.", "bad_request", "messages")
    wanted = body.max_completion_tokens or body.max_tokens or min(300, limits.max_tokens)
    if wanted > limits.max_tokens:
        raise ApiError(400, f"max_tokens is {wanted}; at most {limits.max_tokens} are given.", "too_many", "max_tokens")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

    def tell(news: Answer | Exception) -> None:
        news = news if isinstance(news, Exception) else replace(news, ids=list(news.ids))
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
    return _Asked(request, _answers(request, arrived, stops), [worker.chat.template.end, *stops])


async def _answers(request: engine.Request, arrived: asyncio.Queue, stops: list[str]) -> AsyncIterator[Answer]:
    """The answer as it grows; whoever stops listening cancels it."""
    try:
        while True:
            news = await arrived.get()
            if isinstance(news, TimeoutError) or (request.is_over and not request.cancelled.is_set()):
                raise ApiError(503, f"The answer took longer than {request.seconds:g} s.", "timeout")
            if isinstance(news, UserError):
                raise ApiError(400, str(news), "bad_request", "messages")
            if isinstance(news, Exception):
                raise ApiError(500, "The model failed; the server's log says how.", "internal")
            for stop in stops:
                news.text = news.text.split(stop)[0] if stop else news.text
            yield news
            if news.end is not None:
                return
    finally:
        request.cancelled.set()


async def _last(answers: AsyncIterator[Answer]) -> Answer:
    async for answer in answers:
        last = answer
    return last


async def _load_picture(url: str, limits: Limits) -> Image.Image:
    """A picture from a data URL, an allowed host or the allowed folder."""
    parts = urlsplit(url)
    if parts.scheme == "data":
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise UserError("A data URL looks like data:image/jpeg;base64,DATA; this one does not.")
        try:
            raw = base64.b64decode(data, validate=True)
        except binascii.Error as error:
            raise UserError(f"The data URL is not base64 ({error}).") from error
    elif parts.scheme in ("http", "https"):
        if parts.hostname not in limits.allowed_hosts:
            raise UserError(f"Pictures from '{parts.hostname}' are not allowed here; send a data URL.")
        raw = await _download(url, limits.max_body_bytes)
    elif parts.scheme == "file" and limits.allowed_folder is not None:
        folder = limits.allowed_folder.resolve()
        path = (folder / unquote(parts.path).lstrip("/")).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise UserError("There is no such picture in the allowed folder (file:///NAME is taken below it).")
        raw = path.read_bytes()
    else:
        raise UserError(f"Pictures by '{parts.scheme or url[:20]}' are not allowed here; send a data URL.")
    return await asyncio.to_thread(read_picture, raw)


async def _download(url: str, most: int) -> bytes:
    data = bytearray()
    try:
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client, client.stream("GET", url) as response:
            if response.status_code != 200:  # redirections are not followed: they would lead past the allowed hosts
                raise UserError(f"The picture's address answers with status {response.status_code}.")
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > most:
                    raise UserError(f"The picture is larger than {most} bytes.")
    except httpx.HTTPError as error:
        raise UserError(f"The picture cannot be fetched ({type(error).__name__}).") from error
    return bytes(data)


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.num_context,
        "completion_tokens": len(answer.ids),
        "total_tokens": answer.num_context + len(answer.ids),
        "prompt_tokens_details": {"cached_tokens": answer.num_cached},
    }


def _completion(identity: str, name: str, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.end, "logprobs": None}
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
            shown = answer.text if answer.end else steady(answer.text, asked.marks)
            if shown.startswith(sent) and len(shown) > len(sent):
                yield event({"content": shown[len(sent) :]})
                sent = shown
            if answer.end:
                break
            answer = await anext(asked.answers)
        yield event({}, answer.end)
        if body.stream_options.include_usage:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': _usage(answer)})}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        asked.request.cancelled.set()
        await asked.answers.aclose()
