"""Prompt templates as data, and pictures of every kind."""

import numpy
import picture_kinds
import pytest

from minigpt4.common.errors import UserError
from minigpt4.conversation import images
from minigpt4.conversation.images import read_image
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


def test_images_in_a_row_do_not_swap_the_separators():
    conv = TEMPLATES["vicuna_v1"].copy()
    for role, text in ((0, "I1"), (0, "I2"), (1, "A1"), (1, None)):
        conv.append_message(conv.roles[role], text)
    assert conv.get_prompt().endswith(" USER: I1 USER: I2 ASSISTANT: A1</s>ASSISTANT:")


def test_the_vocabulary_chooses(caplog):
    assert choose_template(None, 32001) is TEMPLATES["vicuna_v0"]
    assert choose_template(None, 32000) is TEMPLATES["vicuna_v1"]
    assert choose_template(None, 97) is TEMPLATES["vicuna_v0"]
    assert not caplog.records
    assert choose_template("vicuna_v0", 32000) is TEMPLATES["vicuna_v0"]
    assert "usually speaks vicuna_v1" in caplog.text
    with pytest.raises(UserError, match=r"vicuna_v2.*vicuna_v1"):
        choose_template("vicuna_v2", 32000)


COLOURS = {"grey16.png": (128, 128, 128), "transparent.png": (255, 255, 255)}
SIZES = {"rotated.jpg": (32, 48), "one_pixel.png": (1, 1)}


@pytest.mark.parametrize("name", picture_kinds.readable())
def test_pictures_of_every_kind(name):
    image = read_image(picture_kinds.readable()[name])
    assert (image.mode, image.size) == ("RGB", SIZES.get(name, (48, 32)))
    assert numpy.abs(numpy.array(image.getpixel((0, 0))) - COLOURS.get(name, (200, 10, 10))).max() <= 4


def test_pictures_that_cannot_be_read(tmp_path):
    for name, data in picture_kinds.unreadable().items():
        with pytest.raises(UserError, match="at most 100,000,000 pixels" if name == "bomb.png" else "cannot be read"):
            read_image(data)
    with pytest.raises(UserError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    assert images.MAX_PIXELS == 100_000_000
