"""Chat templates: what is written for the language model, and which one is chosen."""

import pytest
import torch
from golden_data import TINY, read_tensors

from minigpt4.common.errors import UserError
from minigpt4.common.schema import ModelConfig
from minigpt4.common.templates import TEMPLATES, choose_template
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.models.llama_tokenizer import load_tokenizer

IMAGE = "<Img><ImageHere></Img>"
SYSTEM = {name: template.system for name, template in TEMPLATES.items()}
EXPECTED = {
    "vicuna_v0": f"{SYSTEM['vicuna_v0']}###Human: Q1###Assistant: A1###Human: Q2###Assistant:",
    "vicuna_v1": f"{SYSTEM['vicuna_v1']} USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:",
    "llama_2": f"{SYSTEM['llama_2']}<s>[INST] Q1 [/INST] A1<s>[INST] Q2 [/INST] ",
    "minigpt_v2": "<s>[INST] Q1 [/INST]A1<s>[INST] Q2 [/INST]",
}


def prompt_of(template, *messages, system=None):
    """The prompt of messages "Q…" of the user and "A…" of the assistant; the answer to come follows."""
    conv = template.copy()
    conv.system = conv.system if system is None else system
    for text in messages:
        conv.append_message(conv.roles[text.startswith("A")], text)
    conv.append_message(conv.roles[1], None)
    return conv.get_prompt()


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts(name):
    assert prompt_of(TEMPLATES[name], "Q1", "A1", "Q2") == EXPECTED[name]


def test_images_in_a_row_do_not_swap_the_separators():
    prompt = prompt_of(TEMPLATES["vicuna_v1"], "Q1", "Q2", "A1")
    assert prompt.endswith(" USER: Q1 USER: Q2 ASSISTANT: A1</s>ASSISTANT:")


# ---- the choice -----------------------------------------------------------------------------------------------------


class PlainTokenizer:
    chat_template = None


def choose(tokenizer=None, **settings):
    return choose_template(ModelConfig(**settings), tokenizer or PlainTokenizer())


V0 = {"prompt_template": "###Human: {} ###Assistant: ", "end_sym": "###"}
V1 = {"prompt_template": "USER: {} ASSISTANT: ", "end_sym": "</s>"}
INST = {"prompt_template": "[INST] {} [/INST] ", "end_sym": "</s>"}


def test_the_form_of_training_is_vicuna_v0(caplog):
    assert choose(**V0) is CONV_VISION
    assert choose(**V0, conversation="vicuna_v0") is CONV_VISION
    assert choose(prompt_template="###Human: {}###Assistant:", end_sym="###") is CONV_VISION
    assert choose(prompt_template=V0["prompt_template"], end_sym="\n").stop_string == "\n"
    assert not caplog.records


def test_the_form_of_training_agrees_with_a_named_template(caplog):
    assert choose(**V1, conversation="vicuna_v1") is TEMPLATES["vicuna_v1"]
    assert choose(**INST, conversation="llama_2") is TEMPLATES["llama_2"]
    assert not caplog.records


@pytest.mark.parametrize("tokenizer", [None, "with a chat template"])
def test_the_form_of_training_wins_over_another_name(caplog, tokenizer):
    tokenizer = tokenizer and chat_tokenizer("chatml")
    assert choose(tokenizer, **V0, conversation="vicuna_v1") is CONV_VISION
    assert "vicuna_v1 is ignored" in caplog.text and "###Human: {} ###Assistant: " in caplog.text
    assert prompt_of(choose(tokenizer, **V1, conversation="vicuna_v0"), "Q1") == "USER: Q1 ASSISTANT: "


def test_a_name_wins_over_the_tokenizer():
    assert choose(chat_tokenizer("chatml"), conversation="llama_2") is TEMPLATES["llama_2"]
    with pytest.raises(UserError, match=r"vicuna_v2.*Did you mean 'vicuna_v1'"):
        choose(conversation="vicuna_v2")


def test_vicuna_v0_is_the_last_resort(caplog):
    assert choose() is CONV_VISION
    assert "vicuna_v0's is used" in caplog.text and "model.conversation" in caplog.text


@pytest.mark.parametrize("settings", [V1, INST, {"prompt_template": "Q: {}\nA: ", "end_sym": "\n"}])
def test_any_form_of_training_is_a_conversation(settings):
    template = choose(**settings)
    before, after = settings["prompt_template"].split("{}")
    end = settings["end_sym"]
    assert template.stop_string == end
    assert prompt_of(template, f"Q {IMAGE} Q1") == f"{before}Q {IMAGE} Q1{after}"
    assert prompt_of(template, "Q1", "A1", "Q2") == f"{before}Q1{after}A1{end}{before}Q2{after}"
    assert prompt_of(template, IMAGE, IMAGE, "Q {}") == f"{before}{IMAGE} {IMAGE} Q {{}}{after}"
    assert prompt_of(template, "Q1", system="Be brief.") == f"Be brief. {before}Q1{after}"
    copied = template.copy()
    copied.append_message(copied.roles[0], "Q1")
    assert template.messages == []


