"""The prompt of an interactive terminal: line editing, completion, and a history that outlives the program."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle

from minigpt4.serve.terminal import COMMANDS


class CommandCompleter(Completer):
    """Completes commands, and paths after ``/image``."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Returns the continuations of the text before the cursor."""
        text = document.text_before_cursor
        if text.startswith("/image "):
            path = text.removeprefix("/image ").lstrip()
            yield from PathCompleter(expanduser=True).get_completions(Document(path, len(path)), complete_event)
        elif text.startswith("/"):
            yield from (Completion(command, -len(text)) for command in COMMANDS if command.startswith(text))


class _History(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(OSError, UnicodeError):  # such as a full disk: the chat continues without this line
            super().store_string(string)


def history_path() -> Path:
    """The file of the lines of earlier chats, in the user's folder for such files (XDG)."""
    folder = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(folder) / "minigpt4" / "terminal_history"


def line_editor() -> Callable[[str], str]:
    """A function that shows a prompt and returns a line; EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # questions may be private
        with path.open("ab"):
            history = _History(str(path))
    except OSError as error:
        logging.warning("The history is not kept: %s cannot be written (%s).", path, error.strerror)
        history = InMemoryHistory()
    style = CompleteStyle.READLINE_LIKE
    session = PromptSession(
        history=history, completer=CommandCompleter(), complete_style=style, complete_while_typing=False
    )
    # Bytes that are not UTF-8 arrive as half surrogate pairs.
    return lambda prompt: session.prompt(prompt).encode(errors="replace").decode()
