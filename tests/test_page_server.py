"""The web page's server, without a browser: what clients may send, what it stores, and what it says about errors."""

import gc
import io
import json
import os
import re
import shutil
import socket
import threading
import time
from argparse import Namespace
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from picture_kinds import saved
from PIL import Image
from serving import GREEDY, served

from minigpt4.serve import page_guard, web

SECRET = "/srv/secret/weights.pth"
DEFAULTS = [False, 1, 1.0, 0.9, 1, 4]  # of the settings, but for sampling and length
FILE = {"orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("uploads") / "a*b*.png"
    file.write_bytes(saved(Image.new("RGB", (40, 30), "red"), "PNG"))
    return file


@pytest.fixture(scope="module")
def page(chat, picture):
    with served(web.build_app(chat, "Small", GREEDY, [picture])) as url:
        yield url


@pytest.fixture
def folder(page):
    """Where the server stores uploads and images of chats; afterwards without uploads."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    yield folder
    delete_uploads(folder)


def stored(folder, uploads=False):
    """The images of chats, or the uploads."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.parent.name != "kept"]
    return [file for file in files if file.parent.name.startswith("kept") != uploads]


def delete_uploads(folder):
    for file in stored(folder, uploads=True):
        file.unlink() if file.parent == folder else shutil.rmtree(file.parent, ignore_errors=True)


def ask(client, *files, text=""):
    """Text left in the box, files left there, messages of the chat, and the status line."""
    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    box, messages, status = client.predict(message, api_name="/submit")
    return box, messages, re.sub(r"\\(.)", r"\1", status)


@pytest.fixture
def connect(page):
    """A new session of the page, in a language."""
    return lambda language="en": Client(page, verbose=False, headers={"Accept-Language": language})


def upload(page, name="a.png", data=b"x"):
    return httpx.post(f"{page}/gradio_api/upload", files={"files": (name, io.BytesIO(data))})


def test_a_chat_has_a_limited_number_of_images(connect, picture, folder, monkeypatch):
    assert web.MAX_IMAGES <= 16
    monkeypatch.setattr(web, "MAX_IMAGES", 2)
    client = connect()
    for count, is_refused in ((3, True), (1, False), (2, True), (1, False), (1, True)):
        assert ("A chat can have 2 images" in ask(client, *[picture] * count)[2]) == is_refused
        client.predict(*DEFAULTS, api_name="/answer")
    client.predict(api_name="/clear")
    assert "⚠" not in ask(client, picture)[2]
    assert "一次对话最多 2 张图片" in ask(connect("zh-CN"), *[picture] * 3)[2]


def test_large_images_do_not_stay_in_memory(connect, tmp_path, folder):
    size, client = 4500, connect()
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(saved(Image.new("1", (size, size), number % 2), "PNG"))
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 20_000
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory()
    assert "⚠" not in ask(client, *sorted(tmp_path.iterdir()))[2]
    assert peak_memory() - before < 3 * size**2  # the pixels of one image
    for file in stored(folder):
        with Image.open(file) as shown:
            assert max(shown.size) <= web.MAX_SHOWN_SIDE


def peak_memory():
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()).group(1))


def test_images_are_deleted_with_their_chat(connect, picture, folder, tmp_path):
    (broken := tmp_path / "broken.png").write_bytes(picture.read_bytes()[:50])
    client, before = connect(), set(stored(folder))
    for count in (1, 2):
        assert "'broken.png' cannot be read" in ask(client, picture, broken)[2]
        assert "⚠" not in ask(client, picture)[2]
        client.predict(*DEFAULTS, api_name="/answer")
        assert len(set(stored(folder)) - before) == count
    client.predict(api_name="/clear")
    assert set(stored(folder)) == before


def test_images_of_a_message_that_the_model_refuses_are_deleted_with_the_next_one(
    connect, picture, folder, chat, monkeypatch
):
    client, before = connect(), set(stored(folder))
    monkeypatch.setattr(chat, "stream", lambda *_: 1 / 0)
    for _ in range(3):
        ask(client, picture, text="Why?")
        client.predict(*DEFAULTS, api_name="/answer")
        assert len(set(stored(folder)) - before) == 1


def test_images_are_deleted_when_their_session_ends(connect, picture, folder, monkeypatch):
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # a session ends a second after its page is closed
    client, before = connect(), set(stored(folder))
    ask(client, picture)
    assert set(stored(folder)) - before
    client.close()
    end = time.monotonic() + 20
    while set(stored(folder)) - before:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_old_and_partial_uploads_are_deleted(page, folder):
    (old,) = upload(page, "old.png", b"old").json()
    (folder / "tmp_partial").write_bytes(b"x")  # as a client leaves it that disconnects
    hours_ago = time.time() - 2 * page_guard.MAX_STORED_SECONDS
    for path in (Path(old).parent, folder / "tmp_partial"):
        os.utime(path, (hours_ago, hours_ago))
    (new,) = upload(page, "new.png", b"new").json()
    assert not Path(old).exists() and stored(folder, uploads=True) == [Path(new)]


