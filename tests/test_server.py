"""The end of a server by SIGTERM, whatever its clients do."""

import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from serving import GREEDY

from minigpt4.serve import server
from minigpt4.serve.engine import Engine, Request

ROOT = Path(__file__).parents[1]
SCRIPT = """
import itertools, socket
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from minigpt4.serve import server

async def read(request):
    return PlainTextResponse(await request.body())

async def stream(request):
    async def lines():
        for _ in itertools.count():
            yield "data: x\\n\\n" * 1000
    return StreamingResponse(lines())

app = Starlette(routes=[Route("/read", read, methods=["POST"]), Route("/stream", stream)])
listener = server.listen("127.0.0.1", 0)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
print(server.address(listener), flush=True)
server.serve(app, listener, grace_seconds=1)
print("ended", flush=True)
"""
STALLED = [
    b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",  # half a request
    b"POST /read HTTP/1.1\r\nHost:",
    b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n",  # nobody reads the answer
    b"",
]


@pytest.mark.parametrize("requests", [[], STALLED], ids=["no clients", "stalled clients"])
def test_sigterm_ends_the_server_with_status_0(programs, requests):
    with programs.running(["-c", SCRIPT]) as process:
        port = int(re.search(r":(\d+)$", process.stdout.readline()).group(1))
        clients = []
        for data in requests:
            clients.append(socket.create_connection(("127.0.0.1", port)))
            clients[-1].sendall(data)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        status, output = process.wait(), process.stdout.read()
        for client in clients:
            client.close()
    assert status == 0 and output.endswith("ended\n") and "Traceback" not in output


ENDING = """
import asyncio, logging, signal, sys, threading
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from minigpt4.serve import server

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
logging.basicConfig(level="INFO", format="%(message)s")
release = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), release.set()), daemon=True).start()

async def stream(request):
    async def lines():
        yield "begun\\n"
        while not release.is_set():
            await asyncio.sleep(0.02)
        yield "ended\\n"
    return StreamingResponse(lines())

async def read(request):
    return PlainTextResponse("read")

listener = server.listen("127.0.0.1", 0)
print(server.address(listener), flush=True)
server.serve(Starlette(routes=[Route("/stream", stream), Route("/read", read)]), listener, 60, max_connections=3)
print("left", flush=True)
"""


@pytest.fixture
def ending_server(programs):
    """A server whose streams end when it reads a line, and its URL."""
    with programs.running(["-c", ENDING]) as process:
        yield process, process.stdout.readline().strip()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_running_streams_end_and_new_requests_are_refused(ending_server, sign):
    process, url = ending_server
    with httpx.stream("GET", f"{url}/stream", timeout=20) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "begun"
        process.send_signal(sign)
        deadline = time.monotonic() + 20
        while (found := httpx.get(f"{url}/read")).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found.status_code == 503 and int(found.headers["retry-after"]) > 0
        assert found.json()["error"]["message"] == "The server is ending."
        process.stdin.write("\n")
        process.stdin.flush()
        assert next(lines) == "ended"
    status, output = process.wait(), process.stdout.read()
    if sign == signal.SIGTERM:
        assert (status, output) == (0, "127.0.0.1 GET /read: 503 The server is ending.\nleft\n")
    else:
        assert status != 0 and "KeyboardInterrupt" in output


def test_a_second_signal_ends_the_server_at_once(ending_server):
    process, url = ending_server
    with httpx.stream("GET", f"{url}/stream", timeout=20) as stream:
        lines = stream.iter_lines()  # its end would close the connection
        assert next(lines) == "begun"
        begin = time.monotonic()
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        status, output = process.wait(), process.stdout.read()
    assert status == 0 and output.endswith("left\n") and "Traceback" not in output
    assert time.monotonic() - begin < 15  # and not a minute


def test_too_many_connections_are_refused(ending_server):
    _, url = ending_server
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    others = [socket.create_connection(address) for _ in range(3)]
    found = httpx.get(f"{url}/read")
    assert found.status_code == 503 and int(found.headers["retry-after"]) > 0
    assert found.json()["error"]["type"] == "server_error" and "too many connections" in found.text
    for other in others:
        other.close()
    deadline = time.monotonic() + 20
    while (found := httpx.get(f"{url}/read")).status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found.text == "read"


LOGGED = """
from minigpt4.serve.engine import Stats
from minigpt4.serve.metrics import AccessLog, Metrics

metrics = Metrics(type("Engine", (), {"stats": Stats()}))
app = AccessLog(Starlette(routes=[Route("/stream", stream), Route("/read", read)]), metrics)
server.serve(app, listener, 60, max_connections=3)
print(metrics.text().decode())
"""


def test_requests_that_the_server_refuses_are_in_the_log_and_the_metrics_of_an_api(programs):
    with programs.running(["-c", ENDING.partition("server.serve(")[0] + LOGGED]) as process:
        url = process.stdout.readline().strip()
        others = [socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) for _ in range(3)]
        assert httpx.get(f"{url}/read").status_code == 503
        for other in others:
            other.close()
        deadline = time.monotonic() + 20
        while httpx.get(f"{url}/read").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        with httpx.stream("GET", f"{url}/stream", timeout=20) as stream:
            lines = stream.iter_lines()  # its end would close the connection
            assert next(lines) == "begun"
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/read").status_code == 200 and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)  # which cuts the stream off
            process.wait()
        output = process.stdout.read()
    lines = output.splitlines()
    num_refused = sum("GET /read: 503 unavailable, " in line for line in lines)
    assert num_refused >= 2 and sum("GET /stream: 200 disconnected, " in line for line in lines) == 1
    assert f'minigpt4_rejections_total{{reason="unavailable"}} {num_refused}.0' in lines
    assert f'minigpt4_requests_total{{status="503"}} {num_refused}.0' in lines


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="an option of Linux")
def test_clients_that_do_not_read_lose_their_connections(monkeypatch):
    monkeypatch.setattr(server, "UNREAD_SECONDS", 1)
    with server.listen("127.0.0.1", 0) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2000)
        client.connect(listener.getsockname())
        connection, _ = listener.accept()
        connection.settimeout(20)
        with pytest.raises(OSError, match="Connection timed out"):
            connection.sendall(b"x" * 10**8)
        connection.close()


def test_an_engine_that_is_busy_is_left(chat):
    engine, is_busy, release = Engine(chat, max_batch=1, max_queue=1), threading.Event(), threading.Event()
    engine.submit(Request([("user", ["Why?"])], GREEDY, lambda _: (is_busy.set(), release.wait(20))))
    assert is_busy.wait(20)
    begin = time.monotonic()
    engine.close(timeout_seconds=0.2)  # the queue has a place
    engine.close(timeout_seconds=0.2)  # and now it has none
    assert time.monotonic() - begin < 10
    release.set()
    engine.close()


def test_events_are_sent_at_once():
    with server.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        with listener.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
