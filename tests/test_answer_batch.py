"""Continuous batching: conversations that join and leave get the answers they get alone, at a bounded cost."""

from dataclasses import replace

import pytest
import torch
from golden_data import read_tensors

from minigpt4.common.errors import UserError
from minigpt4.conversation import answer_batch, generation
from minigpt4.conversation.answer_batch import AnswerBatch
from minigpt4.conversation.conversation import CONV_VISION, Chat
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.models import recorded_step
from minigpt4.processors import Blip2ImageEvalProcessor

GREEDY = GenerationOptions(do_sample=False, max_new_tokens=12)
SAMPLED = GenerationOptions(temperature=1.5, seed=7, max_new_tokens=12)


@pytest.fixture
def new_chat(model):
    return lambda kept=8: Chat(model, Blip2ImageEvalProcessor(28), num_kept_chats=kept)


def asked(chat, question, image=None, owner=""):
    conv, images = replace(CONV_VISION.copy(), owner=owner), []
    if image is not None:
        chat.upload_img(read_tensors("vision")["image"][image], conv, images)
    chat.ask(question, conv)
    return conv, images


def add(batch, conv, images, options=GREEDY):
    return batch.add(conv, images, batch.plan(conv, len(images), options))


def finish(batch):
    while len(batch):
        batch.step()


QUESTIONS = [
    ("What is it?", 1),
    ("Why?", None),
    ("Please describe the image in as many words as you can.", 2),
    ("Who?", 1),
]


@pytest.mark.parametrize("kept", [0, 8], ids=["no cached prefixes", "cached prefixes"])
@pytest.mark.parametrize(
    "options", [GREEDY, SAMPLED, replace(GREEDY, num_beams=3), replace(GREEDY, presence_penalty=1.0)]
)
def test_answers_are_those_that_each_conversation_gets_alone(new_chat, options, kept):
    """They join at different steps, over two turns, so that the second ones continue from cached prefixes."""
    alone, together = new_chat(0), new_chat(kept)
    batch = AnswerBatch(together)
    convs = [
        (asked(alone, *question, owner=str(i)), asked(together, *question, owner=str(i)))
        for i, question in enumerate(QUESTIONS)
    ]
    for turn in range(2):
        expected = [list(alone.stream(*own, options))[-1] for own, _ in convs]
        answers = []
        for _, other in convs:
            answers.append(add(batch, *other, options))
            for _ in range(2):
                batch.step()
        finish(batch)
        assert [answer.ids for answer in answers] == [answer.ids for answer in expected]
        assert [answer.finish_reason for answer in answers] == [answer.finish_reason for answer in expected]
        assert all((answer.cached_tokens > 0) == (kept > 0 and turn == 1) for answer in answers)
        for pair in convs:
            assert pair[0][0].messages == pair[1][0].messages and pair[1][0].messages[-1][0] == "Assistant"
            for (conv, _), chat in zip(pair, (alone, together), strict=True):
                chat.ask("And now?", conv)


@pytest.fixture
def prefilled(monkeypatch):
    """Shapes [B, t] of the LM inputs of every forward."""
    shapes, plain = [], generation.next_token_logits

    def spy(llm, embeds, mask, cache):
        shapes.append(tuple(embeds.shape[:2]))
        return plain(llm, embeds, mask, cache)

    for module in (generation, answer_batch):
        monkeypatch.setattr(module, "next_token_logits", spy)
    return shapes


def test_long_contexts_are_prefilled_in_parts_and_a_short_one_does_not_wait_for_them(new_chat, prefilled, monkeypatch):
    monkeypatch.setattr(answer_batch, "PREFILL_TOKENS", 60)
    chat, expected = new_chat(), new_chat(0)
    running, long = asked(chat, "Who?"), asked(chat, "x" * 400)
    alone = [list(expected.stream(conv.copy(), images, GREEDY))[-1].ids for conv, images in (running, long)]
    batch = AnswerBatch(chat)
    first = add(batch, *running)
    batch.step()
    prefilled.clear()
    late = add(batch, *long)
    short = add(batch, *asked(chat, "Why?"))
    grown = [batch.step() for _ in range(4)]  # parts of contexts and tokens in turns
    assert grown == [[first], [], [first], [short]] and not late.ids
    finish(batch)
    assert [first.ids, late.ids] == alone and max(t for _, t in prefilled) <= 60


