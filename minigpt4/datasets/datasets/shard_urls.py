"""Shards by path, URL or command: which there are, and their bytes as tarfile gets them."""

import glob
import io
import logging
import os
import shutil
import tarfile
from pathlib import Path

import braceexpand

from minigpt4.common.errors import UserError, see
from minigpt4.common.images import MAX_FILE_BYTES
from minigpt4.datasets.datasets.shard_streams import open_stream

# Programs that fetch a URL; those of http(s) are read directly
_CLIENTS = {"http": "", "https": "", "ftps": "curl", "sftp": "curl", "scp": "curl", "gs": "gsutil", "s3": "aws"}


class ShardFile:
    """The bytes of one shard, read while they arrive. Close it in the end.

    tarfile takes the end of a truncated archive for its regular end, and reads a file of any size into memory; here
    both raise.
    """

    def __init__(self, shard: str, timeout: float, retries: int) -> None:
        self.shard = shard
        self._stream = io.BufferedReader(open_stream(shard, timeout, retries))
        self._num_bytes = 0

    def __repr__(self) -> str:
        return self.shard  # webdataset quotes it in messages

    def start_file(self, _: str) -> bool:
        """To be called before each file of the archive: restarts the count of its bytes. Returns True."""
        self._num_bytes = 0
        return True

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; raises at the end of the stream, or if a file has more than MAX_FILE_BYTES."""
        data = self._stream.read(size)
        self._num_bytes += len(data)
        if not data:
            raise tarfile.ReadError("it is truncated")
        if self._num_bytes > MAX_FILE_BYTES:
            raise tarfile.ReadError(f"one of its files has more than {MAX_FILE_BYTES:,} bytes")
        return data

    def finish(self) -> None:
        """Reads what follows the archive; raises if that is more than padding, or if the command failed.

        More than padding remains after a damaged header, which tarfile takes for the end of the archive.
        """
        num_left = 0
        while data := self._stream.read(1 << 20):  # to the end, as a command may fail on its last bytes
            num_left += len(data.strip(b"\0"))
        if num_left > 2 * tarfile.RECORDSIZE:
            raise tarfile.ReadError(f"a header is damaged, or {num_left:,} bytes follow the end of the archive")

    def close(self) -> None:
        """Also ends the connection or the command."""
        self._stream.close()


def expand_shards(storage: str | list[str], key: str) -> list[str]:
    """Expands brace patterns, globs, folders and lists of them to shard paths.

    URLs and commands (``pipe:COMMAND``) are kept as they are: s3 is read by aws, gs by gsutil. If only some files are
    missing, a warning reports how many, and the others are used.

    Raises:
        UserError: there is no shard, or nothing that reads a URL.
    """
    try:
        patterns = [storage] if isinstance(storage, str) else storage
        paths = [path for pattern in patterns for path in braceexpand.braceexpand(str(pattern))]
    except ValueError as error:
        raise UserError(f"{key}: '{storage}' is no valid pattern ({error}); expected, e.g., {{00..99}}.tar.") from error
    found = {path: _find(path, key) for path in paths}
    shards, missing = [shard for path in paths for shard in found[path]], [path for path in paths if not found[path]]
    if not shards:
        hint = "it is still the placeholder" if "path/to/" in str(storage) else f"seen from {Path.cwd()}"
        message = f"{key}: there is no shard at '{storage}' ({hint}); set it to the tar files of img2dataset."
        raise UserError(message + see("placeholder-paths"))
    if missing:
        counts = len(missing), len(paths), missing[0]
        logging.warning("%s: %d of %d shards are missing (first: %s); continuing with the others.", key, *counts)
    return shards


def _find(path: str, key: str) -> list[str]:
    """The shards of one expanded pattern; raises UserError for a URL that cannot be read."""
    if path.startswith(("pipe:", "file://")):
        return [path]
    scheme, is_url, _ = path.partition("://")
    if is_url and scheme not in _CLIENTS:
        raise UserError(
            f"{key}: '{path}' is a URL of an unknown kind; expected one of {', '.join(_CLIENTS)}, or pipe:COMMAND with "
            "a command that writes the shard to its standard output."
        )
    client = _CLIENTS.get(scheme) if is_url else None
    if client and shutil.which(client) is None:
        raise UserError(f"{key}: '{path}' is read by the program {client}, which is not installed or in PATH.")
    if is_url or os.path.isfile(path):
        return [path]
    pattern = f"{glob.escape(path)}/*.tar" if os.path.isdir(path) else path
    try:  # absolute paths, as a relative one may look like a command: "pipe:COMMAND.tar"
        return sorted(os.path.abspath(file) for file in glob.glob(pattern) if os.path.isfile(file))
    except ValueError:  # no file can have such a name
        return []
