"""What operators see: numbers for Prometheus, and a line of the log for each request."""

import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Answer
from minigpt4.serve.engine import Engine

_FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5)


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"minigpt4_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "HTTP requests", "status")
        self.rejections = counter("rejections", "Requests that were refused or failed", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, images included")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that were prefilled in an earlier turn")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers")
        self.first_token = Histogram(
            "minigpt4_time_to_first_token_seconds", "From the arrival of a request to the first token",
            buckets=_FIRST_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        self.token = Histogram(
            "minigpt4_inter_token_seconds", "From one token of an answer to the next",
            buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip
        for name, text, value in (
            ("requests_waiting", "Requests in the queue", lambda: engine.stats.num_waiting),
            (
                "requests_running",
                "Requests that are answered together",
                lambda: engine.stats.num_running,
            ),
        ):
            Gauge(f"minigpt4_{name}", text, registry=registry).set_function(value)

    def text(self) -> bytes:
        """All numbers in the text format of Prometheus."""
        return generate_latest(self.registry)

    def observer(self, arrival: float) -> Callable[[Answer], None]:
        """A function that is to be called with one answer each time it has grown; thread-safe.

        ``arrival`` is the time of its request by ``time.monotonic``.
        """
        num_tokens, latest = 0, arrival

        def observe(answer: Answer) -> None:
            nonlocal num_tokens, latest
            now, num_new = time.monotonic(), len(answer.ids) - num_tokens
            if num_new > 0:
                if num_tokens == 0:
                    self.first_token.observe(now - arrival)
                    self.prompt_tokens.inc(answer.prompt_tokens)
                    self.cached_tokens.inc(answer.cached_tokens)
                else:
                    self.token.observe((now - latest) / num_new)
                self.generated_tokens.inc(num_new)
                num_tokens, latest = len(answer.ids), now

        return observe


class AccessLog:
    """ASGI middleware that counts requests and logs a line for each: client, method, path, status, seconds and tokens.

    HEAD is passed on as GET; uvicorn leaves out the body.
    Applications may set ``client``, ``num_tokens`` and, for a refusal, ``reason`` in the request's state.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and reports it when its response has ended."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # 499: the client left first
        begin, status, is_whole, state = time.monotonic(), 499, False, scope.setdefault("state", {})
        state["client"] = (scope.get("client") or ("",))[0]

        async def record(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            is_head = scope["method"] == "HEAD"
            await self.app(scope | {"method": "GET"} if is_head else scope, receive, record)
        finally:
            seconds, num_tokens = time.monotonic() - begin, state.get("num_tokens", 0)
            reason = state.get("reason") or (None if is_whole else "disconnected")
            self.metrics.requests.labels(status).inc()
            if reason:
                self.metrics.rejections.labels(reason).inc()
            path = str(UserError(scope["path"][:200]))  # one printable line
            values = (state["client"] or "-", scope["method"], path, status, reason or "ok", seconds, num_tokens)
            logging.info("%s %s %s: %d %s, %.3f s, %d tokens", *values)
