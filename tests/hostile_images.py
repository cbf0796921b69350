"""Image files that somebody prepared: {name: bytes}, small enough to be made when the tests begin."""

import struct
import zlib

from hostile_data import PICTURE
from picture_kinds import saved
from PIL import Image


def sized_jpeg(width, height):
    """A JPEG whose header claims this size."""
    data = bytearray(PICTURE)
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks, depth=8, color=2):
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + chunk(b"IEND", b"")


def many_scans(count):
    """A progressive JPEG that says its last scan again and again."""
    data = saved(Image.new("RGB", (64, 64), (90, 50, 200)), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * count + b"\xff\xd9"


def tiff(*entries):
    """A directory of (tag, type, number of values, value), as in a TIFF or in EXIF, with 8 MB behind it."""
    size = [(256, 3, 1, 10), (257, 3, 1, 10)]
    packed = [struct.pack("<HHII", *entry) for entry in sorted([*size, *entries])]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(packed)) + b"".join(packed) + bytes(2**23)


def with_metadata():
    """{name: bytes} of images whose metadata would take gigabytes, or minutes, to read."""
    bomb = tiff(*((tag, 7, 2**23, 0) for tag in range(1000, 1300)))
    image, calm = Image.new("RGB", (12, 10), (90, 50, 200)), tiff()
    parts = [bomb[at : at + 64_992] for at in range(0, len(bomb), 64_992)]
    exif = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)
    strip = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 2**13), (277, 3, 1, 1), (279, 4, 1, 100)]
    plain = png(10, 10, chunk(b"IDAT", zlib.compress(bytes(310))))
    start, end = plain[:33], plain[33:]  # around what may follow the header
    avif = saved(image, "AVIF", exif=calm)
    return {
        "EXIF of a JPEG": PICTURE[:2] + exif + PICTURE[20:],
        "EXIF of a PNG": start + chunk(b"eXIf", bomb) + end,
        "EXIF of a WebP": saved(image, "WEBP", exif=calm).replace(calm, bomb[: len(calm)]),
        "EXIF of an AVIF": avif.replace(calm, bomb[: len(calm)]),
        "tags of a TIFF": tiff(*strip, *((tag, 7, 2**23, 0) for tag in range(1000, 1300))),
        "profiles of a PNG": start + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20))) * 20_000 + end,
        "a text of a PNG": start + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**8), 1)) + end,
        "comments of a GIF": commented_gif(b"\x01a" * 90_000),
    }


def commented_gif(blocks):
    """A GIF of a comment in these blocks, for which Pillow takes quadratic time."""
    at = 13 + (3 << (GIF[10] & 7) + 1 if GIF[10] & 128 else 0)
    return GIF[:at] + b"!\xfe" + blocks + b"\0" + GIF[at:]


