"""Turns that continue from cached keys and values: the numbers of a full prefill, at a part of the work."""

import itertools
from dataclasses import replace

import pytest
import torch
from golden_data import close, read_json, read_tensors

from minigpt4.conversation import beam_search, generation
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models.growing_cache import copy_cache, new_cache
from minigpt4.models.language_model import next_token_logits
from minigpt4.processors import Blip2ImageEvalProcessor

GREEDY = GenerationOptions(do_sample=False, max_new_tokens=12)
QUESTIONS = ("What is in the image?", "Why?", "Please describe it in detail.", "Is it old?", "And now?")
SCRIPTS = [script for script in read_json("chat.json")["scripts"] if script["note"] is None]


@pytest.fixture
def new_chat(model):
    return lambda kept: Chat(model, Blip2ImageEvalProcessor(28), num_kept_chats=kept)


def upload(chat, number, conv, images):
    chat.upload_img(read_tensors("vision")["image"][number], conv, images)


@pytest.fixture
def seen_logits(monkeypatch):
    """The logits of every forward of the LM, and how many positions each computed."""
    logits, lengths, plain = [], [], generation.next_token_logits

    def spy(llm, inputs_embeds, attention_mask, cache):
        lengths.append(inputs_embeds.shape[1])
        logits.append(plain(llm, inputs_embeds, attention_mask, cache))
        return logits[-1]

    for module in (generation, beam_search):
        monkeypatch.setattr(module, "next_token_logits", spy)
    return logits, lengths


def talk(chat, num_beams=1):
    conv, images, answers = CONV_VISION.copy(), [], []
    upload(chat, 1, conv, images)
    for i, question in enumerate(QUESTIONS):
        if i == 3:
            upload(chat, 2, conv, images)
        chat.ask(question, conv)
        answers.append(chat.answer(conv, images, do_sample=False, max_new_tokens=12, num_beams=num_beams)[1].tolist())
    return answers


@pytest.mark.parametrize("num_beams", [1, 3])
def test_same_logits_and_fewer_positions(new_chat, seen_logits, num_beams):
    logits, lengths = seen_logits
    anew = talk(new_chat(0), num_beams)
    split = len(logits)
    assert talk(new_chat(4), num_beams) == anew
    before, after = logits[:split], logits[split:]
    assert len(before) == len(after) and all(close(a, b, 1e-4) for a, b in zip(before, after, strict=True))
    assert sum(lengths[split:]) < 0.6 * sum(lengths[:split])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script["name"])
def test_scripts_give_the_same_ids_either_way(new_chat, script):
    def play(chat):
        conv, images, ids, answers = CONV_VISION.copy(), [], [], iter(script["answers"])
        for kind, what in (operation[:2] if len(operation) > 1 else (*operation, None) for operation in script["ops"]):
            if kind == "image":
                upload(chat, what, conv, images)
            elif kind == "ask":
                chat.ask(what, conv)
            else:
                arguments = next(answers)["answer_kwargs"]
                ids.append(chat.answer(conv, images, do_sample=False, **arguments)[1].tolist())
        return ids

    assert play(new_chat(4)) == play(new_chat(0))


def test_another_image_is_another_context(new_chat):
    chat, answers = new_chat(4), []
    for number in (1, 2):
        conv, images = CONV_VISION.copy(), []
        upload(chat, number, conv, images)
        chat.ask(QUESTIONS[0], conv)
        answers.append(next(chat.stream(conv, images, GREEDY)))
    system = [1, *chat.model.tokenize_prompt(CONV_VISION.get_prompt() + "Human: <Img>")]
    assert 0 < answers[1].cached_tokens <= len(system)  # they share the system text alone, and each keeps its own
    assert len(chat.prefixes) == 2


def test_the_same_question_again_prefills_its_last_token_only(new_chat):
    chat, conv, images = new_chat(4), CONV_VISION.copy(), []
    upload(chat, 1, conv, images)
    chat.ask(QUESTIONS[0], conv)
    first, again = (list(chat.stream(conv.copy(), images, GREEDY))[-1] for _ in range(2))
    assert again.ids == first.ids and again.cached_tokens == again.prompt_tokens - 1


def test_prefixes_are_used_for_their_owner_only(new_chat):
    chat, conv, images = new_chat(4), CONV_VISION.copy(), []
    upload(chat, 1, conv, images)
    chat.ask(QUESTIONS[0], conv)
    cached, ids = [], []
    for owner in ("a", "b", "", "b", "a"):
        answer = list(chat.stream(replace(conv.copy(), owner=owner), images, GREEDY))[-1]
        cached.append(answer.cached_tokens)
        ids.append(answer.ids)
    assert cached == [0, 0, 0, answer.prompt_tokens - 1, answer.prompt_tokens - 1] and ids == [ids[0]] * 5


def test_no_more_chats_are_kept_than_allowed(new_chat):
    chat = new_chat(2)
    for number in range(5):
        conv = CONV_VISION.copy()
        chat.ask(f"{number} is a number?", conv)
        chat.answer(conv, [], do_sample=False, max_new_tokens=3)
    assert len(chat.prefixes) <= 2


