"""Images that the API fetches from allowed hosts: which ports, how many bytes and seconds, and no decompression."""

import asyncio
import base64
import contextlib
import gzip
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from minigpt4.common.errors import UserError
from minigpt4.serve import image_sources
from minigpt4.serve.api_requests import Limits
from minigpt4.serve.image_sources import load_image

MAX_BYTES = 2**20


@contextlib.contextmanager
def host(answer):
    """A server that runs ``answer(connection)`` once; yields a function that loads an image of it, and its request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        received, name = [], f"127.0.0.1:{listener.getsockname()[1]}"
        listener.settimeout(5)

        def serve():
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                received.append(connection.recv(10_000).lower())
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        limits = Limits(allowed_hosts=[name], max_body_bytes=MAX_BYTES)
        yield lambda: asyncio.run(load_image(f"http://{name}/a.png", limits)), received
        thread.join()


def test_an_endless_image_is_given_up(confined):
    sent = []

    def pour(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(400):
            connection.sendall(b"x" * 2**16)
            sent.append(2**16)

    with host(pour) as (load, _), pytest.raises(UserError, match="larger than"):
        load()
    assert sum(sent) < 2**24


def test_an_image_that_arrives_slowly_is_given_up(monkeypatch, confined):
    monkeypatch.setattr(image_sources, "MAX_DOWNLOAD_SECONDS", 0.5)

    def trickle(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(40):
            connection.sendall(b"x")
            time.sleep(0.1)

    begin = time.monotonic()
    with host(trickle) as (load, _), pytest.raises(UserError, match="TimeoutError"):
        load()
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "br", "deflate", "zstd", "GZIP"])
def test_compressed_images_are_not_decompressed(encoding, confined):
    data = gzip.compress(gzip.compress(bytes(10_000)))
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: {encoding}\r\ncontent-length: {len(data)}\r\n\r\n"
    with host(lambda connection: connection.sendall(head.encode() + data)) as (load, received):
        with pytest.raises(UserError, match=f"encoding '{encoding}'"):
            load()
    assert b"accept-encoding: identity\r\n" in received[0]


@pytest.mark.parametrize("encoding", ["", "content-encoding: identity\r\n"])
def test_an_image_of_an_allowed_host_and_port(encoding, confined):
    head = f"HTTP/1.1 200 OK\r\n{encoding}content-length: 4\r\n\r\n"
    with host(lambda connection: connection.sendall(head.encode() + b"data")) as (load, _):
        assert load() == b"data"


@pytest.mark.parametrize(
    ("allowed", "url", "is_allowed"),
    [
        ("a.example", "http://a.example/x.png", True),
        ("a.example", "https://A.Example:443/x.png", True),
        ("A.example", "http://a.example:80/x.png", True),
        ("a.example", "http://a.example:8080/x.png", False),
        ("a.example", "http://a.example:0/x.png", False),
        ("a.example:8080", "http://a.example:8080/x.png", True),
        ("a.example:8080", "http://a.example/x.png", False),
        ("::1", "http://[::1]/x.png", True),
        ("::1", "http://[::1]:8080/x.png", False),
        ("[::1]:8080", "http://[::1]:8080/x.png", True),
        ("a.example", "http://b.example/@a.example", False),
        ("a.example", "http://a.example@b.example/", False),
        ("a.example:443", "https://a.example/x.png", True),
        ("a.example", "http://b.example\\@a.example/", True),  # others read b.example; the client reads a.example
    ],
)
def test_hosts_and_ports(monkeypatch, allowed, url, is_allowed):
    async def download(address, max_bytes):
        return str(address.host).encode()

    monkeypatch.setattr(image_sources, "_download", download)
    loading = load_image(url, Limits(allowed_hosts=[allowed]))
    if is_allowed:
        assert asyncio.run(loading).decode() in allowed.lower()
    else:
        with pytest.raises(UserError, match=r"not allowed|no URL"):
            asyncio.run(loading)


@pytest.mark.parametrize(("size", "is_read"), [(MAX_BYTES, True), (MAX_BYTES + 1, False), (2**40, False)])
def test_the_size_of_files_is_limited(tmp_path, size, is_read, confined):
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(size)
    loading = load_image("file:///sparse.png", Limits(allowed_folder=tmp_path, max_body_bytes=MAX_BYTES))
    if is_read:
        assert asyncio.run(loading) == bytes(size)
    else:
        with pytest.raises(UserError, match="larger than 1048576 bytes"):
            asyncio.run(loading)


DATA = bytes(range(256)) * 9
ENCODED = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,", " \n DATA:;base64,", "http://a.example/", "file:///", "x:", ""]
)
def test_long_urls_are_not_kept_in_memory(url, tmp_path):
    """``urlsplit`` keeps the last 128 URLs that it gets."""
    before = urlsplit.cache_info().misses
    loading = load_image(url + ENCODED * 8, Limits(allowed_hosts=["a.example"], allowed_folder=tmp_path))
    if "data" in url.lower():
        assert asyncio.run(loading) == DATA * 8
    else:
        with pytest.raises(UserError, match=r"^A URL of 2\d{4} characters is not accepted"):
            asyncio.run(loading)
    assert urlsplit.cache_info().misses == before


def test_data_urls_are_decoded_beside_the_event_loop(monkeypatch):
    threads, decode = [], base64.b64decode
    monkeypatch.setattr(
        base64, "b64decode", lambda *a, **k: (threads.append(threading.current_thread()), decode(*a, **k))[1]
    )
    assert asyncio.run(load_image("data:;base64," + ENCODED, Limits())) == DATA
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


@pytest.mark.parametrize("case", [str.upper, str.lower])
def test_percent_signs_of_data_urls(case):
    def load(text):
        return asyncio.run(load_image("data:;base64," + text, Limits()))

    lines = base64.encodebytes(DATA + b"x").decode()
    for character in "+/=\n":
        lines = lines.replace(character, case(f"%{ord(character):02x}"))
    assert load(lines) == DATA + b"x"
    many = case("%2b") * 2**20
    assert load(many) == load("+" * 2**20)
    for wrong in (
        "%41" * 2**20,
        "%" * 2**20,
        "%25" + "2B" * 100,
    ):  # which no encoder writes, and takes seconds to decode
        with pytest.raises(UserError, match="is not base64"):
            load(wrong)
