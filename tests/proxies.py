"""Checks the configurations of docs/serving with real proxies; run by hand, as the proxies are not Python packages.

python -m tests.proxies nginx=/usr/sbin/nginx haproxy=/usr/sbin/haproxy caddy=/usr/bin/caddy

Two replicas of ``demo.py --api`` answer with the quickstart's model behind each proxy. Every check is a line: whether a
client stays with its replica, whether a stream arrives in pieces, and what happens when a replica is killed and started
again. The ports of docs/serving (8000, 8001, 8080) have to be free.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "docs" / "serving"
URL, HOST = "http://127.0.0.1:8080", "api.example:8080"
PORTS = (8000, 8001)
# demo.py, whose responses also tell the replica's port and the address of the client.
REPLICA = """
import sys
import demo
from minigpt4.serve import server

run = server.serve

def serve(app, listener, *options, **settings):
    async def tell(scope, receive, send):
        async def add(message):
            if message["type"] == "http.response.start":
                own = [("x-replica", listener.getsockname()[1]), ("x-client", scope["client"][0])]
                message["headers"] = [*message["headers"], *((k.encode(), str(v).encode()) for k, v in own)]
            await send(message)
        await app(scope, receive, add)
    run(tell, listener, *options, **settings)

server.serve = serve
demo.main()
"""
NGINX = """
daemon off; pid {folder}/pid; error_log stderr crit; events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {configs}/nginx.conf;
}}
"""


def command_of(name: str, binary: str, folder: str) -> list[str]:
    """The command that runs a proxy in the foreground."""
    if name == "nginx":
        file = Path(folder) / "nginx.conf"
        file.write_text(NGINX.format(folder=folder, configs=CONFIGS), encoding="utf-8")
        return [binary, "-c", str(file), "-e", "stderr"]
    if name == "haproxy":
        return [binary, "-db", "-f", str(CONFIGS / "haproxy.cfg")]
    return [binary, "run", "--adapter", "caddyfile", "--config", str(CONFIGS / "Caddyfile")]


@contextmanager
def running(command: list[str], log: Path):
    """A process with its children, until the end of the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def replica(port: int) -> list[str]:
    """The command of a replica."""
    checkpoint = "output/quickstart/stage2/checkpoint.pth"
    options = ["run.device=cpu", f"model.ckpt={checkpoint if (ROOT / checkpoint).exists() else 'null'}"]
    flags = ["--api", "--port", str(port), "--allow-origin", f"http://{HOST}", "--shutdown-seconds", "20"]
    cfg_path = ["--cfg-path", "eval_configs/quickstart_eval.yaml"]
    return [sys.executable, "-c", REPLICA, *cfg_path, *flags, "--options", *options]


def wait_for(url: str, host: str = "localhost", seconds: float = 60) -> None:
    """Returns as soon as a server answers with status 200."""
    end = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(url, headers={"Host": host}).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(url)
        time.sleep(0.1)


def ask(client: int, text: str = "How many objects are there?", **options) -> httpx.Response:
    """A request of one of many clients, each with a key of its own."""
    body = {"model": "quickstart_eval", "messages": [{"role": "user", "content": text}], "max_tokens": 16} | options
    headers = {"Host": HOST, "Authorization": f"Bearer key-{client}"}
    return httpx.post(f"{URL}/v1/chat/completions", json=body, headers=headers, timeout=60)


def replicas_of(num_clients: int) -> dict[int, str]:
    """The replica of each client; fails if one has several."""
    found = {}
    for client in range(num_clients):
        answers = [ask(client) for _ in range(3)]
        assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers]
        (found[client],) = {answer.headers["x-replica"] for answer in answers}
    return found


