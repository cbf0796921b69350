"""The listening socket of the API or the web page, and the HTTP server on it."""

import asyncio
import signal
import socket
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.common.errors import UserError

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


def serve(
    app: ASGIApp,
    listener: socket.socket,
    grace_seconds: int = GRACE_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
) -> None:
    """Runs the server until SIGINT, which raises KeyboardInterrupt, or SIGTERM.

    More than ``max_connections`` get status 503. At the end it accepts nothing more, gives running requests
    ``grace_seconds`` to end, and cancels those that are left.
    """

    async def cancellable(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):  # uvicorn would log it with a traceback
            await app(scope, receive, send)

    limits = {"limit_concurrency": max_connections, "timeout_graceful_shutdown": grace_seconds}
    server = uvicorn.Server(uvicorn.Config(cancellable, log_level="warning", **limits))
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # at its end, uvicorn repeats signals for this handler
    try:
        server.run([listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
