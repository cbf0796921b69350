"""The chat in the terminal, on the embedded model."""

import re
import shlex

import pytest
from serving import GREEDY, QUESTION

from minigpt4.conversation.stopping import hold_back_partial_stop
from minigpt4.serve.terminal import parse_path, terminal_chat


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
    assert "/reset" in shown.out and "Received." in shown.out and len(shown.out.splitlines()) == 6 and not shown.err
    assert "New chat." in shown.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image {}/2a.jpg", "2a.jpg' cannot be read as an image"),
        ("/image {}/absent.jpg", "absent.jpg' cannot be read as an image (there is no such file)."),
        ("x" * 100_000, "too long"),
        ("<ImageHere>", "cannot contain"),
        ("/imge {}/0.png", "There is no command /imge. Did you mean '/image'?"),
        ("/what?", "There is no command /what?. To ask a question with this beginning, write //what?"),
        ("{}/0.png", "To add this file, write /image /"),
        ("/reset now", "write /reset without 'now'"),
        ("/quit it", "write /quit without 'it'"),
        ("/image", "/image needs a file"),
        ("/image  ", "/image needs a file"),
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


@pytest.mark.parametrize("line", ["//proc?", "//", "// x"])
def test_a_question_may_begin_with_a_slash(chat, capsys, monkeypatch, line):
    asked, ask = [], chat.ask
    monkeypatch.setattr(chat, "ask", lambda text, conv: asked.append(text) or ask(text, conv))
    shown = talk(chat, capsys, line, "a/b?")
    assert asked == [line[1:], "a/b?"] and len(shown.out.splitlines()) == 2 and not shown.err


def test_blank_lines_are_ignored_and_quit_ends_the_chat(chat, capsys):
    shown = talk(chat, capsys, "", "  ", "Why?", "", "What?", "/quit", "Who?")
    assert len(shown.out.splitlines()) == 2 and not shown.err


def test_paths_as_typed_or_dragged(chat, capsys, scene_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["a b.png", "it's.png", 'say "hi".png', "back\\slash.png", "你好 🙂.png", "a#b.png", "100%.png"]
    for name in names:
        (tmp_path / name).write_bytes((scene_folder / "0.png").read_bytes())
    for name in names:
        path = str(tmp_path / name)
        typed = [
            path,
            f"~/{name}",
            f"  {path}  ",
            shlex.quote(path),
            shlex.quote(path) + " ",
            re.sub(r"(\W)", r"\\\1", path),
        ]
        for text in [*typed, tmp_path.joinpath(name).as_uri()]:
            assert parse_path(text) == path, text
        assert talk(chat, capsys, f"/image {shlex.quote(path)}").out == "Received.\n"
    assert parse_path("it's absent.png") == "it's absent.png" and parse_path("a\0b") == "a\0b"


def interrupting(chat, monkeypatch, after):
    """Makes Ctrl-C arrive in the first answer, after this many pieces of its text."""
    stream, count = chat.stream_answer, []

    def hooked(*arguments, **options):
        pieces = stream(*arguments, **options)
        count.append(1)
        for number, piece in enumerate(pieces):
            if number == after and len(count) == 1:
                pieces.close()
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(chat, "stream_answer", hooked)


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupted_answer_ends_and_the_chat_continues(chat, capsys, scene_folder, monkeypatch, after):
    image = f"/image {scene_folder}/0.png"
    plain = talk(chat, capsys, image, QUESTION).out.splitlines()
    interrupting(chat, monkeypatch, after)
    shown = talk(chat, capsys, image, QUESTION, "/reset", image, QUESTION).out.splitlines()
    assert shown[0] == shown[3] == "Received." and shown[4] == plain[1] and plain[1].startswith(shown[1])


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
