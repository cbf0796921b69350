"""Images of many kinds, readable and not, as bytes and as files."""

import io
import struct

import numpy
from PIL import Image

RED = Image.new("RGB", (48, 32), (200, 10, 10))


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _grey(dtype, value, largest=0):
    """An image of this value, but for one pixel."""
    values = numpy.full((32, 48), value, dtype=dtype)
    values[-1, -1] = largest
    return Image.fromarray(values)


def _exif():
    """EXIF of an image that is rotated by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _long_orientation(order):
    """EXIF of an image that is rotated by 90 degrees, whose orientation is a LONG in this byte order."""
    mark = b"MM" if order == ">" else b"II"
    return b"Exif\0\0" + mark + struct.pack(order + "HIHHHIII", 42, 8, 1, 0x0112, 4, 1, 6, 0)


def readable():
    """{file name: bytes} of images that have to be accepted."""
    frames = [RED, Image.new("RGB", RED.size, (0, 0, 255))]
    return {
        "grey16.tif": saved(_grey(numpy.uint16, 32896), "TIFF"),
        "grey32.tif": saved(_grey(numpy.int32, 32896, 65535), "TIFF"),
        "small32.tif": saved(_grey(numpy.int32, 128, 255), "TIFF"),
        "floats.tif": saved(_grey(numpy.float32, 0.502), "TIFF"),
        "large_floats.tif": saved(_grey(numpy.float32, 5.02, 10), "TIFF"),
        "transparent.gif": saved(Image.new("P", RED.size), "GIF", transparency=0, comment="some words"),
        "grey16.png": saved(_grey(numpy.uint16, 32896), "PNG"),
        **{f"rotated.{kind}": saved(RED, kind, exif=_exif()) for kind in ("jpeg", "png", "webp", "avif", "tiff")},
        "rotated_long.jpg": saved(RED, "JPEG", exif=_long_orientation(">")),
        "rotated_little_long.jpg": saved(RED, "JPEG", exif=_long_orientation("<")),
        "motion_photo.jpg": saved(RED, "JPEG") + b"a video\xff\xda" * 1000,
        "transparent.png": saved(Image.new("RGBA", RED.size, (0, 0, 0, 0)), "PNG"),
        "palette.png": saved(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "one_pixel.png": saved(RED.resize((1, 1)), "PNG"),
        "cmyk.jpg": saved(RED.convert("CMYK"), "JPEG"),
        "picture.webp": saved(RED, "WEBP"),
    }


def unreadable():
    """{file name: bytes} of files that have to be rejected with an explanation."""
    noise = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=numpy.uint8))
    return {
        "empty.png": b"",
        "text.png": b"this is no picture",
        "truncated.jpg": saved(noise, "JPEG")[:1500],
        "bomb.png": saved(Image.new("1", (30_000, 30_000)), "PNG"),
    }


def write_all(folder):
    """Writes all of them; returns the readable and the unreadable files."""
    files = []
    for kind in (readable(), unreadable()):
        files.append([folder / name for name in kind])
        for name, data in kind.items():
            (folder / name).write_bytes(data)
    return files
