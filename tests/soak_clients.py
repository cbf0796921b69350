"""Soak: demo.py --api, and its clients, some of which are slow, vanish or send garbage."""

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
MODEL = "quickstart_eval"
QUESTIONS = ("Describe this image in detail.", "What is at the top?", "How many objects are there?")


def image_url(seed: int, num_more: int = 0) -> str:
    """A scene as JPEG; behind its end the file has so many bytes more, which do not change the image."""
    from quickstart import scenes

    rng = Random(seed)
    data = scenes.jpeg(scenes.render(scenes.draw_scene(rng), rng))
    return "data:image/jpeg;base64," + base64.b64encode(data + rng.randbytes(num_more)).decode()


def body(number: int, is_stream: bool = False, num_more: int = 0) -> bytes:
    """The request number ``number``: an image, as of ``image_url``, and a question."""
    content = [
        {"type": "image_url", "image_url": {"url": image_url(number, num_more)}},
        {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]},
    ]
    options = {"model": MODEL, "max_tokens": 16, "temperature": 0, "stream": is_stream}
    return json.dumps(options | {"messages": [{"role": "user", "content": content}]}).encode()


def post(port: int, content: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/chat/completions", content)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def text_of(data: bytes) -> str:
    """The answer in a completion or in the events of a stream."""
    if not data.startswith(b"data: "):
        return json.loads(data)["choices"][0]["message"]["content"]
    events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    if events.pop() != "[DONE]":
        return "an incomplete stream"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


def raw_request(content: bytes, length: int | None = None) -> bytes:
    length = len(content) if length is None else length
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length + content


def judge(expected: str, status: int, data: bytes) -> str:
    """One phrase on a response; "wrong: …" if it is not one that a client may get."""
    if status == 429:
        return "asked to retry later"
    if status != 200:
        return f"wrong: status {status}"
    return "answered" if text_of(data) == expected else f"wrong: {text_of(data)!r}"


class Clients:
    """Threads that send requests until a moment, each in its own way; they count outcomes and note wrong ones."""

    def __init__(self, port: int, expected: Sequence[str], until: float, seed: int) -> None:
        self.port, self.expected, self.until, self.seed = port, expected, until, seed
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seen: dict[tuple[int, int], str] = {}  # answers of chats by their number and turn

    def run(self, count: int = 6) -> None:
        """Runs so many threads until the moment."""
        ways = [
            self.good, self.good, self.streaming, self.slow, self.vanishing, self.garbage, self.chatting, self.stopping,
        ]  # fmt: skip
        ways = [ways[i % len(ways)] for i in range(count)]
        threads = [threading.Thread(target=self._repeat, args=(way, i)) for i, way in enumerate(ways)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(self, way: Callable[[Random], str], index: int) -> None:
        rng = Random(self.seed * 100 + index)
        while time.monotonic() < self.until:
            try:
                outcome = way(rng)
            except Exception as error:
                outcome = f"wrong: {type(error).__name__}: {error}"
            name = f"{way.__name__}, {outcome[:60]}"
            self.counts[name] += 1
            if outcome.startswith("wrong"):
                self.wrong.append(name)
            time.sleep(rng.uniform(0, 0.3))

    def good(self, rng: Random) -> str:
        number, num_more = rng.randrange(len(self.expected)), rng.choice([0, 0, 1_500_000])
        return judge(self.expected[number], *post(self.port, body(number, num_more=num_more)))

    def streaming(self, rng: Random) -> str:
        number = rng.randrange(len(self.expected))
        return judge(self.expected[number], *post(self.port, body(number, is_stream=True)))

    def slow(self, rng: Random) -> str:
        """Sends a request in a hundred pieces, and reads the response slowly."""
        number = rng.randrange(len(self.expected))
        data, client = raw_request(body(number)), http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        client.connect()
        with client.sock as connection:
            for start in range(0, len(data), len(data) // 100 + 1):
                connection.sendall(data[start : start + len(data) // 100 + 1])
                time.sleep(0.02)
            response = http.client.HTTPResponse(connection, method="POST")
            response.begin()
            content = b"".join(iter(lambda: response.read(7), b""))
            return judge(self.expected[number], response.status, content)

    def vanishing(self, rng: Random) -> str:
        """Leaves in the middle of a request, before the answer, or in the middle of a stream."""
        data = raw_request(body(rng.randrange(len(self.expected)), is_stream=rng.random() < 0.5))
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            if rng.random() < 0.3:
                connection.sendall(data[: rng.randrange(len(data))])
                return "left in the middle of a request"
            connection.sendall(data)
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.2))
                return "left before an answer"
            connection.recv(200)
            return "left in the middle of an answer"

    def chatting(self, rng: Random) -> str:
        """Three turns of a chat whose sampled answers have seeds: each time, the chat is the same."""
        number, messages = rng.randrange(24), []
        for turn in range(3):
            own = json.loads(body(number + turn))
            question = own["messages"][0] if turn != 1 else {"role": "user", "content": "Are you sure?"}
            messages.append(question)
            lengths = {"max_tokens": (4, 16, 64)[(number + turn) % 3], "temperature": 1, "seed": number}
            status, data = post(self.port, json.dumps(own | lengths | {"messages": messages}).encode())
            if status != 200:
                return judge("", status, data)
            text = text_of(data)
            if text != self.seen.setdefault((number, turn), text):
                return f"wrong: chat {number}, turn {turn}, was {self.seen[number, turn]!r} and is {text!r}"
            messages.append({"role": "assistant", "content": text})
        return "answered"

    def stopping(self, rng: Random) -> str:
        """Ends a long answer after a few events, and has another one ended by a stop string."""
        content = json.loads(body(rng.randrange(24), is_stream=True)) | {"max_tokens": 200, "temperature": 1}
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            connection.sendall(raw_request(json.dumps(content).encode()))
            for _ in range(3):
                connection.recv(400)
        status, data = post(self.port, json.dumps(content | {"stop": ["e", "o"], "stream": False}).encode())
        if status != 200 or not set("eo") & set(text_of(data)):
            return judge("", status, data) if status != 200 else "answered"
        return f"wrong: the stop strings are in {text_of(data)!r}"

    def garbage(self, rng: Random) -> str:
        """Sends bytes that are not HTTP, JSON, an image or a request, or fewer than announced."""
        kind = rng.choice(["bytes", "header", "JSON", "image", "fields", "length"])
        noise = rng.randbytes(rng.randrange(1, 3000))
        url = "data:image/png;base64," + base64.b64encode(noise).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Why?"}]
        image = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": parts}]}).encode()
        fields = json.dumps({"model": MODEL, "messages": rng.choice([5, [], [None], {"a": 1}])}).encode()
        data = {
            "bytes": noise,
            "header": b"GET / HTTP/1.1\r\n" + b"X: " + noise.hex().encode() * 40 + b"\r\n\r\n",
            "JSON": raw_request(noise),
            "image": raw_request(image),
            "fields": raw_request(fields),
            "length": raw_request(noise, 10**12),
        }[kind]
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(100)
            except OSError:  # the server has closed the connection
                answer = b""
        if answer and not answer.startswith(b"HTTP/1.1 4"):
            return f"wrong: {kind} was answered with {answer[:30]!r}"
        return f"refused ({kind})"


def start_clients(port: int, expected: Sequence[str], until: float, seed: int, report: Path, count: int = 6) -> int:
    """Starts the clients in a process that writes their counts and wrong outcomes at its end; returns its pid."""
    if pid := os.fork():
        return pid
    clients = Clients(port, expected, until, seed)
    clients.run(count)
    report.write_text(json.dumps([clients.counts, clients.wrong]), encoding="utf-8")
    os._exit(0)


class Server:
    """demo.py --api."""

    def __init__(self, folder: Path, port: int, *flags: str) -> None:
        self.log, self.port = folder / "server.log", port
        options = ["--cfg-path", f"eval_configs/{MODEL}.yaml", "--options", "model.ckpt=null", "run.device=cpu"]
        # Only in float32 does an answer not depend on the batch size; bfloat16 rounds differently.
        options += ["model.llm_dtype=fp32", "run.amp=False"]
        command = [sys.executable, "demo.py", *options, "--api", "--port", str(port), *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def answers(self) -> list[str]:
        """The answers to six requests, one after the other; waits until the server is up."""
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(self.log.read_text())
            try:
                return [text_of(post(self.port, body(number))[1]) for number in range(6)]
            except ConnectionError:
                time.sleep(0.2)
