"""Properties of requests to the API."""

import asyncio

from fuzz_cases import (
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

from minigpt4.serve.api_requests import ApiError, Limits, parse_body
from minigpt4.serve.image_sources import load_image

BODY = {
    "model": "m",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
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
        assert error.status == 400 and str(error).isprintable()


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
