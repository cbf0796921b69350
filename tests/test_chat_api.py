"""``Chat`` as code that was written for the reference uses it, in its first and in its later form."""

import pytest
import torch
from golden_data import TINY, close, read_tensors
from PIL import Image
from scripted_chats import CHAT, PLAIN, asked, upload
from transformers import StoppingCriteria, StoppingCriteriaList

from minigpt4.common.errors import UserError
from minigpt4.conversation import conversation, generation
from minigpt4.conversation.conversation import CONV_VISION, Chat, StoppingCriteriaSub
from minigpt4.conversation.generation import GenerationOptions, Token
from minigpt4.processors import Blip2ImageEvalProcessor

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def chat(model):
    return Chat(model, Blip2ImageEvalProcessor(28))


def test_the_names_that_downstream_code_imports():
    for template, roles, sep in (
        (conversation.CONV_VISION_Vicuna0, ("Human: ", "Assistant: "), "###"),
        (conversation.CONV_VISION_LLama2, ("<s>[INST] ", " [/INST] "), ""),
        (conversation.CONV_VISION_minigptv2, ("<s>[INST] ", " [/INST]"), ""),
    ):
        assert (tuple(template.roles), template.sep, template.messages) == (roles, sep, [])
    conv = conversation.CONV_VISION_Vicuna0.copy()
    conv.messages = [["Human: ", "hi"], ["Assistant: ", ""], ["Human: ", "again"], ["Assistant: ", None]]
    assert conv.get_prompt() == f"{CHAT['system']}###Human: hi###Assistant: Human: again###Assistant: "
    conv = conversation.CONV_VISION_minigptv2.copy()
    conv.messages = [["<s>[INST] ", "hi"], [" [/INST]", None]]
    assert conv.get_prompt() == "<s>[INST] hi [/INST]"


def test_an_answer_without_a_stop_string_ends_at_the_end_token(chat):
    conv, images = conversation.CONV_VISION_LLama2.copy(), []
    upload(chat, 0, conv, images)
    chat.ask("What is it?", conv)
    text, ids = chat.answer(conv, images, do_sample=False, max_new_tokens=8)
    assert len(ids) == 8 and text
    assert chat.decode_answer([*ids, EOS], conv) == text


def test_the_device_is_where_the_model_is_by_default(model):
    assert Chat(model, None).device == torch.device("cpu")
    if not torch.accelerator.is_available():
        assert Chat(model, None, "cuda:0").device == torch.device("cpu")


def test_uploaded_images_are_encoded_once_and_lists_filled_by_hand_too(chat):
    image, pixels = Image.open(TINY / "images" / "model_1.png"), read_tensors("vision")["image"]
    expected = read_tensors("vision")["encode_img"]
    conv, images = CONV_VISION.copy(), []
    upload(chat, 0, conv, images)
    images += [image, pixels[2], pixels[:1]]
    uploaded = images[0]
    chat.encode_img(images)
    assert images[0] is uploaded
    for embed, number in zip(images, (0, 1, 2, 0), strict=True):
        assert close(embed, expected[number : number + 1], 2e-5)
    chat.encode_img(images)
    assert images[0] is uploaded and len(images) == 4


def test_embeddings_of_uploaded_images_can_take_part_in_autograd(chat):
    """Attacks on images keep them for a backward pass, which tensors of inference mode do not allow."""
    _, images = asked(chat, "What is it?")
    weight = torch.ones(images[0].shape[-1], requires_grad=True)
    (images[0] @ weight).sum().backward()
    assert weight.grad is not None


def test_the_context_of_a_conversation(chat):
    conv, images = asked(chat, "What is it?")
    conv.append_message(conv.roles[1], None)
    ids = torch.tensor([[BOS, *chat.model.tokenize_prompt(conv.get_prompt())]])
    with torch.no_grad():
        assert close(chat.get_context_emb(conv, images), chat.model.embed_inputs(ids, images[0]), 0)
        with pytest.raises(UserError):
            chat.get_context_emb(conv, images * 2)


def test_prepared_arguments_give_the_answer_by_transformers(chat):
    conv, images = asked(chat, "What is it?")
    expected = chat.answer(conv.copy(), images, do_sample=False, max_new_tokens=12)[1].tolist()
    arguments = chat.answer_prepare(conv, images, max_new_tokens=12, temperature=0)
    assert conv.messages[-1] == ["Assistant", None] and arguments["do_sample"] is False
    assert arguments["stopping_criteria"] is chat.stopping_criteria
    with torch.no_grad():
        found = chat.model.llama_model.generate(**arguments, eos_token_id=EOS, pad_token_id=0)[0].tolist()
    assert found == expected
    conv, images = asked(chat, "What is it?")
    settings = {"num_beams": 2, "top_p": 0.5, "repetition_penalty": 1.2, "max_new_tokens": 7}
    arguments = chat.answer_prepare(conv, images, **settings)
    assert {name: arguments[name] for name in settings} == settings and arguments["do_sample"] is True
    assert "seed" not in arguments and "stop" not in arguments


def test_criteria_of_the_caller_end_answers_beside_the_stop_string(model, chat):
    conv, images = asked(chat, "What is it?")
    full = chat.answer(conv.copy(), images, do_sample=False, max_new_tokens=12)[1].tolist()
    criteria = StoppingCriteriaList([StoppingCriteriaSub([torch.tensor([9999]), torch.tensor(full[2:4])])])
    other = Chat(model, chat.vis_processor, "cpu", criteria)
    assert other.stopping_criteria is criteria and isinstance(criteria[0], StoppingCriteria)
    answers = other.stream(conv.copy(), images, GenerationOptions(do_sample=False, max_new_tokens=12))
    assert [answer.ids for answer in answers][-1] == full[:4]
    assert isinstance(chat.stopping_criteria, StoppingCriteriaList)


def test_pieces_of_text_add_up_to_the_answer(chat):
    script = next(script for script in PLAIN if script["name"] == "three_turns_beam3")
    for settings in ({"num_beams": 3}, {}):
        conv, images = asked(chat, script["ops"][1][1], script["ops"][0][1])
        text, _ = chat.answer(conv.copy(), images, do_sample=False, max_new_tokens=20, **settings)
        pieces = list(chat.stream_answer(conv, images, do_sample=False, max_new_tokens=20, **settings))
        assert "".join(pieces) == text and conv.messages[-1] == ["Assistant", text]
        assert (len(pieces) > 2 or settings) and not any("#" in piece for piece in pieces)


def test_text_that_was_sent_is_not_sent_again_in_other_words(chat, monkeypatch):
    """What precedes "Assistant:" is no part of an answer, but it has been sent when that is seen."""
    ids = chat.model.llama_tokenizer("It is a dog. Assistant: yes###", add_special_tokens=False).input_ids
    tokens = iter([Token(0, i, n == len(ids)) for n, i in enumerate(ids, 1)])
    for name in ("add", "step"):
        monkeypatch.setattr(generation.DecodingState, name, lambda *_: [next(tokens)])
    conv, images = asked(chat, "What is it?")
    assert "".join(chat.stream_answer(conv, images)) == "It is a dog. Assistant"
    assert conv.messages[-1] == ["Assistant", "yes"]


def test_an_empty_question_is_accepted_as_in_the_reference(chat):
    conv, images = asked(chat, "")
    assert conv.messages == [["Human", "<Img><ImageHere></Img> "]]
    chat.ask("", conv)
    assert conv.messages[1:] == [["Human", ""]] and conv.get_prompt().endswith("</Img> ###Human:")
    assert chat.answer(conv, images, max_new_tokens=3)[1].shape == (3,)
