"""Terminal, batch and API on the embedded model; the API is driven by the official client over a real socket."""

import argparse
import base64
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from random import Random

import httpx
import openai
import picture_kinds
import pytest
import uvicorn

import demo
from minigpt4.common.errors import UserError
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve import api
from minigpt4.serve.api_requests import Limits
from minigpt4.serve.batch import answer_batch, find_questions
from minigpt4.serve.engine import Busy, Engine, Request
from minigpt4.serve.terminal import steady, terminal_chat
from quickstart import scenes

GREEDY = GenerationOptions(do_sample=False, max_new_tokens=12)
NAME = "small"


@pytest.fixture(scope="module")
def chat():
    cfg_path = "eval_configs/quickstart_eval.yaml"
    return demo.build_chat(
        argparse.Namespace(cfg_path=cfg_path, options=["model.ckpt=null", "run.device=cpu"], gpu_id=0, seed=1)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), Random(1)
    for i in range(5):
        scenes.render(scenes.draw_scene(rng), rng).save(folder / f"{i}.png")
    (folder / "2a.jpg").write_bytes((folder / "2.png").read_bytes()[:100])
    return folder


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def content(*urls, text="Describe this image in detail."):
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return picture_kinds.write_all(tmp_path_factory.mktemp("kinds"))


# ---- terminal -------------------------------------------------------------------------------------------------------


def talk(chat, capsys, *lines):
    feed = iter(lines)

    def read(_):
        try:
            return next(feed)
        except StopIteration:
            raise EOFError from None

    terminal_chat(chat, GREEDY, read=read)
    return capsys.readouterr()


def test_terminal(chat, capsys, folder):
    seen = talk(chat, capsys, "/help", f"/image {folder}/0.png", "What is at the top?", "/reset", "Yes?")
    assert "/reset" in seen.out and "Received." in seen.out and len(seen.out.splitlines()) == 4 and not seen.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image {}/2a.jpg", "2a.jpg' cannot be read as an image"),
        ("/image {}/absent.jpg", "absent.jpg"),
        ("x" * 100_000, "too long"),
        ("<ImageHere>", "cannot contain"),
    ],
)
def test_terminal_goes_on_after_mistakes(chat, capsys, folder, line, said):
    seen = talk(chat, capsys, line.format(folder), "你好 🙂?")
    assert said in seen.err and len(seen.err.splitlines()) == 1 and len(seen.out.splitlines()) == 1


def test_terminal_reads_pictures_of_every_kind(chat, capsys, kinds):
    good, bad = kinds
    for file in good:
        seen = talk(chat, capsys, f"/image {file}", "What is it?")
        assert seen.out.startswith("Received.") and not seen.err, file
    for file in bad:
        seen = talk(chat, capsys, f"/image {file}", "What is it?")
        assert file.name in seen.err and len(seen.err.splitlines()) == 1 and len(seen.out.splitlines()) == 1, file


def test_what_may_still_change_is_held_back():
    assert steady("a dog#", ["###"]) == "a dog" and steady("a dog##", ["###"]) == "a dog"
    assert steady("a \ufffd", ["###"]) == "a" and steady("a dog", ["###", "ogre"]) == "a d"


# ---- batch ----------------------------------------------------------------------------------------------------------


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_batch_and_its_resume(chat, folder, tmp_path):
    questions = find_questions(str(folder), "What is it?")
    assert [q.image.rsplit("/", 1)[1] for q in questions] == ["0.png", "1.png", "2.png", "2a.jpg", "3.png", "4.png"]
    out = tmp_path / "out" / "rows.jsonl"
    assert answer_batch(chat, questions, out, GREEDY, size=2) == 1
    whole = out.read_bytes()
    rows = rows_of(out)
    assert [row["image"] for row in rows] == [q.image for q in questions]
    assert "2a.jpg" in rows[3]["error"] and all("answer" in row for row in rows if row is not rows[3])
    lines = whole.splitlines(keepends=True)
    for rest in (b"".join(lines[:2]), b"".join(lines[:2]) + lines[2][:20], whole):  # killed between, within, after
        out.write_bytes(rest)
        assert answer_batch(chat, questions, out, GREEDY, size=2) == 1
        assert out.read_bytes() == whole
    with pytest.raises(UserError, match="other pictures or questions"):
        answer_batch(chat, find_questions(str(folder), "Why?"), out, GREEDY)
    assert out.read_bytes() == whole


def test_batch_reads_pictures_of_every_kind(chat, kinds, tmp_path):
    good, bad = kinds
    assert answer_batch(chat, find_questions(str(good[0].parent), "What?"), tmp_path / "out.jsonl", GREEDY) == len(bad)
    for row in rows_of(tmp_path / "out.jsonl"):
        name = row["image"].rsplit("/", 1)[1]
        assert "answer" in row if name in {file.name for file in good} else name in row["error"]


