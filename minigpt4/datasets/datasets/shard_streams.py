"""The bytes of a shard while they arrive: from a file, over HTTP with retries, or from the output of a command."""

import base64
import http.client
import io
import logging
import multiprocessing.connection
import os
import shlex
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from functools import partial

from minigpt4.common.dist_utils import end_with_parent

_MAX_WAIT = 60.0  # seconds before another attempt
_RETRIED_STATUS = (408, 425, 429)  # and all from 500 on; others, such as 404, are final
# Runs $1 as a background job, so that the trap runs at once and ends the whole group. The kernel sends the signal when
# the reading process dies, even if by SIGKILL.
_SHELL = 'trap "kill -KILL 0" TERM; (eval "$1") & wait $!'


class Unreachable(OSError):
    """No data from a server or a command: the shard may be readable later."""


def open_stream(shard: str, timeout: float, retries: int) -> io.RawIOBase:
    """Opens a shard by path, ``file://`` or other URL, or ``pipe:COMMAND``.

    Args:
        timeout: seconds without data after which a connection or a command has failed.
        retries: further attempts at a URL of http(s), with waits of 1, 2, 4, … seconds between them.
    """
    quoted = shlex.quote(shard)
    scheme = shard.partition("://")[0]
    if scheme in ("http", "https"):
        return _HttpStream(shard, timeout, retries)
    if shard.startswith("pipe:"):
        return _CommandStream(shard.removeprefix("pipe:"), timeout)
    if scheme in ("ftps", "sftp", "scp"):
        return _CommandStream(f"curl --fail --silent --show-error --location {quoted}", timeout)
    if scheme == "s3":
        return _CommandStream(f"aws s3 cp {quoted} -", timeout)
    if scheme == "gs":
        return _CommandStream(f"gsutil cat {quoted}", timeout)
    return io.FileIO(shard.removeprefix("file://"))


class _Stream(io.RawIOBase):
    def readable(self) -> bool:
        return True


class _HttpStream(_Stream):
    """The body of a GET request, which is sent again for the rest where the connection fails."""

    def __init__(self, url: str, timeout: float, retries: int) -> None:
        self._url, self._timeout, self._retries = url, timeout, retries
        self._response: http.client.HTTPResponse | None = None
        self._num_failures = 0
        self._position = 0
        self._versions: set[tuple[int | None, str | None]] = set()  # size and Last-Modified, of each response

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
            return len(data)

    def _read(self, size: int) -> bytes:
        if self._response is None:
            self._response = self._connect()
        if len(self._versions) > 1:
            raise OSError("it has changed while it was read")
        length = next(iter(self._versions))[0]
        if self._position == length:
            return b""
        data = self._response.read1(size)
        if not data and length is not None:
            raise ConnectionError(f"the connection ended after {self._position:,} of {length:,} bytes")
        return data

    def _connect(self) -> http.client.HTTPResponse:
        parts = urllib.parse.urlsplit(self._url)
        credentials, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "minigpt4"})
        if credentials:
            encoded = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        if self._position:
            request.add_header("Range", f"bytes={self._position}-")
        response = urllib.request.urlopen(request, timeout=self._timeout)
        length = response.length
        if response.status == 206:
            length = int(response.headers["Content-Range"].rpartition("/")[2])
        else:
            num_left = self._position  # the server sends again what was received before
            while num_left and (data := response.read(min(num_left, 1 << 20))):
                num_left -= len(data)
        self._versions.add((length, response.headers["Last-Modified"]))
        return response

    def _wait_after(self, error: Exception) -> None:
        """Waits before another attempt, or raises what the failure means."""
        self._disconnect()
        if len(self._versions) > 1:
            raise error
        reason = getattr(error, "reason", error)  # of an HTTPError, a text; of a URLError, an exception
        if isinstance(error, urllib.error.HTTPError):
            error.close()
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


class _CommandStream(_Stream):
    """The standard output of a shell command, which ends with the process that reads it."""

    def __init__(self, command: str, timeout: float) -> None:
        self._timeout = timeout
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the stream
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SHELL, "sh", command],
            bufsize=0,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            start_new_session=True,
            preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )

    def readinto(self, buffer: memoryview) -> int:
        """Reads what there is; raises Unreachable after a time without data, and OSError if the command fails."""
        if not multiprocessing.connection.wait([self._process.stdout], self._timeout):
            raise Unreachable(f"no data from its command for {self._timeout:g} s")
        size = self._process.stdout.readinto(buffer)
        if not size and (status := self._process.wait()):
            self._messages.seek(0)
            lines = self._messages.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no message")
            raise OSError(f"its command ended with status {status}: {last}")
        return size

    def close(self) -> None:
        """Ends the command, which may wait for a server, and all that it has started."""
        if not self.closed:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdout.close()
            self._messages.close()
        super().close()
