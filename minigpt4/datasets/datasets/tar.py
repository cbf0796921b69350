"""Files in tar archives that others wrote: plain ones of a bounded size, whatever the headers claim.

Nothing is unpacked to the disk, so that the names of members are only keys.
"""

import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from webdataset.gopen import gopen

from minigpt4.common.errors import UserError
from minigpt4.common.utils import MAX_FILE_BYTES

MAX_HEADER_BYTES = 2**14  # of a long name or of extended attributes
MAX_EXPANSION = 20  # of a compressed archive; pictures hardly shrink
FREE_EXPANSION = 2**26  # bytes that may come out of any compressed archive
_PACKED = (b"\x1f\x8b\x08", b"BZh", b"\x5d\x00\x00\x80", b"\xfd7zXZ")
_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def tar_files(shards: Iterable[str], skipped: Counter, handler: Callable[[Exception], Any]) -> Iterator[dict[str, Any]]:
    """The plain files of shards in webdataset's form: fname, data and __url__; {} at the end of each shard.

    Args:
        shards: paths, URLs, or commands (``pipe:``).
        skipped: counts what is no plain file and what is too large.
        handler: is told why a shard could not be read to its end.
    """
    for shard in shards:
        try:
            for name, data in _members(_Counted(gopen(shard)), skipped):
                yield {"fname": name, "data": data, "__url__": shard}
        except Exception as error:  # of the archive, the disk or the network
            handler(UserError(f"{shard}: {error}"))
        yield {}


def key_and_suffix(name: str) -> tuple[str | None, str | None]:
    """``DIR/KEY.SUFFIX`` as (DIR/KEY, SUFFIX), KEY without a dot; (None, None) for other names."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return (folder + slash + key, suffix) if key and dot else (None, None)


def _members(stream: "_Counted", skipped: Counter) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:
        for member in tar:
            tar.members = []  # the archive would remember all of them
            end = member.offset_data + member.size
            if member.size < 0:
                raise tarfile.ReadError(f"a header claims {member.size:,} bytes")
            if stream.is_packed and end > FREE_EXPANSION + MAX_EXPANSION * stream.num_bytes:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_EXPANSION} times its size")
            if not member.isreg():
                skipped["no plain file in a shard"] += not member.isdir()
            elif member.size > MAX_FILE_BYTES:
                skipped["file too large in a shard"] += 1
            else:
                yield member.name, tar.extractfile(member).read()


class _Counted:
    """A stream that counts its bytes, and that has to go on until the archive ends itself.

    Python's reader takes the end of a stream for the end of the archive, and looks for a member behind it for ever.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.num_bytes = 0
        self.is_packed = False

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if not data:
            raise tarfile.ReadError(f"it is cut short after {self.num_bytes:,} bytes")
        self.is_packed = self.is_packed or (self.num_bytes == 0 and data.startswith(_PACKED))
        self.num_bytes += len(data)
        return data

    def close(self) -> None:
        """The stream closes itself once nobody holds it."""


class _Member(tarfile.TarInfo):
    """A header that is refused where Python's reader would believe too much."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:  # the reader would take it for the end of the archive
            raise tarfile.ReadError(f"a header is damaged ({error})") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in _EXTENDED and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header claims {self.size:,} bytes")
        return super()._proc_member(archive)

    def _proc_gnusparse_10(self, *_: Any) -> NoReturn:
        raise tarfile.ReadError("it holds a sparse file")  # some bytes that stand for terabytes

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10