def test_two_chats_can_have_the_same_upload(connect, picture, folder):
    assert "⚠" not in ask(connect(), picture)[2]
    assert len(stored(folder, uploads=True)) == 1  # the path depends on the content only


@pytest.fixture
def reading(chat, monkeypatch):
    """Two events: an image is being read, and it may go on."""
    begun, may_end, plain = threading.Event(), threading.Event(), chat.preprocess_image
    monkeypatch.setattr(chat, "preprocess_image", lambda image: (begun.set(), may_end.wait(20), plain(image))[-1])
    yield begun, may_end
    may_end.set()


def sent(client, picture):
    return client.submit({"text": "", "files": [handle_file(str(picture))]}, api_name="/submit")


def test_chats_do_not_wait_for_the_images_of_others(connect, picture, folder, chat, monkeypatch):
    barrier, plain = threading.Barrier(3), chat.preprocess_image
    monkeypatch.setattr(chat, "preprocess_image", lambda image: (barrier.wait(20), plain(image))[-1])
    clients = [connect() for _ in range(3)]
    assert all("⚠" not in event.result(30)[-1] for event in [sent(client, picture) for client in clients])


def test_of_two_messages_at_the_same_time_one_is_refused(connect, picture, folder, reading):
    client, (begun, may_end) = connect(), reading
    first = sent(client, picture)
    assert begun.wait(20)
    assert "is being answered" in ask(client, text="Why?")[2]
    assert client.predict(*DEFAULTS, api_name="/answer") is not None  # which follows any message, but has no job yet
    may_end.set()
    assert "⚠" not in first.result(20)[-1]
    messages, _ = client.predict(*DEFAULTS, api_name="/answer")
    assert [message["role"] for message in messages] == ["user"]


def test_a_chat_that_is_cleared_while_its_images_are_read_stays_empty(connect, picture, folder, reading):
    client, (begun, may_end) = connect(), reading
    first = sent(client, picture)
    assert begun.wait(20)
    client.predict(api_name="/clear")
    may_end.set()
    first.result(20)
    ask(client, text="Why?")
    messages, _ = client.predict(*DEFAULTS, api_name="/answer")
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_the_turns_of_images_are_those_of_addresses(connect, picture, folder, monkeypatch):
    clients, plain = set(), web.ImageDecoder.submit

    def submit(self, data, name, size, client):
        clients.add(client)
        return plain(self, data, name, size, client)

    monkeypatch.setattr(web.ImageDecoder, "submit", submit)
    ask(connect(), picture)
    assert clients == {"127.0.0.1"}


def test_sessions_are_limited(chat, picture, monkeypatch):
    monkeypatch.setattr(web, "MAX_SESSIONS", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", os.environ["GRADIO_TEMP_DIR"])  # restored afterwards
    with served(web.build_app(chat, "Small", GREEDY)) as url:
        for _ in range(2):
            ask(Client(url, verbose=False), picture)
        gc.collect()
        assert len(stored(Path(os.environ["GRADIO_TEMP_DIR"]))) == 1


def test_an_upload_that_is_gone_is_asked_for_again(connect, picture, monkeypatch):
    def delete(path):
        path.unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", delete)
    assert "⚠ ab.png is no longer on the server: add it again." in ask(connect(), picture)[2]


def test_the_bytes_of_requests_are_limited(page, monkeypatch):
    assert upload(page, data=bytes(page_guard.MAX_UPLOADED_FILE_BYTES + 1)).status_code == 413
    monkeypatch.setattr(page_guard, "MAX_UPLOAD_BYTES", 1000)
    assert upload(page, data=bytes(2000)).status_code == 413
    monkeypatch.setattr(page_guard, "MAX_STORED_BYTES", 0)
    found = httpx.post(f"{page}/gradio_api/upload", files={"files": b"x"}, headers={"Accept-Language": "zh"})
    assert (found.status_code, found.json()["detail"]) == (507, "服务器上的上传文件过多，请稍后再试。")
    join = f"{page}/gradio_api/queue/join"
    assert httpx.post(join, json={"data": "x" * page_guard.MAX_BODY_BYTES}).status_code == 413
    assert httpx.post(join, content=iter([b"{}"])).status_code == 411
    assert httpx.post(join, content=b"{").status_code == 400
    assert httpx.post(join, content=b"[" * 100_000).status_code == 400


def test_running_uploads_count(page, folder, monkeypatch):
    monkeypatch.setattr(page_guard, "MAX_STORED_BYTES", 2**27)
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**26}\r\n"
    more = "Content-Type: multipart/form-data; boundary=x\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(page).port)) as slow:
        slow.settimeout(20)
        slow.sendall((head + more).encode())
        assert b"100 Continue" in slow.recv(1000)
        monkeypatch.setattr(page_guard, "MAX_STORED_BYTES", 2**26)
        assert upload(page).status_code == 507
    end = time.monotonic() + 20
    while upload(page).status_code != 200:  # the slow client has left
        assert time.monotonic() < end
        time.sleep(0.1)


