"""The listening socket of the API or the web page, and the HTTP server on it."""

import asyncio
import logging
import math
import signal
import socket
import time
from contextlib import suppress
from types import FrameType

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.common.errors import UserError
from minigpt4.serve.api_requests import ApiError
from minigpt4.serve.metrics import AccessLog

MAX_CONNECTIONS = 128  # each may hold a request's whole body in memory
UNREAD_SECONDS = 60  # then a client that does not read what is sent loses its connection
GRACE_SECONDS = 5  # Docker kills a container 10 seconds after SIGTERM


def listen(host: str, port: int) -> socket.socket:
    """Opens the listening socket, on any free port if ``port`` is 0; connections wait until ``serve``.

    It is called before the model is loaded, which takes minutes. Raises UserError if the address cannot be used.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # UnicodeError: a text that is no host name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port} cannot be used ({reason}); give another.") from error
    # Connections inherit these options. Without the first one, events that follow another one closely wait 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a listening socket, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Serves on for up to ``grace_seconds`` after the first signal, as long as requests are running."""

    def __init__(self, app: ASGIApp, grace_seconds: float, max_connections: int) -> None:
        # What still runs after ``grace_seconds`` has one more second to end.
        settings = {"log_level": "warning", "timeout_graceful_shutdown": 1, "interface": "asgi3"}
        super().__init__(uvicorn.Config(self.handle, **settings))
        self.app, self.grace_seconds, self.max_connections = app, grace_seconds, max_connections
        self.num_running, self.end = 0, math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end; a second one does not wait."""
        super().handle_exit(sig, frame)
        if self.end == math.inf:
            self.should_exit, self.end = False, time.monotonic() + self.grace_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether to leave; asked ten times per second."""
        is_over = self.end < math.inf and (not self.num_running or time.monotonic() >= self.end)
        return await super().on_tick(counter) or is_over

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application, or answers that the server cannot."""
        if scope["type"] == "http" and self.end < math.inf:
            await self._refuse("The server is ending.", scope, receive, send)
        elif scope["type"] == "http" and len(self.server_state.connections) > self.max_connections:
            await self._refuse("The server has too many connections; try again later.", scope, receive, send)
        else:
            self.num_running += scope["type"] == "http"
            try:
                with suppress(asyncio.CancelledError):  # uvicorn would log it with a traceback
                    await self.app(scope, receive, send)
            finally:
                self.num_running -= scope["type"] == "http"

    async def _refuse(self, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with status 503, which the application's access log and metrics have, if it has them."""
        error = ApiError(message, status=503, code="unavailable")
        response = JSONResponse(error.body, error.status, error.headers | {"Connection": "close"})
        scope.setdefault("state", {})["reason"] = error.code
        if isinstance(self.app, AccessLog):
            await AccessLog(response, self.app.metrics)(scope, receive, send)
        else:
            path = str(UserError(scope["path"][:200]))
            logging.info("%s %s %s: 503 %s", (scope.get("client") or "-")[0], scope["method"], path, error)
            await response(scope, receive, send)


def serve(
    app: ASGIApp,
    listener: socket.socket,
    grace_seconds: float = GRACE_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
) -> None:
    """Runs the server until SIGINT, which raises KeyboardInterrupt, or SIGTERM.

    More than ``max_connections`` get status 503. At the end it gives running requests ``grace_seconds``, answers others
    with status 503, and then cancels what is left; a second signal ends it at once.
    """
    server = _Server(app, grace_seconds, max_connections)
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # at its end, uvicorn repeats signals for this handler
    try:
        server.run([listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
