"""Where images of clients may come from: data URLs, allowed hosts and one allowed folder."""

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from minigpt4.common.errors import UserError
from minigpt4.serve.api_requests import PORTS, Limits

MAX_DOWNLOAD_SECONDS = 60  # for one image, however slowly it arrives
_MAX_URL = 8192  # characters, except of data URLs: urllib keeps the last 128 URLs in memory
_URL_SAFE, _BLANKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v"
# The percent signs of a data URL that encoders write. To decode any others would take seconds.
_ESCAPES = {"%2b": "+", "%2f": "/", "%3d": "=", "%0a": "", "%0d": "", "%20": ""}
_ESCAPES |= {code.upper(): character for code, character in _ESCAPES.items()}


async def load_image(url: str, limits: Limits) -> bytes:
    """The bytes of an image from a data URL, an allowed host or the allowed folder; UserError for any other text."""
    if url[:100].lstrip()[:5].lower() == "data:":
        return await asyncio.to_thread(_decode, url)
    if len(url) > _MAX_URL:
        raise UserError(
            f"A URL of {len(url)} characters is not accepted, as it has more than {_MAX_URL}; send a data URL."
        )
    try:
        parts = urlsplit(url)
        _ = parts.port  # validated on access
    except ValueError as error:
        raise UserError(f"'{url[:80]}' is no URL ({error}); send a data URL.") from error
    if parts.scheme in ("http", "https"):
        return await _download(_parse_address(url, limits.allowed_hosts), limits.max_body_bytes)
    if parts.scheme == "file" and limits.allowed_folder is not None:
        return await asyncio.to_thread(_read_file, unquote(parts.path), limits.allowed_folder, limits.max_body_bytes)
    raise _not_allowed(parts.scheme or url[:20])


def _decode(url: str) -> bytes:
    """The bytes of a data URL, which may be percent-encoded, URL-safe, broken into lines and without padding."""
    head, comma, data = url.partition(",")
    if not comma or not head.rstrip().lower().endswith(";base64"):
        raise UserError("A data URL looks like data:image/jpeg;base64,DATA; this one does not.")
    for code, character in _ESCAPES.items() if "%" in data else ():
        data = data.replace(code, character)
    try:
        content = data.encode("ascii").translate(_URL_SAFE, _BLANKS).rstrip(b"=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except ValueError as error:
        raise UserError(f"The data URL is not base64 ({error}).") from error


def _not_allowed(source: str) -> UserError:
    return UserError(f"Images from '{source}' are not allowed here; send a data URL.")


def _read_file(name: str, folder: Path, max_bytes: int) -> bytes:
    try:
        path = (folder.resolve() / name.lstrip("/")).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise FileNotFoundError
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        text = "There is no such image in the allowed folder (file:///NAME is a path below it)."
        raise UserError(text) from error
    if len(data) > max_bytes:
        raise UserError(f"The image is larger than {max_bytes} bytes.")
    return data


def _parse_address(url: str, allowed_hosts: Sequence[str]) -> httpx.URL:
    """The address of an image as the client below reads it; UserError unless its host is allowed, with its port."""
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"'{url[:80]}' is no URL ({error}); send a data URL.") from error
    host, allowed = address.host, [allowed.lower() for allowed in allowed_hosts]
    port = PORTS[address.scheme] if address.port is None else address.port
    with_port = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    is_usual = port in PORTS.values()
    if with_port not in allowed and not (is_usual and host in allowed):
        raise _not_allowed(host if is_usual else with_port)
    return address


async def _download(address: httpx.URL, max_bytes: int) -> bytes:
    data = bytearray()
    try:
        # Decompression could take as long and as much memory as the host likes.
        client = httpx.AsyncClient(timeout=20, trust_env=False, headers={"Accept-Encoding": "identity"})
        async with asyncio.timeout(MAX_DOWNLOAD_SECONDS), client, client.stream("GET", address) as response:
            if response.status_code != 200:  # redirections are not followed: they could leave the allowed hosts
                raise UserError(f"The image's address answers with status {response.status_code}.")
            if (encoding := response.headers.get("content-encoding", "identity")).lower() != "identity":
                raise UserError(f"The image's address sends it in the encoding '{encoding}', which is not decoded.")
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > max_bytes:
                    raise UserError(f"The image is larger than {max_bytes} bytes.")
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise UserError(f"The image cannot be fetched ({type(error).__name__}).") from error
    return bytes(data)
