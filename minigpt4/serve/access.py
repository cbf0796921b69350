"""Which pages and names may use a server: checks of the Host and Origin headers, with CORS."""

import ipaddress
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.common.errors import UserError
from minigpt4.serve.api_requests import PORTS, ApiError

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_ALL_ADDRESSES = ("", "0.0.0.0", "::")


class OriginCheck:
    """ASGI middleware that answers 403 for other host names, and to the pages of other origins.

    Without it any website could use a server on the visitor's machine: with a request that needs no preflight, or with
    a domain of its own that resolves to 127.0.0.1 (DNS rebinding). Accepted are localhost, ``host`` and ``origins``,
    which also get CORS headers; on all addresses (``0.0.0.0``) also the machine's name, its first label, that label
    with ``.local``, and any IP address, which rebinding cannot use. Clients that send no Origin, such as programs, pass
    with an accepted host name.

    Args:
        app: the application, for example with ``fastapi_app.add_middleware(OriginCheck, host=…, origins=…)``.
        host: the address that the server listens on.
        origins: further origins, such as ``https://chat.example:8080``. UserError for anything else.
    """

    def __init__(self, app: ASGIApp, host: str = "127.0.0.1", origins: Sequence[str] = ()) -> None:
        self.origins = {parse_origin(origin) for origin in origins}
        self.is_on_all_addresses = host in _ALL_ADDRESSES
        self.names = {*_LOCAL_NAMES, host.lower()}
        if self.is_on_all_addresses:
            name = socket.gethostname().lower()
            label = name.partition(".")[0]
            self.names |= {name, label, f"{label}.local"}
        # Only accepted origins get there.
        anything = {"allow_origin_regex": ".*", "allow_methods": ["*"], "allow_headers": ["*"]}
        self.app = CORSMiddleware(app, **anything, expose_headers=["Retry-After"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes an accepted request on."""
        error = self._refuse(Headers(scope=scope)) if scope["type"] in ("http", "websocket") else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            scope.setdefault("state", {})["reason"] = error.code
            await JSONResponse(error.body, error.status)(scope, receive, send)

    def _refuse(self, headers: Headers) -> ApiError | None:
        host, origin = ",".join(headers.getlist("host")), headers.get("origin")
        if not self._is_own(_parse(f"http://{host}")[1]):
            text = f"The host name '{host}' is not served"
            return ApiError(text + _advice(f"http://{host}"), status=403, code="bad_host")
        if origin is None or origin.partition("://")[2] == host:  # of the server's own page
            return None
        parsed = _parse(origin)
        if parsed in self.origins or (parsed[0] in PORTS and parsed[1] in self.names):
            return None
        text = f"Pages of '{origin}' may not use this server"
        return ApiError(text + _advice(origin), status=403, code="bad_origin")

    def _is_own(self, name: str) -> bool:
        if name in self.names or any(name == allowed for _, allowed, _ in self.origins):
            return True
        try:
            return self.is_on_all_addresses and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _parse(origin: str) -> tuple[str, str, int | None]:
    """Scheme, host name and port, by default that of the scheme; empty where the text has none."""
    try:
        parts = urlsplit(origin.lower())
        return parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return "", "", None


def parse_origin(origin: str) -> tuple[str, str, int | None]:
    """Scheme, host name and port of a value of ``--allow-origin``; UserError if it is not an origin."""
    parsed = _parse(origin)
    if not re.fullmatch(r"https?://[^/?#@*\s]+/?", origin, re.IGNORECASE) or not parsed[1]:
        raise UserError(
            f"--allow-origin: '{origin}' is no origin; write it like https://chat.example or http://a:8080."
        )
    return parsed


def _advice(origin: str) -> str:
    """The end of a sentence that refuses an origin: how to allow it, if it is one."""
    with suppress(UserError):
        parse_origin(origin)
        return f"; start the server with --allow-origin {origin}."
    return "."
