"""Requests as clients of OpenAI's API send them: which fields and messages are accepted, and what errors name."""

import base64
import json
import re
import threading

import httpx
import pytest
from serving import PATH, QUESTION, answered, content, data_url, post, post_text, text_of

from minigpt4.serve import api_requests


def refused(server, **changes):
    found = post(server, **changes)
    assert found.status_code == 400, found.text
    return found.json()["error"]


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


# Fields


def test_null_is_the_same_as_an_absent_field(server):
    names = sorted(set(api_requests.Body.model_fields) - {"model", "messages", "max_tokens", "temperature"})
    assert len(names) > 12
    found = answered(server, **dict.fromkeys([*names, "tools", "audio", "modalities", "user", "evil"]))
    assert text_of(found) == text_of(answered(server))
    messages = [
        {"role": "system", "content": None, "name": None},
        {"role": "user", "content": [{"type": "text", "text": "Why?", "image_url": None}], "tool_calls": None},
    ]
    expected = [{"role": "system", "content": ""}, {"role": "user", "content": "Why?"}]
    assert text_of(answered(server, messages=messages)) == text_of(answered(server, messages=expected))
    form = {"type": "text", "json_schema": None}
    assert text_of(answered(server, response_format=form, stream_options={"include_usage": None})) == text_of(found)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("number", [101, 1024, 4096, 10**9])
def test_more_tokens_than_allowed_are_as_many_as_allowed(server, engine_requests, name, number):
    answered(server, **{"max_tokens": None, "stop": [" "], name: number})  # the text ends it soon
    assert engine_requests[0].options.max_new_tokens == 100


