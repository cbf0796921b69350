"""Conversations, contexts and answers against the original's scripted chats."""

import numpy
import pytest
import torch
from decoding import generate
from golden_data import DEVICE, TINY, close, read_json, read_tensors
from PIL import Image
from scripted_chats import CHAT, PATCHED, PLAIN, asked, upload

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import (
    CONV_VISION,
    Chat,
    Conversation,
    SeparatorStyle,
    StoppingCriteriaSub,
)
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.conversation.sampling import build_processors, build_warpers
from minigpt4.conversation.stopping import StopStringCriteria
from minigpt4.models.mini_gpt4 import IMAGE_TOKEN_INDEX
from minigpt4.processors import Blip2ImageEvalProcessor

EMBEDS = read_tensors("chat_embeddings")
BOS, EOS = 1, 2


def name_of(value):
    return value["name"]


@pytest.fixture(scope="module")
def chat(model):
    return Chat(model, Blip2ImageEvalProcessor(28), num_kept_chats=0)  # every answer reads its whole context


@pytest.fixture
def generated(model, monkeypatch):
    """The LM inputs of every answer."""
    calls, plain = [], model.embed_inputs

    def spy(*arguments):
        calls.append(plain(*arguments))
        return calls[-1]

    monkeypatch.setattr(model, "embed_inputs", spy)
    return calls


def without_tail(ids, *tail):
    """Ids without the end token and padding at their end, which the original leaves there and we do or do not."""
    ids = list(ids)
    while ids and ids[-1] in tail:
        ids.pop()
    return ids


def context_ids(answer, num_queries=8):
    """The golden ids of a prompt with the image index at each image position."""
    ids = []
    for i, segment in enumerate(answer["segment_ids"]):
        ids += [IMAGE_TOKEN_INDEX] * num_queries * (i > 0) + segment
    return ids


def up_to_separator(chat, ids):
    """Ids up to the separator's, which ends an answer in this vocabulary too; the original knows Vicuna's ids only."""
    stop = StopStringCriteria(chat.model.llama_tokenizer, "###")
    return next((ids[: i + 1] for i in range(len(ids)) if stop.ends(ids[: i + 1])), ids)


def beams_of(answer):
    return [without_tail(ids[1:], 0) for ids in answer["beam_sequences_all"]]


def test_constants():
    assert CONV_VISION.system == CHAT["system"] and CONV_VISION.sep == CHAT["sep"]
    assert list(CONV_VISION.roles) == CHAT["roles"] and CONV_VISION.offset == CHAT["offset"]
    assert len(PLAIN) + len(PATCHED) + 1 == len(CHAT["scripts"])


@pytest.mark.parametrize("script", PLAIN, ids=name_of)
def test_script(chat, generated, script):
    conv, images, answers = CONV_VISION.copy(), [], iter(script["answers"])
    for operation, after in zip(script["ops"], script["after_each_op"], strict=True):
        if operation[0] == "image":
            upload(chat, operation[1], conv, images)
        elif operation[0] == "ask":
            chat.ask(operation[1], conv)
        else:
            answer = next(answers)
            text, ids = chat.answer(conv, images, do_sample=False, **answer["answer_kwargs"])
            embeds = generated[-1]
            assert ids.dtype == numpy.int64 and ids.tolist() == up_to_separator(chat, answer["output_ids"])
            assert text == answer["output_text"]
            assert embeds.shape[1] == answer["context_len"]
            if answer.get("context_emb_key"):
                assert close(embeds, EMBEDS[answer["context_emb_key"]], 2e-5)
        assert conv.messages == after["messages"]
        assert conv.get_prompt() == after["prompt"]
    assert next(answers, None) is None


@pytest.mark.parametrize("script", CHAT["scripts"], ids=name_of)
def test_segments(model, script):
    for answer in script["answers"]:
        assert [BOS, *model.tokenize_prompt(answer["prompt"])] == context_ids(answer)
        assert len(context_ids(answer)) == answer["context_len"]


