"""Who calls the API: keys from the command line and a file, and the number of requests per minute."""

import hashlib
import hmac
import ipaddress
import logging
import math
import re
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from fastapi import Request

from minigpt4.common.errors import UserError
from minigpt4.serve.api_requests import ApiError

_KEY = re.compile("[!-~]+")  # what a header can transport
_SECONDS = 60.0
_MAX_CLIENTS = 10_000  # whose requests are counted; beyond them, those that have been silent for longest are forgotten


def check_api_key(api_key: str | None) -> None:
    """Raises UserError for a key that cannot be sent in a header; None is none."""
    if api_key is not None and not _KEY.fullmatch(api_key):
        kind = "has other characters than ASCII's letters, digits and signs" if api_key else "is empty"
        raise UserError(
            f"The API key (--api-key or MINIGPT4_API_KEY) {kind}; give another, or none for an open server."
        )


def read_keys(file: Path) -> dict[str, str]:
    """Names by key of a file with one key per line, a name after it, and comments after ``#``; UserError if damaged."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"--api-keys: {file} cannot be read ({reason}); give a text file with one key per line."
        ) from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        key, name, *_ = [*re.sub(r"(^|\s)#.*", "", line).split(None, 1), "", ""]
        if key and (key in keys or not _KEY.fullmatch(key)):
            problem = "the key of an earlier line" if key in keys else "a key with other characters than ASCII's"
            raise UserError(f"--api-keys: line {number} of {file} has {problem}; give each client a key of its own.")
        if key:
            keys[key] = name.strip() or f"key {len(keys) + 1}"
    return keys


class ApiKeys:
    """The keys of clients; without any, the server is open.

    Args:
        api_key: one key, or None.
        file: further keys, as of ``read_keys``; it is read again when it has changed.

    Raises:
        UserError: a key cannot be sent, or the file cannot be read or has no keys.
    """

    def __init__(self, api_key: str | None = None, file: str | Path | None = None) -> None:
        check_api_key(api_key)
        file = None if file is None else Path(file)
        self._own = {} if api_key is None else {_digest(api_key): "--api-key"}
        self._file, self._version = file, self._stat(file)
        self._names = self._own | self._read()
        if file is not None and len(self._names) == len(self._own):
            raise UserError(f"--api-keys: {file} has no keys; write one per line.")
        self.is_open = not self._names

    def identify(self, request: Request) -> tuple[str, str]:
        """(Identity, name for the log) of a client: those of its key, or its address; ApiError 401 for a wrong key."""
        address = request.client.host if request.client else ""
        if self.is_open:
            return address, address
        if (version := self._stat(self._file)) != self._version:
            self._version = version
            try:
                self._names = self._own | self._read()
            except UserError as error:
                logging.warning("%s The former keys remain valid.", error)
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent, found = _digest(key.strip()), None
        for digest, name in self._names.items():  # all of them, so that the time says nothing
            found = (digest, name) if hmac.compare_digest(digest, sent) else found
        if scheme.lower() != "bearer" or found is None:
            text = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
            raise ApiError(text, status=401, code="invalid_api_key")
        return found

    def _read(self) -> dict[str, str]:
        return {_digest(key): name for key, name in (read_keys(self._file) if self._file else {}).items()}

    @staticmethod
    def _stat(file: Path | None) -> tuple[int, ...]:
        try:
            status = file.stat() if file else None
        except OSError:
            return (0,)
        return (status.st_mtime_ns, status.st_size, status.st_ino) if status else ()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


class RateLimit:
    """At most ``per_minute`` requests at once, and on average, of each client (a token bucket); None: no limit.

    The addresses of an IPv6 network of /64, which is what one machine usually gets, are one client.
    """

    def __init__(self, per_minute: int | None) -> None:
        self.per_minute = per_minute
        # By client, the latest one last: when it may send all its requests at once again.
        self._free_at: OrderedDict[str, float] = OrderedDict()

    def count(self, client: str) -> None:
        """Counts a request; ApiError 429, with the time to wait, if it is one too many."""
        if self.per_minute is None:
            return
        client = _network(client)
        now, interval = time.monotonic(), _SECONDS / self.per_minute
        free_at = max(self._free_at.get(client, now), now) + interval
        if client in self._free_at:
            self._free_at.move_to_end(client)
        if (seconds := free_at - now - _SECONDS) > 1e-6:
            text = f"A client may send {self.per_minute} requests per minute; wait {math.ceil(seconds)} s."
            raise ApiError(text, status=429, code="rate_limit_exceeded", retry_seconds=math.ceil(seconds))
        self._free_at[client] = free_at
        if len(self._free_at) > _MAX_CLIENTS:
            self._free_at.popitem(last=False)


def _network(client: str) -> str:
    """The network of /64 of an IPv6 address; any other client as it is."""
    with suppress(ValueError):
        address = ipaddress.IPv6Address(client)
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))
    return client
