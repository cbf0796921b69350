"""What clients of the API may send: the schema of a request, its limits, and what the engine is asked for."""

import asyncio
import functools
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.requests import ClientDisconnect
from torch import Tensor

from minigpt4.common.errors import UserError, nearest
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.conversation.sampling import GenerationOptions

MAX_ITEMS = 1000  # messages of a request, and parts of a message
PORTS = {"http": 80, "https": 443}
RETRY_SECONDS = 2  # after which a request that was refused for a moment may be sent again
# Fields that do not change the answer. Others that are not in ``Body`` are refused unless they ask for nothing.
_HARMLESS = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "request_id", "priority", "cache_prompt", "keep_alive",
}  # fmt: skip
_LARGE_BYTES = 2**20  # of a body, which is then parsed beside the event loop
_MAX_VALUES = (
    300_000  # of a body; json would take 15 s and gigabytes for 10 million lists, and end the event loop's turns
)
_PROBLEMS = {  # of pydantic, by type, instead of its own messages
    "missing": "a value is needed, and null is none",
    "model_type": "it must be a JSON object",
    "dict_type": "it must be a JSON object",
}
_NO_RESULT = "(no result)"  # what the model reads where a tool returned nothing
_NEUTRAL = {"tool_choice": "none", "function_call": "none", "modalities": ["text"], "best_of": 1}
_SAMPLING = {"temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"}


@dataclass
class Limits:
    """What one request may ask for."""

    max_body_bytes: int = 32 * 2**20
    max_characters: int = 200_000  # of all texts together, many times what the LM can read
    max_images: int = 16
    max_tokens: int = 1000  # a request for more gets as many
    timeout_seconds: float = 300.0  # from the arrival to the last token
    allowed_hosts: list[str] = field(default_factory=list)  # of http(s) images: name, for usual ports, or name:port
    allowed_folder: Path | None = None  # of file:// images


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:  # null means the same as an absent field
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class ImageUrl(_Fields):
    """An image: a data URL, or one that the server's flags allow."""

    url: str


class ContentPart(_Fields):
    """A text or an image of a message."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: Annotated[ImageUrl, BeforeValidator(lambda x: {"url": x} if isinstance(x, str) else x)] | None = None


# Plain text becomes a list of one.
_TEXT_AS_PART = BeforeValidator(lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value)
_TEXT_AS_LIST = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
_WITHOUT_EMPTY = AfterValidator(lambda texts: list(filter(None, texts)))


class Message(_Fields):
    """One turn of the conversation; a tool's is shown to the model as the user's, and its calls as the model's text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[ContentPart], Field(max_length=MAX_ITEMS), _TEXT_AS_PART] = []
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=MAX_ITEMS)] = []

    @property
    def texts(self) -> list[str]:
        """The texts of its parts and its tool calls."""
        calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in self.tool_calls]
        return [part.text for part in self.content if part.type == "text"] + calls


class StreamOptions(_Fields):
    """What a stream has beside the answer."""

    include_usage: bool = False
    """Whether the last chunk has the usage."""
    include_obfuscation: bool = False
    """Has no effect."""


class JsonSchema(_Fields):
    """A JSON Schema, with a name that has no effect."""

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Fields):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


