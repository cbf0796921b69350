"""Tar files by path, URL or command: which there are, and the files in them, one behind the other.

Headers are not believed: whatever they claim, only plain files of a bounded size come out. Nothing is unpacked to the
disk, so that the names of members are only keys.
"""

import glob
import logging
import os
import re
import shlex
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import braceexpand
from webdataset.gopen import gopen

from minigpt4.common.errors import UserError, see
from minigpt4.common.utils import MAX_FILE_BYTES

MAX_HEADER_BYTES = 2**14  # of a long name or of extended attributes
MAX_EXPANSION = 20  # of a compressed archive; pictures hardly shrink
FREE_EXPANSION = 2**26  # bytes that may come out of any compressed archive
_PACKED = (b"\x1f\x8b\x08", b"BZh", b"\x5d\x00\x00\x80", b"\xfd7zXZ")
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own records in a shard


class _Header(tarfile.TarInfo):
    """A member of a tar file whose header, where it is a plain file's, is read without the fields that nobody needs.

    Where Python's own reader would believe too much, or end without a word, it is refused.
    """

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

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """The next header; raises ReadError also where the reader would take a damaged one for the archive's end."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged ({error})") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in _EXTENDED and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header claims {self.size:,} bytes")
        return super()._proc_member(archive)

    def _proc_gnusparse_10(self, *_: Any) -> NoReturn:
        raise tarfile.ReadError("it holds a sparse file")  # some bytes that stand for terabytes

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10


class _Counted:
    """A stream that counts its bytes, and that has to go on until the archive ends itself.

    Python's reader takes the end of a stream for the end of the archive, and looks for a member behind it for ever.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.num_bytes = 0
        self.is_packed = False

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer at the end of a pipe's; ReadError behind the end."""
        data = self._stream.read(size)
        if not data:
            raise tarfile.ReadError(f"it is cut short after {self.num_bytes:,} bytes")
        self.is_packed = self.is_packed or (self.num_bytes == 0 and data.startswith(_PACKED))
        self.num_bytes += len(data)
        return data

    def close(self) -> None:
        """Whoever opened the stream closes it."""


def read_files(
    shards: Iterable[str], handler: Callable[[Exception], bool], skipped: Counter | None = None
) -> Iterator[dict[str, Any]]:
    """The files of tar files, one behind the other, as ``webdataset`` groups them to samples; an empty one ends each.

    Nothing is kept: a shard that comes over the network is read while it comes. Errors go to ``handler`` and end the
    shard; where it returns False, they are raised. ``skipped`` counts members that are no plain files, or too large.
    """
    skipped = Counter() if skipped is None else skipped
    for shard in shards:
        stream = None
        try:
            stream = gopen(_readable(shard))
            # The read of webdataset's pipes would drop what has come where the client has failed by now.
            file = getattr(stream, "stream", stream)
            for name, data in _members(_Counted(file), skipped):
                yield {"fname": name, "data": data, "__url__": shard}
            # A client that cannot write its last block calls that a failure.
            while file is not stream and file.read(tarfile.RECORDSIZE):
                pass
            stream.close()  # raises where the client failed
        except Exception as error:  # of many kinds: the archive's, the connection's, the client's
            if not handler(_explained(error, stream, shard)):
                raise
        yield {}


def _members(stream: _Counted, skipped: Counter) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
        for member in tar:
            tar.members = []  # it would remember them all
            end = member.offset_data + member.size
            if member.size < 0:
                raise tarfile.ReadError(f"a header claims {member.size:,} bytes")
            if stream.is_packed and end > FREE_EXPANSION + MAX_EXPANSION * stream.num_bytes:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_EXPANSION} times its size")
            if not member.isreg():
                skipped["no plain file in a shard"] += not member.isdir()
            elif member.size > MAX_FILE_BYTES:
                skipped["file too large in a shard"] += 1
            elif not _META.match(member.name):
                yield member.name, tar.extractfile(member).read()


def key_and_suffix(name: str) -> tuple[str | None, str | None]:
    """``DIR/KEY.SUFFIX`` as (DIR/KEY, SUFFIX), KEY without a dot; (None, None) for other names.

    As webdataset splits them, whose pattern takes minutes for a name of many slashes.
    """
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return (folder + slash + key, suffix) if key and dot else (None, None)


def _explained(error: Exception, stream: Any, shard: str) -> Exception:
    client = getattr(stream, "proc", None)
    if client is not None:  # where it has ended, its failure is why the archive breaks off
        is_open = not stream.stream.closed and stream.stream.read(1)
        if status := client.poll() if is_open else client.wait():
            return UserError(f"{shard}: the program that fetches it ended with status {status}")
    return UserError(f"{shard}: {error}")  # in a line, whatever the archive's names hold


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
    try:
        expanded = [path for pattern in patterns for path in braceexpand.braceexpand(str(pattern))]
    except ValueError as error:
        raise UserError(
            f"{key}: '{storage}' is no pattern ({error}); expected one as in {{00000..00099}}.tar."
        ) from error
    shards, missing = [], []
    for path in expanded:
        if "://" in path or path.startswith("pipe:"):
            _check_url(path, key)
            shards.append(path)
        elif os.path.isdir(path):
            shards += _found(f"{glob.escape(path)}/*.tar")
        elif os.path.isfile(path):
            shards.append(path)
        elif found := _found(path):
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


def _found(pattern: str) -> list[str]:
    # Absolute: a file may be named "pipe:COMMAND.tar", which at the beginning of a path would be run.
    try:
        return sorted(os.path.abspath(path) for path in glob.glob(pattern) if os.path.isfile(path))
    except ValueError:  # no file can have such a name
        return []