def test_more_tokens_than_fit_beside_the_prompt_are_as_many_as_fit(server):
    messages = [{"role": "user", "content": "Why? " * 80}]
    num_prompt = answered(server, messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
    assert 300 < num_prompt < 400  # of the engine's 400
    usage = answered(server, messages=messages, max_tokens=1024)["usage"]
    error = refused(server, messages=[{"role": "user", "content": "Why? " * 800}])
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert usage["prompt_tokens"] == num_prompt and 1 <= usage["completion_tokens"] <= 400 - num_prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "anna", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"safety_identifier": "x", "prompt_cache_key": "y", "stream_options": {"include_obfuscation": False}},
        {"tools": [], "functions": [], "tool_choice": "none", "function_call": "none"},
        {"modalities": ["text"], "logit_bias": {}, "n": 1, "best_of": 1, "echo": False, "min_p": 0},
        {"response_format": {"type": "text"}, "stop": [], "logprobs": False, "top_logprobs": 0},
        {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(server, fields):
    assert text_of(answered(server, **fields)) == text_of(answered(server))


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
REFUSED = {
    "tools": [TOOL],
    "functions": [TOOL["function"]],
    "tool_choice": "auto",
    "function_call": {"name": "f"},
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {"search_context_size": "low"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "top_k": 5,
    "min_p": 0.1,
    "guided_json": {"type": "object"},
    "ignore_eos": True,
    "chat_template": "x",
    "temprature": 0.5,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(server, name):
    error = refused(server, **{name: REFUSED[name]})
    assert error["param"] == name and f"'{name}' is not supported" in error["message"]
    assert error["code"] == "unsupported_parameter" and error["type"] == "invalid_request_error"


def test_a_misspelt_field_is_named_with_the_right_one(server):
    assert "Did you mean 'temperature'?" in refused(server, temprature=0.5)["message"]


def messages(*contents, role="user"):
    return {"messages": [{"role": role, "content": text} for text in contents]}


WRONG = [
    ({"temperature": 3}, "temperature"),
    ({"n": 9}, "n"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"presence_penalty": -2.1}, "presence_penalty"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias.99999999"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"stop": ["a", 5]}, "stop.1"),
    ({"stream_options": 5}, "stream_options"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream_options": {"include_usages": True}, "stream": True}, "stream_options.include_usages"),
    ({"stream_options": {"include_usage": "?"}, "stream": True}, "stream_options.include_usage"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"messages": None}, "messages"),
    ({"model": None}, "model"),
    (messages("Why?", role="root"), "messages.0.role"),
    (messages("Why?", role="assistant"), "messages.0.role"),
    (messages("Why?", ""), "messages.1.content"),
    (messages("a", "x" * 100_000), "messages"),
    (messages("a", "<ImageHere>"), "messages.1.content"),
    (messages("a", [{"type": "input_audio", "input_audio": {}}]), "messages.1.content.0.type"),
    (messages("a", [{"type": "text", "text": 5}]), "messages.1.content.0.text"),
    (messages([{"type": "text", "text": "a"}, {"type": "image_url"}]), "messages.0.content.1.image_url"),
    (messages("a", [image_part(5)]), "messages.1.content.0.image_url.url"),
    (messages("a", [image_part("data:image/png;base64,@")]), "messages.1.content.0.image_url.url"),
    (messages("a", [image_part("data:image/png;base64,YQ==")]), "messages.1.content.0.image_url.url"),
    (messages("a", [image_part("http://a.example/")]), "messages.1.content.0.image_url.url"),
    (messages([image_part("data:,")], role="system"), "messages.0.content.0.image_url"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objekt"}}}},
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_an_error_names_the_field(server, fields, param):
    error = refused(server, **fields)
    assert error["param"] == param and len(error["message"].splitlines()) == 1


SENTENCES = [
    ({"messages": None}, r"messages: a value is needed, and null is none\."),
    ({"model": None}, r"model: a value is needed, and null is none\."),
    ({"messages": [5]}, r"messages\.0: it must be a JSON object\."),
    ({"stream_options": 5}, r"stream_options: it must be a JSON object\."),
    (messages([{"type": "image_url", "image": {"url": "x"}}]), 'has its image as "image_url": .*this one has none'),
    (messages([image_part("data:,")], role="system"), "Images are sent in the user's messages, not in others"),
    ({"reasoning_effort": "low"}, "'reasoning_effort' is not supported; leave it out\\."),
    ({"stream_options": {"include_usages": True}, "stream": True}, "Did you mean 'include_usage'?"),
    ({"stream_options": {"include_usage": True}}, "stream_options needs stream to be true"),
]


@pytest.mark.parametrize(("fields", "sentence"), SENTENCES)
def test_an_error_says_what_is_wrong(server, fields, sentence):
    assert re.fullmatch(f"(.* )?{sentence}.*", refused(server, **fields)["message"])


def test_a_body_that_is_no_object(server):
    found = httpx.post(server.url + PATH, content=b"[1]").json()["error"]
    assert found["message"] == "The body: it must be a JSON object."


def test_a_large_body_is_parsed_beside_the_event_loop(server, monkeypatch):
    threads, parse = [], api_requests.parse_body
    monkeypatch.setattr(
        api_requests, "parse_body", lambda data: (threads.append(threading.current_thread()), parse(data))[1]
    )
    for num_bytes in (2**20 + 1, 0):
        assert httpx.post(server.url + PATH, content=post_text().ljust(num_bytes), timeout=60).status_code == 200
    assert threads[0] is not threads[1]


# Messages


def test_an_empty_result_of_a_tool_is_answered(server, engine_requests):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", "tool_calls": [call]}]
    for result in ("", None, " ", []):
        answered(server, messages=[*asked, {"role": "tool", "tool_call_id": "1", "content": result}])
    assert [request.messages[-1] for request in engine_requests] == [("user", ["(no result)"])] * 4


def test_the_order_of_texts_and_images_reaches_the_engine(server, image, engine_requests):
    parts = [
        {"type": "text", "text": "Before"},
        image_part(image),
        {"type": "text", "text": "between"},
        image_part(image),
        {"type": "text", "text": "after"},
    ]
    answered(server, messages=[{"role": "user", "content": parts}, *messages([image_part(image)])["messages"]])
    (request,) = engine_requests
    kinds = [[part if isinstance(part, str) else list(part.shape) for part in parts] for _, parts in request.messages]
    assert kinds == [["Before", [3, 64, 64], "between", [3, 64, 64], "after"], [[3, 64, 64]]]


def test_an_image_needs_no_question(server, image):
    assert answered(server, messages=[{"role": "user", "content": [image_part(image)]}])["choices"]
    assert answered(server, messages=[{"role": "user", "content": [image_part(image), {"type": "text", "text": ""}]}])


def test_roles(server, engine_requests):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Basel"}'}}
    answered(
        server,
        messages=[
            {"role": "developer", "content": "Be brief.", "name": "a"},
            {"role": "user", "content": "Is it warm?", "name": "anna"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": "1", "content": "17 degrees"},
            {"role": "assistant", "content": ""},
            {"role": "assistant"},
            {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "17.5 degrees"}]},
        ],
    )
    (request,) = engine_requests
    assert [role for role, _ in request.messages] == [
        *("developer", "user", "assistant", "user", "assistant", "assistant", "user")
    ]
    assert json.loads(request.messages[2][1][0]) == call["function"]
    assert [parts for _, parts in request.messages[3:]] == [["17 degrees"], [""], [], ["17.5 degrees"]]


DATA_URLS = {
    "line breaks": lambda data: "data:image/png;base64," + base64.encodebytes(data).decode(),
    "carriage returns": lambda data: (
        "data:image/png;base64," + base64.encodebytes(data).decode().replace("\n", "\r\n ")
    ),
    "no padding": lambda data: data_url(data + b"\0").rstrip("="),
    "the URL-safe alphabet": lambda data: "data:image/png;base64," + base64.urlsafe_b64encode(data).decode(),
    "percent signs": lambda data: data_url(data).replace("+", "%2B").replace("=", "%3D").replace("/", "%2f"),
    "an upper-case scheme": lambda data: data_url(data).replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64"),
    "parameters": lambda data: data_url(data).replace("png;", "png;charset=utf-8;name=a.png;"),
    "no type": lambda data: data_url(data).replace("image/png", ""),
    "another type": lambda data: data_url(data).replace("image/png", "application/octet-stream"),
    "blanks": lambda data: f"  {data_url(data)} \n",
}


@pytest.mark.parametrize("kind", DATA_URLS)
def test_data_urls(server, scene_folder, image, kind):
    data = (scene_folder / "0.png").read_bytes()
    while b"+" not in (encoded := base64.b64encode(data)) or b"/" not in encoded or len(data) % 3 == 0:
        data += b">?"  # behind the end of the image
    expected = text_of(answered(server, messages=[{"role": "user", "content": content(image)}]))
    found = answered(server, messages=[{"role": "user", "content": content(DATA_URLS[kind](data))}])
    assert text_of(found) == expected


def test_an_image_as_a_bare_url(server, image):
    parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": QUESTION}]
    expected = text_of(answered(server, messages=[{"role": "user", "content": content(image)}]))
    assert text_of(answered(server, messages=[{"role": "user", "content": parts}])) == expected
