"""Pictures as people have them, of every kind, to RGB; or one sentence that says why not."""

import warnings
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from minigpt4.common.errors import UserError
from minigpt4.common.utils import open_image, read_plain_file

MAX_PIXELS = 100_000_000  # 300 MB as RGB; a camera's picture has a quarter of that


def read_picture(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Reads a picture as RGB: upright as its EXIF says, on white where transparent, the first frame of several.

    Args:
        source: a file, the bytes of one, or an opened image.
        name: how messages call it; by default the file's path.

    Raises:
        UserError: it is no picture, damaged, or larger than ``MAX_PIXELS``.
    """
    name = name or (f"'{source}'" if isinstance(source, str | Path) else "the picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = source
            if not isinstance(image, Image.Image):
                image = open_image(source if isinstance(source, bytes) else read_plain_file(Path(source)))
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{name} has {image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are read, make it smaller."
                )
            return _to_rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large; at most {MAX_PIXELS:,} pixels are read, make it smaller.") from error
    except Exception as error:  # each of Pillow's decoders has exceptions of its own
        raise UserError(f"{name} cannot be read as an image ({error}).") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # Pillow would cut these off at 255
        values = numpy.asarray(image).astype(numpy.float64)
        values = values / 257 if image.mode != "F" else values * 255 / max(values.max(), 1.0)
        return Image.fromarray(values.clip(0, 255).round().astype(numpy.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