def test_short_contexts_are_prefilled_together(new_chat, prefilled):
    chat = new_chat()
    batch = AnswerBatch(chat)
    for question, image in QUESTIONS:
        add(batch, *asked(chat, question, image))
    assert len(batch.step()) == 4
    assert [rows for rows, length in prefilled if length > 1] == [4]


def test_the_shared_beginning_is_computed_again_where_a_longer_context_joins_beside_it(new_chat, prefilled):
    """The prefilled block is as long as its longest row, so that no row has padding in its middle."""
    chat = new_chat()
    old = asked(chat, "What is it?", 1)
    list(chat.stream(*old, GREEDY))
    chat.ask("Why?", old[0])
    alone = list(new_chat(0).stream(old[0].copy(), old[1], GREEDY))[-1].ids
    prefilled.clear()
    batch = AnswerBatch(chat)
    answer = add(batch, *old)
    add(batch, *asked(chat, "Please describe the image.", 2))
    batch.step()
    longest = prefilled[0][1]
    assert prefilled[0][0] == 2 and answer.cached_tokens > answer.prompt_tokens - longest
    finish(batch)
    assert answer.ids == alone


def test_questions_about_one_image_share_what_comes_before_them(new_chat, prefilled):
    """Prefilled once for each image and owner; an image that was seen before is in the prefix of its chat."""
    alone, together, texts = new_chat(0), new_chat(0), ("What is it?", "Who?", "Why?", "Is there a car in the image?")
    questions = [(text, image, owner) for image, owner in ((1, "a"), (2, "a"), (2, "b")) for text in texts]
    expected = [list(alone.stream(*asked(alone, *question), GREEDY))[-1].ids for question in questions]
    prefilled.clear()
    batch = AnswerBatch(together)
    answers = [add(batch, *asked(together, *question)) for question in questions]
    finish(batch)
    assert [answer.ids for answer in answers] == expected and not any(answer.cached_tokens for answer in answers)
    num_all = sum(answer.prompt_tokens for answer in answers)
    assert sum(rows * positions for rows, positions in prefilled if positions > 1) < 0.7 * num_all


def test_room_is_what_the_longest_rows_may_need_to_their_end(new_chat):
    chat = new_chat()
    batch = AnswerBatch(chat, max_tokens=200)
    plans = [
        batch.plan(*((conv, len(images))), GREEDY)
        for conv, images in (asked(chat, "Who?"), asked(chat, "Why is it?" * 3))
    ]
    short, long = plans
    assert short.num_tokens == len(short.context.ids) + 12 < long.num_tokens
    assert batch.has_room([replace(long, options=replace(GREEDY, max_new_tokens=5000))])  # nothing else is answered
    batch.max_tokens = 2 * long.num_tokens
    assert batch.has_room([short, long]) and not batch.has_room([short, short, long])
    add(batch, *asked(chat, "Who?"))
    assert batch.has_room([long])
    batch.max_tokens -= 1
    assert batch.has_room([short]) and not batch.has_room([long])


def test_answers_are_shortened_where_the_server_wants_it(new_chat):
    chat, options = new_chat(), replace(GREEDY, max_new_tokens=1024)
    conv, images = asked(chat, "What is it?", 1)
    length = len(AnswerBatch(chat).plan(conv, 1, GREEDY).context.ids)
    with pytest.raises(UserError, match="too long"):
        AnswerBatch(chat, max_length=length + 30).plan(conv, 1, options)
    batch = AnswerBatch(chat, max_length=length + 30, shortens_answers=True)
    assert batch.plan(conv, 1, options).options.max_new_tokens == 30
    assert batch.plan(conv, 1, GREEDY).options.max_new_tokens == 12
    answer = add(batch, conv, images, replace(options, min_length=1000))
    finish(batch)
    assert len(answer.ids) == 30 and answer.finish_reason == "length"
    with pytest.raises(UserError, match="too long"):
        AnswerBatch(chat, max_length=length, shortens_answers=True).plan(*asked(chat, "What is it?", 1)[:1], 1, options)


