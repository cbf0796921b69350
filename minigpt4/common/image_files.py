"""Image files reduced to what their pixels need, before Pillow reads them.

Opening a file, Pillow reads its comments, profiles and EXIF: some in quadratic time, some into gigabytes of memory from
one megabyte. Nothing of that is needed here but the orientation.
"""

import re
import struct
from collections.abc import Callable

_MAX_BLOCKS = 100_000  # walked through in 0.1 s; a photo has some dozens, a PNG of 100 MB 12,000
_MAX_JPEG_HEADER = 2**20
_JPEG_STANDALONE = {0, 1, *range(0xD0, 0xDA)}  # markers without data
_JPEG_KEPT = {*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD, 0xE0, 0xEE}  # frame, tables, JFIF, Adobe's colour transform
_JPEG_SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # no standalone marker but that of the end, 0xD9
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_MAX_TIFF_VALUES = 2**19  # of one tag, such as the positions of strips
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946)  # not JPEG: its strips may share data of many scans
_TIFF_KEPT = {  # sizes, bits, compression, colours, orientation, positions of strips and tiles
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339)
}


def strip_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Returns an image file without metadata, and its EXIF if that would otherwise be lost.

    Raises:
        ValueError: it is damaged, has too many parts, or is a TIFF of a rare kind.
    """
    for prefix, strip in _STRIP.items():
        if data.startswith(prefix):
            return strip(data)
    if data[4:8] == b"ftyp":  # AVIF; its rotation is not part of EXIF
        data = data.replace(b"Exif", b"skip")
    return data, b""


def read_orientation(exif: bytes) -> int:
    """Returns the orientation in EXIF bytes, 1 to 8; 1, which is upright, if there is none."""
    try:
        order, entries = _read_directory(exif.removeprefix(b"Exif\0\0"))
        (kind,) = struct.unpack_from(order + "H", entries[274], 2)
        return struct.unpack_from(order + ("I" if kind == 4 else "H"), entries[274], 8)[0]  # LONG or SHORT
    except (KeyError, struct.error):  # absent or damaged
        return 1


def count_scans(jpeg: bytes) -> int:
    """Returns the number of scans of a JPEG, as libjpeg finds them: what follows the image, such as a video, has none.

    Raises:
        ValueError: it has too many parts.
    """
    num_scans, at = 0, 2
    for _ in range(_MAX_BLOCKS):
        found = _JPEG_SEGMENT.search(jpeg, at)
        if found is None or found[0] == b"\xff\xd9":
            return num_scans
        num_scans += found[0] == b"\xff\xda"
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])
    raise ValueError(f"it has more than {_MAX_BLOCKS:,} segments")


def _read_directory(tiff: bytes) -> tuple[str, dict[int, bytes]]:
    """The byte order and the entries, {tag: 12 bytes}, of the first directory of TIFF or EXIF bytes."""
    order = "<" if tiff.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, at)
    entries = [tiff[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    return order, {struct.unpack_from(order + "H", entry)[0]: entry for entry in entries}


def _strip_tiff(data: bytes) -> tuple[bytes, bytes]:
    if 43 in data[2:4]:
        raise ValueError("BigTIFF is not read")
    try:
        order, entries = _read_directory(data)
        kept = {tag: entry for tag, entry in sorted(entries.items()) if tag in _TIFF_KEPT}
        num_values = max(struct.unpack_from(order + "I", entry, 4)[0] for entry in kept.values())
        compression = struct.unpack_from(order + "H", kept[259], 8)[0] if 259 in kept else 1
    except (ValueError, struct.error) as error:
        raise ValueError("its directory is damaged") from error
    if compression not in _TIFF_COMPRESSIONS:
        raise ValueError(f"TIFF compression {compression} is not read; save it as JPEG or PNG")
    if num_values > _MAX_TIFF_VALUES:
        raise ValueError(f"it has more than {_MAX_TIFF_VALUES:,} strips")
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept.values()) + bytes(4)
    return b"".join([data[:4], struct.pack(order + "I", len(data)), memoryview(data)[8:], directory]), b""


def _strip_jpeg(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [b"\xff\xd8"], b"", 2
    for _ in range(_MAX_BLOCKS):
        at = data.find(b"\xff", at)  # skips what is between segments
        marker = data[at + 1] if 0 <= at < len(data) - 1 else 0xDA
        if marker == 0xDA:  # the first scan
            break
        size = 1 if marker == 0xFF else 2 if marker in _JPEG_STANDALONE else 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker in _JPEG_KEPT:
            kept.append(data[at : at + size])
        elif marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            exif = exif or data[at + 4 : at + size]
        at += max(1, size)
    if marker != 0xDA or sum(map(len, kept)) > _MAX_JPEG_HEADER:
        raise ValueError("its header is too long")
    return b"".join([*kept, memoryview(data)[at:]]), exif


def _strip_png(data: bytes) -> tuple[bytes, bytes]:
    view, kept, exif, at = memoryview(data), [data[:8]], b"", 8
    for _ in range(_MAX_BLOCKS):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if kind in _PNG_KEPT:
            kept.append(view[at:end])
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        if kind == b"IEND" or end >= len(data):
            return b"".join(kept), exif
        at = end
    raise ValueError(f"it has more than {_MAX_BLOCKS:,} chunks")


def _strip_gif(data: bytes) -> tuple[bytes, bytes]:
    flags = int.from_bytes(data[10:11])
    start = at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    control, is_extension = b"", False  # control: the transparency of the first frame
    for _ in range(_MAX_BLOCKS):
        byte = data[at : at + 1]
        if is_extension:  # at the size of one of its blocks; 0 ends it
            at += 1 + int.from_bytes(byte)
            is_extension = byte not in (b"\0", b"")
        elif byte in (b",", b";", b""):
            return b"".join([data[:start], control, memoryview(data)[at:]]), b""
        else:
            if data[at : at + 3] == b"!\xf9\x04":
                control = data[at : at + 7] + b"\0"
            is_extension = byte == b"!"
            at += 2 if is_extension else 1
    raise ValueError(f"more than {_MAX_BLOCKS:,} blocks precede its first frame")


_STRIP: dict[bytes, Callable[[bytes], tuple[bytes, bytes]]] = {
    b"\xff\xd8": _strip_jpeg,
    b"\x89PNG\r\n\x1a\n": _strip_png,
    b"GIF8": _strip_gif,
    b"II": _strip_tiff,
    b"MM": _strip_tiff,
}