def context(model, script, answer):
    """Context embeddings [1, T, L] of an answer, cut as the original cuts them."""
    numbers = [operation[1] for operation in script["ops"] if operation[0] == "image"]
    images = read_tensors("vision")["image"][numbers[: len(answer["segment_ids"]) - 1]].to(DEVICE)
    with torch.no_grad():
        image_embeds = model.encode_img(images)[0] if len(images) else None
        embeds = model.embed_inputs(torch.tensor([context_ids(answer)], device=DEVICE), image_embeds)
    return embeds[:, answer["begin_idx"] :]


def search(model, script, number=0):
    """An answer of a script and what generate() gives for it, under the script's stop ids and end token."""
    answer, note = script["answers"][number], script["note"] if isinstance(script["note"], dict) else {}
    arguments = {name: value for name, value in answer["answer_kwargs"].items() if name != "max_length"}
    options = GenerationOptions(do_sample=False, **arguments)
    if "stop_ids" in note:
        options.stop = lambda ids: any(ids[-len(stop) :] == stop for stop in note["stop_ids"])
    embeds = context(model, script, answer)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    return answer, generate(model.llama_model, embeds, mask, options, [BOS], [note.get("config.eos_token_id", EOS)])[0]


DEVIATING = [script for script in PATCHED if script["name"].startswith("stop_one_id_beam3")]


@pytest.mark.parametrize("script", [s for s in CHAT["scripts"] if s not in DEVIATING], ids=name_of)
def test_search(model, script):
    for number in range(len(script["answers"])):
        answer, result = search(model, script, number)
        assert result.ids == answer["output_ids"]
        if "beam_scores_all" in answer:
            assert result.beam_scores == pytest.approx(answer["beam_scores_all"], rel=1e-5, abs=1e-5)
            assert [without_tail(ids, 0) for ids in result.beams] == beams_of(answer)


@pytest.mark.parametrize("script", DEVIATING, ids=name_of)
def test_a_stop_word_finishes_its_own_beam_only(model, script):
    """Deliberately unlike the original, which looks at row 0 of the running beams and then stops all of them."""
    answer, result = search(model, script)
    (stop,) = script["note"]["stop_ids"][0]
    assert result.ids != answer["output_ids"]
    assert result.ids[-1] == stop
    assert all(stop not in ids[:-1] for ids in result.beams)
    if stop == 190:  # one beam met it, the other two went on to the end
        assert sorted(len(ids) for ids in result.beams if ids[-1] != stop) == [20, 20]
    assert result.beam_scores == sorted(result.beam_scores, reverse=True) and len(result.beams) == 3


def long_chat(chat, conv, images):
    upload(chat, 0, conv, images)
    for question, reply in (("What is it?", "A dog."), ("How old is the dog?", "Three years.")):
        chat.ask(question, conv)
        conv.append_message(conv.roles[1], reply)
    chat.ask("And now?", conv)


def test_long_chats_lose_their_oldest_turns(chat, generated, model):
    """Deliberately unlike the original, which cuts begin token, system text and even images away from the left."""
    conv, images = CONV_VISION.copy(), []
    long_chat(chat, conv, images)
    messages = [list(message) for message in conv.messages]
    expected = CONV_VISION.copy()
    expected.messages = [["Human", "<Img><ImageHere></Img>"], *[list(m) for m in messages[2:]], ["Assistant", None]]
    ids = [BOS, *model.tokenize_prompt(expected.get_prompt())]
    text, _ = chat.answer(conv, images, do_sample=False, max_new_tokens=5, max_length=len(ids) + 5)
    with torch.no_grad():
        assert close(generated[0], model.embed_inputs(torch.tensor([ids], device=DEVICE), images[0]), 0)
    assert conv.messages == [*messages, ["Assistant", text]]  # only the prompt was shortened

    expected.messages = [["Human", "<Img><ImageHere></Img>"], ["Human", "And now?"], ["Assistant", None]]
    conv.messages, shortest = messages, len([BOS, *model.tokenize_prompt(expected.get_prompt())])
    chat.answer(conv, images, do_sample=False, max_new_tokens=5, max_length=shortest + 5)
    assert generated[-1].shape[1] == shortest < len(ids)


