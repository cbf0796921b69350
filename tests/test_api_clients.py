"""Who may use the API, and how often: keys of a file, requests per minute, and when to try again."""

import sys
from contextlib import nullcontext

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from serving import NAME, PATH, Server, ask, client, post_text

import demo
from minigpt4.common.errors import UserError
from minigpt4.serve import api, clients, completions
from minigpt4.serve.api_requests import ApiError, Limits
from minigpt4.serve.clients import ApiKeys, RateLimit
from minigpt4.serve.engine import Engine

KEYS = "# our clients\nfirst-key anna\n\nsecond-key\t Bert's laptop # until May\nthird#key\n"


# Keys


def write_keys(file, text):
    file.write_text(text, encoding="utf-8")
    return file


def test_keys_of_a_file(engine, tmp_path):
    file = write_keys(tmp_path / "keys", KEYS)
    with client(engine, api_key="own", api_keys=file) as server:
        for key in ("own", "first-key", "second-key", "third#key"):
            assert ask(server, key).status_code == 200
        for key in ("", "fourth-key", "anna", "#", "first-key anna", "first-ke", "é"):
            found = server.post(PATH, headers={"Authorization": f"Bearer {key}".encode()})
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"


def test_a_changed_file_is_read_again(engine, tmp_path, caplog):
    file = write_keys(tmp_path / "keys", KEYS)
    with client(engine, api_keys=file) as server:
        assert ask(server, "first-key").status_code == 200
        write_keys(file, "new-key-1 anna\n")
        assert (ask(server, "first-key").status_code, ask(server, "new-key-1").status_code) == (401, 200)
        write_keys(file, "new-key-2\nschlüssel\n")  # a mistake
        assert (ask(server, "new-key-2").status_code, ask(server, "new-key-1").status_code) == (401, 200)
        assert "line 2 of" in caplog.text and "The former keys remain valid." in caplog.text
        file.unlink()
        assert ask(server, "new-key-1").status_code == 200
        write_keys(file, "# nobody\n")
        assert ask(server, "new-key-1").status_code == 401


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# nothing\n", "has no keys"),
        ("a\na b\n", "line 2 of .* has the key of an earlier line"),
        ("ok\n密钥 anna", "line 2 of .* has a key with other characters"),
        (None, r"cannot be read \(No such file"),
        (b"\xff\xfe", "cannot be read .it is not UTF-8"),
    ],
)
def test_a_wrong_file_of_keys_is_one_sentence(tmp_path, text, problem):
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^--api-keys: .*{problem}") as error:
        ApiKeys(None, file)
    assert "\n" not in str(error.value)


def test_the_command_line_checks_the_file_before_it_loads_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "build_chat", lambda args: pytest.fail("the model is loaded"))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--cfg-path", "F", "--api", "--api-keys", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match=r"error: --api-keys: .*absent cannot be read"):
        demo.main()


