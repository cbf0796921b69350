"""The bytes of a shard while they arrive: from a file, over HTTP with retries, or from the output of a command."""

import io
import multiprocessing.connection
import os
import shlex
import signal
import subprocess
import tempfile
from functools import partial

from minigpt4.common.dist_utils import end_with_parent
from minigpt4.common.http_stream import HttpStream, Unreachable

# Runs $1 as a background job, so that the trap runs at once and ends the whole group. The kernel sends the signal when
# the reading process dies, even if by SIGKILL.
_SHELL = 'trap "kill -KILL 0" TERM; (eval "$1") & wait $!'


def open_stream(shard: str, timeout: float, retries: int) -> io.RawIOBase:
    """Opens a shard by path, ``file://`` or other URL, or ``pipe:COMMAND``.

    Args:
        timeout: seconds without data after which a connection or a command has failed.
        retries: further attempts at a URL of http(s) without new data; see ``HttpStream``.
    """
    quoted = shlex.quote(shard)
    scheme = shard.partition("://")[0]
    if scheme in ("http", "https"):
        return HttpStream(shard, timeout, retries)
    if shard.startswith("pipe:"):
        return _CommandStream(shard.removeprefix("pipe:"), timeout)
    if scheme in ("ftps", "sftp", "scp"):
        return _CommandStream(f"curl --fail --silent --show-error --location {quoted}", timeout)
    if scheme == "s3":
        return _CommandStream(f"aws s3 cp {quoted} -", timeout)
    if scheme == "gs":
        return _CommandStream(f"gsutil cat {quoted}", timeout)
    return io.FileIO(shard.removeprefix("file://"))


class _CommandStream(io.RawIOBase):
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

    def readable(self) -> bool:
        return True

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