def test_a_chat_that_just_fits_is_not_shortened(chat, generated, model):
    conv, images = CONV_VISION.copy(), []
    long_chat(chat, conv, images)
    whole = conv.copy()
    whole.append_message(whole.roles[1], None)
    length = len([BOS, *model.tokenize_prompt(whole.get_prompt())])
    for room, is_whole in ((length, True), (length - 1, False)):
        chat.answer(conv.copy(), images, do_sample=False, max_new_tokens=5, max_length=room + 5)
        assert (generated[-1].shape[1] == length) == is_whole


def test_question_that_cannot_fit(chat):
    conv, images = CONV_VISION.copy(), []
    long_chat(chat, conv, images)
    with pytest.raises(UserError, match=r"too long.*8 of them images.*40 fit") as error:
        chat.answer(conv, images, max_new_tokens=10, max_length=50)
    assert "max_new_tokens" in str(error.value)
    assert conv.messages[-1] == ["Human", "And now?"]


@pytest.mark.parametrize("row", [r for r in read_json("postprocess.json") if "output_ids" in r], ids=name_of)
def test_text_of_ids(chat, row):
    assert chat.decode_answer(row["output_ids"], CONV_VISION) == row["output_text"]


def test_text_of_a_single_unknown_id(chat):
    """The original fails on this one; an answer must come out all the same."""
    assert isinstance(chat.decode_answer([0], CONV_VISION), str)


@pytest.mark.parametrize("row", read_json("sampling.json"), ids=lambda row: row["key"])
def test_sampling_probabilities(row):
    golden = read_tensors("sampling")
    options = GenerationOptions(
        top_p=row["top_p"], temperature=row["temperature"], repetition_penalty=row["repetition_penalty"]
    )
    scores = build_processors(options, [BOS], [EOS], torch.device("cpu"))(torch.tensor([[BOS]]), golden["logits"])
    probabilities = build_warpers(options)(None, scores).softmax(-1)
    assert close(probabilities, golden[row["key"]], 1e-6)
    assert (probabilities > 0).sum() == row["nonzero"]


@pytest.mark.parametrize("row", read_json("conversation_prompts.json"))
def test_conversation_prompts(row):
    style = SeparatorStyle[row["style"]]
    conv = Conversation(row["system"], ("Human", "Assistant"), row["messages"], 2, style, row["sep"], row["sep2"])
    assert conv.get_prompt() == row["prompt"]
    assert conv.to_gradio_chatbot() == row["gradio_chatbot_offset2"]


def test_copies_share_nothing():
    conv = CONV_VISION.copy()
    conv.append_message("Human", "hi")
    assert CONV_VISION.messages == [] and conv.copy().messages is not conv.messages
    assert conv.dict()["messages"] == [["Human", "hi"]]


def test_stopping_criteria_looks_at_each_row():
    stop = StoppingCriteriaSub([torch.tensor([5]), torch.tensor([7, 8])])
    assert stop(torch.tensor([[1, 5], [7, 8], [8, 7]])).tolist() == [True, True, False]
    assert stop(torch.tensor([[8]])).tolist() == [False]


def test_seed_repeats_a_drawn_answer(chat):
    def draw(seed):
        return chat.answer(*asked(chat, "What is it?"), max_new_tokens=12, temperature=2.0, seed=seed)[1].tolist()

    assert draw(3) == draw(3)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_temperature_zero_is_greedy(chat):
    greedy = chat.answer(*asked(chat, "What is it?"), max_new_tokens=8, do_sample=False)
    assert chat.answer(*asked(chat, "What is it?"), max_new_tokens=8, temperature=0)[0] == greedy[0]


