"""The listening socket of the API or the web page, and the HTTP server on it."""

import socket

import uvicorn
from starlette.types import ASGIApp

from minigpt4.common.errors import UserError

MAX_CONNECTIONS = 128  # each may hold a request's whole body in memory


def listen(host: str, port: int) -> socket.socket:
    """Opens the listening socket, on any free port if ``port`` is 0; connections wait until ``serve``.

    It is called before the model is loaded, which takes minutes. Raises UserError if the address cannot be used.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # UnicodeError: a text that is no host name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port} cannot be used ({reason}); give another.") from error


def address(listener: socket.socket) -> str:
    """The URL of a listening socket, without a path."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: ASGIApp, listener: socket.socket, grace_seconds: int | None = None) -> None:
    """Runs the server until it is interrupted; answers that are being sent then have ``grace_seconds`` to end."""
    limits = {"limit_concurrency": MAX_CONNECTIONS, "timeout_graceful_shutdown": grace_seconds}
    uvicorn.Server(uvicorn.Config(app, log_level="warning", **limits)).run([listener])
