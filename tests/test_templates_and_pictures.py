"""Prompt templates as data, and pictures of every kind."""

import io

import numpy
import pytest
from PIL import Image

from minigpt4.common.errors import UserError
from minigpt4.conversation import pictures
from minigpt4.conversation.pictures import read_picture
from minigpt4.conversation.templates import TEMPLATES, choose_template

SYSTEM = {name: template.system for name, template in TEMPLATES.items()}
EXPECTED = {
    "vicuna_v0": f"{SYSTEM['vicuna_v0']}###Human: Q1###Assistant: A1###Human: Q2###Assistant:",
    "vicuna_v1": f"{SYSTEM['vicuna_v1']} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llama_2": f"[INST] <<SYS>>\n{SYSTEM['llama_2']}\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts(name):
    conv = TEMPLATES[name].copy()
    for role, text in ((0, "Q1"), (1, "A1"), (0, "Q2"), (1, None)):
        conv.append_message(conv.roles[role], text)
    assert conv.get_prompt() == EXPECTED[name]


def test_the_vocabulary_chooses(caplog):
    assert choose_template(None, 32001) is TEMPLATES["vicuna_v0"]
    assert choose_template(None, 32000) is TEMPLATES["vicuna_v1"]
    assert choose_template(None, 97) is TEMPLATES["vicuna_v0"]
    assert not caplog.records
    assert choose_template("vicuna_v0", 32000) is TEMPLATES["vicuna_v0"]
    assert "usually speaks vicuna_v1" in caplog.text
    with pytest.raises(UserError, match=r"vicuna_v2.*vicuna_v1"):
        choose_template("vicuna_v2", 32000)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = Image.new("RGB", (8, 4), (200, 10, 10))


def test_pictures_of_every_kind():
    grey16 = Image.fromarray(numpy.full((4, 8), 32896, dtype=numpy.uint16))
    exif = RED.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    clear = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    frames = [RED, Image.new("RGB", (8, 4), (0, 0, 255))]
    kinds = {
        "16 bit": (saved(grey16, "PNG"), (128, 128, 128), (8, 4)),
        "rotated": (saved(RED, "PNG", exif=exif), (200, 10, 10), (4, 8)),
        "transparent": (saved(clear, "PNG"), (255, 255, 255), (8, 4)),
        "palette": (saved(RED.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), (200, 10, 10), (8, 4)),
        "animated": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), (200, 10, 10), (8, 4)),
        "one pixel": (saved(RED.resize((1, 1)), "PNG"), (200, 10, 10), (1, 1)),
        "CMYK": (saved(Image.new("CMYK", (8, 4), (0, 0, 0, 0)), "JPEG"), (255, 255, 255), (8, 4)),
    }
    for name, (data, colour, size) in kinds.items():
        image = read_picture(data)
        assert (image.mode, image.size) == ("RGB", size), name
        assert numpy.abs(numpy.array(image.getpixel((0, 0))) - colour).max() <= 2, name


def test_pictures_that_cannot_be_read(tmp_path):
    whole = saved(RED.resize((64, 64)), "JPEG")
    for data in (b"", b"no picture", whole[: len(whole) // 2]):
        with pytest.raises(UserError, match="cannot be read as an image"):
            read_picture(data)
    bomb = saved(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 1_000_000
    with pytest.raises(UserError, match="at most 100,000,000 pixels"):
        read_picture(bomb)
    with pytest.raises(UserError, match=r"absent\.png"):
        read_picture(tmp_path / "absent.png")
    assert 10**7 < pictures.MAX_PIXELS < 2 * 10**8
