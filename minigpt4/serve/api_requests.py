"""What clients of the API may send: the schema of a request, its limits, and where images may come from."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import httpx
from fastapi import Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from starlette.requests import ClientDisconnect
from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.sampling import GenerationOptions

MAX_ITEMS = 1000  # messages of a request, and parts of a message
MAX_DOWNLOAD_SECONDS = 60  # for one image, however slowly it arrives
PORTS = {"http": 80, "https": 443}


@dataclass
class Limits:
    """What one request may ask for."""

    max_body_bytes: int = 32 * 2**20
    max_characters: int = 200_000  # of all texts together, many times what the LM can read
    max_images: int = 16
    max_tokens: int = 1000
    timeout_seconds: float = 300.0  # from the arrival to the last token
    allowed_hosts: list[str] = field(default_factory=list)  # of http(s) images: name, for usual ports, or name:port
    allowed_folder: Path | None = None  # of file:// images


class ImageUrl(BaseModel):
    """An image: a data URL, or one that the server's flags allow."""

    url: str


class ContentPart(BaseModel):
    """A text or an image of a message."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageUrl | None = None


# Plain text becomes a list of one.
_TEXT_AS_PART = BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value)
_TEXT_AS_LIST = BeforeValidator(lambda value: [value] if isinstance(value, str) else [] if value is None else value)
_WITHOUT_EMPTY = AfterValidator(lambda texts: list(filter(None, texts)))


class Message(BaseModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart], Field(max_length=MAX_ITEMS), _TEXT_AS_PART]


_StopString = Annotated[str, Field(max_length=200)]


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
    stop: Annotated[list[_StopString], Field(max_length=16), _TEXT_AS_LIST, _WITHOUT_EMPTY] = []
    n: Literal[1] = 1


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An error response in OpenAI's format; ``param`` names the field of the request that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "bad_request") -> None:
        message = str(UserError(message))  # one printable line, whatever it quotes of the request
        super().__init__(message)
        self.status = status
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def read_body(request: Request, max_bytes: int) -> Body:
    """Reads and validates a request; ApiError 413 if it is too large, 400 with the name of a wrong field."""
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > max_bytes:
                raise ApiError(f"The request is larger than {max_bytes} bytes.", status=413, code="too_large")
    except ClientDisconnect as error:
        raise ApiError("The client disconnected during the request.") from error
    return parse_body(bytes(data))


def parse_body(data: bytes) -> Body:
    """Validates a request; ApiError 400 with the name of the wrong field."""
    try:
        return Body.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        details = getattr(error, "errors", lambda: [])()
        if not details:
            raise ApiError(f"The body is not JSON ({error}).") from error
        param = ".".join(map(str, details[0]["loc"]))
        raise ApiError(f"{param}: {details[0]['msg']}.", param) from error


def check_messages(messages: Sequence[Message], limits: Limits) -> None:
    """Raises ApiError 400 if the messages are not a conversation that can be answered; loads no images."""
    if messages[-1].role != "user":
        raise ApiError("The last message must be the user's.", "messages")
    images = [(message.role, part) for message in messages for part in message.content if part.type == "image_url"]
    if len(images) > limits.max_images or any(role != "user" or part.image_url is None for role, part in images):
        text = f"Images are sent as image_url in the user's messages, at most {limits.max_images} in all."
        raise ApiError(text, "messages")
    num_characters = sum(len(part.text) for message in messages for part in message.content)
    if num_characters > limits.max_characters:
        text = f"The messages have {num_characters} characters; at most {limits.max_characters} are accepted."
        raise ApiError(text, "messages", code="too_long")
    if not any(part.text.strip() for part in messages[-1].content if part.type == "text"):
        raise ApiError("The question is empty; write what you want to know.", "messages")


async def load_messages(
    messages: Sequence[Message], limits: Limits, process: Callable[[bytes], Awaitable[Tensor]]
) -> list[tuple[str, list[str | Tensor]]]:
    """Checked messages as (role, texts and processed images); ApiError 400 names the message of an unreadable image.

    The images are loaded one after the other, so that a request holds the bytes of one file only.
    """
    loaded = []
    for i, message in enumerate(messages):
        try:
            parts = [await _load_part(part, limits, process) for part in message.content]
        except UserError as error:
            raise ApiError(str(error), f"messages.{i}.content", code="bad_image") from error
        loaded.append((message.role, parts))
    return loaded


async def _load_part(part: ContentPart, limits: Limits, process: Callable[[bytes], Awaitable[Tensor]]) -> str | Tensor:
    return part.text if part.type == "text" else await process(await load_image(part.image_url.url, limits))


def read_options(body: Body, limits: Limits, decode: Callable[[Sequence[int]], str]) -> GenerationOptions:
    """The generation options of a request, whose stop strings ``decode`` finds; ApiError 400 for a limit."""
    max_tokens = body.max_completion_tokens or body.max_tokens or min(300, limits.max_tokens)
    if max_tokens > limits.max_tokens:
        text = f"max_tokens is {max_tokens}; at most {limits.max_tokens} are allowed."
        raise ApiError(text, "max_tokens", code="too_many")
    # A character may take up to four byte tokens, so the tail holds the whole string and the token that completes it.
    tail = 4 * max(map(len, body.stop), default=0) + 1

    def stop(ids: Sequence[int]) -> bool:
        return any(text in decode(ids[-tail:]) for text in body.stop)

    sampling = {"temperature": body.temperature, "top_p": body.top_p, "seed": body.seed}
    return GenerationOptions(max_new_tokens=max_tokens, stop=stop, **sampling)


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
        return await _download(_parse_address(url, limits.allowed_hosts), limits.max_body_bytes)
    if parts.scheme == "file" and limits.allowed_folder is not None:
        return await asyncio.to_thread(_read_file, unquote(parts.path), limits.allowed_folder, limits.max_body_bytes)
    raise _not_allowed(parts.scheme or url[:20])


def _not_allowed(source: str) -> UserError:
    return UserError(f"Images from '{source}' are not allowed here; send a data URL.")


def _read_file(name: str, folder: Path, max_bytes: int) -> bytes:
    try:
        path = (folder.resolve() / name.lstrip("/")).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise FileNotFoundError
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        text = "There is no such image in the allowed folder (file:///NAME is a path below it)."
        raise UserError(text) from error
    if len(data) > max_bytes:
        raise UserError(f"The image is larger than {max_bytes} bytes.")
    return data


def _parse_address(url: str, allowed_hosts: Sequence[str]) -> httpx.URL:
    """The address of an image as the client below reads it; UserError unless its host is allowed, with its port."""
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"'{url[:80]}' is no URL ({error}); send a data URL.") from error
    host, allowed = address.host, [allowed.lower() for allowed in allowed_hosts]
    port = PORTS[address.scheme] if address.port is None else address.port
    with_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    is_usual = port in PORTS.values()
    if with_port not in allowed and not (is_usual and host in allowed):
        raise _not_allowed(host if is_usual else with_port)
    return address


async def _download(address: httpx.URL, max_bytes: int) -> bytes:
    data = bytearray()
    try:
        # Decompression could take as long and as much memory as the host likes.
        client = httpx.AsyncClient(timeout=20, trust_env=False, headers={"Accept-Encoding": "identity"})
        async with asyncio.timeout(MAX_DOWNLOAD_SECONDS), client, client.stream("GET", address) as response:
            if response.status_code != 200:  # redirections are not followed: they could leave the allowed hosts
                raise UserError(f"The image's address answers with status {response.status_code}.")
            if (encoding := response.headers.get("content-encoding", "identity")).lower() != "identity":
                raise UserError(f"The image's address sends it in the encoding '{encoding}', which is not decoded.")
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > max_bytes:
                    raise UserError(f"The image is larger than {max_bytes} bytes.")
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise UserError(f"The image cannot be fetched ({type(error).__name__}).") from error
    return bytes(data)