_StopString = Annotated[str, Field(max_length=200)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(_Fields):
    """A chat completion request, in which null means the same as an absent field."""

    model: str
    """As /v1/models lists it."""
    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    """The conversation; the last message is the user's and has a text or an image."""
    stream: bool = False
    """Whether the answer is sent in pieces, as server-sent events."""
    stream_options: StreamOptions = StreamOptions()
    """Of a stream: whether it has the usage."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """At most so many tokens, and as many as fit beside the prompt."""
    max_tokens: int | None = Field(None, ge=1)
    """The older name of max_completion_tokens."""
    n: int = Field(1, ge=1, le=8)
    """The number of answers."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0: the most probable token is taken."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Tokens are sampled from the most probable ones that have this share, and of these from 50 at most."""
    seed: int | None = None
    """Makes sampling repeatable; the answers of n use the following numbers."""
    stop: Annotated[list[_StopString], Field(max_length=16), _TEXT_AS_LIST, _WITHOUT_EMPTY] = []
    """Texts that end the answer and are not part of it."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted once from the logits of tokens that the answer contains."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Subtracted from the logits of tokens for each time that the answer contains them."""
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    """Divides positive logits of tokens that the answer contains, and multiplies negative ones."""
    logit_bias: dict[int, _Bias] = Field({}, max_length=1000)
    """Added to the logits of tokens, by their id."""
    logprobs: bool = False
    """Whether the answer has the log probabilities of its tokens."""
    top_logprobs: int = Field(0, ge=0, le=20)
    """The number of most probable tokens that logprobs lists for each token."""
    response_format: ResponseFormat = ResponseFormat(type="text")
    """json_object, or json_schema with a schema, which the answer follows unless max_tokens ends it before."""


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """An error response in OpenAI's format; ``param`` names the field of the request that is wrong."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str = "bad_request",
        retry_seconds: int = RETRY_SECONDS,
    ) -> None:
        message = str(UserError(message))  # one printable line, whatever it quotes of the request
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {"Retry-After": str(retry_seconds)} if status in (429, 503) else {}
        kind, param = ERROR_TYPES.get(status, "invalid_request_error"), param and str(UserError(param))
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
        raise ApiError("The client disconnected during the request.", status=499, code="disconnected") from error
    if len(data) < _LARGE_BYTES:
        return parse_body(bytes(data))
    return await asyncio.to_thread(parse_body, bytes(data))