def stream(seed: int) -> tuple[int, float, float]:
    """Pieces of a streamed answer, as they arrive, and the seconds to the first and to the last one."""
    body = {"model": "quickstart_eval", "messages": [{"role": "user", "content": "Tell a story."}], "stream": True}
    body |= {"max_tokens": 1000, "temperature": 2, "top_p": 1, "seed": seed}
    begin, times = time.monotonic(), []
    headers = {"Host": HOST, "Authorization": "Bearer key"}
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
        assert response.status_code == 200, response.read()
        times = [time.monotonic() - begin for _ in response.iter_raw()]
    return len(times), times[0], times[-1]


@contextmanager
def half_a_request(port: int):
    """A request that a replica waits for, so that it does not end at once."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head.encode())
        time.sleep(0.5)
        yield


def check(name: str, binary: str) -> None:
    """Prints a line for each check of one proxy; an AssertionError ends it."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log = Path(folder) / "log"
        stack.callback(lambda: sys.exc_info()[0] and print(log.read_text(errors="replace")[-2000:]))
        os.chmod(folder, 0o755)  # for the workers of a proxy that runs as root
        processes = [stack.enter_context(running(replica(port), log)) for port in PORTS]
        for port in PORTS:
            wait_for(f"http://127.0.0.1:{port}/health")
        stack.enter_context(running(command_of(name, binary, folder), log))
        wait_for(f"{URL}/health", HOST)

        def report(what: str, result: object) -> None:
            print(f"{name:8} {what}: {result}", flush=True)

        before = replicas_of(16)
        report("requests of 16 clients by replica, each client with one", dict(Counter(before.values())))
        refused = httpx.get(f"{URL}/health", headers={"Host": "other.example"}).status_code
        forged = httpx.get(f"{URL}/health", headers={"Host": HOST, "X-Forwarded-For": "1.2.3.4"})
        assert refused == 403 and forged.headers["x-client"] == "127.0.0.1", forged.headers
        assert httpx.get(f"{URL}/metrics", headers={"Host": HOST}).status_code == 404
        assert httpx.get(f"http://127.0.0.1:{PORTS[0]}/metrics").status_code == 200
        report("another Host header, and a forged X-Forwarded-For", "refused; overwritten")
        large = ask(0, "What?" + "\u4f60" * 100_000)
        assert "longer" in large.text or "too long" in large.text, large.text
        report("a request of 300 kB", f"arrives ({large.status_code}: too long for the model)")
        num_pieces, first, whole = max(map(stream, range(10)))  # some random answers are long
        assert num_pieces > 20 and first < whole / 2, (num_pieces, first, whole)
        report("streamed answer", f"{num_pieces} pieces, the first after {first:.2f} s, the last after {whole:.2f} s")
        os.killpg(processes[0].pid, signal.SIGKILL)
        after = Counter(ask(client).headers.get("x-replica", "failed") for client in range(16))
        assert after == {str(PORTS[1]): 16}, after
        report("after kill -9 of replica 8000", f"{after[str(PORTS[1])]} of 16 requests answered by 8001")
        restarted = stack.enter_context(running(replica(PORTS[0]), log))
        wait_for(f"http://127.0.0.1:{PORTS[0]}/health")
        _wait_until_back(before, report)
        with half_a_request(PORTS[0]):
            os.killpg(restarted.pid, signal.SIGTERM)
            time.sleep(0.5)
            statuses = Counter(ask(client).status_code for client in range(16))
            time.sleep(5)
            assert all(ask(client).status_code == 200 for client in range(16))
        report("status of 16 requests while replica 8000 ends, within 5 s and later", f"{dict(statuses)}, all 200")


def _wait_until_back(before: dict[int, str], report: Callable[[str, object], None]) -> None:
    begin = time.monotonic()
    while {client: ask(client).headers["x-replica"] for client in range(16)} != before:
        assert time.monotonic() - begin < 60
        time.sleep(0.5)
    report("after its restart, every client is back at its replica within", f"{time.monotonic() - begin:.0f} s")


def main() -> None:
    """Checks the proxies that the command line names."""
    for argument in sys.argv[1:]:
        check(*argument.split("=", 1))


if __name__ == "__main__":
    main()
