"""Who may use a server: host names, origins of web pages, and API keys."""

import queue
import re
import socket
import sys
from argparse import Namespace

import pytest
from fastapi.testclient import TestClient
from starlette.applications import Starlette

import demo
from minigpt4.common.errors import UserError
from minigpt4.serve import api, page_guard
from minigpt4.serve.access import OriginCheck, parse_origin
from minigpt4.serve.api_requests import Limits

OWN_PAGE = {"Host": "localhost:8000", "Origin": "http://localhost:8000"}
UNUSUAL = ("null", "http://[::1", "file://localhost", "", "[::1")  # no value of --allow-origin
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def client(api_key=None, **access):
    """The API without a model: it answers /v1/models, and refuses every question."""
    engine = Namespace(waiting=queue.Queue())
    return TestClient(api.build_app(engine, "small", Limits(), api_key, **access), base_url="http://localhost:8000")


@pytest.mark.parametrize(
    ("host", "headers", "code"),
    [
        ("127.0.0.1", {}, None),
        ("127.0.0.1", {"Host": "127.0.0.1:8000"}, None),
        ("127.0.0.1", {"Host": "LOCALHOST"}, None),
        ("127.0.0.1", {"Host": "[::1]:8000"}, None),
        ("127.0.0.1", {"Host": "evil.example"}, "bad_host"),  # DNS rebinding
        ("127.0.0.1", {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}, "bad_host"),
        ("127.0.0.1", {"Host": "localhost.evil.example"}, "bad_host"),
        ("127.0.0.1", {"Host": "203.0.113.5"}, "bad_host"),
        ("127.0.0.1", {"Host": ""}, "bad_host"),
        ("127.0.0.1", {"Host": "[::1"}, "bad_host"),
        ("127.0.0.1", OWN_PAGE, None),
        ("127.0.0.1", {"Origin": "http://127.0.0.1:3000"}, None),  # a page of this machine
        ("127.0.0.1", {"Origin": "https://evil.example"}, "bad_origin"),
        ("127.0.0.1", {"Origin": "null"}, "bad_origin"),
        ("127.0.0.1", {"Origin": "http://[::1"}, "bad_origin"),
        ("127.0.0.1", {"Origin": "file://localhost"}, "bad_origin"),
        ("gpu.lan", {"Host": "gpu.lan:8000", "Origin": "http://gpu.lan:8000"}, None),
        ("gpu.lan", {"Host": "evil.example"}, "bad_host"),
        ("0.0.0.0", {"Host": "203.0.113.5:8000", "Origin": "http://203.0.113.5:8000"}, None),
        ("0.0.0.0", {"Host": "203.0.113.5:8000", "Origin": "http://198.51.100.7"}, "bad_origin"),
        ("0.0.0.0", {"Host": "evil.example"}, "bad_host"),
        ("0.0.0.0", {"Host": "gpu7.lab.example"}, None),
        ("0.0.0.0", {"Host": "gpu7:8000"}, None),
        ("0.0.0.0", {"Host": "gpu7.local:8000"}, None),
        ("0.0.0.0", {"Host": "gpu7.evil.example"}, "bad_host"),
        ("127.0.0.1", {"Host": "gpu7"}, "bad_host"),
        ("::", {"Host": "[2001:db8::1]:8000"}, None),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_hosts_and_origins(host, headers, code, method, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU7.lab.example")
    found = client(host=host).request(method, "/v1/models", headers=headers)
    if code is None:
        assert found.status_code == {"GET": 200, "POST": 405}[method]
        assert found.headers.get("access-control-allow-origin") == headers.get("Origin")
    else:
        error = found.json()["error"]
        assert (found.status_code, error["code"], error["type"]) == (403, code, "permission_error")
        assert "access-control-allow-origin" not in found.headers
        if flag := re.search(r"; start the server with --allow-origin (.*)\.$", error["message"]):
            parse_origin(flag[1])  # is accepted
        assert bool(flag) == (headers.get("Origin") not in UNUSUAL and headers.get("Host") not in UNUSUAL)


def test_an_allowed_origin_gets_cors_headers_and_its_preflight_needs_no_key():
    origin = "https://chat.example"
    for access, status in (({"origins": [origin]}, 200), ({"origins": ["https://chat.example:444"]}, 403), ({}, 403)):
        server = client("secret", **access)
        found = server.options("/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
        assert found.status_code == status
        assert found.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    allowed = client("secret", origins=[f"{origin}/"])
    found = allowed.options("/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
    assert "POST" in found.headers["access-control-allow-methods"]
    assert found.headers["access-control-allow-headers"] == "authorization,content-type"
    found = allowed.get(
        "/v1/models", headers={"Origin": origin, "Host": "chat.example", "Authorization": "Bearer secret"}
    )
    assert found.status_code == 200 and found.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "origin", ["*", "chat.example", "https://", "ftp://a", "https://a/b", "https://*.a", "http://[::1"]
)
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(UserError, match="--allow-origin"):
        OriginCheck(None, origins=[origin])


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER  secret ", 200),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        ("secret", 401),
        ("Basic secret", 401),
        ("", 401),
    ],
)
def test_keys_of_clients(header, status):
    found = client("secret").get("/v1/models", headers={"Authorization": header})
    assert found.status_code == status
    assert client().get("/v1/models", headers={"Authorization": header}).status_code == 200  # without a key


@pytest.mark.parametrize("key", ["", " ", "schlüssel", "密钥", "a b", "a\n"])
def test_a_key_that_no_client_can_send_is_refused(key):
    with pytest.raises(UserError, match="--api-key or MINIGPT4_API_KEY"):
        client(key)


@pytest.mark.parametrize(
    ("arguments", "key", "word"),
    [
        (["--api", "--api-key", ""], None, "--api-key"),
        (["--api"], "", "MINIGPT4_API_KEY"),
        (["--api", "--allow-origin", "*"], None, "--allow-origin"),
        (["--allow-origin", "*"], None, "--allow-origin"),
    ],
)
def test_the_command_line_refuses_them_before_it_loads_the_model(monkeypatch, arguments, key, word):
    monkeypatch.setattr(demo, "build_chat", lambda args: pytest.fail("the model is loaded"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", *arguments])
    monkeypatch.delenv("MINIGPT4_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MINIGPT4_API_KEY", key)
    with pytest.raises(SystemExit, match=f"error: .*{word}"):
        demo.main()


def test_pages_of_allowed_origins_may_embed_the_page(tmp_path):
    for origins, sources in (([], "'self'"), (["https://hub.example/"], "'self' https://hub.example")):
        guard = page_guard.PageGuard(Starlette(), tmp_path, origins)
        policy = TestClient(guard).get("/").headers["content-security-policy"]
        assert policy.endswith(f"; frame-ancestors {sources}")
