"""What operators of the API use: metrics, the access log, defaults of requests, and the page /docs."""

import re
import sys
import time

import httpx
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, PATH, Server, ask, client, content, data_url, post_text

import demo
from minigpt4.conversation.answer_batch import AnswerBatch
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve import api, completions
from minigpt4.serve.api_requests import Limits
from minigpt4.serve.constrained import GrammarProcessor
from minigpt4.serve.engine import Engine, Stats

# Metrics and the log


def numbers(server):
    families = text_string_to_metric_families(server.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def test_metrics(engine):
    with client(engine) as server:
        found = ask(server, max_tokens=4, n=2).json()
        ask(server, temperature=9)
        server.get("/v1/models", headers={"Host": "evil.example"})
        server.get("/nowhere")
        now = numbers(server)
    count = found["usage"]["completion_tokens"]
    assert now["minigpt4_generated_tokens_total",] == count
    assert now["minigpt4_prompt_tokens_total",] == 2 * found["usage"]["prompt_tokens"]
    assert now["minigpt4_time_to_first_token_seconds_count",] == 2
    assert now["minigpt4_inter_token_seconds_count",] == count - 2
    assert now["minigpt4_rejections_total", "not_found"] == 1
    for status, number in {"200": 1, "400": 1, "403": 1, "404": 1}.items():
        assert now["minigpt4_requests_total", status] == number
    assert now["minigpt4_rejections_total", "bad_request"] == now["minigpt4_rejections_total", "bad_host"] == 1
    assert now["minigpt4_requests_waiting",] == now["minigpt4_requests_running",] == 0
    assert now["process_resident_memory_bytes",] > 2**20
    with client(engine) as server:
        assert numbers(server)["minigpt4_generated_tokens_total",] == 0  # every application has its own


def test_the_log_has_a_line_for_each_request(engine, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "keys").write_text("first-key anna\nsecond-key Bert's laptop\n")
    with client(engine, api_keys=tmp_path / "keys") as server:
        found = ask(server, "first-key", max_tokens=3).json()
        ask(server, "second-key", stream=True, max_tokens=2)
        ask(server, "second-key", n=20)
        ask(server, "wrong")
        server.get(PATH)
        server.get("/a%0Ab%1b[31m" + "c" * 500)
    lines = [record.getMessage() for record in caplog.records if record.name == "root"]
    patterns = [
        rf"anna POST {PATH}: 200 ok, \d+\.\d\d\d s, {found['usage']['completion_tokens']} tokens",
        rf"Bert's laptop POST {PATH}: 200 ok, \d+\.\d\d\d s, [12] tokens",
        rf"Bert's laptop POST {PATH}: 400 bad_request, \d+\.\d\d\d s, 0 tokens",
        rf"192\.0\.2\.1 POST {PATH}: 401 invalid_api_key, .*",
        rf"192\.0\.2\.1 GET {PATH}: 405 method_not_allowed, .*",
        r"192\.0\.2\.1 GET /a b\\x1b\[31mc{1,200}: 404 not_found, .*",
    ]
    assert len(lines) == len(patterns)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert "first-key" not in caplog.text


# Defaults


def test_defaults_of_requests(engine, monkeypatch):
    seen, submit = [], engine.submit
    monkeypatch.setattr(engine, "submit", lambda *own: (seen.extend(request.options for request in own), submit(*own)))
    defaults = GenerationOptions(do_sample=False, temperature=0.5, top_p=0.4, seed=7, max_new_tokens=3)
    with client(engine, defaults=defaults) as server:
        ask(server, temperature=None, max_tokens=None)
        ask(server, temperature=0.9, top_p=0.8, seed=1, max_tokens=2)
        ask(server, temperature=None, max_tokens=None, n=2)
    names = ("do_sample", "temperature", "top_p", "seed", "max_new_tokens")
    assert [tuple(getattr(options, name) for name in names) for options in seen] == [
        (False, 0.5, 0.4, 7, 3),
        (True, 0.9, 0.8, 1, 2),
        (False, 0.5, 0.4, 7, 3),
        (False, 0.5, 0.4, 8, 3),
    ]


def test_defaults_of_the_command_line(monkeypatch, chat):
    from minigpt4.serve import server

    built = []
    monkeypatch.setattr(demo, "build_chat", lambda args: chat)
    monkeypatch.setattr(api, "build_app", lambda engine, name, limits, *_: built.append((limits, _[-1])))
    monkeypatch.setattr(server, "serve", lambda app, listener, seconds: (built.append(seconds), listener.close()))
    arguments = "--greedy --seed 5 --num-beams 2 --max-new-tokens 1500 --shutdown-seconds 30"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", "--api", "--port", "0", *arguments.split()])
    demo.main()
    (limits, options), seconds = built
    assert (options.do_sample, options.seed, options.num_beams, options.max_new_tokens) == (False, 5, 2, 1500)
    assert limits.max_tokens == 1500 and seconds == 30
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", "--api", "--port", "0"])
    demo.main()
    assert built[2][1].seed is None and built[2][0].max_tokens == 1000 and built[3] == 5


def test_beam_search_as_a_default(chat, scene_folder):
    image = data_url((scene_folder / "0.png").read_bytes())
    engine = Engine(chat, max_length=400)
    conv, images = chat.template.copy(), []
    chat.upload_img(scene_folder / "0.png", conv, images)
    chat.ask("Why?", conv)
    beams = GenerationOptions(num_beams=3, do_sample=False, max_new_tokens=6)
    expected, _ = chat.answer_batch([conv], [images], beams)[0]
    with client(engine, defaults=beams) as server:
        fields = {"messages": [{"role": "user", "content": content(image, text="Why?")}], "max_tokens": None}
        found = ask(server, **fields)
        assert found.json()["choices"][0]["message"]["content"] == expected
        refused = ask(server, **fields, logprobs=True).json()["error"]
        assert refused["param"] == "logprobs" and "--num-beams" in refused["message"]
    engine.close()


# The page


def test_the_page_needs_no_other_host(engine):
    with client(engine) as server:
        page, schema = server.get("/docs"), server.get("/openapi.json").json()
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"https?:|//|<script|<link|<img|url\(", page.text)
    for name in (PATH, "/v1/models/{model_id}", "frequency_penalty", "response_format", "required", "0 to 2"):
        assert name in page.text
    assert schema["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = re.findall(r"#/components/schemas/(\w+)", str(schema))
    assert {"Body", "Message", "ContentPart"} <= set(names) <= set(schema["components"]["schemas"])


def test_an_unexpected_error_has_openais_form(engine, monkeypatch, caplog):
    app = api.build_app(engine, NAME, Limits())
    monkeypatch.setattr(completions.api_requests, "parse_body", lambda data: 1 / 0)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as server:
        found = ask(server)
    assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"


def test_a_stream_whose_client_leaves_is_no_success(chat, caplog, monkeypatch):
    caplog.set_level("INFO")
    step = AnswerBatch.step
    monkeypatch.setattr(AnswerBatch, "step", lambda batch: (time.sleep(0.05), step(batch))[1])
    server = Server(chat)
    try:
        body = post_text(stream=True, max_tokens=200, logit_bias={"2": -100})
        with httpx.stream("POST", server.url + PATH, content=body, timeout=60) as stream:
            next(stream.iter_bytes())
        deadline = time.monotonic() + 20
        while (
            not (lines := [line for line in caplog.messages if f"POST {PATH}" in line]) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        assert len(lines) == 1 and "200 disconnected" in lines[0]
        assert 'minigpt4_rejections_total{reason="disconnected"} 1.0' in httpx.get(f"{server.url}/metrics").text
    finally:
        server.close()


def test_a_failure_of_the_engine_is_logged_once(engine, monkeypatch, caplog):
    monkeypatch.setattr(AnswerBatch, "step", lambda batch: 1 / 0)
    with client(engine) as server:
        assert ask(server).json()["error"]["code"] == "internal"
    assert caplog.text.count("ZeroDivisionError") == 1


def test_a_failure_behind_the_engine_is_logged(engine, monkeypatch, caplog):
    app = api.build_app(engine, NAME, Limits())
    monkeypatch.setattr(GrammarProcessor, "check", lambda self: 1 / 0)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as server:
        found = ask(server, response_format={"type": "json_object"})
    assert found.status_code == 500 and "ZeroDivisionError" in caplog.text


def test_each_grammar_is_checked_when_its_own_answer_has_ended(engine, monkeypatch):
    checked = []
    monkeypatch.setattr(GrammarProcessor, "check", lambda self: checked.append(self))
    with client(engine) as server:
        assert ask(server, n=3, response_format={"type": "json_object"}).status_code == 200
    assert len(checked) == len(set(map(id, checked))) == 3


def test_health_is_that_of_the_engine(chat, monkeypatch):
    engine = Engine(chat, max_length=400)
    with client(engine) as server:
        monkeypatch.setattr(Engine, "stats", Stats(num_waiting=3))
        found = server.get("/health")
        assert (found.status_code, found.json()) == (200, {"status": "ok", "model": NAME, "waiting": 3})
        engine.close()
        found = server.get("/health")
        assert (found.status_code, found.json()["status"]) == (503, "failed")
        assert "engine has ended" in found.json()["problem"] and found.headers["Retry-After"]
