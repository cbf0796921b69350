"""What the tests of the API share: requests, and the server on a free port in a thread."""

import base64
import json
import threading
from argparse import Namespace
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import openai
import uvicorn
from fastapi.testclient import TestClient

import demo
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.serve import api
from minigpt4.serve.api_requests import Limits
from minigpt4.serve.engine import Engine
from minigpt4.serve.server import address, listen

GREEDY = GenerationOptions(do_sample=False, max_new_tokens=12)
NAME, PATH = "small", "/v1/chat/completions"
QUESTION = "Describe this image in detail."


def build_chat():
    """The quickstart's frozen parts with an untrained projection, in float32: its answers are wrong, but repeatable."""
    options = ["model.ckpt=null", "model.llm_dtype=fp32", "run.device=cpu"]
    cfg_path = str(Path(demo.__file__).parent / "eval_configs" / "quickstart_eval.yaml")
    return demo.build_chat(Namespace(cfg_path=cfg_path, options=options, gpu_id=0, seed=1))


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def content(*urls, text=QUESTION):
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def post_text(**changes):
    """The body of a request without images."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 4, "temperature": 0}
    return json.dumps(body | changes).encode()


def post(server, **changes):
    """The response to a short question; ``changes`` are fields of its body."""
    return httpx.post(server.url + PATH, content=post_text(**changes), timeout=60)


def answered(server, **changes):
    found = post(server, **changes)
    assert found.status_code == 200, found.text
    return found.json()


@contextmanager
def client(engine, address="192.0.2.1", **settings):
    """A client of the API without a server, from an address."""
    app = api.build_app(engine, NAME, Limits(max_tokens=50), **settings)
    with TestClient(app, base_url="http://localhost", client=(address, 5)) as found:
        yield found


def ask(client, key=None, **changes):
    """The response to a short question that is sent with a key."""
    return client.post(PATH, content=post_text(**changes), headers={"Authorization": f"Bearer {key}"})


def text_of(completion, index=0):
    return completion["choices"][index]["message"]["content"]


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@contextmanager
def served(app):
    """Runs a server on a free port, in a thread; yields its URL."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    yield address(listener)
    server.should_exit = True
    thread.join()


class Server:
    """The API on a free port, in a thread."""

    def __init__(self, chat, api_key=None, max_queue=8, rate_limit=None, **limits):
        self.engine = Engine(chat, max_batch=4, max_queue=max_queue, max_length=400)
        self.stack = ExitStack()
        app = api.build_app(self.engine, NAME, Limits(**limits), api_key, rate_limit=rate_limit)
        self.url = self.stack.enter_context(served(app))
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key or "none", max_retries=0)

    def ask(self, what, **options):
        messages = [{"role": "user", "content": what}]
        return self.client.chat.completions.create(
            **({"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0} | options)
        )

    def close(self):
        self.stack.close()
        self.engine.close()
