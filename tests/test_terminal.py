"""The chat in the terminal, on the embedded model."""

import pytest
from serving import GREEDY, QUESTION

from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve.terminal import terminal_chat


def talk(chat, capsys, *lines):
    """What the terminal shows for lines of input."""
    feed = iter(lines)

    def read(_):
        try:
            return next(feed)
        except StopIteration:
            raise EOFError from None

    terminal_chat(chat, GREEDY, read=read)
    return capsys.readouterr()


def test_commands_and_answers(chat, capsys, scene_folder):
    shown = talk(chat, capsys, "/help", f"/image {scene_folder}/0.png", "What is at the top?", "/reset", "Yes?")
    assert "/reset" in shown.out and "Received." in shown.out and len(shown.out.splitlines()) == 4 and not shown.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image {}/2a.jpg", "2a.jpg' cannot be read as an image"),
        ("/image {}/absent.jpg", "absent.jpg"),
        ("x" * 100_000, "too long"),
        ("<ImageHere>", "cannot contain"),
    ],
)
def test_the_chat_continues_after_a_mistake(chat, capsys, scene_folder, line, message):
    shown = talk(chat, capsys, line.format(scene_folder), "你好 🙂?")
    assert message in shown.err and len(shown.err.splitlines()) == 1 and len(shown.out.splitlines()) == 1


def test_a_refused_question_and_a_reset_chat_leave_nothing(chat, capsys, scene_folder):
    image, question = f"/image {scene_folder}/0.png", QUESTION
    with_image = talk(chat, capsys, image, question).out.splitlines()[-1]
    without = talk(chat, capsys, question).out.splitlines()[-1]
    assert with_image != without
    assert talk(chat, capsys, image, "x" * 100_000, question).out.splitlines()[-1] == with_image
    assert talk(chat, capsys, image, "/reset", question).out.splitlines()[-1] == without


def test_images_of_every_kind(chat, capsys, image_kinds):
    good, bad = image_kinds
    for file in good:
        shown = talk(chat, capsys, f"/image {file}", "What is it?")
        assert shown.out.startswith("Received.") and not shown.err, file
    for file in bad:
        shown = talk(chat, capsys, f"/image {file}", "What is it?")
        assert file.name in shown.err and len(shown.err.splitlines()) == 1 and len(shown.out.splitlines()) == 1, file


@pytest.mark.parametrize(
    ("text", "stops", "final"),
    [
        ("a dog#", ["###"], "a dog"),
        ("a dog##", ["###"], "a dog"),
        ("a \ufffd", ["###"], "a"),
        ("a dog", ["###", "ogre"], "a d"),
    ],
)
def test_partial_stop_strings_are_held_back(text, stops, final):
    assert hold_back_partial_stop(text, stops) == final
