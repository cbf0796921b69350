"""Answers in the form of OpenAI's API: several ones, penalties, log probabilities, streams, and other routes."""

import json
import math

import httpx
import openai
import pytest
from serving import NAME, PATH, answered, content, post, text_of

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


def test_several_answers_need_places_in_the_queue(server, monkeypatch):
    monkeypatch.setattr(server.engine.waiting, "maxsize", 2)
    found = post(server, n=3)
    assert found.status_code == 429 and found.headers["retry-after"]
    assert server.engine.waiting.qsize() == 0 and post(server, n=2).status_code == 200


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


def test_messages_of_minigpt_v2_have_boxes(server, image, monkeypatch):
    assert "boxes" not in answered(server)["choices"][0]["message"]
    monkeypatch.setattr(server.engine.chat.model, "arch", "minigpt_v2")
    monkeypatch.setattr(server.engine.chat, "decode_answer", lambda *_, **__: "{<5><30><40><60>}")
    boxes = [{"phrase": None, "box": [0.05, 0.3, 0.4, 0.6]}]
    assert server.ask(content(image)).choices[0].message.boxes == boxes
    *_, last = server.ask(content(image), stream=True)
    assert last.choices[0].finish_reason and last.choices[0].delta.boxes == boxes
    outside = {"role": "user", "content": "[identify] {<120><0><130><9>}"}
    found = post(server, messages=[outside])
    assert found.status_code == 400 and "lies outside the image" in found.json()["error"]["message"]


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