def test_turns_are_left_out_for_a_usual_answer_only(new_chat, monkeypatch):
    monkeypatch.setattr(answer_batch, "NUM_USUAL_TOKENS", 20)
    chat = new_chat()
    conv, _ = asked(chat, "What is it?")
    conv.append_message("Assistant", "A dog.")
    chat.ask("Why?", conv)
    options = replace(GREEDY, max_new_tokens=1000)
    whole = len(AnswerBatch(chat).plan(conv, 0, GREEDY).context.ids)
    for max_length, num_dropped, room in ((whole + 20, 0, 20), (whole + 19, 1, None)):
        plan = AnswerBatch(chat, max_length, shortens_answers=True).plan(conv, 0, options)
        assert plan.context.num_dropped_turns == num_dropped
        assert plan.options.max_new_tokens == (room or max_length - len(plan.context.ids))


def test_no_part_of_the_last_question_is_left_out(new_chat):
    """A text, an image and a text that follow the last answer are one question, which is too long as a whole."""
    chat = new_chat()
    conv, images = asked(chat, "word " * 100)
    chat.upload_img(read_tensors("vision")["image"][1], conv, images)
    chat.ask("What is it?", conv)
    with pytest.raises(UserError, match="too long"):
        AnswerBatch(chat, max_length=200, shortens_answers=True).plan(conv, 1, GREEDY)
    conv.append_message("Assistant", "A dog.")
    chat.ask("Why?", conv)
    plan = AnswerBatch(chat, max_length=200, shortens_answers=True).plan(conv, 1, GREEDY)
    assert plan.context.num_dropped_turns == 1 and plan.context.ids.count(-1) == images[0].shape[1]


def test_what_cannot_fit_is_not_tokenized(new_chat, model, monkeypatch):
    chat, lengths, plain = new_chat(), [], model.tokenize_prompt
    monkeypatch.setattr(model, "tokenize_prompt", lambda text: (lengths.append(len(text)), plain(text))[1])
    conv, _ = asked(chat, "book " * 100_000)
    with pytest.raises(UserError, match="at least") as error:
        AnswerBatch(chat, shortens_answers=True).plan(conv, 0, GREEDY)
    assert "too long" in str(error.value) and lengths == []
    conv.append_message("Assistant", "A book.")
    chat.ask("Why?", conv)
    assert AnswerBatch(chat, shortens_answers=True).plan(conv, 0, GREEDY).context.num_dropped_turns == 1
    assert max(lengths) < 1000


def test_removed_answers_keep_what_they_have_and_their_chat_is_cached(new_chat):
    chat = new_chat()
    batch = AnswerBatch(chat)
    (conv, images), other = asked(chat, "What is it?", 1), asked(chat, "Who?")
    answer, kept = add(batch, conv, images), add(batch, *other)
    for _ in range(3):
        batch.step()
    batch.remove(answer)
    assert conv.messages[-1] == ["Assistant", answer.text] and len(answer.ids) == 3 and len(batch) == 1
    never = add(batch, *asked(chat, "Where?"))
    batch.remove(never)
    finish(batch)
    assert never.ids == [] and kept.ids == list(new_chat(0).stream(*asked(chat, "Who?"), GREEDY))[-1].ids
    chat.ask("Why?", conv)
    again = list(chat.stream(conv, images, GREEDY))[-1]
    assert again.cached_tokens > 0.5 * again.prompt_tokens


def test_a_failure_ends_all_answers_and_the_batch_can_be_used_again(new_chat, monkeypatch):
    chat = new_chat()
    batch, (conv, images) = AnswerBatch(chat), asked(chat, "What is it?", 1)
    add(batch, conv, images)
    batch.step()
    with monkeypatch.context() as patch:
        for module in (generation, recorded_step):
            patch.setattr(module, "next_token_logits", lambda *_: torch.zeros(1).new_empty(-1))
        with pytest.raises(RuntimeError):
            batch.step()
    assert len(batch) == 0 and len(chat.prefixes) == 0 and conv.messages[-1][0] == "Assistant"
    answer = add(batch, *asked(chat, "Who?"))
    finish(batch)
    assert answer.ids == list(new_chat(0).stream(*asked(chat, "Who?"), GREEDY))[-1].ids