AVIF = saved(Image.new("RGB", (48, 32), (90, 50, 200)), "AVIF")
GIF = saved(Image.new("RGB", (12, 10)), "GIF")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file closefile showpage\n%%EOF\n"
LARGE, UNREADABLE_IMAGE = "image too large", "unreadable image"
PICTURES = {
    "no bytes": (b"", UNREADABLE_IMAGE),
    "a text": (b"this is no picture", UNREADABLE_IMAGE),
    "a page": (b"<!doctype html>", UNREADABLE_IMAGE),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNREADABLE_IMAGE),
    "a PDF": (b"%PDF-1.7\n%%EOF", UNREADABLE_IMAGE),
    "an EPS, which Ghostscript would run": (EPS, UNREADABLE_IMAGE),
    "a WMF": (b"\xd7\xcd\xc6\x9a" + b"\0" * 80, UNREADABLE_IMAGE),
    "a PSD": (b"8BPS\0\1" + b"\0" * 80, UNREADABLE_IMAGE),
    "an XBM of 60,000 x 60,000": (
        b"#define a_width 60000\n#define a_height 60000\nstatic char a_bits[] = {",
        UNREADABLE_IMAGE,
    ),
    "JPEG header alone": (PICTURE[:2], UNREADABLE_IMAGE),
    "JPEG without data": (PICTURE[:-40], UNREADABLE_IMAGE),
    "JPEG of half": (PICTURE[: len(PICTURE) // 2], UNREADABLE_IMAGE),
    "JPEG of 60,000 x 60,000": (sized_jpeg(60_000, 60_000), LARGE),
    "JPEG of 65,535 x 65,535": (sized_jpeg(65_535, 65_535), LARGE),
    "JPEG of 65,535 x 2,000": (sized_jpeg(65_535, 2_000), LARGE),
    "JPEG of no width": (sized_jpeg(0, 10), UNREADABLE_IMAGE),
    "JPEG of 2,000 scans": (many_scans(2000), UNREADABLE_IMAGE),
    "PNG of 60,000 x 60,000": (png(60_000, 60_000, chunk(b"IDAT", zlib.compress(b"\0" * 1000))), LARGE),
    "PNG of 2^31 - 1 squared": (png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", b"")), LARGE),
    "PNG of no size": (png(0, 0, chunk(b"IDAT", b"")), UNREADABLE_IMAGE),
    "PNG without data": (png(10, 10), UNREADABLE_IMAGE),
    "PNG of other data": (png(10, 10, chunk(b"IDAT", b"rubbish")), UNREADABLE_IMAGE),
    "PNG of unknown depth": (png(10, 10, chunk(b"IDAT", zlib.compress(b"\0" * 310)), depth=99), UNREADABLE_IMAGE),
    "PNG of 100,001 chunks": (png(10, 10, *[chunk(b"teXt", b"")] * 100_001), UNREADABLE_IMAGE),
    "PNG with a wrong checksum": (png(10, 10).replace(b"IHDR", b"IHDQ"), UNREADABLE_IMAGE),
    "GIF header alone": (b"GIF89a", UNREADABLE_IMAGE),
    "GIF of 65,535 x 65,535": (GIF[:6] + b"\xff" * 4 + GIF[10:], LARGE),
    "BMP of 60,000 x 60,000": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        LARGE,
    ),
    "WebP header alone": (b"RIFF\x10\0\0\0WEBPVP8 ", UNREADABLE_IMAGE),
    "TIFF that points at itself": (
        b"II*\0\x08\0\0\0\x01\0\x00\x01\x04\0\x01\0\0\0\x08\0\0\0\x08\0\0\0",
        UNREADABLE_IMAGE,
    ),
    "TIFF of a far offset": (b"II*\0\xff\xff\xff\x7f" + b"\0" * 20, UNREADABLE_IMAGE),
    "AVIF header alone": (b"\0\0\0\x20ftypavif" + b"\0" * 40, UNREADABLE_IMAGE),
    "AVIF of other data": (AVIF[:-40] + b"\xff" * 40, UNREADABLE_IMAGE),
    "JPEG 2000 header alone": (b"\0\0\0\x0cjP  \x0d\x0a\x87\x0a" + b"\0" * 40, UNREADABLE_IMAGE),
    "PPM of a slow maximum": (b"P6 1000 1000 254\n" + b"\0" * 3_000_000, UNREADABLE_IMAGE),
    "GIF of a million comments": (commented_gif(b"\x01a" * 1_000_000), UNREADABLE_IMAGE),
    "JPEG of 100,001 comments": (PICTURE[:2] + b"\xff\xfe\0\2" * 100_001 + PICTURE[2:], UNREADABLE_IMAGE),
    "JPEG of tables of 2 MB": (
        PICTURE[:2] + (b"\xff\xdb\xff\xff" + b"\0" * 65533) * 32 + PICTURE[2:],
        UNREADABLE_IMAGE,
    ),
    "BMP of runs": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 9000, 9000, 1, 8, 1, 0, 0, 0, 0, 0) + b"\0" * 2000,
        UNREADABLE_IMAGE,
    ),
    "TIFF of a million strips": (tiff((273, 4, 2**20, 0)), UNREADABLE_IMAGE),
    "TIFF of JPEGs": (tiff((259, 3, 1, 7), (273, 4, 1, 8), (279, 4, 1, 8)), UNREADABLE_IMAGE),
    "BigTIFF": (b"II+\0\x08\0\0\0" + b"\0" * 100, UNREADABLE_IMAGE),
}