def parse_body(data: bytes) -> Body:
    """Validates a request; ApiError 400 with the name of the wrong field, or 413 for too many values."""
    if (num_values := sum(map(data.count, (b",", b"[", b"{")))) > _MAX_VALUES:
        text = f"The body has {num_values} commas and opening brackets; at most {_MAX_VALUES} are accepted."
        raise ApiError(text, status=413, code="too_large")
    try:
        body = Body.model_validate(json.loads(data))
    except (ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        details = getattr(error, "errors", lambda: [])()
        if not details:
            raise ApiError(f"The body is not JSON ({error}).") from error
        param = ".".join(str(part) for part in details[0]["loc"] if part != "[key]") or None  # of a dict's key
        text = _PROBLEMS.get(details[0]["type"], details[0]["msg"])
        raise ApiError(f"{param or 'The body'}: {text}.", param) from error
    _check_extra(body, "")
    _check_extra(body.stream_options, "stream_options.")
    if body.stream_options.include_usage and not body.stream:
        raise ApiError("stream_options needs stream to be true.", "stream_options")
    if body.top_logprobs and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true.", "top_logprobs")
    if body.response_format.type == "json_schema" and body.response_format.json_schema is None:
        raise ApiError("The schema of response_format is missing.", "response_format.json_schema")
    return body


def _check_extra(fields: _Fields, prefix: str) -> None:
    """Raises ApiError 400 for a field that is unknown and asks for something."""
    for name, value in (fields.model_extra or {}).items():
        if name not in _HARMLESS and value and value != _NEUTRAL.get(name):
            text = f"'{prefix}{name}' is not supported; leave it out.{nearest(name, type(fields).model_fields)}"
            raise ApiError(text, prefix + name, code="unsupported_parameter")


def check_messages(messages: Sequence[Message], limits: Limits) -> None:
    """Raises ApiError 400 if the messages are not a conversation that can be answered; loads no images."""
    last, num_images, num_characters = len(messages) - 1, 0, 0
    for i, message in enumerate(messages):
        for j, part in enumerate(message.content):
            if part.type == "image_url" and (part.image_url is None or message.role not in ("user", "tool")):
                text = "Images are sent in the user's messages, not in others."
                if part.image_url is None:
                    text = (
                        'A part of type image_url has its image as "image_url": {"url": "data:…"}; this one has none.'
                    )
                raise ApiError(text, f"messages.{i}.content.{j}.image_url")
            num_images += part.type == "image_url"
        num_characters += sum(map(len, message.texts))
        if any(IMAGE_PLACEHOLDER in text for text in message.texts):
            text = f"A message cannot contain {IMAGE_PLACEHOLDER}; send the image instead."
            raise ApiError(text, f"messages.{i}.content")
    if num_images > limits.max_images:
        text = f"The messages have {num_images} images; at most {limits.max_images} are accepted."
        raise ApiError(text, "messages", code="too_many_images")
    if num_characters > limits.max_characters:
        text = f"The messages have {num_characters} characters; at most {limits.max_characters} are accepted."
        raise ApiError(text, "messages", code="context_length_exceeded")
    if messages[last].role not in ("user", "tool"):
        raise ApiError("The last message must be the user's.", f"messages.{last}.role")
    is_empty = not any(part.type == "image_url" or part.text.strip() for part in messages[last].content)
    if is_empty and messages[last].role == "user":
        raise ApiError("The question is empty; write what you want to know.", f"messages.{last}.content")


async def load_messages(
    messages: Sequence[Message], load: Callable[[str], Awaitable[Tensor]]
) -> list[tuple[str, list[str | Tensor]]]:
    """Checked messages as (role, texts and processed images); ApiError 400 names the field of an unreadable image.

    ``load`` gets the URLs of images one after the other, so that a request holds the bytes of one file only.
    """
    loaded: list[tuple[str, list[str | Tensor]]] = []
    for i, message in enumerate(messages):
        parts: list[str | Tensor] = []
        for j, part in enumerate(message.content):
            try:
                parts.append(part.text if part.type == "text" else await load(part.image_url.url))
            except UserError as error:
                raise ApiError(str(error), f"messages.{i}.content.{j}.image_url.url", code="bad_image") from error
        if message.role == "tool" and not any(isinstance(part, Tensor) or part.strip() for part in parts):
            parts = [_NO_RESULT]
        if message.tool_calls:
            parts.append(" ".join(message.texts[-len(message.tool_calls) :]))
        loaded.append(("user" if message.role == "tool" else message.role, parts))
    return loaded


def read_options(
    body: Body, limits: Limits, defaults: GenerationOptions, decode: Callable[[Sequence[int]], str]
) -> GenerationOptions:
    """The generation options of a request, whose stop strings ``decode`` finds.

    ``defaults`` are those of requests that do not set them. ApiError 400 for what beam search cannot do.
    """
    max_tokens = body.max_completion_tokens or body.max_tokens or defaults.max_new_tokens
    is_limited = body.response_format.type != "text"
    if defaults.num_beams > 1 and (body.logprobs or is_limited):
        param = "logprobs" if body.logprobs else "response_format"
        raise ApiError(f"{param} is not supported by this server, which was started with --num-beams.", param)
    return replace(
        defaults,
        max_new_tokens=min(max_tokens, limits.max_tokens),
        do_sample=defaults.do_sample or body.temperature is not None,
        top_logprobs=body.top_logprobs if body.logprobs else None,
        stop=stop_function(body.stop, decode),
        **body.model_dump(include=_SAMPLING, exclude_none=True),
    )


def stop_function(texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> Callable[[Sequence[int]], bool]:
    """Whether the latest of a row's new ids completes one of ``texts``; only as many ids as necessary are decoded."""
    longest = max(map(len, texts), default=0)

    @functools.cache
    def num_characters(token_id: int) -> float:
        """A lower bound on the characters that a token adds: one may take four byte tokens, each no text alone."""
        return max(len(decode([token_id]).replace("\ufffd", "")), 0.25)

    def stop(ids: Sequence[int]) -> bool:
        if not texts:
            return False
        # The last id may complete a character of four tokens, and decoding drops a leading space.
        count, missing = min(4, len(ids)), longest + 1.0
        while count < len(ids) and missing > 0:
            count += 1
            missing -= num_characters(ids[-count])
        tail = decode(ids[-count:])
        return any(text in tail for text in texts)

    return stop
