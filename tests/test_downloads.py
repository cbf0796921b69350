"""Values that name a file elsewhere: URLs, which are downloaded once, and folders of the Hugging Face cache."""

import json
import threading
import urllib.parse
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch

from minigpt4.common import http_stream, weights
from minigpt4.common.errors import UserError
from minigpt4.common.files import locate, resolve_local_path
from minigpt4.common.schema import ModelConfig
from minigpt4.models.loading import locate_files
from minigpt4.models.vision import locate_vision

KEY = "model.ckpt"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server whose every path holds its own name; a query says how many bytes are claimed beyond those sent."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            path, _, missing = self.path.partition("?missing=")
            self.send_response(206 if "Range" in self.headers and server.sent else 200)
            self.send_header("Content-Range", f"bytes 1-{len(path) - 1}/{len(path)}")
            if missing != "unknown":
                self.send_header("Content-Length", str(len(path) + int(missing or 0)))
            self.end_headers()
            self.wfile.write(server.sent.pop() if server.sent else path.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.sent, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_of_one_name_have_a_download_each(server):
    urls = [f"{server.url}{path}" for path in ("/a/x.pth", "/b/x.pth", "/b/x.pth?missing=0")]
    files = [locate(url, KEY) for url in urls + urls]
    assert [file.read_text() for file in files[:3]] == ["/a/x.pth", "/b/x.pth", "/b/x.pth"]
    assert len(set(files)) == 3 and files[3:] == files[:3] and len(server.requests) == 3
    assert {file.suffix for file in files} == {".pth"}
    assert resolve_local_path(urls[0], KEY) == files[0] and resolve_local_path(f"{server.url}/c/x.pth", KEY) is None


@pytest.mark.parametrize("url", [ModelConfig().vit_weights, ModelConfig().q_former_model])
def test_downloads_of_the_published_files_are_found(server, tmp_path, url):
    """Under the names that the reference gives them."""
    file = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    file.touch()
    assert locate(url, KEY) == file and not server.requests


def test_a_download_that_ends_early_is_none(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(http_stream.time, "sleep", waits.append)
    for _ in range(2):  # nothing of the first attempt counts as the file
        with pytest.raises(UserError, match=r"model\.ckpt.*could not be downloaded.*6 of 16 bytes"):
            locate(f"{server.url}/x.pth?missing=10", KEY)
    assert waits == [1, 2, 4, 1, 2, 4] and len(server.requests) == 8 and not list((tmp_path / "hub").rglob("*x.pth"))


def test_a_download_goes_on_after_a_dropped_connection(server, tmp_path, monkeypatch):
    monkeypatch.setattr(http_stream.time, "sleep", lambda _: server.sent.append(b"x.pth"))
    server.sent.append(b"/")
    assert locate(f"{server.url}/x.pth", KEY).read_text() == "/x.pth" and len(server.requests) == 2


@pytest.mark.parametrize("name", ["图 ü.pth", "图" * 99 + ".pth"])
def test_a_download_beyond_ascii(server, name):
    path = "/" + urllib.parse.quote(name)
    assert locate(f"{server.url}/{name}", KEY).read_text() == path and server.requests == [path]


def test_a_download_without_length(server):
    assert locate(f"{server.url}/x.pth?missing=unknown", KEY).read_text() == "/x.pth"


def test_a_download_that_was_killed_is_begun_anew(server):
    url = f"{server.url}/x.pth"
    file = locate(url, KEY)
    file.rename(f"{file}.partial")
    assert resolve_local_path(url, KEY) is None
    assert locate(url, KEY).read_text() == "/x.pth" and not Path(f"{file}.partial").exists()


def test_a_folder_of_the_hub_cache(tmp_path):
    folder = tmp_path / "models--lmsys--vicuna"
    (folder / "refs").mkdir(parents=True)
    with pytest.raises(UserError, match=r"model\.ckpt.*0 snapshots \(none\)"):
        locate(str(folder), KEY)
    (folder / "snapshots" / "abc").mkdir(parents=True)
    assert locate(str(folder), KEY) == folder / "snapshots" / "abc"
    (folder / "snapshots" / "def").mkdir()
    with pytest.raises(UserError, match=r"2 snapshots \(abc, def\); set model\.ckpt to the folder of one"):
        locate(str(folder), KEY)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the Hugging Face hub, which serves the files of a folder as the repository ``someone/model``."""
    folder, commit = tmp_path / "repository", "a" * 40
    folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            headers = {}
            if path.startswith("/api/models/someone/model/tree/"):
                listing = [{"type": "file", "path": f.name, "size": f.stat().st_size} for f in folder.iterdir()]
                data = json.dumps([entry | {"oid": "0" * 40} for entry in listing]).encode()
            elif path.startswith("/api/models/someone/model"):
                siblings = [{"rfilename": file.name} for file in folder.iterdir()]
                data = json.dumps({"id": "someone/model", "sha": commit, "siblings": siblings}).encode()
            else:
                name = path.rpartition("/")[2]
                data = (folder / name).read_bytes()
                headers = {"ETag": f'"{name}"', "X-Repo-Commit": commit}
                if self.command == "GET":
                    server.fetched.append(name)
            self.send_response(200)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fetched, server.folder = [], folder
    url = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


TENSORS = {
    "vision_model.embeddings.class_embedding": 0,
    "vision_model.encoder.layers.0.mlp.fc1.bias": 0,
    "vision_model.post_layernorm.bias": 1,
    "qformer.layernorm.bias": 1,
    "query_tokens": 1,
    "language_model.norm.weight": 2,
}


@pytest.mark.parametrize("formats", [["model.safetensors", "pytorch_model.bin"], ["pytorch_model.bin"]])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_of_a_hub_repository_only_what_is_needed_is_fetched(hub, formats, is_sharded):
    for name in reversed(formats):
        stem, suffix = name.split(".")
        shards = [f"{stem}-{number}.{suffix}" for number in "012"] if is_sharded else [name] * 3
        for file in shards:
            (hub.folder / file).write_bytes(b"x")
        if is_sharded:
            weight_map = {tensor: shards[number] for tensor, number in TENSORS.items()}
            (hub.folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("config.json", "tokenizer.model", "README.md"):
        (hub.folder / name).write_text("{}")
    cfg = ModelConfig(vit_weights="someone/model", q_former_model="someone/model", llama_model="someone/model")
    places = set(locate_vision(cfg))
    assert {file for file in hub.fetched if "index" not in file} == set(shards[:2])
    hub.fetched.clear()
    assert places == {locate_files(replace(cfg, ckpt=None), has_vision=False).llama_model}
    assert set(hub.fetched) == {"config.json", "tokenizer.model", *shards} - set(shards[:2])


def test_a_shard_that_the_hub_does_not_have(hub):
    weight_map = dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors")
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = locate_vision(ModelConfig(vit_weights="someone/model", has_qformer=False))[0]
    with pytest.raises(UserError, match=r"model\.vit_weights: 1 of 1 files .* model-00001-of-00001\.safetensors"):
        weights.read_state_dict(folder, "model.vit_weights", ["vision_model.*"])
