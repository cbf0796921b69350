"""Requests as clients of OpenAI's API send them: which fields are accepted, what they do, and the form of answers."""

import base64
import json
import math

import httpx
import openai
import pytest
from serving import NAME, QUESTION, Server, content, data_url

from minigpt4.serve import api_requests, completions

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(chat):
    server = Server(chat, max_tokens=100)
    yield server
    server.close()


@pytest.fixture(scope="module")
def image(scene_folder):
    return data_url((scene_folder / "0.png").read_bytes())


def post(server, **changes):
    body = {"model": NAME, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4, "temperature": 0}
    return httpx.post(server.url + PATH, json=body | changes, timeout=60)


def answered(server, **changes):
    found = post(server, **changes)
    assert found.status_code == 200, found.text
    return found.json()


def refused(server, **changes):
    found = post(server, **changes)
    assert found.status_code == 400, found.text
    return found.json()["error"]


def text_of(completion, index=0):
    return completion["choices"][index]["message"]["content"]


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture
def engine_requests(server, monkeypatch):
    """What reaches the engine."""
    seen, submit = [], server.engine.submit
    monkeypatch.setattr(server.engine, "submit", lambda request: (seen.append(request), submit(request)))
    return seen


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


# Messages


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


# Sampling


def test_several_answers(server, image):
    options = {"temperature": 2, "top_p": 1, "seed": 5, "n": 3, "max_tokens": 12}
    found = server.ask(content(image), **options)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in found.choices]
    single = [server.ask(content(image), **(options | {"n": 1, "seed": seed})) for seed in (5, 6, 7)]
    assert texts == [answer.choices[0].message.content for answer in single] and len(set(texts)) == 3
    assert found.usage.completion_tokens == sum(answer.usage.completion_tokens for answer in single)
    assert found.usage.prompt_tokens == single[0].usage.prompt_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    chunks = list(server.ask(content(image), **options, stream=True, stream_options={"include_usage": True}))
    streamed, ends = ["", "", ""], []
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        ends += [choice.index] if choice.finish_reason else []
    assert streamed == texts and sorted(ends) == [0, 1, 2]
    assert chunks[-1].usage.completion_tokens == found.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1]) and len({chunk.id for chunk in chunks}) == 1


def test_several_answers_need_places_in_the_queue(server, monkeypatch, engine_requests):
    places, submit = [0, 0], server.engine.submit

    def limited(request):
        if not places:
            raise completions.queue.Full
        places.pop()
        submit(request)

    monkeypatch.setattr(server.engine, "submit", limited)
    found = post(server, n=3)
    assert found.status_code == 429 and found.headers["retry-after"]
    assert all(request.cancelled.is_set() for request in engine_requests)


def test_a_share_of_nothing_is_the_most_probable_token(server, image):
    greedy = server.ask(content(image))
    found = server.ask(content(image), temperature=2, top_p=0)
    assert found.choices[0].message.content == greedy.choices[0].message.content


def test_penalties_and_biases_reach_the_engine(server, engine_requests):
    answered(server, presence_penalty=1.5, frequency_penalty=-0.5, repetition_penalty=1.25)
    options = engine_requests[0].options
    assert (options.presence_penalty, options.frequency_penalty, options.repetition_penalty) == (1.5, -0.5, 1.25)


def test_a_bias_decides_the_tokens(server, image):
    tokenizer = server.engine.chat.model.llama_tokenizer
    (dog,) = tokenizer("dog", add_special_tokens=False).input_ids[-1:]
    assert text_of(answered(server, logit_bias={str(dog): 100})) == tokenizer.decode([dog] * 4).strip()
    first = server.ask(content(image)).choices[0].message.content.split()[0]
    biases = {str(i): -100 for i in tokenizer(first, add_special_tokens=False).input_ids}
    assert first not in server.ask(content(image), logit_bias=biases).choices[0].message.content


# Log probabilities


def test_logprobs(server, image):
    found = server.ask(content(image), logprobs=True, top_logprobs=3)
    entries = found.choices[0].logprobs.content
    assert 0 < len(entries) <= found.usage.completion_tokens
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().strip() == found.choices[0].message.content
    for entry in entries:
        assert entry.token.encode() == bytes(entry.bytes) and len(entry.top_logprobs) == 3
        best = entry.top_logprobs[0]  # nothing is sampled
        assert (entry.token, entry.logprob) == (best.token, pytest.approx(best.logprob)) and entry.logprob <= 0
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-4
    plain = server.ask(content(image), logprobs=True)
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[]] * len(entries)
    assert server.ask(content(image)).choices[0].logprobs is None


def test_logprobs_are_streamed(server, image):
    whole = server.ask(content(image), logprobs=True, top_logprobs=2)
    chunks = list(server.ask(content(image), logprobs=True, top_logprobs=2, stream=True))
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == [entry.token for entry in whole.choices[0].logprobs.content]
    for chunk in chunks:
        if chunk.choices[0].delta.content:
            assert chunk.choices[0].logprobs.content


def test_tokens_of_a_stop_string_have_no_logprobs(server, image):
    words = text_of(json.loads(server.ask(content(image)).model_dump_json())).split()
    found = server.ask(content(image), logprobs=True, stop=[words[2]])
    entries = found.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().split() == words[:2]
    assert found.usage.completion_tokens > len(entries)


# The form of responses


def test_responses_have_openais_fields(server):
    found = answered(server)
    assert set(found) == {"id", "object", "created", "model", "choices", "usage"}
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    (choice,) = found["choices"]
    assert set(choice) == {"index", "message", "finish_reason", "logprobs"}
    assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None


def test_a_stream_in_bytes(server):
    with httpx.stream(
        "POST", server.url + PATH, json=json.loads(post(server).request.content) | {"stream": True}
    ) as found:
        assert found.headers["content-type"].startswith("text/event-stream")
        assert found.headers["cache-control"] == "no-cache"
        lines = [line for line in found.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {} and chunks[-1]["choices"][0]["finish_reason"]
    assert not any("usage" in chunk for chunk in chunks)


def test_the_model(server):
    assert server.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="gpt-9") as error:
        server.client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found" and error.value.type == "invalid_request_error"
    assert httpx.get(f"{server.url}/v1/models/a/b").status_code == 404


def test_head_and_wrong_methods(server):
    for path in ("/health", "/v1/models", f"/v1/models/{NAME}", "/docs", "/openapi.json", "/metrics"):
        found = httpx.head(server.url + path)
        assert found.status_code == 200 and found.content == b"", path
    for method, path, allowed in (("GET", PATH, "POST"), ("POST", "/v1/models", "GET")):
        found = httpx.request(method, server.url + path)
        assert found.status_code == 405 and found.json()["error"]["code"] == "method_not_allowed"
        assert found.headers["allow"] == allowed
