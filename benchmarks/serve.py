"""What continuous batching gains for the clients of the API, and how long a short question waits behind long ones.

python -m benchmarks.serve                                                # random weights of preset small
python -m benchmarks.serve --cfg-path eval_configs/minigpt4_eval.yaml     # another model

The server is a process of its own; the clients stream their answers over HTTP, each one question after the other.
"""

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import numpy
from PIL import Image

from benchmarks import hardware
from benchmarks.chat import add_model_arguments, given_chat
from minigpt4.common.errors import UserError
from minigpt4.serve.api import build_app
from minigpt4.serve.api_requests import Limits
from minigpt4.serve.engine import Engine
from minigpt4.serve.server import address, listen, serve

NAME = "benchmark"
QUESTION = "Describe this image in detail."
EQUAL_TOKENS, SHORT_TOKENS, LONG_TOKENS = 64, 5, 400
MIXED_TOKENS = (8, 16, 32, 64, 128, 256)


def run_server(args: argparse.Namespace, to_parent: Connection) -> None:
    """Serves the model until the process is terminated; sends the address and a description of the hardware."""
    try:
        chat = given_chat(args)
    except UserError as error:
        to_parent.send(error)
        return
    listener = listen("127.0.0.1", 0)
    app = build_app(Engine(chat, max_batch_tokens=args.max_batch_tokens), NAME, Limits())
    to_parent.send((address(listener), hardware.describe(chat.device)))
    serve(app, listener)


class Client:
    """A client with an image of its own."""

    def __init__(self, url: str, number: int) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        pixels = numpy.random.default_rng(number).integers(0, 256, (224, 224, 3), dtype=numpy.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png")
        self.image = {"url": "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()}

    async def ask(self, max_tokens: int) -> tuple[int, float]:
        """Streams one answer; returns its number of tokens and the seconds to the first one."""
        content = [{"type": "image_url", "image_url": self.image}, {"type": "text", "text": QUESTION}]
        body = json.dumps({
            "model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }).encode()  # fmt: skip
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Length: {len(body)}\r\n"
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**20)
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        first, usage, status = 0.0, {}, (await reader.readline()).split()[1:2]
        if status != [b"200"]:
            body = (await reader.read()).partition(b"\r\n\r\n")[2]
            reason = json.loads(body)["error"]["message"] if body else "It closed the connection."
            raise UserError(f"The server refused a request; give fewer --clients. {reason}")
        async for line in reader:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise UserError(event["error"]["message"])
                usage = event.get("usage") or usage
                if not first and any(choice["delta"].get("content") for choice in event["choices"]):
                    first = time.perf_counter() - start
        writer.close()
        return usage["completion_tokens"], first


async def tokens_per_second(clients: Sequence[Client], lengths: Sequence[int]) -> float:
    """Each client asks for the next of the lengths as soon as it has its answer."""
    remaining, start = list(reversed(lengths)), time.perf_counter()

    async def work(client: Client) -> int:
        num_tokens = 0
        while remaining:
            num_tokens += (await client.ask(remaining.pop()))[0]
        return num_tokens

    return sum(await asyncio.gather(*map(work, clients))) / (time.perf_counter() - start)


async def first_token_seconds(clients: Sequence[Client], num_long: int, repeats: int) -> float:
    """Median time to the first token of a short question while so many long answers are running."""
    long, short = clients[:num_long], clients[-1]
    running = [asyncio.ensure_future(client.ask(LONG_TOKENS)) for client in long]
    await asyncio.sleep(0.5 if running else 0)
    seconds = []
    for _ in range(repeats):
        for i, task in enumerate(running):  # one that has ended begins anew
            if task.done():
                task.result()
                running[i] = asyncio.ensure_future(long[i].ask(LONG_TOKENS))
        seconds.append((await short.ask(SHORT_TOKENS))[1])
        await asyncio.sleep(0.1)
    await asyncio.gather(*running)
    return statistics.median(seconds)


async def measure(url: str, num_clients: int, repeats: int) -> dict[str, Any]:
    """All figures, the compared ones alternately; medians of the repetitions."""
    clients = [Client(url, i) for i in range(num_clients + 1)]
    lengths = {"equal": [EQUAL_TOKENS] * 2 * num_clients, "mixed": [*MIXED_TOKENS] * (num_clients // 2)}
    Random(0).shuffle(lengths["mixed"])
    await tokens_per_second(clients, [4] * num_clients)  # warm up
    rates: dict[str, list[float]] = {}
    for _ in range(repeats):
        for kind, all_lengths in lengths.items():
            for count in (1, num_clients):
                part = all_lengths if count > 1 else all_lengths[: len(all_lengths) // 4]
                rate = await tokens_per_second(clients[:count], part)
                rates.setdefault(f"{kind} lengths, clients: {count}, tokens/s", []).append(rate)
    result: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    for kind in lengths:
        many, one = (result[f"{kind} lengths, clients: {count}, tokens/s"] for count in (num_clients, 1))
        result[f"{kind} lengths, {num_clients} clients / one"] = round(many / one, 2)
    idle, busy = [await first_token_seconds(clients, n, 5 * repeats) for n in (0, num_clients)]
    result |= {
        "first token of a short question, idle, ms": round(1000 * idle, 1),
        f"first token behind {num_clients} long answers, ms": round(1000 * busy, 1),
        "first token, behind long answers / idle": round(busy / idle, 2),
    }
    return result


def main() -> None:
    """Prints the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the line of JSON to this file")
    args = parser.parse_args()
    if args.clients < 2 or args.repeats < 1:
        parser.error("--clients must be 2 or more, as they are compared with one, and --repeats 1 or more.")
    context = multiprocessing.get_context("spawn")
    from_child, to_parent = context.Pipe()
    server = context.Process(target=run_server, args=(args, to_parent), daemon=True)
    server.start()
    try:
        if isinstance(answer := from_child.recv(), UserError):
            sys.exit(f"error: {answer}")
        url, description = answer
        result = asyncio.run(measure(url, args.clients, args.repeats))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        server.terminate()
    rows = [{"measurement": name, "value": value} for name, value in result.items()]
    hardware.report(rows, description | {"clients": args.clients, "repeats": args.repeats}, args.json)


if __name__ == "__main__":
    main()