def test_conversations_in_one_batch(chat):
    questions = [("What is in the image?", 0), ("Please describe it in detail.", None), ("Why?", 2)]
    options = GenerationOptions(do_sample=False, max_new_tokens=12)
    alone = [chat.answer_batch([c], [i], options)[0] for c, i in (asked(chat, *q) for q in questions)]
    convs, images = zip(*(asked(chat, *q) for q in questions), strict=True)
    together = chat.answer_batch(convs, images, options)
    assert [text for text, _ in together] == [text for text, _ in alone]
    assert [ids.tolist() for _, ids in together] == [ids.tolist() for _, ids in alone]
    assert [conv.messages[-1] for conv in convs] == [["Assistant", text] for text, _ in alone]


def test_a_separator_in_any_spelling_ends_the_answer(chat):
    tokenizer = chat.model.llama_tokenizer
    stop = StopStringCriteria(tokenizer, "###").ends
    for text in ("###", "a dog###", "a dog.###", "a dog. ###", "a dog ####"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert stop(ids), text
    assert not any(stop(tokenizer.encode(text, add_special_tokens=False)) for text in ("a dog", "##", "# # #", "a##"))


def test_the_first_stop_ends_a_row(chat, generated):
    """The first beam of this script runs into the separator; the original generates on and cuts the text there."""
    script = next(script for script in PLAIN if script["name"] == "three_turns_beam3")
    conv, images = asked(chat, script["ops"][1][1], script["ops"][0][1])
    text, ids = chat.answer(conv, images, do_sample=False, num_beams=3, max_new_tokens=20)
    assert chat.model.llama_tokenizer.decode(ids).endswith("###") and "###" not in text
    assert len(ids) < len(script["answers"][0]["output_ids"]) and text == script["answers"][0]["output_text"]


def test_only_the_conversations_own_stop_string_ends_its_answer(chat):
    """The same prompt with another end of turns: the answer goes on as the original's, which does not know "###"."""
    script = next(script for script in PLAIN if script["name"] == "three_turns_beam3")
    conv, images = asked(chat, script["ops"][1][1], script["ops"][0][1])
    conv.sep_style, conv.sep2 = SeparatorStyle.TWO, "</s>"
    _, ids = chat.answer(conv, images, do_sample=False, num_beams=3, max_new_tokens=20)
    assert ids.tolist() == script["answers"][0]["output_ids"]


@pytest.mark.parametrize("kind", ["path", "pil", "tensor", "batch of one"])
def test_kinds_of_images(chat, kind):
    file = TINY / "images" / "model_1.png"
    pixels = chat.vis_processor(Image.open(file).convert("RGB"))
    image = {"path": file, "pil": Image.open(file), "tensor": pixels, "batch of one": pixels[None]}[kind]
    conv, images = CONV_VISION.copy(), []
    assert chat.upload_img(image, conv, images) == "Received."
    assert close(images[0], read_tensors("vision")["encode_img"][1:2], 2e-5)
    assert conv.messages == [["Human", "<Img><ImageHere></Img>"]]


def test_mistakes_are_told(chat, tmp_path):
    conv, images = asked(chat, "What is it?")
    with pytest.raises(UserError, match="<ImageHere>"):
        chat.ask("Look: <ImageHere>", conv)
    with pytest.raises(UserError, match="shows 1 images and 2 were given"):
        chat.answer(conv, images * 2)
    file = tmp_path / "no.png"
    file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no\.png"):
        chat.upload_img(str(file), conv, images)
    with pytest.raises(UserError, match=r"absent\.png"):
        chat.upload_img(str(tmp_path / "absent.png"), conv, images)
    assert len(images) == 1


def test_a_number_is_the_index_of_an_accelerator(model, monkeypatch):
    picked = []
    monkeypatch.setattr("minigpt4.common.device.pick", lambda *names: picked.append(names) or model.device)
    assert Chat(model, None, device=1).device == model.device and picked == [("auto:1",)]
