"""Questions and chats that nobody hopes for, asked of ``Chat`` itself."""

from dataclasses import replace

import pytest
from confined import told
from serving import GREEDY

from minigpt4.conversation.context import IMAGE_MESSAGE, build_context, drop_oldest_turn
from minigpt4.conversation.conversation import Conversation


def test_dropping_by_halves_drops_as_one_by_one(chat, monkeypatch):
    """The fewest turns that have to go, for any room."""
    conv = chat.template.copy()
    for i in range(12):
        if i % 4 == 0:
            conv.append_message(conv.roles[0], IMAGE_MESSAGE)
        conv.append_message(conv.roles[0], f"question {i} " * (i % 5 + 1))
        conv.append_message(conv.roles[1], f"answer {i}" if i % 3 else None)
    conv.append_message(conv.roles[0], "the last one")
    num_images = conv.get_prompt().count("<ImageHere>")

    def one_by_one(room):
        rest: Conversation = conv.copy()
        rest.append_message(rest.roles[1], None)
        while True:
            ids = [chat.model.llama_tokenizer.bos_token_id, *chat.model.tokenize_prompt(rest.get_prompt())]
            if len(ids) <= room:
                return ids
            if not drop_oldest_turn(rest):
                return None

    lengths = set()
    for room in range(40, 700, 7):
        expected = one_by_one(room)
        if expected is None:
            told(lambda room=room: build_context(chat.model, conv, num_images, room), "too long")
        else:
            assert build_context(chat.model, conv, num_images, room).ids == expected
            lengths.add(len(expected))
    assert len(lengths) > 5


@pytest.mark.parametrize("text", ["<ImageHere>", "a <ImageHere> b", "x" * 200_000])
def test_questions_that_are_refused(chat, text):
    conv, images = chat.template.copy(), []

    def ask():
        chat.ask(text, conv)
        chat.answer(conv, images, max_new_tokens=4)

    told(ask)


def test_a_temperature_near_nothing_is_the_likeliest_word(chat):
    answers = []
    for options in (GREEDY, replace(GREEDY, do_sample=True, temperature=1e-38, seed=1)):
        conv = chat.template.copy()
        chat.ask("Why?", conv)
        answers.append(chat.answer_batch([conv], [[]], options)[0][0])
    assert answers[0] == answers[1]