def test_a_question_that_is_too_long_is_a_row(chat, folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = ("Why?", "x" * 100_000, "")
    rows.write_text("".join(json.dumps({"image": f"{folder}/0.png", "question": t}) + "\n" for t in texts), "utf-8")
    assert answer_batch(chat, find_questions(str(rows), "What?"), tmp_path / "out.jsonl", GREEDY) == 2
    first, second, third = rows_of(tmp_path / "out.jsonl")
    assert first["answer"] and "too long" in second["error"] and "empty" in third["error"]


def test_batch_resumes_behind_odd_line_ends_and_names_a_bad_target(chat, folder, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"image": f"{folder}/0.png", "question": "Why\u2028so\x85?"}
    rows.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    for _ in range(2):
        assert answer_batch(chat, find_questions(str(rows), "What?"), out, GREEDY) == 0
        assert out.read_text(encoding="utf-8").count("\n") == 1
    with pytest.raises(UserError, match=r"--out.*cannot be written"):
        answer_batch(chat, find_questions(str(rows), "What?"), tmp_path, GREEDY)


def test_batch_sources(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "a.png", "question": "Why?"}\n\n{"image": "b.png"}\n', encoding="utf-8")
    assert [(q.image, q.text) for q in find_questions(str(rows), "What?")] == [
        (str(tmp_path / "a.png"), "Why?"),
        (str(tmp_path / "b.png"), "What?"),
    ]
    assert len(find_questions(f"{folder}/[0-2].png", "What?")) == 3
    for text, said in (("{", "line 1"), ("[]", "no row"), ('{"image": 3}', "no row")):
        rows.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            find_questions(str(rows), "What?")
    with pytest.raises(UserError, match="holds no pictures"):
        find_questions(str(tmp_path / "nothing"), "What?")


# ---- API ------------------------------------------------------------------------------------------------------------


class Server:
    """The API on a free port, in a thread."""

    def __init__(self, chat, api_key=None, max_queue=8, **limits):
        self.engine = Engine(chat, max_batch=4, max_queue=max_queue, max_length=300)
        app = api.build_app(self.engine, NAME, Limits(**limits), api_key)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0)

    def ask(self, what, **options):
        messages = [{"role": "user", "content": what}]
        return self.client.chat.completions.create(
            **({"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0} | options)
        )

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()


@pytest.fixture(scope="module")
def server(chat, folder):
    server = Server(chat, allowed_folder=folder, max_tokens=100, max_body_bytes=2**20)
    yield server
    server.close()


@pytest.fixture(scope="module")
def picture(folder):
    return data_url((folder / "0.png").read_bytes())


def test_api_answers(server, picture, chat, folder):
    found = server.ask(content(picture))
    conv, images = chat.template.copy(), []
    chat.upload_img(folder / "0.png", conv, images)
    chat.ask("Describe this image in detail.", conv)
    text, ids = chat.answer(conv, images, do_sample=False, max_new_tokens=12)
    assert found.choices[0].message.content == text and found.choices[0].finish_reason in ("stop", "length")
    assert found.usage.completion_tokens == len(ids) and found.usage.prompt_tokens > 12
    assert server.client.models.list().data[0].id == NAME
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_api_streams(server, picture):
    whole = server.ask(content(picture))
    chunks = list(server.ask(content(picture), stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content and sum(map(bool, texts)) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_api_turns_cost_only_their_own_tokens(server, picture):
    messages = [{"role": "user", "content": content(picture)}]
    for _ in range(2):
        found = server.ask(None, messages=messages)
        messages += [
            {"role": "assistant", "content": found.choices[0].message.content},
            {"role": "user", "content": "Why?"},
        ]
    usage = found.usage
    assert usage.prompt_tokens_details.cached_tokens > 0.5 * usage.prompt_tokens


def test_api_stop_words_and_system_text(server, picture):
    words = server.ask(content(picture)).choices[0].message.content.split()
    found = server.ask(content(picture), stop=[words[1]])
    assert words[1] not in found.choices[0].message.content and found.choices[0].finish_reason == "stop"
    system = {"role": "system", "content": "Be brief."}
    more = server.ask(None, messages=[system, {"role": "user", "content": content(picture)}])
    assert more.usage.prompt_tokens > found.usage.prompt_tokens


def test_api_serves_several_at_once(server, folder):
    urls = [data_url((folder / f"{i}.png").read_bytes()) for i in (0, 1, 3, 4)]
    alone = [server.ask(content(url)).choices[0].message.content for url in urls]
    found = [None] * 4

    def ask(i):
        found[i] = server.ask(content(urls[i])).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_api_pictures_that_are_allowed(server):
    assert server.ask(content("file:///1.png")).choices[0].message.content is not None


def test_api_fetches_from_allowed_hosts_alone_and_goes_nowhere_else(chat, folder):
    class Files(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path == "/0.png"
            self.send_response(200 if known else 302)
            self.send_header("Location", "http://localhost:1/elsewhere.png")
            self.end_headers()
            self.wfile.write((folder / "0.png").read_bytes() if known else b"")

        def log_message(self, *_):
            pass

    files = HTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=files.serve_forever, daemon=True).start()
    server, address = Server(chat, allowed_hosts=["127.0.0.1"]), f"http://127.0.0.1:{files.server_port}"
    try:
        alike = server.ask(content(data_url((folder / "0.png").read_bytes())))
        found = server.ask(content(f"{address}/0.png"))
        assert found.choices[0].message.content == alike.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="status 302"):
            server.ask(content(f"{address}/moved.png"))
        with pytest.raises(openai.BadRequestError, match="'localhost' are not allowed"):
            server.ask(content(f"http://localhost:{files.server_port}/0.png"))
    finally:
        server.close()
        files.shutdown()
        files.server_close()


@pytest.mark.parametrize(
    ("what", "options", "status", "said"),
    [
        ("", {}, 400, "empty"),
        ("x" * 100_000, {}, 400, "too long"),
        ("Yes?", {"model": "gpt-9"}, 404, "gpt-9.*small"),
        ("Yes?", {"max_tokens": 1000}, 400, "at most 100"),
        ("Yes?", {"temperature": 3}, 400, "temperature"),
        ("Yes?", {"messages": []}, 400, "messages"),
        (content("data:image/png;base64,@@@"), {}, 400, "base64"),
        (content("data:image/png,abc"), {}, 400, "data URL"),
        (content(data_url(b"no picture")), {}, 400, "cannot be read"),
        (content(data_url(b"")), {}, 400, "cannot be read"),
        (content("http://127.0.0.1:1/a.png"), {}, 400, "not allowed"),
        (content("http://169.254.169.254/latest"), {}, 400, "not allowed"),
        (content("file:///../../../etc/passwd"), {}, 400, "no such picture"),
        (content("/etc/passwd"), {}, 400, "not allowed"),
        (content("ftp://a/b.png"), {}, 400, "not allowed"),
        (content("data:image/png;base64," + "A" * 2**20), {}, 413, "larger than"),
        (content("file:///0.png", text="<ImageHere>"), {}, 400, "cannot contain"),
        (content(*["file:///0.png"] * 17), {}, 400, "at most 16"),
    ],
)
def test_api_refuses_in_openais_form(server, what, options, status, said):
    with pytest.raises(openai.APIStatusError, match=f"(?s){said}") as error:
        server.ask(what, **options)
    assert error.value.status_code == status and error.value.body["type"]
    assert server.ask("Yes?").choices  # the server goes on


def test_api_reads_pictures_of_every_kind(server, kinds):
    good, bad = kinds
    for file in good:
        assert server.ask(content(data_url(file.read_bytes()))).usage.completion_tokens, file
    for file in bad:
        with pytest.raises(openai.BadRequestError, match=r"cannot be read|too large"):
            server.ask(content(data_url(file.read_bytes())))
    assert server.ask("你好 🙂?").choices


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": 1}'])
def test_api_malformed_bodies(server, body):
    found = httpx.post(f"{server.url}/v1/chat/completions", content=body)
    assert found.status_code == 400 and found.json()["error"]["message"]
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["code"] == "not_found"


def test_api_client_that_leaves_ends_its_answer(server, picture):
    options = {"max_tokens": 100, "temperature": 1, "seed": 3, "stream": True}
    for _ in range(3):
        stream = server.ask(content(picture), **options)
        next(iter(stream))
        stream.close()
    begin = time.time()
    assert server.ask("Yes?").choices and time.time() - begin < 30


def test_api_key(chat):
    server = Server(chat, api_key="secret")
    try:
        assert server.ask("Yes?").choices
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    finally:
        server.close()


def test_a_full_queue_is_told(chat):
    engine = Engine(chat, max_batch=1, max_queue=1)
    hold, got = threading.Event(), []
    first = Request("", [("user", ["Yes?"])], GREEDY, lambda news: (got.append(news), hold.wait(20)))
    engine.submit(first)
    while not got:  # it is being answered
        time.sleep(0.01)
    engine.submit(Request("", [("user", ["Yes?"])], GREEDY, got.append))
    with pytest.raises(Busy):
        engine.submit(Request("", [("user", ["Yes?"])], GREEDY, got.append))
    hold.set()
    engine.close()


def test_time_is_limited(chat):
    server = Server(chat, seconds=0.0)
    try:
        with pytest.raises(openai.InternalServerError, match="longer than 0 s"):
            server.ask("Yes?")
    finally:
        server.close()


def test_time_is_limited_while_waiting(chat):
    server, hold, got = Server(chat, seconds=0.5), threading.Event(), []
    try:
        server.engine.submit(Request("", [("user", ["Yes?"])], GREEDY, lambda news: (got.append(news), hold.wait(20))))
        with pytest.raises(openai.InternalServerError, match=r"longer than 0\.5 s"):
            server.ask("Yes?")
    finally:
        hold.set()
        server.close()


def test_a_port_in_use_is_told(server, chat):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(UserError, match=f"--port {port}"):
        api.serve(None, "127.0.0.1", port)
