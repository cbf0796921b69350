"""The chat in an interactive terminal: demo.py behind a pseudo-terminal, and the line editor by itself."""

import os
import pty
import re
import select
import signal
import termios
import time
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from minigpt4.serve.line_editor import history_path, line_editor

ROOT = Path(__file__).parents[1]


class Terminal:
    """demo.py --terminal behind a pseudo-terminal; it uses an untrained projection."""

    def __init__(self, programs, home, *arguments):
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (40, 200))
        options = ["--options", "model.ckpt=null", "run.device=cpu"]
        command = ["demo.py", "--cfg-path", "eval_configs/quickstart_eval.yaml", "--terminal", *arguments, *options]
        environment = {"XDG_STATE_HOME": str(home), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.programs, files = programs, 3 * [os.ttyname(self.slave)]
        self.pid = programs.start(command, files, is_session=True, **environment)  # so that Ctrl-C is a SIGINT
        self.text = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, pattern, seconds=60):
        """Returns the output up to a pattern, which the next call does not find again."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end and self._read(), (pattern, self.text)
        found, self.text = self.text[: match.end()], self.text[match.end() :]
        return found

    def _read(self):
        if not select.select([self.master], [], [], 1)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # the process has ended
            return False
        self.text += re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\x1b[=>]|\r", "", data.decode(errors="replace"))
        return bool(data)

    def wait(self, seconds=30):
        """The exit status."""
        status = self.programs.wait(self.pid, seconds)
        self.pid = self.pid if status is None else None
        return status

    def close(self):
        if self.pid and self.wait(0) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self.slave)
        os.close(self.master)


@pytest.fixture
def terminal(programs, tmp_path):
    opened = []

    def open_terminal(*arguments):
        opened.append(Terminal(programs, tmp_path / "state", *arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_chat_in_a_terminal(terminal, scene_folder, tmp_path):
    image = tmp_path / "my image.png"
    image.write_bytes((scene_folder / "0.png").read_bytes())
    shown = terminal("--max-new-tokens", "1900", "--temperature", "2", "--top-p", "1")
    shown.wait_for(r"/quit or Ctrl-D(.|\n)*\n>")
    shown.type("half a line\x03")  # Ctrl-C
    shown.wait_for("half a line(.|\n)*\n>")
    shown.type(f"/im\t {tmp_path}/my\t\r")
    shown.wait_for(r"Received\.\n")
    shown.type("/imge x.png\r")
    shown.wait_for(r"error: There is no command /imge. Did you mean '/image'\?")
    shown.type("\r\r")
    shown.type("What is it?\r")
    shown.wait_for(r"What is it\?\n+\S")  # the answer, whose end is unlikely before 1,900 random tokens
    shown.type("\x03")
    shown.wait_for("\n>")
    shown.type("\x03\x03//\x03")
    shown.type("\x04")  # Ctrl-D
    assert shown.wait() == 0
    history = (tmp_path / "state" / "minigpt4" / "terminal_history").read_text(encoding="utf-8")
    assert "+What is it?" in history and f"+/image {image}" in history and "half" not in history


def edit(*keys):
    """What the line editor returns for keys."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        read, lines = line_editor(), []
        for text in keys:
            pipe.send_bytes(text.encode(errors="surrogateescape"))
            try:
                lines.append(read("> "))
            except (EOFError, KeyboardInterrupt) as end:
                lines.append(type(end))
        return lines


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_completion(state, monkeypatch):
    (state / "only one.png").touch()
    monkeypatch.setenv("HOME", str(state))
    lines = edit("/im\t\r", "/r\t\r", f"/image {state}/on\t\r", "/image ~/on\t\r", "plain\t\r")
    expected = ["/image", "/reset", f"/image {state}/only one.png", "/image ~/only one.png", "plain"]
    assert lines == expected


def test_history_is_kept_and_private(state):
    assert edit("first\r", "secret \u4f60\u597d\r") == ["first", "secret \u4f60\u597d"]
    assert history_path() == state / "state" / "minigpt4" / "terminal_history"
    assert history_path().stat().st_mode & 0o777 == 0o600
    up = "\x1b[A"
    assert edit(f"{up}\r", f"{up}{up}\r") == ["secret \u4f60\u597d", "first"]


def test_ends(state):
    assert edit("half\x03", "\x04", "a\udcffb\r") == [KeyboardInterrupt, EOFError, "a?b"]


def test_a_history_that_cannot_be_written(state, caplog):
    (state / "state").write_text("")
    assert edit("first\r", "\x1b[A\r") == ["first", "first"]
    assert "history is not kept" in caplog.text
