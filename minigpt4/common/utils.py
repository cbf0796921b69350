"""Small things without a better home."""

import io
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.common.errors import UserError

IMAGE_PLACEHOLDER = "<ImageHere>"  # where a prompt has its image; no text from outside may bring one
MAX_FILE_BYTES = 2**27  # of a picture; more is read into no memory
# What Pillow decodes itself. It would open more, EPS among it, for which it starts Ghostscript.
_PICTURE_KINDS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_MAX_SCANS = 200  # of a JPEG, each of which may cover the whole picture with a few bytes; usual are 1 to 20


def now() -> str:
    """The present minute as a job id, YYYYMMDDHHMMSS, local time."""
    return datetime.now().strftime("%Y%m%d%H%M%S")


def parse_json(text: str | bytes, where: str) -> Any:
    """The value that a JSON text is; a UserError that begins with ``where`` for any other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no UTF-8 and numbers of thousands of digits are ValueErrors too
        raise UserError(f"{where} is no valid JSON ({error}).") from error


def read_plain_file(path: Path) -> bytes:
    """The bytes of a picture's file; an OSError where it is none, as a pipe or device, which would have no end."""
    if not os.path.isfile(path):  # also of names that no file can have
        raise FileNotFoundError(f"there is no file {path}")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise OSError(f"it has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
    return path.read_bytes()


def open_image(data: bytes) -> Image.Image:
    """Image.open for the usual kinds of pictures; an OSError for others and for what would take for ever to decode."""
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise OSError(f"it is drawn in more than {_MAX_SCANS} scans")
    Image.init()
    return Image.open(io.BytesIO(data), formats=[kind for kind in _PICTURE_KINDS if kind in Image.OPEN])
