"""Images as users have them: colour modes, rotation, transparency, damaged files."""

import io

import numpy
import picture_kinds
import pytest
from PIL import Image

from minigpt4.common import images
from minigpt4.common.errors import UserError
from minigpt4.common.images import read_image
from minigpt4.datasets.datasets.sample import decode_image

COLOURS = {"transparent.png": (255, 255, 255), "transparent.gif": (255, 255, 255)}
GREYS = ("grey16.png", "grey16.tif", "grey32.tif", "small32.tif", "floats.tif", "large_floats.tif")
SIZES = {"one_pixel.png": (1, 1)}


@pytest.mark.parametrize("decode", [read_image, decode_image], ids=["chat", "training"])
@pytest.mark.parametrize("name", picture_kinds.readable())
def test_images_of_many_kinds_become_rgb(name, decode):
    image = decode(picture_kinds.readable()[name])
    assert (image.mode, image.size) == ("RGB", SIZES.get(name, (32, 48) if "rotated" in name else (48, 32)))
    colour = (128, 128, 128) if name in GREYS else COLOURS.get(name, (200, 10, 10))
    assert numpy.abs(numpy.array(image.getpixel((0, 0))) - colour).max() <= 4


def test_a_plain_jpeg_keeps_its_pixels():
    data = picture_kinds.readable()["rotated.jpeg"]
    image = Image.open(io.BytesIO(data))
    assert decode_image(data).tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_unreadable_images_are_reported(tmp_path):
    for name, data in picture_kinds.unreadable().items():
        match = "900000000 pixels; at most 100,000,000 are read" if name == "bomb.png" else "^'IMAGE' cannot be read"
        with pytest.raises(UserError, match=match) as error:
            read_image(data, "'IMAGE'")
        assert " object at 0x" not in str(error.value)
    with pytest.raises(UserError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    assert images.MAX_PIXELS == 100_000_000
