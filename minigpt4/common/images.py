"""Image files as RGB images, the same in training and in chats, or one sentence that says why a file cannot be read."""

import io
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from minigpt4.common.errors import UserError
from minigpt4.common.image_files import count_scans, read_orientation, strip_metadata

MAX_FILE_BYTES = 2**27
MAX_PIXELS = 100_000_000  # 300 MB as RGB; a photo has about a quarter
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_MAX_SCAN_PIXELS = 10 * MAX_PIXELS  # a progressive JPEG is usually drawn in 10 scans
_MIN_SCAN_PIXELS = 5_000_000  # a scan of a small image counts as this many: at most 200 scans


class ImageTooLarge(UserError):
    """An image has more than ``MAX_PIXELS``."""


def read_plain_file(path: Path) -> bytes:
    """Returns the bytes of an image file; an OSError for pipes and devices, which may have no end, and large files."""
    if not os.path.isfile(path):  # False, too, for names that no file can have
        raise FileNotFoundError("there is no such file")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise OSError(f"it has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    return path.read_bytes()


def read_image(
    source: str | Path | bytes | Image.Image,
    name: str | None = None,
    draft_size: Callable[[int, int], tuple[int, int]] | None = None,
) -> Image.Image:
    """Reads an image as RGB: rotated as its EXIF says, transparency over white, the first frame of several.

    Values of more than 8 bits are scaled to 0..255: of 16 bits from 0..65,535; of 32 bits from the smallest of 0..255,
    0..65,535 and 0..MAX that holds all of them, MAX being the largest; floats from 0..max(1, MAX). Others are clipped.

    Args:
        source: a path, the bytes of a file, or an opened image.
        name: the image's name in messages; by default the path.
        draft_size: from the width and height of a JPEG to those below which it is not decoded; it is decoded at
            1/2, 1/4 or 1/8 of its size if these are larger. By default, it is decoded at its full size.

    Raises:
        ImageTooLarge: it has more than ``MAX_PIXELS``.
        UserError: it is not an image in one of the ``FORMATS``, is damaged, or would take minutes to decode.
    """
    name = name or (f"'{source}'" if isinstance(source, str | Path) else "the image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(source, Image.Image):
                _check_size(source)
                return _to_rgb(ImageOps.exif_transpose(source))
            return _to_rgb(_decode(source if isinstance(source, bytes) else read_plain_file(Path(source)), draft_size))
    except Image.DecompressionBombError as error:
        size = re.search(r"[\dx]+ pixels", str(error))  # in Pillow's text or that of _check_size
        actual = size[0] if size else "too many pixels"
        raise ImageTooLarge(f"{name} has {actual}; at most {MAX_PIXELS:,} are read, make it smaller.") from error
    except UnidentifiedImageError as error:  # its text has the address of a buffer
        formats = ", ".join(FORMATS)
        raise UserError(f"{name} cannot be read as an image (it is damaged, or not one of {formats}).") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        cause = str(error) or type(error).__name__  # a MemoryError has no text
        raise UserError(f"{name} cannot be read as an image ({cause}).") from error


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")


def _decode(data: bytes, draft_size: Callable[[int, int], tuple[int, int]] | None) -> Image.Image:
    """The first frame of an image file, upright; raises what Pillow raises."""
    data, exif = strip_metadata(data)
    Image.init()
    image = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    _check_size(image)
    num_scans = count_scans(data) if image.format == "JPEG" else 1
    if num_scans * max(image.width * image.height, _MIN_SCAN_PIXELS) > _MAX_SCAN_PIXELS:
        raise OSError(f"its {image.width}x{image.height} pixels are drawn in {num_scans} scans")
    if any(tile[0] == "bmp_rle" for tile in image.tile):
        raise OSError("it is a run-length encoded BMP")  # which Pillow decodes in Python
    if draft_size and (size := draft_size(*image.size)) != image.size:
        image.draft("RGB", size)
    image.load()
    image.getexif()[ExifTags.Base.Orientation] = read_orientation(exif or image.info.pop("exif", b""))
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # Pillow would clip these at 255
        values = numpy.array(image, dtype=numpy.float32)
        if image.mode == "F":
            numpy.nan_to_num(values, copy=False, posinf=0)
        largest = 65_535 if image.mode.startswith("I;16") else values.max()
        ranges = (1,) if image.mode == "F" else (255, 65_535)
        values *= 255 / next((white for white in ranges if largest <= white), largest)
        numpy.rint(values.clip(0, 255, out=values), out=values)
        return Image.fromarray(values.astype(numpy.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert copies even RGB
