"""Images as users have them: colour modes, rotation, transparency, damaged files."""

import numpy
import picture_kinds
import pytest

from minigpt4.common.errors import UserError
from minigpt4.conversation import images
from minigpt4.conversation.images import read_image

COLOURS = {"grey16.png": (128, 128, 128), "transparent.png": (255, 255, 255)}
SIZES = {"rotated.jpg": (32, 48), "one_pixel.png": (1, 1)}


@pytest.mark.parametrize("name", picture_kinds.readable())
def test_images_of_many_kinds_become_rgb(name):
    image = read_image(picture_kinds.readable()[name])
    assert (image.mode, image.size) == ("RGB", SIZES.get(name, (48, 32)))
    assert numpy.abs(numpy.array(image.getpixel((0, 0))) - COLOURS.get(name, (200, 10, 10))).max() <= 4


def test_unreadable_images_are_reported(tmp_path):
    for name, data in picture_kinds.unreadable().items():
        with pytest.raises(UserError, match="at most 100,000,000 pixels" if name == "bomb.png" else "cannot be read"):
            read_image(data)
    with pytest.raises(UserError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    assert images.MAX_PIXELS == 100_000_000
