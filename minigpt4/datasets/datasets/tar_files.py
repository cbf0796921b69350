"""Tar files by path, URL or command: which there are, and the files in them, one behind the other."""

import glob
import logging
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import braceexpand
from webdataset.gopen import gopen

from minigpt4.common.errors import UserError, see

_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own records in a shard


class _Header(tarfile.TarInfo):
    """A member of a tar file whose header, where it is a plain file's, is read without the fields that nobody needs."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """From a block of 512 bytes; raises as tarfile does where it is no header."""
        is_plain = len(buf) == tarfile.BLOCKSIZE and buf[156:157] in (b"0", b"\0") and buf[345] == 0
        name, _, _ = buf[:100].partition(b"\0")
        size, checksum = buf[124:136].strip(b"\0 "), buf[148:156].strip(b"\0 ")
        if not (is_plain and size.isdigit() and checksum.isdigit()) or name.endswith(b"/"):
            return super().frombuf(buf, encoding, errors)
        if int(checksum, 8) != sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
            return super().frombuf(buf, encoding, errors)
        info = cls(name.decode(encoding, errors))
        info.size = int(size, 8)
        return info


def read_files(shards: Iterable[str], handler: Callable[[Exception], bool]) -> Iterator[dict[str, Any]]:
    """The files of tar files, one behind the other, as ``webdataset`` groups them to samples; an empty one ends each.

    Nothing is kept: a shard that comes over the network is read while it comes. Errors go to ``handler`` and end the
    shard; where it returns False, they are raised.
    """
    for shard in shards:
        stream = None
        try:
            stream = gopen(_readable(shard))
            # The read of webdataset's pipes would drop what has come where the client has failed by now.
            file = getattr(stream, "stream", stream)
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
                for info in tar:
                    if info.isreg() and not _META.match(info.name):
                        yield {"fname": info.name, "data": tar.extractfile(info).read(), "__url__": shard}
                    tar.members = []  # it would remember them all
            while file.read(tarfile.RECORDSIZE):  # a client that cannot write its last block calls that a failure
                pass
            stream.close()  # raises where the client failed
        except Exception as error:  # of many kinds: the archive's, the connection's, the client's
            if not handler(_explained(error, stream, shard)):
                raise
        yield {}


def _explained(error: Exception, stream: Any, shard: str) -> Exception:
    client = getattr(stream, "proc", None)
    if client is not None:  # where it has ended, its failure is why the archive breaks off
        is_open = not stream.stream.closed and stream.stream.read(1)
        if status := client.poll() if is_open else client.wait():
            return OSError(f"{shard}: the program that fetches it ended with status {status}")
    return type(error)(f"{shard}: {error}") if isinstance(error, tarfile.TarError) else error


# What fetches a URL to its standard output; the others of webdataset's own know theirs.
_COMMANDS = {"s3": "aws s3 cp {} -", "gs": "gsutil cat {}"}
_CLIENTS = {
    **dict.fromkeys(("http", "https", "ftps", "sftp", "scp"), "curl"),
    **{name: command.split()[0] for name, command in _COMMANDS.items()},
}


def _readable(shard: str) -> str:
    scheme = shard.partition("://")[0]
    return f"pipe:{_COMMANDS[scheme].format(shlex.quote(shard))}" if scheme in _COMMANDS else shard


def _check_url(url: str, key: str) -> None:
    scheme = url.partition("://")[0]
    if url.startswith("pipe:") or scheme == "file":
        return
    if scheme not in _CLIENTS:
        raise UserError(
            f"{key}: nothing here reads '{url}'; known are {', '.join(_CLIENTS)} and, for any other client, "
            "pipe:COMMAND with a command that writes the shard to its standard output."
        )
    if shutil.which(_CLIENTS[scheme]) is None:
        raise UserError(f"{key}: '{url}' is read by the program {_CLIENTS[scheme]}, which is not installed or in PATH.")


def expand_shards(storage: str | list[str], key: str) -> list[str]:
    """Expands brace patterns, globs, folders and lists of them to shard paths.

    URLs pass through, and commands (``pipe:COMMAND``) as well: http(s) is read by curl, s3 by aws, gs by gsutil.

    Raises:
        UserError: nothing is there, or nothing that reads a URL; where only some files are missing, a warning tells
            how many and the rest is used.
    """
    patterns = [storage] if isinstance(storage, str) else list(storage)
    expanded = [path for pattern in patterns for path in braceexpand.braceexpand(str(pattern))]
    shards, missing = [], []
    for path in expanded:
        if "://" in path or path.startswith("pipe:"):
            _check_url(path, key)
            shards.append(path)
        elif Path(path).is_dir():
            shards += sorted(map(str, Path(path).glob("*.tar")))
        elif Path(path).is_file():
            shards.append(path)
        elif found := sorted(glob.glob(path)):
            shards += found
        else:
            missing.append(path)
    if not shards:
        hint = "it is still the placeholder" if "path/to/" in str(storage) else f"seen from {Path.cwd()}"
        told = f"{key}: no shard is at '{storage}' ({hint}); set it to the tar files of img2dataset."
        raise UserError(told + see("placeholder-paths"))
    if missing:
        logging.warning(
            "%s: %d of %d shards are missing (first: %s); going on with the others.",
            *(key, len(missing), len(expanded), missing[0]),
        )
    return shards
