"""A chat in the terminal, or over a pipe."""

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import unquote

from torch import Tensor

from minigpt4.common.errors import UserError, nearest
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions

COMMANDS = ("/image", "/reset", "/help", "/quit")
HELP = """/image PATH adds an image, /reset starts a new chat, /help shows this, /quit or Ctrl-D ends the program.
Ctrl-C ends an answer. A question that begins with a slash is written with two."""


def terminal_chat(
    chat: Chat,
    options: GenerationOptions,
    image: str | None = None,
    read: Callable[[str], str] = input,
    is_interactive: bool = False,
) -> None:
    """Streams answers to questions and runs commands until the input ends; blank lines are ignored.

    ``image`` is a file to start with; ``read`` shows a prompt and returns the next line. With ``is_interactive``, there
    are a prompt and the help, and Ctrl-C discards a line instead of ending the chat.
    """
    session = _Session(chat, options)
    if is_interactive:
        print(HELP)
    if image:
        chat.upload_img(image, session.conv, session.images)
    while True:
        try:
            session.reply(read("> " if is_interactive else "").strip())
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt, or again while the first one ends an answer
            if not is_interactive:
                raise


class _Session:
    """A conversation and its images [1, Q, L]."""

    def __init__(self, chat: Chat, options: GenerationOptions) -> None:
        self.chat, self.options = chat, options
        self.reset()

    def reset(self) -> None:
        self.conv, self.images = self.chat.template.copy(), []

    def reply(self, line: str) -> None:
        """Prints the answer to a question, or what a command or a mistake gives; KeyboardInterrupt ends an answer."""
        before = self.conv.copy(), list(self.images)
        try:
            self._run(line)
        except UserError as error:
            self.conv, self.images = before  # the chat continues without the refused question
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if len(self.conv.messages) and self.conv.messages[-1][0] == self.conv.roles[0]:
                self.conv, self.images = before  # the answer had not begun
            print(flush=True)

    def _run(self, line: str) -> None:
        command, argument = (*line.split(maxsplit=1), "", "")[:2]
        if command == "/image":
            if not argument:
                raise UserError("/image needs a file: /image PATH.")
            print(self.chat.upload_img(parse_path(argument), self.conv, self.images), flush=True)
        elif command in ("/reset", "/help", "/quit") and argument:
            raise UserError(f"{command} stands alone: write {command} without '{argument}'.")
        elif command == "/reset":
            self.reset()
            print("New chat.", flush=True)
        elif command == "/help":
            print(HELP, flush=True)
        elif command == "/quit":
            raise EOFError
        elif line.startswith("/") and not line.startswith("//"):
            if os.path.isfile(parse_path(line)):
                raise UserError(f"There is no command {command}. To add this file, write /image {line}")
            advice = f"{nearest(command, COMMANDS)} To ask a question with this beginning, write /{line}"
            raise UserError(f"There is no command {command}.{advice}")
        elif line:
            self.chat.ask(line.removeprefix("/"), self.conv)
            write_answer(self.chat, self.conv, self.images, self.options)


def parse_path(text: str) -> str:
    """The path that a user types or drags into a terminal: plain, with ``~``, as a shell writes it, or a file URL."""
    text = text.strip()
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    elif not os.path.exists(os.path.expanduser(text)):  # which may have spaces
        with suppress(ValueError):  # such as an apostrophe without a second one
            if len(words := shlex.split(text)) == 1:
                text = words[0]
    return os.path.expanduser(text)


def write_answer(chat: Chat, conv: Conversation, images: list[Tensor], options: GenerationOptions) -> None:
    """Streams the answer to the last question to standard output."""
    for piece in chat.stream_answer(conv, images, options=options):
        print(piece, end="", flush=True)
    print(flush=True)