def test_images_of_chats_count(page, connect, folder, tmp_path, monkeypatch):
    Image.effect_noise((500, 500), 100).save(tmp_path / "noise.png")
    num_bytes = sum(file.stat().st_size for file in folder.rglob("*"))
    monkeypatch.setattr(page_guard, "MAX_STORED_BYTES", num_bytes + 50_000)
    assert upload(page).status_code == 200
    monkeypatch.undo()
    client = connect()
    assert "⚠" not in ask(client, tmp_path / "noise.png")[2]
    delete_uploads(folder)
    monkeypatch.setattr(page_guard, "MAX_STORED_BYTES", num_bytes + 50_000)
    assert upload(page).status_code == 507


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:9/a.png", "{}/../../etc/passwd", "a.png", "\0"])
@pytest.mark.parametrize("more", [{}, {"is_stream": True}, {"url": "http://127.0.0.1:9/a.png"}])
def test_only_uploads_can_be_used(page, folder, path, more):
    """Gradio would read any file of the server, or fetch a URL."""
    file = FILE | {"path": path.format(folder)} | more
    for data in ([None, {"text": "", "files": [file]}], [None, file, *DEFAULTS[1:]]):
        event = {"data": data, "fn_index": 0, "session_hash": "x"}
        for route in ("queue/join", "run/submit", "call/submit", "call/v2/submit"):
            assert httpx.post(f"{page}/gradio_api/{route}", json=event).status_code == (400 if path == "\0" else 403)
    assert path == "\0" or httpx.get(f"{page}/gradio_api/file={file['path']}").status_code in (403, 404)


@pytest.mark.parametrize(
    "path", ["file=http://127.0.0.1:9/a", "proxy=http://127.0.0.1:9/a", "deep_link?session_hash=x"]
)
def test_urls_are_not_fetched_and_states_not_stored(page, path):
    assert httpx.get(f"{page}/gradio_api/{path}").json() == {"detail": "The page does not use this."}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_websites_cannot_use_the_page(page, headers, status):
    for path in ("", "config", "gradio_api/info", "assets/none.js"):
        assert (httpx.get(f"{page}/{path}", headers=headers).status_code == 403) == (status == 403)


def test_every_response_has_a_policy_without_other_hosts(page):
    for path in ("", "config", "theme.css", "absent", "gradio_api/file=http://a"):
        policy = httpx.get(f"{page}/{path}").headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy and "eval" not in policy


def test_errors_show_neither_paths_nor_tracebacks(connect, picture, chat, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError(f"cannot read {SECRET}")

    client, chinese = connect(), connect("zh-CN,zh;q=0.9")
    monkeypatch.setattr(chat, "vis_processor", fail)
    shown = [ask(client, picture), ask(chinese, picture)]
    monkeypatch.undo()
    monkeypatch.setattr(chat, "stream", fail)
    for each in (client, chinese):
        ask(each, text="Why?")
        shown.append(each.predict(*DEFAULTS, api_name="/answer"))
    monkeypatch.undo()
    texts = [re.sub(r"\\(.)", r"\1", str(result[-1])) for result in shown]
    assert all(("The model failed" in text) == (i % 2 == 0) for i, text in enumerate(texts))
    assert all(("模型出错" in text) == (i % 2 == 1) for i, text in enumerate(texts))
    assert caplog.text.count("RuntimeError: cannot read") == 4  # where the operator finds the reason
    monkeypatch.setattr(chat, "template", Namespace(copy=fail))
    with pytest.raises(Exception) as error:
        client.predict(api_name="/clear")
    monkeypatch.undo()
    shown = json.dumps([shown, str(error.value)])
    assert "minigpt4" not in shown and SECRET not in shown and "RuntimeError" not in shown
    ask(client, text="Again?")  # the chat continues
    assert "⚠" not in client.predict(*DEFAULTS, api_name="/answer")[-1]


def test_the_folder_is_deleted_with_the_server(chat, picture):
    before = os.environ["GRADIO_TEMP_DIR"]
    with served(web.build_app(chat, "Small", GREEDY, [picture])):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert stored(folder) == [] and len(list((folder / "kept").iterdir())) == 1
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    os.environ["GRADIO_TEMP_DIR"] = before
