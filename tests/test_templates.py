"""Prompt templates."""

import pytest

from minigpt4.common.errors import UserError
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
