"""Shards over the network and from commands: read while they come, failures counted and named."""

import itertools
import shutil
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_samples import EVAL, KEY, captions, good, picture, same, shard

from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets import ShardDataset
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.datasets.datasets.shard_urls import expand_shards

WORKER = WorkerInfo(seed=0)
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture
def serve():
    """Starts a server on this machine from a request handler's do_GET; gives its address."""
    servers = []

    def start(do_get):
        handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": do_get, "log_message": lambda *_: None})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
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


@needs_curl
def test_shards_over_http(tmp_path, shards, serve, caplog):
    address = serve(from_folder(tmp_path))
    urls = expand_shards(address + "/{00000..00003}.tar", KEY)
    skipped = Counter()
    assert captions(ShardDataset("x", urls, EVAL).iter_eval(WORKER, skipped)) == [f"c{n}" for n in range(24)]
    assert skipped == {"unreadable shard": 1} and "00003.tar cannot be read any further: the program" in caplog.text
    local, remote = (
        list(itertools.islice(ShardDataset("x", paths, EVAL, shuffle_buffer=5).iter_train(WorkerInfo(2)), 30))
        for paths in (shards, urls[:3])
    )
    assert same(local, remote)


@needs_curl
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


@needs_curl
def test_a_remote_shard_may_be_left_halfway(tmp_path, shards, serve):
    big = shard(tmp_path / "big.tar", [("0.jpg", picture(1)), ("0.txt", b"c"), ("1.txt", bytes(10**6)), *good(2)])
    for url in (serve(from_folder(tmp_path)) + "/big.tar", f"pipe:cat {big}"):
        skipped = Counter()
        samples = ShardDataset("x", [url], EVAL).iter_eval(WORKER, skipped)
        next(samples)
        samples.close()
        assert not skipped


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
        ShardDataset("x", ["pipe:cat " + shards[0] + "; exit 3", shards[1]], EVAL).iter_eval(WORKER, skipped)
    )
    assert found == [f"c{n}" for n in range(16)] and skipped == {"unreadable shard": 1}
    assert "ended with status 3" in caplog.text
