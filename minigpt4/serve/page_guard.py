"""Limits of the web page's server: what browsers may load, what clients may send, and how long uploads are kept."""

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from minigpt4.serve.page_texts import localized

MAX_UPLOADED_FILE_BYTES = 2**25  # of an uploaded file
MAX_UPLOAD_BYTES = 2**27  # of the files that are selected together
MAX_BODY_BYTES = 2**20  # of other requests
MAX_STORED_BYTES = 2**30  # of all uploads and the images of all chats
MAX_STORED_SECONDS = 600  # of an upload
_REFUSED = ("/file=http", "/proxy=", "/deep_link")  # gradio would fetch URLs, and store a file for each request
POLICY = (  # gradio's page has inline scripts and styles; nothing may come from or go to another host
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)


class PageGuard(BaseHTTPMiddleware):
    """ASGI middleware around gradio's server, which stores uploads below ``folder``.

    Requests may name files below ``folder`` only: gradio itself would read any file, and download those that are URLs.
    Each upload deletes those older than ``MAX_STORED_SECONDS``; folders whose names begin with ``kept`` hold images of
    chats. Pages of ``origins`` may embed the page.
    """

    def __init__(self, app: ASGIApp, folder: Path, origins: Sequence[str] = ()) -> None:
        super().__init__(app)
        self.folder, self.num_arriving_bytes = folder.resolve(), 0  # of running uploads
        self.policy = " ".join([POLICY, *(origin.rstrip("/") for origin in origins)])

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Answers acceptable requests; every response has the content security policy."""
        length, is_upload = request.headers.get("content-length", ""), _is_upload(request)
        num_bytes = int(length) if is_upload and length.isdecimal() else 0
        self.num_arriving_bytes += num_bytes
        try:
            refusal = await self._refuse(request)
            response = JSONResponse({"detail": refusal[0]}, refusal[1]) if refusal else await call_next(request)
        finally:
            self.num_arriving_bytes -= num_bytes
        response.headers["Content-Security-Policy"] = self.policy
        return response

    async def _refuse(self, request: Request) -> tuple[str, int] | None:
        """Text and status with which a request is refused."""
        path = request.url.path
        if any(part in path for part in _REFUSED):
            return "The page does not use this.", 403
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return None
        is_upload, length = _is_upload(request), request.headers.get("content-length", "")
        limit = MAX_UPLOAD_BYTES if is_upload else MAX_BODY_BYTES
        if not length.isdecimal():
            return "A Content-Length is required.", 411
        if int(length) > limit:
            return localized(request, "too_large", size=int(length) >> 20, limit=limit >> 20), 413
        if is_upload:
            num_bytes = await asyncio.to_thread(self._delete_old_uploads)
            is_full = num_bytes + self.num_arriving_bytes > MAX_STORED_BYTES
            return (localized(request, "full"), 507) if is_full else None
        try:
            is_valid = self._has_own_files(json.loads(await request.body() or b"null"))
        except (ValueError, RecursionError):
            return "The body is not JSON.", 400
        return None if is_valid else ("Only uploaded files can be used.", 403)

    def _has_own_files(self, data: Any) -> bool:
        values = list(data.values()) if isinstance(data, dict) else data if isinstance(data, list) else []
        path = data.get("path") if isinstance(data, dict) else None
        if isinstance(path, str) and not Path(path).resolve().is_relative_to(self.folder):
            return False
        return all(map(self._has_own_files, values))

    def _delete_old_uploads(self) -> int:
        """Returns the bytes of all files that remain."""
        num_bytes, oldest = 0, time.time() - MAX_STORED_SECONDS
        for entry in self.folder.iterdir():
            try:
                if entry.name.startswith("kept") or entry.stat().st_mtime > oldest:
                    num_bytes += sum(file.stat().st_size for file in (entry, *entry.rglob("*")))
                elif entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            except FileNotFoundError:  # deleted with its chat, or by another upload, meanwhile
                continue
        return num_bytes


def _is_upload(request: Request) -> bool:
    return request.method == "POST" and request.url.path.endswith("/upload")
