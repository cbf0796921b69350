"""Job ids, JSON and image files."""

import io
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.common.errors import UserError

IMAGE_PLACEHOLDER = "<ImageHere>"  # the image's position in a prompt; not allowed in text from users
MAX_FILE_BYTES = 2**27  # of an image file
# Formats that Pillow decodes itself; for others, EPS among them, it starts programs such as Ghostscript.
_IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_MAX_SCANS = 200  # of a JPEG, each of which may cover the whole image with a few bytes; usual are 1 to 20


def now() -> str:
    """Returns the current second as a job id, YYYYMMDDHHMMSS, local time."""
    return datetime.now().strftime("%Y%m%d%H%M%S")


def parse_json(text: str | bytes, where: str) -> Any:
    """Returns the value of a JSON text; a UserError that begins with ``where`` if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 and numbers of thousands of digits: ValueErrors
        raise UserError(f"{where} is no valid JSON ({error}).") from error


def read_plain_file(path: Path) -> bytes:
    """Returns the bytes of an image file; an OSError for pipes and devices, which may have no end, and large files."""
    if not os.path.isfile(path):  # False, too, for names that no file can have
        raise FileNotFoundError(f"there is no file {path}")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise OSError(f"it has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    return path.read_bytes()


def open_image(data: bytes) -> Image.Image:
    """``Image.open`` for the usual formats; an OSError for others and for JPEGs that would take minutes to decode."""
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise OSError(f"it is drawn in more than {_MAX_SCANS} scans")
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in _IMAGE_FORMATS if name in Image.OPEN])