def test_a_stopped_answer_stays_in_the_chat_and_it_goes_on(new_chat):
    chat, conv, images = new_chat(4), CONV_VISION.copy(), []
    upload(chat, 1, conv, images)
    chat.ask(QUESTIONS[0], conv)
    answers = chat.stream(conv, images, GREEDY)
    for _ in range(3):
        text = next(answers).text
    answers.close()
    assert conv.messages[-1] == ["Assistant", text]
    chat.ask("Go on.", conv)
    cached, anew = list(chat.stream(conv.copy(), images, GREEDY)), list(new_chat(0).stream(conv, images, GREEDY))
    assert cached[-1].cached_tokens > 0 and cached[-1].ids == anew[-1].ids


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("num_forwards", [1, 4])
def test_a_failed_answer_leaves_nothing_behind(new_chat, error, num_forwards):
    """The error comes from the second layer, when the first one's cache is already longer."""
    chat, conv, images = new_chat(4), CONV_VISION.copy(), []
    upload(chat, 1, conv, images)
    chat.ask(QUESTIONS[0], conv)
    first = list(chat.stream(conv, images, GREEDY))[-1]
    chat.ask(QUESTIONS[1], conv)
    expected = list(new_chat(0).stream(conv.copy(), images, GREEDY))[-1].ids
    count = [0]

    def fail(*_):
        count[0] += 1
        if count[0] == num_forwards:
            raise error

    hook = chat.model.llama_model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        chat.answer(conv.copy(), images, do_sample=False)
    hook.remove()
    assert first.finish_reason and len(chat.prefixes) == 0
    again = list(chat.stream(conv, images, GREEDY))[-1]
    assert (again.cached_tokens, again.ids) == (0, expected)


def test_chats_that_share_a_beginning_do_not_disturb_each_other(new_chat):
    """Two take copies of the same cached system text, token by token in turns; then the first chat continues."""
    chat, convs = new_chat(4), [CONV_VISION.copy() for _ in range(3)]
    for conv, question in zip(convs, ("Please describe it. " * 20, *QUESTIONS), strict=False):
        chat.ask(question, conv)
    chat.answer(convs[0], [], do_sample=False, max_new_tokens=5)
    chat.ask("Why?", convs[0])
    expected = [list(new_chat(0).stream(conv.copy(), [], GREEDY))[-1].ids for conv in convs]
    latest = [None, None]
    for answers in itertools.zip_longest(*(chat.stream(conv, [], GREEDY) for conv in convs[1:])):
        latest = [new or old for new, old in zip(answers, latest, strict=True)]
    latest.insert(0, list(chat.stream(convs[0], [], GREEDY))[-1])
    assert [answer.ids for answer in latest] == expected
    assert all(answer.cached_tokens > 30 for answer in latest) and latest[0].cached_tokens > 100


def test_a_copy_of_a_cache_has_its_own_tensors(model):
    embeds = torch.randn(1, 6, model.llama_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    cache = new_cache()
    with torch.no_grad():
        next_token_logits(model.llama_model, embeds, torch.ones(1, 6, dtype=torch.long), cache)
    copied = copy_cache(cache, positions=slice(4))
    before = [layer.keys.clone() for layer in copied.layers]
    for layer in cache.layers:
        layer.keys.zero_()
    assert copied.get_seq_length() == 4 and cache.get_seq_length() == 6
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(copied.layers, before, strict=True))


def test_answers_grow_token_by_token(new_chat):
    chat, conv = new_chat(4), CONV_VISION.copy()
    chat.ask(QUESTIONS[0], conv)
    lengths = [(len(answer.ids), answer.finish_reason) for answer in chat.stream(conv, [], GREEDY)]
    assert [n for n, _ in lengths] == list(range(1, len(lengths) + 1))
    assert [end for _, end in lengths[:-1]] == [None] * (len(lengths) - 1) and lengths[-1][1] in ("stop", "length")


def test_rows_of_one_batch_have_their_own_options(new_chat):
    chat, convs = new_chat(0), [CONV_VISION.copy() for _ in range(3)]
    for conv in convs:
        chat.ask(QUESTIONS[0], conv)
    options = [
        GREEDY,
        GenerationOptions(do_sample=False, max_new_tokens=2),
        GenerationOptions(seed=5, temperature=2.0, max_new_tokens=12),
    ]
    alone = [chat.answer_batch([conv.copy()], [[]], option)[0] for conv, option in zip(convs, options, strict=True)]
    together = chat.answer_batch(convs, [[]] * 3, options)
    assert [ids.tolist() for _, ids in together] == [ids.tolist() for _, ids in alone]


def test_eight_bit_weights_answer_and_pass_gradients_on(build):
    model = build(low_resource=True)
    kinds = {type(layer).__name__ for layer in model.llama_model.modules()}
    assert "Int8Linear" in kinds
    x = torch.randn(2, 5, model.llama_model.config.hidden_size)
    exact, rounded = (m.llama_model.model.layers[0].mlp(x) for m in (build(), model))
    assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()
    samples = {"image": read_tensors("vision")["image"], "text_input": ["a dog"] * 3}
    losses = [m(samples)["loss"] for m in (build(), model)]
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    assert model.llama_proj.weight.grad.abs().sum() > 0
