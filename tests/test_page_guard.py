# ruff: noqa: F811  (fixtures)
"""The guard of the web page's server: what requests may be and name, and how long uploads are kept."""

import os
import socket
import time
from pathlib import Path

import httpx
import pytest
from page_clients import FILE, SETTINGS, ask, connect, delete_uploads, folder, models, page, picture, stored, upload  # noqa: F401
from PIL import Image
from serving import GREEDY, served

from minigpt4.serve import page_guard, web


def test_old_and_partial_uploads_are_deleted(page, folder):
    (old,) = upload(page, "old.png", b"old").json()
    (folder / "tmp_partial").write_bytes(b"x")  # as a client leaves it that disconnects
    hours_ago = time.time() - 2 * page_guard.MAX_STORED_SECONDS
    for path in (Path(old).parent, folder / "tmp_partial"):
        os.utime(path, (hours_ago, hours_ago))
    (new,) = upload(page, "new.png", b"new").json()
    assert not Path(old).exists() and stored(folder, uploads=True) == [Path(new)]


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
    for data in ([None, {"text": "", "files": [file]}], [None, file, *SETTINGS[1:]]):
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


def test_the_folder_is_deleted_with_the_server(models, picture):
    before = os.environ["GRADIO_TEMP_DIR"]
    with served(web.build_app(models, GREEDY, [picture])):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert stored(folder) == [] and len(list((folder / "kept").iterdir())) == 1
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    os.environ["GRADIO_TEMP_DIR"] = before
