"""The API on the embedded model, driven by the official client over a real socket."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import openai
import pytest
from serving import GREEDY, NAME, QUESTION, Server, content, data_url, post_text

from minigpt4.common.errors import UserError
from minigpt4.conversation.answer_batch import AnswerBatch
from minigpt4.serve.engine import Request
from minigpt4.serve.server import listen

MAX_BODY_BYTES = 2**20


@pytest.fixture(scope="module")
def server(chat, scene_folder):
    server = Server(chat, allowed_folder=scene_folder, max_tokens=100, max_body_bytes=MAX_BODY_BYTES)
    yield server
    server.close()


def text_of(completion):
    return completion.choices[0].message.content


def direct_answer(chat, file, **options):
    """What the chat answers without the API."""
    conv, images = chat.template.copy(), []
    chat.upload_img(file, conv, images)
    chat.ask(QUESTION, conv)
    return chat.answer(conv, images, **options)


def test_answers(server, image, chat, scene_folder):
    found = server.ask(content(image))
    text, ids = direct_answer(chat, scene_folder / "0.png", do_sample=False, max_new_tokens=12)
    assert text_of(found) == text and found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.completion_tokens == len(ids) and found.usage.prompt_tokens > 12
    assert server.client.models.list().data[0].id == NAME
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_streams(server, image, chat):
    whole, chunks, received = server.ask(content(image)), [], threading.Semaphore(2)

    def wait(*_):  # what a client has not read yet would be sent as one piece
        received.acquire(timeout=1)

    hook = chat.model.llama_model.register_forward_hook(wait)
    try:
        for chunk in server.ask(content(image), stream=True, stream_options={"include_usage": True}):
            chunks.append(chunk)
            received.release()
    finally:
        hook.remove()
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == text_of(whole) and sum(map(bool, texts)) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_turns_cost_only_their_own_tokens(server, image):
    messages = [{"role": "user", "content": content(image)}]
    for _ in range(2):
        found = server.ask(None, messages=messages)
        messages += [{"role": "assistant", "content": text_of(found)}, {"role": "user", "content": "Why?"}]
    usage = found.usage
    assert usage.prompt_tokens_details.cached_tokens > 0.5 * usage.prompt_tokens


def test_stop_strings(server, image):
    words = text_of(server.ask(content(image))).split()
    for stop in (words[1], " ".join(words[1:4])):  # one token, several tokens
        found = server.ask(content(image), stop=[stop])
        assert stop not in text_of(found) and found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 12
        streamed = server.ask(content(image), stop=["never", stop], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text_of(found)


def test_system_text(server, image):
    def prompt_tokens(*first):
        return server.ask(None, messages=[*first, {"role": "user", "content": content(image)}]).usage.prompt_tokens

    counts = [prompt_tokens({"role": role, "content": "Be brief."}) for role in ("system", "developer")]
    assert counts[0] == counts[1] > prompt_tokens()


@pytest.mark.parametrize("limit", [1, 3])
def test_max_completion_tokens_limits_the_answer(server, image, limit):
    found = server.ask(content(image), max_completion_tokens=limit, max_tokens=12)
    assert found.usage.completion_tokens == limit and found.choices[0].finish_reason == "length"


def test_without_a_limit_the_answer_has_at_most_the_servers(server):
    body = json.loads(post_text())
    del body["max_tokens"]
    found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] <= 100


def test_seed_and_top_p_reach_sampling(server, image, chat, scene_folder):
    def sampled(**options):
        text = text_of(server.ask(content(image), temperature=2, **options))
        expected = direct_answer(chat, scene_folder / "0.png", temperature=2, max_new_tokens=12, **options)[0]
        assert text == expected
        return text

    texts = [sampled(seed=seed, top_p=1.0) for seed in (1, 2, 3)]
    assert len(set(texts)) == 3
    greedy = text_of(server.ask(content(image)))
    assert sampled(seed=1, top_p=1e-6) == greedy != texts[0]


def test_exactly_max_images_is_accepted(server):
    assert text_of(server.ask(content(*["file:///0.png"] * 16))) is not None
    with pytest.raises(openai.BadRequestError, match="at most 16"):
        server.ask(content(*["file:///0.png"] * 17))


@pytest.mark.parametrize(("num_bytes", "status"), [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)])
def test_a_body_of_exactly_the_limit_is_accepted(server, num_bytes, status):
    found = httpx.post(f"{server.url}/v1/chat/completions", content=post_text().ljust(num_bytes), timeout=60)
    assert found.status_code == status


def test_serves_several_at_once(server, scene_folder):
    urls = [data_url((scene_folder / f"{i}.png").read_bytes()) for i in (0, 1, 3, 4)]
    alone = [text_of(server.ask(content(url))) for url in urls]
    found = [None] * 4

    def ask(i):
        found[i] = text_of(server.ask(content(urls[i])))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_images_of_the_allowed_folder(server):
    assert text_of(server.ask(content("file:///1.png"))) is not None


def test_fetches_from_allowed_hosts_alone_and_follows_no_redirection(chat, scene_folder):
    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/0.png"
            self.send_response(200 if known else 302)
            self.send_header("Location", "http://localhost:1/elsewhere.png")
            self.end_headers()
            self.wfile.write((scene_folder / "0.png").read_bytes() if known else b"")

        def log_message(self, *_):
            pass

    files = HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    server, address = Server(chat, allowed_hosts=[host := f"127.0.0.1:{files.server_port}"]), f"http://{host}"
    try:
        expected = server.ask(content(data_url((scene_folder / "0.png").read_bytes())))
        assert text_of(server.ask(content(f"{address}/0.png"))) == text_of(expected)
        with pytest.raises(openai.BadRequestError, match="status 302"):
            server.ask(content(f"{address}/moved.png"))
        with pytest.raises(openai.BadRequestError, match=r"'localhost:\d+' are not allowed"):
            server.ask(content(f"http://localhost:{files.server_port}/0.png"))
    finally:
        server.close()
        files.shutdown()
        files.server_close()


@pytest.mark.parametrize(
    ("what", "options", "status", "message"),
    [
        ("", {}, 400, "empty"),
        ("x" * 100_000, {}, 400, "too long"),
        ("Yes?", {"model": "gpt-9"}, 404, "gpt-9.*small"),
        ("Yes?", {"max_tokens": 0}, 400, "max_tokens"),
        ("Yes?", {"temperature": 3}, 400, "temperature"),
        ("Yes?", {"messages": []}, 400, "messages"),
        (content("data:image/png;base64,@@@"), {}, 400, "base64"),
        (content("data:image/png,abc"), {}, 400, "data URL"),
        (content(data_url(b"no image")), {}, 400, "cannot be read"),
        (content("http://127.0.0.1:1/a.png"), {}, 400, "not allowed"),
        (content("file:///../../../etc/passwd"), {}, 400, "no such image"),
        (content("data:image/png;base64," + "A" * 2**20), {}, 413, "larger than"),
        (content("file:///0.png", text="<ImageHere>"), {}, 400, "cannot contain"),
    ],
)
def test_errors_have_openais_form(server, what, options, status, message):
    with pytest.raises(openai.APIStatusError, match=f"(?s){message}") as error:
        server.ask(what, **options)
    assert error.value.status_code == status and error.value.body["type"]
    assert server.ask("Yes?").choices  # the server continues


def test_images_of_every_kind(server, image_kinds):
    good, bad = image_kinds
    for file in good:
        assert server.ask(content(data_url(file.read_bytes()))).usage.completion_tokens, file
    for file in bad:
        with pytest.raises(openai.BadRequestError, match=r"cannot be read|at most 100,000,000"):
            server.ask(content(data_url(file.read_bytes())))
    assert server.ask("你好 🙂?").choices


def test_unknown_paths(server):
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["code"] == "not_found"


def test_a_client_that_leaves_ends_its_answer(server, image):
    options = {"max_tokens": 100, "temperature": 1, "seed": 3, "stream": True}
    for _ in range(3):
        stream = server.ask(content(image), **options)
        next(iter(stream))
        stream.close()
    begin = time.time()
    assert server.ask("Yes?").choices and time.time() - begin < 30


def test_a_client_that_leaves_without_streaming_ends_its_answer(server, chat, monkeypatch):
    step, plan = AnswerBatch.step, AnswerBatch.plan
    monkeypatch.setattr(AnswerBatch, "step", lambda batch: (time.sleep(0.1), step(batch))[1])
    monkeypatch.setattr(AnswerBatch, "plan", lambda *args: plan(*args[:3], replace(args[3], min_length=1000)))
    monkeypatch.setattr(chat, "template", replace(chat.template, sep="%%"))  # a stop string that it never generates
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", content=post_text(max_tokens=100), timeout=0.3)
    begin = time.monotonic()
    while server.engine.stats.num_running:
        time.sleep(0.05)
    assert time.monotonic() - begin < 5  # 100 tokens would take 10 s


def test_api_key(chat):
    server = Server(chat, api_key="secret")
    try:
        assert server.ask("Yes?").choices
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    finally:
        server.close()


def test_time_is_limited(chat):
    server = Server(chat, timeout_seconds=0.0)
    try:
        with pytest.raises(openai.InternalServerError, match="longer than 0 s"):
            server.ask("Yes?")
    finally:
        server.close()


def test_time_is_limited_while_waiting(chat):
    server, release, updates = Server(chat, timeout_seconds=0.5), threading.Event(), []
    try:
        hold = Request([("user", ["Yes?"])], GREEDY, lambda update: (updates.append(update), release.wait(20)))
        server.engine.submit(hold)
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.5 s"):
            server.ask("Yes?")
    finally:
        release.set()
        server.close()


def test_a_port_in_use_is_reported(server):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"--port {port}"):
        listen("127.0.0.1", port)