# ---- chat templates of tokenizers -----------------------------------------------------------------------------------

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
TURNS = "{% for m in messages %}"
CHAT_TEMPLATES = {
    "chatml": (
        TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n",
    ),
    "llama 3": (
        "{{ bos_token }}" + TURNS + "<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        "<|eot|>",
        "<|start|>system<|end|>\n\nSYS<|eot|><|start|>user<|end|>\n\nQ1<|eot|><|start|>assistant<|end|>\n\n",
    ),
    "gemma": (
        "{{ bos_token }}" + NO_SYSTEM + TURNS + "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "<end>",
        "<turn>user\nSYS\n\nQ1<end>\n<turn>model\n",
    ),
    "mistral": (
        "{{ bos_token }}" + NO_SYSTEM + TURNS + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
        "[INST] SYS\n\nQ1 [/INST]",
    ),
    "phi 3": (
        TURNS + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
        "<|system|>\nSYS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n",
    ),
    "plain text": (
        TURNS + "### {{ m.role }}\n{{ m.content }}\n### END\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}",
        "### END",
        "### system\nSYS\n### END\n### user\nQ1\n### END\n### assistant\n",
    ),
}


def chat_tokenizer(name):
    """The tiny tokenizer with a chat template and the tokens that end its turns."""
    tokenizer = load_tokenizer(TINY / "llama")
    tokenizer.chat_template, stop_string, _ = CHAT_TEMPLATES[name]
    if stop_string.startswith("<") and stop_string != tokenizer.eos_token:
        tokenizer.add_special_tokens({"additional_special_tokens": [stop_string, stop_string[:-1]]})
    return tokenizer


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_chat_template_of_a_tokenizer(name):
    tokenizer = chat_tokenizer(name)
    template = choose(tokenizer)
    _, stop_string, expected = CHAT_TEMPLATES[name]
    assert template.stop_string == stop_string and template.answer_marker == ""
    assert prompt_of(template, "Q1", system="SYS") == expected
    messages = [{"role": "user", "content": f"{IMAGE} {IMAGE} Q1"}, {"role": "assistant", "content": "A1"}]
    messages.append({"role": "user", "content": "Q2"})
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt_of(template, IMAGE, f"{IMAGE} Q1", "A1", "Q2") == rendered.removeprefix(tokenizer.bos_token)
    assert template.copy().render is template.render  # the tokenizer is not copied with each conversation


def test_a_conversation_that_a_chat_template_refuses():
    tokenizer = chat_tokenizer("gemma")
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    with pytest.raises(UserError, match=r"does not accept.*user first.*model\.conversation"):
        prompt_of(choose(tokenizer), "A1", "Q1")
    tokenizer.chat_template = "{{ damaged"
    with pytest.raises(UserError, match=r"does not accept.*model\.conversation"):
        choose(tokenizer)


@pytest.mark.parametrize("name", ["mistral", "plain text"])
def test_a_chat_by_the_chat_template_of_the_tokenizer(model, monkeypatch, name):
    """One begin token, the image in the user's turn, and an answer that ends at the end of its turn."""
    contexts, plain = [], model.embed_inputs

    def spy(*arguments):
        contexts.append(plain(*arguments))
        return contexts[-1]

    monkeypatch.setattr(model, "embed_inputs", spy)
    tokenizer = model.llama_tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATES[name][0])
    chat = Chat(model, None, template=choose(tokenizer))
    conv, images = chat.template.copy(), []
    chat.upload_img(read_tensors("vision")["image"][0], conv, images)
    chat.ask("What is it?", conv)
    text, ids = chat.answer(conv, images, do_sample=False, max_new_tokens=8)
    messages = [{"role": "user", "content": f"{IMAGE} What is it?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = [tokenizer.bos_token_id, *model.tokenize_prompt(prompt.removeprefix(tokenizer.bos_token))]
    with torch.no_grad():
        assert torch.equal(contexts[0], model.embed_inputs(torch.tensor([expected]), images[0]))
    assert conv.messages[-1] == ["assistant", text] and 0 < len(ids) <= 8


def test_answers_are_cut_at_the_end_of_the_turn(model):
    """Not at a word that another template would cut at; the end token is cut too."""
    chat = Chat(model, None)
    tokenizer = model.llama_tokenizer
    for settings, text, expected in (
        (V1, "a dog. Assistant: ### yes</s>", "a dog. Assistant: ### yes"),
        ({"prompt_template": "Q: {} A: ", "end_sym": "\n"}, "a dog\nQ: more", "a dog"),
        ({"prompt_template": "Q: {} A: ", "end_sym": "\n"}, "a dog</s>", "a dog"),
        (V0, "Assistant: a dog###Human: more", "a dog"),
    ):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert chat.decode_answer(ids, choose(**settings)) == expected
