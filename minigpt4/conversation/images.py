"""Image files of every common kind as RGB images, or one sentence that says why a file cannot be read."""

import warnings
from pathlib import Path

import numpy
from PIL import Image, ImageOps

from minigpt4.common.errors import UserError
from minigpt4.common.utils import open_image, read_plain_file

MAX_PIXELS = 100_000_000  # 300 MB as RGB; a photo has about a quarter


def read_image(source: str | Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Reads an image as RGB: rotated as its EXIF says, transparency over white, the first frame of several.

    Args:
        source: a path, the bytes of a file, or an opened image.
        name: the image's name in messages; by default the path.

    Raises:
        UserError: it is not an image, damaged, or larger than ``MAX_PIXELS``.
    """
    name = name or (f"'{source}'" if isinstance(source, str | Path) else "the image")
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
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{name} cannot be read as an image ({error}).") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # Pillow would clip these at 255
        values = numpy.asarray(image).astype(numpy.float64)
        values = values / 257 if image.mode != "F" else values * 255 / max(values.max(), 1.0)
        return Image.fromarray(values.clip(0, 255).round().astype(numpy.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
