"""The body of a GET request over HTTP(S), continued where the connection fails."""

import base64
import http.client
import io
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request

_MAX_WAIT = 60.0  # seconds before another attempt
_RETRIED_STATUS = (408, 425, 429)  # and all from 500 on; others, such as 404, are final


class Unreachable(OSError):
    """No data from a server or a command: the data may be readable later."""


class HttpStream(io.RawIOBase):
    """The body of a GET request, which is sent again for the rest where the connection fails.

    Args:
        url: may have credentials (``https://USER:PASSWORD@HOST/…``), spaces and characters beyond ASCII.
        timeout: seconds without data after which a connection has failed.
        retries: further attempts without new data, with waits of 1, 2, 4, … seconds between them.
    """

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self._url, self._timeout, self._retries = url, timeout, retries
        self._response: http.client.HTTPResponse | None = None
        self._num_failures = 0  # since the last data
        self._position = 0
        # As the responses tell, where they do; mirrors behind one name differ in other headers.
        self._sizes: set[int] = set()

    @property
    def size(self) -> int | None:
        """Bytes of the whole body, if a response has told it yet."""
        return next(iter(self._sizes), None)

    def readable(self) -> bool:
        """Returns True: ``io.RawIOBase`` reads through ``readinto``."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Reads what there is; raises OSError, or Unreachable after the last attempt."""
        while True:
            try:
                data = self._read(len(buffer))
            except (OSError, http.client.HTTPException) as error:
                self._wait_after(error)
                continue
            buffer[: len(data)] = data
            self._position += len(data)
            if data:
                self._num_failures = 0
            return len(data)

    def _read(self, max_bytes: int) -> bytes:
        if self._position == self.size:
            return b""
        if self._response is None:
            self._connect()
        data = self._response.read1(max_bytes)
        if not data and (num_missing := self._response.length or (self.size or self._position) - self._position):
            total = self._position + num_missing
            raise ConnectionError(f"the connection ended after {self._position:,} of {total:,} bytes")
        return data

    def _connect(self) -> None:
        parts = urllib.parse.urlsplit(self._url)
        credentials, _, host = parts.netloc.rpartition("@")
        host = re.sub(r"[^.:]+", lambda label: label[0].encode("idna").decode(), host)
        url = urllib.parse.quote(parts._replace(netloc=host).geturl(), safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(url, headers={"User-Agent": "minigpt4"})
        if credentials:
            encoded = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        if self._position:
            request.add_header("Range", f"bytes={self._position}-")
        response = self._response = urllib.request.urlopen(request, timeout=self._timeout)
        start, size = "0", response.length
        if response.status == 206:
            content_range = response.headers["Content-Range"] or ""
            if not (match := re.match(r"bytes (\d+)-\d+/(\d+|\*)$", content_range)):
                raise ConnectionError(f"the server answered with the range '{content_range}'")
            start, total = match.groups()
            size = int(total) if total != "*" else None
        if size is not None:
            self._sizes.add(size)
        if len(self._sizes) > 1:
            raise OSError("it has changed while it was read")
        num_left = self._position - int(start)  # the server sends again what was received before
        while num_left > 0 and (data := response.read(min(num_left, 1 << 20))):
            num_left -= len(data)
        if num_left:
            raise ConnectionError(f"the server did not continue at byte {self._position:,}")

    def _wait_after(self, error: Exception) -> None:
        """Waits before another attempt, or raises what the failure means."""
        self._disconnect()
        if len(self._sizes) > 1 or isinstance(error, http.client.InvalidURL):
            raise error
        reason = getattr(error, "reason", error)  # of an HTTPError, a text; of a URLError, an exception
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            if error.code == 416 and error.headers["Content-Range"] == f"bytes */{self._position}":
                self._sizes.add(self._position)  # only the mark of the end was missing
                return
            reason = f"{error.code} {reason}"
            if error.code < 500 and error.code not in _RETRIED_STATUS:
                raise OSError(reason) from error
        elif isinstance(reason, TimeoutError):
            reason = f"no data for {self._timeout:g} s"
        if self._num_failures == self._retries:
            raise Unreachable(f"{reason}, at attempt {self._num_failures + 1}") from error
        wait = min(2.0**self._num_failures, _MAX_WAIT)
        self._num_failures += 1
        logging.warning("%s: %s; next attempt in %g s.", self._url, reason, wait)
        time.sleep(wait)

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        """Ends the connection."""
        self._disconnect()
        super().close()
