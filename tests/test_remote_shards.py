"""Shards over the network and from commands: read while they come, failures counted and named."""

import base64
import itertools
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from data_samples import EVAL, KEY, captions, good, picture, same, shard

from minigpt4.common import http_stream
from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets import ShardDataset, shard_streams
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.datasets.datasets.shard_urls import expand_shards

WORKER = WorkerInfo(seed=0)


@pytest.fixture
def waits(monkeypatch):
    """The waits between attempts, which are not waited for."""
    seconds = []
    monkeypatch.setattr(http_stream.time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def serve():
    """Starts a server on this machine from a request handler's do_GET; gives its address."""
    servers = []

    def start(do_get):
        handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": do_get, "log_message": lambda *_: None})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def from_folder(folder):
    def do_get(self):
        file = folder / self.path[1:]
        self.send_response(200 if file.is_file() else 404)
        self.end_headers()
        self.wfile.write(file.read_bytes() if file.is_file() else b"not here")

    return do_get


def test_shards_over_http(tmp_path, shards, serve, caplog):
    address = serve(from_folder(tmp_path))
    urls = expand_shards(address + "/{00000..00003}.tar", KEY)
    skipped = Counter()
    assert captions(ShardDataset("x", urls, EVAL).iter_eval(WORKER, skipped)) == [f"c{n}" for n in range(24)]
    assert skipped == {"unreadable shard": 1} and "00003.tar cannot be read any further: 404 Not Found" in caplog.text
    local, remote = (
        list(itertools.islice(ShardDataset("x", paths, EVAL, shuffle_buffer=5).iter_train(WorkerInfo(2)), 30))
        for paths in (shards, urls[:3])
    )
    assert same(local, remote)


def test_a_remote_shard_is_used_while_it_comes(shards, serve):
    data, go_on = Path(shards[0]).read_bytes(), threading.Event()

    def do_get(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        go_on.wait(30)
        self.wfile.write(data[len(data) // 2 :])

    samples = ShardDataset("x", [serve(do_get) + "/0.tar"], EVAL).iter_eval(WORKER)
    assert next(samples)["text_input"] == "c0" and not go_on.is_set()
    go_on.set()
    assert captions(samples) == [f"c{n}" for n in range(1, 8)]


def test_a_remote_shard_may_be_left_halfway(tmp_path, shards, serve):
    big = shard(tmp_path / "big.tar", [("0.jpg", picture(1)), ("0.txt", b"c"), ("1.txt", bytes(10**6)), *good(2)])
    for url in (serve(from_folder(tmp_path)) + "/big.tar", f"pipe:cat {big}"):
        skipped = Counter()
        samples = ShardDataset("x", [url], EVAL).iter_eval(WORKER, skipped)
        next(samples)
        samples.close()
        assert not skipped


def flaky(data, responses):
    """A handler that ends its responses after so many bytes, or with a status above 100; then it is well."""
    left = iter(responses)

    def do_get(self):
        size = next(left, len(data))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if can_resume else 0
        is_refused = 100 < size < 600
        self.send_response(size if is_refused else 206 if start else 200)
        self.send_header("Content-Length", "0" if is_refused else str(len(data) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(b"" if is_refused else data[start : start + size])

    can_resume = len(responses) % 2 == 0
    return do_get


@pytest.mark.parametrize(
    ("responses", "expected_waits"),
    [((503, 5000, 429, 408, 7000, 90), [1, 1, 2, 4, 1, 1]), ((9000, 429, 12_000), [1, 2, 1]), ((700,) * 12, [1] * 12)],
    ids=["ranges", "no ranges", "more drops than attempts"],
)
def test_a_flaky_server_is_asked_for_the_rest(shards, serve, waits, responses, expected_waits):
    """The attempts are counted from the last data on."""
    data = Path(shards[0]).read_bytes()
    url = serve(flaky(data, responses)) + "/0.tar"
    with shard_streams.open_stream(url, 5, 5) as stream:
        assert stream.read() == data
    assert waits == expected_waits


MIRRORS = [({"Content-Length": "10", "Last-Modified": day, "ETag": f'"{day}"'}, b"01234") for day in ("Mon", "Tue")]
UNKNOWN = {"Transfer-Encoding": "chunked"}  # size


@pytest.mark.parametrize(
    "responses",
    [
        [MIRRORS[0], ({"Content-Range": "bytes 5-9/*", "Content-Length": "5"}, b"56789")],
        [MIRRORS[0], ({"Content-Range": "bytes 5-9/10", "Last-Modified": "Tue", "ETag": '"b"'}, b"56789")],
        [MIRRORS[0], ({"Content-Range": "bytes 5-6/10"}, b"56"), ({"Content-Range": "bytes 7-9/10"}, b"789")],
        [MIRRORS[0], ({"Content-Range": "bytes 3-9/10"}, b"3456789")],
        [MIRRORS[0], ({"Content-Range": "bytes 7-9/10"}, b"789"), ({}, b"0123456789")],
        [MIRRORS[0], ({"Content-Range": "none"}, b"56789"), ({"Content-Range": "bytes 5-9/10"}, b"56789")],
        [MIRRORS[0], ({"Content-Range": "bytes 5-9/*", "Content-Length": "5"}, b"567"), ({}, b"0123456789")],
        [(UNKNOWN, b"5\r\n01234\r\n"), ({"Content-Range": "bytes 5-9/10"}, b"56789")],
        [(UNKNOWN, b"5\r\n01234\r\n"), ({"Content-Range": "bytes 5-9/*", "Content-Length": "5"}, b"56789")],
        [(UNKNOWN, b"5\r\n01234\r\n"), ({}, b"0123456789")],
        [(UNKNOWN, b"a\r\n0123456789\r\n"), ({"Content-Range": "bytes */10"}, b"")],
        [MIRRORS[0], ({"Content-Length": "10"}, b"012"), ({}, b"0123456789")],
    ],
)
def test_answers_that_continue_a_body(serve, waits, responses):
    """Only sizes are compared, where both answers have one."""
    left = iter(responses)

    def do_get(self):
        headers, body = next(left)
        self.protocol_version = "HTTP/1.1"
        content_range = headers.get("Content-Range", "")
        self.send_response(416 if content_range.startswith("bytes *") else 206 if content_range else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    with shard_streams.open_stream(serve(do_get), 5, 5) as stream:
        assert stream.read() == b"0123456789"
    assert not list(left) and waits in ([1], [1, 1], [1, 2], [])


def test_urls_beyond_ascii(shards, serve, monkeypatch):
    def do_get(self):
        requests.append((self.headers["Host"], self.path))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(Path(shards[0]).read_bytes())

    requests, port, find = [], serve(do_get).rpartition(":")[2], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest: find("127.0.0.1", *rest))
    url = f"http://bücher.example:{port}/图 %20.tar?a=b c&d=%C3%BC|/+"
    assert len(list(ShardDataset("x", [url], EVAL).iter_eval(WORKER))) == 8
    assert requests == [(f"xn--bcher-kva.example:{port}", "/%E5%9B%BE%20%20.tar?a=b%20c&d=%C3%BC%7C/+")]


def test_a_url_that_no_request_can_have_is_final(waits, caplog):
    skipped = Counter()
    assert not list(ShardDataset("x", ["http://127.0.0.1:x/0.tar"], EVAL).iter_eval(WORKER, skipped))
    assert skipped == {"unreadable shard": 1} and not waits and "nonnumeric port" in caplog.text


def test_a_resume_over_a_flaky_server(shards, serve, waits):
    def do_get(self):
        from_folder(Path(shards[0]).parent)(self) if next(requests) % 2 else flaky(b"x" * 9000, [503])(self)

    requests = itertools.count()
    address = serve(do_get)
    dataset = ShardDataset("x", [f"{address}/{n:05}.tar" for n in range(3)], EVAL, shuffle_buffer=5)
    first = dataset.iter_train(WORKER)
    captions(next(first) for _ in range(10))
    resumed = dataset.iter_train(WORKER, position=first.position)
    assert captions(next(first) for _ in range(20)) == captions(next(resumed) for _ in range(20))
    assert len(waits) > 3


def test_a_resume_without_the_server_tells_so(shards, serve, waits):
    def do_get(self):
        from_folder(Path(shards[0]).parent)(self) if is_up else flaky(b"", [503] * 9)(self)

    is_up = True
    url = serve(do_get) + "/00000.tar"
    stream = ShardDataset("x", [url], EVAL, shuffle_buffer=5).iter_train(WORKER)
    captions(next(stream) for _ in range(10))
    is_up = False
    with pytest.raises(UserError, match=rf"cannot be read \(503 Service Unavailable, at attempt 3\), one of {url}"):
        ShardDataset("x", [url], EVAL, retries=2, shuffle_buffer=5).iter_train(WORKER, position=stream.position)


def test_a_file_that_changes_between_attempts_is_counted(serve, waits, caplog):
    sizes = iter([9000, 8000])

    def do_get(self):
        self.send_response(200)
        self.send_header("Content-Length", str(next(sizes)))
        self.end_headers()
        self.wfile.write(b"x" * 100)

    skipped = Counter()
    assert not list(ShardDataset("x", [serve(do_get) + "/0.tar"], EVAL).iter_eval(WORKER, skipped))
    assert skipped == {"unreadable shard": 1} and "has changed while it was read" in caplog.text


def silent(self):
    """Begins a response and sends nothing more."""
    self.send_response(200)
    self.end_headers()
    self.wfile.flush()
    threading.Event().wait(5)


@pytest.mark.parametrize("kind", ["silent server", "no server", "silent command"])
def test_what_cannot_be_reached_ends_the_run_soon(serve, waits, kind, caplog):
    address = serve(silent)
    if kind == "no server":
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    shard = "pipe:sleep 60" if kind == "silent command" else f"{address}/0.tar"
    skipped = Counter()
    dataset = ShardDataset("web", [shard], EVAL, timeout=0.1, retries=3)
    reason = "Connection refused" if kind == "no server" else "no data .*0.1 s"
    with pytest.raises(UserError, match=rf"^Data set web: 2 shards in a row .* {shard} .*{reason}.*build_info.timeout"):
        next(dataset.iter_train(WORKER, skipped=skipped))
    assert skipped == {"unreachable shard": 2}
    assert waits == ([] if kind == "silent command" else [1, 2, 4] * 2)


def test_single_shards_that_cannot_be_fetched_are_passed_over(shards):
    dataset = ShardDataset("x", ["pipe:sleep 60", *shards * 3], EVAL, timeout=0.05, shuffle_buffer=1)
    stream = dataset.iter_train(WORKER, skipped=(skipped := Counter()))
    while skipped["unreachable shard"] < 3:  # never two in a row with this seed
        assert next(stream)["text_input"] in {f"c{n}" for n in range(24)}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_reader_leaves_no_program_behind(end):
    seconds = 86_400 + os.getpid()  # finds the program among others

    def programs():
        return [p for p in psutil.process_iter(["cmdline"]) if str(seconds) in (p.info["cmdline"] or [])]

    command = f"pipe:sleep {seconds} | cat"
    process = multiprocessing.get_context("fork").Process(
        target=lambda: list(ShardDataset("x", [command], EVAL).iter_eval(WORKER))
    )
    process.start()
    wait_for(programs)
    os.kill(process.pid, end)
    process.join()
    wait_for(lambda: not programs())


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


def test_an_error_about_missing_shards_has_the_status(tmp_path, serve):
    with pytest.raises(UserError, match=r"20 × unreadable shard.* cannot be read \(404 Not Found\)\. Expected"):
        next(ShardDataset("x", [serve(from_folder(tmp_path)) + "/0.tar"], EVAL).iter_train(WORKER))


def test_credentials_of_a_url(shards, serve):
    def do_get(self):
        is_known = self.headers["Authorization"] == "Basic " + base64.b64encode(b"me:a b").decode()
        self.send_response(200 if is_known else 401)
        self.end_headers()
        self.wfile.write(Path(shards[0]).read_bytes())

    url = serve(do_get).replace("//", "//me:a%20b@") + "/0.tar"
    assert len(list(ShardDataset("x", [url], EVAL).iter_eval(WORKER))) == 8


@pytest.mark.parametrize(("scheme", "client"), [("s3", "aws"), ("gs", "gsutil")])
def test_object_stores_by_their_clients(tmp_path, shards, scheme, client, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=rf"^{KEY}: '{scheme}://b/.*' is read by the program {client}, which is not"):
        expand_shards(f"{scheme}://b/{{00000..00001}}.tar", KEY)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / client
    script.write_text(
        '#!/bin/sh\nfor word in "$@"; do case "$word" in\n'
        f'    {scheme}://b/*) /bin/cat "{tmp_path}/${{word#{scheme}://b/}}";;\nesac; done\n'
    )
    script.chmod(0o755)
    urls = expand_shards(f"{scheme}://b/{{00000..00001}}.tar", KEY)
    assert captions(ShardDataset("x", urls, EVAL).iter_eval(WORKER)) == [f"c{n}" for n in range(16)]


def test_urls_of_an_unknown_kind():
    with pytest.raises(
        UserError, match=rf"^{KEY}: 'ipfs://x/0.tar' is a URL of an unknown kind; expected one of http, https, .*pipe:"
    ):
        expand_shards("ipfs://x/{0..1}.tar", KEY)


def test_a_failing_client_is_counted_and_named(shards, caplog):
    skipped = Counter()
    found = captions(
        ShardDataset("x", ["pipe:cat " + shards[0] + "; echo no data today >&2; exit 3", shards[1]], EVAL).iter_eval(
            WORKER, skipped
        )
    )
    assert found == [f"c{n}" for n in range(16)] and skipped == {"unreadable shard": 1}
    assert "ended with status 3: no data today" in caplog.text
