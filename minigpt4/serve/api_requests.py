"""What clients of the API may send: its form, its limits, and pictures from where they are allowed."""

import asyncio
import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

import httpx
from fastapi import Request
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from minigpt4.common.errors import UserError


@dataclass
class Limits:
    """What a client may ask for."""

    max_body_bytes: int = 32 * 2**20
    max_characters: int = 200_000  # of all texts together, many times what the LM can read
    max_images: int = 16
    max_tokens: int = 1000
    seconds: float = 300.0  # from arrival to the last token
    decoding: asyncio.Semaphore = field(
        default_factory=lambda: asyncio.Semaphore(2)
    )  # a large picture takes a gigabyte
    allowed_hosts: list[str] = field(default_factory=list)  # of http(s) pictures
    allowed_folder: Path | None = None  # of file:// pictures


MAX_PIECES = 1000  # messages, or pieces of one
SECONDS_TO_FETCH = 60  # a picture, however slowly it trickles


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
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PIECES)]


class StreamOptions(BaseModel):
    """What a stream holds beside text."""

    include_usage: bool = False


StopWord = Annotated[str, Field(max_length=200)]


class Body(BaseModel):
    """A chat completion request; fields that this model has no use for are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_PIECES)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(0.9, gt=0, le=1)
    seed: int | None = None
    stop: StopWord | Annotated[list[StopWord], Field(max_length=16)] | None = None
    n: Literal[1] = 1


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        message = str(UserError(message))  # in a line, whatever of the request it quotes
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        kind = "server_error" if status >= 500 else kind
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def read_body(request: Request, most: int) -> bytes:
    """A request's body of at most so many bytes; ApiError 413 where it is larger."""
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > most:
                raise ApiError(413, f"The request is larger than {most} bytes; send smaller pictures.", "too_large")
    except ClientDisconnect as error:
        raise ApiError(400, "The request broke off.", "bad_request") from error  # nobody is there to read it
    return bytes(data)


def parse(data: bytes) -> Body:
    """A body as a request; ApiError 400 that names the field where it is none."""
    try:
        return Body.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:  # pydantic's own among them
        details = getattr(error, "errors", lambda: [])()
        place = ".".join(map(str, details[0]["loc"])) if details else None
        text = f"{place}: {details[0]['msg']}" if details else f"The body is not JSON ({str(error)[:100]})"
        raise ApiError(400, text + ".", "bad_request", place) from error


async def load_picture(url: str, limits: Limits) -> bytes:
    """A picture's file from a data URL, an allowed host or the allowed folder; UserError for any other text."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # checked when it is looked at
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
            raise UserError(f"Pictures from '{parts.hostname}' are not allowed here; send a data URL.")
        return await _download(url, limits.max_body_bytes)
    if parts.scheme == "file" and limits.allowed_folder is not None:
        folder = limits.allowed_folder.resolve()
        try:
            path = (folder / unquote(parts.path).lstrip("/")).resolve()
            is_there = path.is_relative_to(folder) and path.is_file()
        except (OSError, ValueError):  # no file can have such a name
            is_there = False
        if not is_there:
            raise UserError("There is no such picture in the allowed folder (file:///NAME is taken below it).")
        return await asyncio.to_thread(path.read_bytes)
    raise UserError(f"Pictures by '{parts.scheme or url[:20]}' are not allowed here; send a data URL.")


async def _download(url: str, most: int) -> bytes:
    data = bytearray()
    try:
        client = httpx.AsyncClient(timeout=20, trust_env=False)
        async with asyncio.timeout(SECONDS_TO_FETCH), client, client.stream("GET", url) as response:
            if response.status_code != 200:  # redirections are not followed: they would lead past the allowed hosts
                raise UserError(f"The picture's address answers with status {response.status_code}.")
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > most:
                    raise UserError(f"The picture is larger than {most} bytes.")
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise UserError(f"The picture cannot be fetched ({type(error).__name__}).") from error
    return bytes(data)
