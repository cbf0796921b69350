"""What clients of the API may send: the schema of a request, its limits, and where images may come from."""

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import httpx
from fastapi import Request
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.generation import GenerationOptions

MAX_ITEMS = 1000  # messages of a request, and parts of a message
MAX_DOWNLOAD_SECONDS = 60  # for one image, however slowly it arrives


@dataclass
class Limits:
    """What one request may ask for."""

    max_body_bytes: int = 32 * 2**20
    max_characters: int = 200_000  # of all texts together, many times what the LM can read
    max_images: int = 16
    max_tokens: int = 1000
    timeout_seconds: float = 300.0  # from the arrival to the last token
    allowed_hosts: list[str] = field(default_factory=list)  # of http(s) images
    allowed_folder: Path | None = None  # of file:// images
    # Images decoded at a time: a large one takes a gigabyte.
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))


class ImageUrl(BaseModel):
    """An image: a data URL, or one that the server's flags allow."""

    url: str


class ContentPart(BaseModel):
    """A text or an image of a message."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_ITEMS)]

    @property
    def parts(self) -> list[ContentPart]:
        """The content as a list, also where it is plain text."""
        return [ContentPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


StopString = Annotated[str, Field(max_length=200)]


class Body(BaseModel):
    """A chat completion request; unknown fields are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    stream: bool = False
    stream_options: dict[str, Any] = {}
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    n: Literal[1] = 1


class ApiError(Exception):
    """An error response in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        message = str(UserError(message))  # one printable line, whatever it quotes of the request
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads a request's body; ApiError 413 if it has more than ``max_bytes``."""
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > max_bytes:
                raise ApiError(413, f"The request is larger than {max_bytes} bytes; send smaller images.", "too_large")
    except ClientDisconnect as error:
        raise ApiError(400, "The client disconnected during the request.", "bad_request") from error
    return bytes(data)


def parse_body(data: bytes) -> Body:
    """Validates a request; ApiError 400 that names the wrong field."""
    try:
        return Body.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        details = getattr(error, "errors", lambda: [])()
        param = ".".join(map(str, details[0]["loc"])) if details else None
        text = f"{param}: {details[0]['msg']}" if details else f"The body is not JSON ({str(error)[:100]})"
        raise ApiError(400, text + ".", "bad_request", param) from error


def check_messages(messages: Sequence[Message], limits: Limits) -> None:
    """Raises ApiError 400 if the messages are not a conversation that can be answered; loads no images."""
    if messages[-1].role != "user":
        raise ApiError(400, "The last message must be the user's.", "bad_request", "messages")
    num_images = num_characters = 0
    for i, message in enumerate(messages):
        for part in message.parts:
            num_characters += len(part.text)
            if part.type == "text":
                continue
            num_images += 1
            if message.role != "user" or part.image_url is None or num_images > limits.max_images:
                text = f"Images are sent as image_url in the user's messages, at most {limits.max_images} in all."
                raise ApiError(400, text, "bad_request", f"messages.{i}.content")
    if num_characters > limits.max_characters:
        text = f"The messages have {num_characters} characters; at most {limits.max_characters} are accepted."
        raise ApiError(400, text, "too_long", "messages")
    if not any(part.text.strip() for part in messages[-1].parts if part.type == "text"):
        raise ApiError(400, "The question is empty; write what you want to know.", "bad_request", "messages")


async def read_messages(
    messages: Sequence[Message], limits: Limits, preprocess: Callable[[bytes], Tensor]
) -> tuple[str, list[tuple[str, list[str | Tensor]]]]:
    """Loads the images of checked messages; ApiError 400 if one is not allowed or cannot be read.

    Args:
        messages: of the request.
        limits: where images may come from.
        preprocess: the bytes of an image file to float32 [3, S, S].

    Returns:
        The system text, and the other messages as (role, texts and images).
    """
    system: list[str] = []
    others: list[tuple[str, list[str | Tensor]]] = []
    for i, message in enumerate(messages):
        parts: list[str | Tensor] = []
        for part in message.parts:
            if part.type == "text":
                parts.append(part.text)
                continue
            try:
                data = await load_image(part.image_url.url, limits)
                async with limits.decoding:  # in a thread; what waits in the engine's queue is small
                    parts.append(await asyncio.to_thread(preprocess, data))
            except UserError as error:
                raise ApiError(400, str(error), "bad_image", f"messages.{i}.content") from error
        if message.role in ("system", "developer"):
            system += parts
        else:
            others.append((message.role, parts))
    return " ".join(system), others


def read_options(
    body: Body, limits: Limits, decode: Callable[[Sequence[int]], str]
) -> tuple[GenerationOptions, list[str]]:
    """The generation options of a request and its stop strings, which ``decode`` finds; ApiError 400 for a limit."""
    max_tokens = body.max_completion_tokens or body.max_tokens or min(300, limits.max_tokens)
    if max_tokens > limits.max_tokens:
        text = f"max_tokens is {max_tokens}; at most {limits.max_tokens} are allowed."
        raise ApiError(400, text, "too_many", "max_tokens")
    stop_strings = [text for text in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if text]
    # A character may take up to four byte tokens, so the tail holds the whole string and the token that completes it.
    tail = 4 * max(map(len, stop_strings), default=0) + 1
    options = GenerationOptions(
        max_new_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=lambda ids: bool(stop_strings) and any(text in decode(ids[-tail:]) for text in stop_strings),
    )
    return options, stop_strings


async def load_image(url: str, limits: Limits) -> bytes:
    """The bytes of an image from a data URL, an allowed host or the allowed folder; UserError for any other text."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # validated on access
    except ValueError as error:
        raise UserError(f"'{url[:80]}' is no URL ({error}); send a data URL.") from error
    if parts.scheme == "data":
        head, comma, data = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise UserError("A data URL looks like data:image/jpeg;base64,DATA; this one does not.")
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise UserError(f"The data URL is not base64 ({error}).") from error
    if parts.scheme in ("http", "https"):
        if parts.hostname not in limits.allowed_hosts:
            raise UserError(f"Images from '{parts.hostname}' are not allowed here; send a data URL.")
        return await _download(url, limits.max_body_bytes)
    if parts.scheme == "file" and limits.allowed_folder is not None:
        folder = limits.allowed_folder.resolve()
        try:
            path = (folder / unquote(parts.path).lstrip("/")).resolve()
            exists = path.is_relative_to(folder) and path.is_file()
        except (OSError, ValueError):  # no file can have such a name
            exists = False
        if not exists:
            raise UserError("There is no such image in the allowed folder (file:///NAME is a path below it).")
        return await asyncio.to_thread(path.read_bytes)
    raise UserError(f"Images by '{parts.scheme or url[:20]}' are not allowed here; send a data URL.")


async def _download(url: str, max_bytes: int) -> bytes:
    data = bytearray()
    try:
        client = httpx.AsyncClient(timeout=20, trust_env=False)
        async with asyncio.timeout(MAX_DOWNLOAD_SECONDS), client, client.stream("GET", url) as response:
            if response.status_code != 200:  # redirections are not followed: they could leave the allowed hosts
                raise UserError(f"The image's address answers with status {response.status_code}.")
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > max_bytes:
                    raise UserError(f"The image is larger than {max_bytes} bytes.")
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise UserError(f"The image cannot be fetched ({type(error).__name__}).") from error
    return bytes(data)
