"""Shards that somebody prepared: {name: bytes}, small enough to be made when the tests begin."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile

from picture_kinds import saved
from PIL import Image

PICTURE = saved(Image.new("RGB", (12, 10), (90, 50, 200)), "JPEG")


def archive(*members, format=tarfile.USTAR_FORMAT):
    """A tar of (name or TarInfo, bytes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data) if data else None)
    return buffer.getvalue()


def good(*keys):
    """Members of good samples, captioned by their keys."""
    return [
        member
        for key in keys
        for member in ((f"{key}.jpg", PICTURE), (f"{key}.json", json.dumps({"caption": f"caption {key}"}).encode()))
    ]


def special(kind, name="b.jpg", target="a.jpg", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    for field, value in fields.items():
        setattr(info, field, value)
    return info, b""


def header(name, size, kind=tarfile.REGTYPE, extra=b""):
    """A header of 512 bytes whose size field is what is given, as octal text or as twelve bytes."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148], block[156:157] = field, b"00000000000\0", kind
    block[257:265] = b"ustar  \0" if kind == tarfile.GNUTYPE_SPARSE else b"ustar\x0000"
    block[345 : 345 + len(extra)] = extra
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + b"\0" * (-len(data) % 512)


def huge(size):
    """A size beyond the eleven octal digits: a sign bit and a number to the base of 256."""
    return struct.pack(">qq", -1 if size < 0 else 0, size)[4:] if size < 0 else b"\x80" + size.to_bytes(11, "big")


def extended(**records):
    """A pax header with these records."""
    lines = b""
    for key, value in records.items():
        text = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(text) + len(str(len(text)))
        lines += f"{length + (len(str(length)) > len(str(len(text))))}".encode() + text
    return header(b"pax", len(lines), tarfile.XHDTYPE) + padded(lines)


def unended(*members):
    """An archive that lacks its end."""
    data = archive(*members)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return data[: last.offset_data + len(padded(b"x" * last.size))]


START = unended(*good("a"))
END = archive(*good("z"))
LONG_END = archive(*good("z"), ("filler.bin", b"x" * 50_000))  # more than what is read along with START
WHOLE = ["caption a", "caption z"]
FIRST = ["caption a"]
UNREADABLE = {"unreadable shard": 1}

# name: (shard, captions that are read, what is counted)
SHARDS = {
    "no bytes": (b"", [], UNREADABLE),
    "one byte": (b"x", [], UNREADABLE),
    "a text": (b"this is no archive " * 100, [], UNREADABLE),
    "a page of a server": (b"<!doctype html><html>404</html>".ljust(2000), [], UNREADABLE),
    "zeros": (b"\0" * 10_240, [], {"empty shard": 1}),
    "one zero": (b"\0", [], UNREADABLE),
    "zeros without a second block": (b"\0" * 512, [], {"empty shard": 1}),
    "a picture": (PICTURE, [], UNREADABLE),
    "a zip": (b"PK\x03\x04" + b"\0" * 2000, [], UNREADABLE),
    "no end": (START, FIRST, UNREADABLE),
    "rubbish behind the end": (START + b"\0" * 1024 + b"rubbish" * 99, FIRST, {}),
    "two archives": (START + b"\0" * 1024 + LONG_END, FIRST, UNREADABLE),
    "rubbish in the middle": (START + b"rubbish!" * 64 + LONG_END, FIRST, UNREADABLE),
    "a changed header": (START + LONG_END[:40] + b"\xff" + LONG_END[41:], FIRST, UNREADABLE),
    "a changed first header": (b"\xff" + START[1:] + END, [], UNREADABLE),
    "packed by gzip": (gzip.compress(START + END), WHOLE, {}),
    "packed by bzip2": (bz2.compress(START + END), WHOLE, {}),
    "packed by xz": (lzma.compress(START + END), WHOLE, {}),
    "packed twice": (gzip.compress(gzip.compress(START + END)), [], UNREADABLE),
    "packed and cut": (gzip.compress(START + END)[:-60], None, UNREADABLE),
    "packed rubbish": (gzip.compress(b"rubbish" * 500), [], UNREADABLE),
    "a broken packing": (gzip.compress(START + END)[:30] + b"\xff" * 500, [], UNREADABLE),
    "header of a packing": (b"\x1f\x8b\x08", [], UNREADABLE),
    "header of bzip2": (b"BZh91AY&SY" + b"\0" * 600, [], UNREADABLE),
    "header of xz": (b"\xfd7zXZ\0" + b"\xff" * 600, [], UNREADABLE),
    "an absolute name": (
        archive(*good("a"), *good("/etc/b"), *good("z")),
        ["caption a", "caption /etc/b", WHOLE[1]],
        {},
    ),
    "a name that leads up": (archive(*good("a", "../../b", "z")), ["caption a", "caption ../../b", WHOLE[1]], {}),
    "a name of a command": (
        archive(*good("a", "pipe:touch ran;", "z")),
        [*FIRST, "caption pipe:touch ran;", WHOLE[1]],
        {},
    ),
    "a line end in a name": (archive(*good("a", "b\nb", "z")), ["caption a", "caption b\nb", "caption z"], {}),
    "a name that is no UTF-8": (START + header(b"\xff\xfe.txt", 0) + END, WHOLE, {"no image": 1}),
    "no name": (START + header(b"", 0) + END, WHOLE, {}),
    "a dot as a name": (
        archive(*good("a"), ("b/.jpg", PICTURE), ("c", PICTURE), ("d/..", PICTURE), *good("z")),
        WHOLE,
        {},
    ),
    "names of the reader's own": (
        archive(*good("a"), ("b.__key__", b"x"), ("c.__url__", b"x"), *good("z")),
        WHOLE,
        {"duplicate file in a shard": 2, "no image": 2},
    ),
    "a sample that calls itself bad": (archive(*good("a"), ("b.__bad__", b"x"), *good("z")), WHOLE, {}),
    "a name of 100,000 slashes": (
        archive(*good("a"), ("/" * 100_000 + "b.jpg", b"x"), *good("z"), format=tarfile.GNU_FORMAT),
        WHOLE,
        {"no caption": 1},
    ),
    "a name of 16,000 slashes": (
        archive(*good("a"), ("/" * 16_000 + "b", b"x"), *good("z"), format=tarfile.GNU_FORMAT),
        WHOLE,
        {},
    ),
    "a symbolic link": (
        archive(*good("a"), special(tarfile.SYMTYPE), *good("z")),
        WHOLE,
        {},
    ),
    "a link to a file outside": (
        archive(*good("a"), special(tarfile.SYMTYPE, target="/etc/passwd"), ("b.txt", b"x"), *good("z")),
        WHOLE,
        {"no image": 1},
    ),
    "a hard link": (archive(*good("a"), special(tarfile.LNKTYPE), *good("z")), WHOLE, {}),
    "a device of characters": (
        archive(*good("a"), special(tarfile.CHRTYPE, devmajor=1, devminor=5), *good("z")),
        WHOLE,
        {},
    ),
    "a device of blocks": (
        archive(*good("a"), special(tarfile.BLKTYPE), *good("z")),
        WHOLE,
        {},
    ),
    "a pipe": (archive(*good("a"), special(tarfile.FIFOTYPE), *good("z")), WHOLE, {}),
    "a folder of a picture's name": (archive(*good("a"), special(tarfile.DIRTYPE), *good("z")), WHOLE, {}),
    "a member of unknown type": (START + header(b"b.jpg", 0, b"~") + END, WHOLE, {}),
    "a picture twice": (
        archive(*good("a"), ("b.jpg", PICTURE), ("b.jpg", PICTURE), ("b.txt", b"caption b"), *good("z")),
        ["caption a", "caption b", "caption z"],
        {"duplicate file in a shard": 1},
    ),
    "a key in two places": (
        archive(*good("a", "b", "a", "z")),
        ["caption a", "caption b", "caption a", "caption z"],
        {},
    ),
    "a size beyond the end": (START + header(b"b.jpg", 10**6) + PICTURE, FIRST, UNREADABLE),
    "a size of 8 GB": (START + header(b"b.jpg", 8**11 - 1) + END, FIRST, UNREADABLE),
    "a size of 2^80": (
        START + header(b"b.jpg", huge(2**80)) + END,
        FIRST,
        UNREADABLE,
    ),
    "a size of 2^60": (
        START + header(b"b.jpg", huge(2**60)) + END,
        FIRST,
        UNREADABLE,
    ),
    "a size that is no number": (START + header(b"b.jpg", b"9zzzzzzzzzz\0") + LONG_END, FIRST, UNREADABLE),
    "a link with a size of 2^80": (
        START + header(b"b.jpg", huge(2**80), tarfile.SYMTYPE) + END,
        WHOLE,
        {},
    ),
    "an unknown type of 2^80": (
        START + header(b"b.jpg", huge(2**80), b"~") + END,
        FIRST,
        UNREADABLE,
    ),
    "a long name of 1 GB": (START + header(b"x", 2**30, tarfile.GNUTYPE_LONGNAME) + END, FIRST, UNREADABLE),
    "a long name of 2^80": (START + header(b"x", huge(2**80), tarfile.GNUTYPE_LONGNAME) + END, FIRST, UNREADABLE),
    "a pax header of 1 GB": (START + header(b"x", 2**30, tarfile.XHDTYPE) + END, FIRST, UNREADABLE),
    "long names without end": (
        START + (header(b"x", 10, tarfile.GNUTYPE_LONGNAME) + padded(b"some name")) * 3000 + END,
        FIRST,
        UNREADABLE,
    ),
    "a pax size of 2^62": (START + extended(size=2**62) + END, FIRST, UNREADABLE),
    "a pax header of length zero": (
        START + header(b"x", 8, tarfile.XHDTYPE) + padded(b"0 size=1") + LONG_END,
        FIRST,
        UNREADABLE,
    ),
}