def test_every_key_is_compared_whatever_is_sent(monkeypatch, tmp_path, engine):
    compared, compare = [], clients.hmac.compare_digest
    monkeypatch.setattr(clients.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    with client(engine, api_keys=write_keys(tmp_path / "keys", KEYS)) as server:
        for key in ("first-key", "third#key", "wrong"):
            server.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert len(compared) == 3 and len({len(text) for pair in compared for text in pair}) == 1
            compared.clear()


def test_what_is_cached_belongs_to_a_key(engine, tmp_path):
    """Two clients behind one address do not learn from counts or times what the other one asked."""
    turns = [("user", "What is in my drawer?"), ("assistant", "A letter."), ("user", "What does it say?")]
    messages = [{"role": role, "content": text} for role, text in turns]

    def cached(server, key):
        found = ask(server, key, messages=messages, max_tokens=1).json()
        return found["usage"]["prompt_tokens_details"]["cached_tokens"]

    with client(engine, api_keys=write_keys(tmp_path / "keys", "anna-1\nbert-1\n")) as server:
        assert cached(server, "anna-1") == 0 == cached(server, "bert-1") < cached(server, "anna-1")
    with client(engine, address="192.0.2.9", api_keys=tmp_path / "keys") as server:
        assert cached(server, "anna-1") > 0


def test_what_needs_a_key(engine):
    with client(engine, api_key="own") as server:
        for path, status in {"/v1/models": 401, f"/v1/models/{NAME}": 401, "/metrics": 401}.items():
            assert server.get(path).status_code == status
            assert server.get(path, headers={"Authorization": "Bearer own"}).status_code == 200
        for path in ("/health", "/docs", "/openapi.json"):
            assert server.get(path).status_code == 200


# Limits of clients


def test_requests_per_minute(engine, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(clients.time, "monotonic", lambda: now[0])
    limit = RateLimit(3)

    def is_accepted(client="a"):
        try:
            limit.count(client)
        except ApiError as error:
            assert error.status == 429 and 1 <= int(error.headers["Retry-After"]) <= 20
            return False
        return True

    assert [is_accepted() for _ in range(5)] == [True, True, True, False, False]
    assert is_accepted("b")
    now[0] += 19
    assert not is_accepted()
    now[0] += 2  # a third of a minute
    assert is_accepted() and not is_accepted()
    now[0] += 1000
    assert [is_accepted() for _ in range(4)] == [True, True, True, False]


def test_counts_of_many_clients_are_forgotten(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(clients.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clients, "_MAX_CLIENTS", 50)
    limit = RateLimit(1)
    for i in range(500):
        now[0] += 2
        limit.count(f"client {i}")
    assert len(limit._free_at) <= 50


def test_counts_of_active_clients_are_limited_too(monkeypatch):
    monkeypatch.setattr(clients.time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(clients, "_MAX_CLIENTS", 50)
    limit = RateLimit(1)
    limit.count("active")
    for i in range(200):
        limit.count(f"client {i}")
        with pytest.raises(ApiError):  # what was counted latest is never forgotten
            limit.count("active")
    assert len(limit._free_at) == 50


@pytest.mark.parametrize(
    ("first", "second", "are_one"),
    [
        ("2001:db8::1", "2001:db8::ffff:0:0:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2", True),
    ],
)
def test_a_network_of_ipv6_is_one_client(first, second, are_one):
    limit = RateLimit(1)
    limit.count(first)
    with pytest.raises(ApiError) if are_one else nullcontext():
        limit.count(second)


def test_the_limit_is_that_of_a_key_or_an_address(engine, tmp_path):
    with client(engine, rate_limit=1) as server:
        assert ask(server).status_code == 200
        found = ask(server)
        assert found.status_code == 429 and 1 <= int(found.headers["retry-after"]) <= 60
        error = found.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert server.get("/v1/models").status_code == 200  # only questions are counted
        other = TestClient(server.app, base_url="http://localhost", client=("192.0.2.2", 5))
        assert ask(other).status_code == 200
    with client(engine, rate_limit=1, api_keys=write_keys(tmp_path / "keys", KEYS)) as server:
        assert [ask(server, key).status_code for key in ("first-key", "second-key", "first-key")] == [200, 200, 429]


def test_retry_after(engine, monkeypatch):
    def full(self, request):
        raise completions.queue.Full

    with client(engine) as server:
        monkeypatch.setattr(Engine, "submit", full)
        found = ask(server)
        assert found.status_code == 429 and int(found.headers["retry-after"]) > 0
        assert "retry-after" not in ask(server, max_tokens=0).headers
    monkeypatch.undo()
    app = api.build_app(engine, NAME, Limits(timeout_seconds=0.0))
    with TestClient(app, base_url="http://localhost") as server:
        found = ask(server)
        assert found.status_code == 503 and int(found.headers["retry-after"]) > 0


def test_pages_of_allowed_origins_may_send_keys_and_read_retry_after(engine):
    headers = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-lang"
    with client(engine, api_key="own", origins=["https://chat.example"], rate_limit=1) as server:
        found = server.options(PATH, headers=headers)
        assert found.status_code == 200 and "authorization" in found.headers["access-control-allow-headers"]
        for status in (200, 429):
            found = server.post(
                PATH, content=post_text(), headers={"Origin": headers["Origin"], "Authorization": "Bearer own"}
            )
            assert found.status_code == status
            assert found.headers["access-control-allow-origin"] == headers["Origin"]
            assert "Retry-After" in found.headers["access-control-expose-headers"]


def test_the_official_client_waits_as_it_is_told(chat, monkeypatch):
    monkeypatch.setattr(clients, "_SECONDS", 2.0)
    server = Server(chat, rate_limit=2)
    try:
        patient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)
        statuses = [httpx.post(server.url + PATH, content=b"{}").status_code for _ in range(3)]
        assert statuses == [400, 400, 429]
        messages = [{"role": "user", "content": "Why?"}]
        assert patient.chat.completions.create(model=NAME, messages=messages, max_tokens=1).choices
    finally:
        server.close()
