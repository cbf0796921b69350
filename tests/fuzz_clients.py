"""Properties of requests to the API."""

import asyncio
import contextlib
import functools
import json

import torch
from fuzz_cases import (
    LLAMA,
    ROOM,
    SEEDS,
    TEXTS,
    VALUES,
    dumped,
    from_files,
    or_told,
    target,
)
from hypothesis import strategies as st

from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.serve.api_requests import ApiError, Limits, ResponseFormat, parse_body
from minigpt4.serve.constrained import GrammarProcessor, Vocabulary, compile_format, read_vocabulary
from minigpt4.serve.image_sources import load_image

BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "logit_bias": {"5": 1},
    "logprobs": True,
    "top_logprobs": 3,
    "n": 2,
    "stream_options": {"include_usage": True},
    "stop": ["a"],
    "seed": 1,
    "temperature": 0.5,
    "max_tokens": 5,
    "stream": False,
}


@target(
    st.one_of(
        SEEDS.map(from_files(dumped(BODY))), st.fixed_dictionaries({}, optional=dict.fromkeys(BODY, VALUES)).map(dumped)
    ),
    1.5,
)
def requests(case: bytes) -> None:
    try:
        parse_body(case)
    except ApiError as error:
        assert error.status == 400 and str(error).isprintable() and dumped(error.body)
        (error.body["error"]["param"] or "").encode()


SCHEMA_WORDS = ["$ref", "$defs", "type", "properties", "items", "enum", "const", "anyOf", "allOf", "oneOf", "pattern"]
SCHEMA_WORDS += ["minLength", "maxLength", "minItems", "maxItems", "required", "additionalProperties", "format", "not"]
SCHEMA_WORDS += ["minimum", "multipleOf", "prefixItems", "patternProperties", "if", "x-guidance", "#", "#/$defs/a", "a"]
SCHEMA_VALUES = st.sampled_from(["object", "array", "string", "integer", "number", "null", "date", "(a|b)*c{9}", -1])
SCHEMAS = st.recursive(
    st.one_of(SCHEMA_VALUES, VALUES, st.booleans(), st.integers(-3, 2**40)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(SCHEMA_WORDS), inner, max_size=5)
    ),
    max_leaves=20,
).filter(lambda value: isinstance(value, dict))


@functools.cache
def vocabulary() -> Vocabulary:
    return read_vocabulary(load_tokenizer(LLAMA), [2], "###")


@target(SCHEMAS, 1.5)
def schemas(case: dict) -> None:
    """A schema is refused, or tokens that follow it end in an error or in JSON."""
    try:
        form = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"schema": case}})
        processor = GrammarProcessor(vocabulary(), compile_format(form, vocabulary()))
    except ApiError as error:
        assert error.status == 400 and str(error).isprintable()
        return
    ids, generator = [1], torch.Generator().manual_seed(0)
    while ids[-1] != 2 and len(ids) < 40:
        ids.append(int(processor(torch.tensor([ids]), torch.randn(1, 600, generator=generator)).argmax()))
    if ids[-1] == 2:
        with contextlib.suppress(ApiError):
            processor.check()
            json.loads(vocabulary().tokens.decode_bytes(ids[1:-1]))


URLS = st.one_of(
    TEXTS,
    st.tuples(
        st.sampled_from(["data:", "file://", "http://", "pipe:", ""]), st.text("abc:/@[]%?#;,=.0159é\0 ", max_size=20)
    ).map("".join),
    SEEDS.map(from_files(b"data:image/png;base64,aGVsbG8=", b"file:///a.png", b"http://u:p@[::1]:80/a?b#c")).map(
        lambda data: data.decode("latin-1")
    ),
)


@target(URLS, 1.5)
def addresses(case: str) -> None:
    (ROOM / "allowed").mkdir(exist_ok=True)
    or_told(lambda: asyncio.run(load_image(case, Limits(allowed_folder=ROOM / "allowed"))))
