"""A chat in the terminal, or over a pipe."""

import sys
from collections.abc import Callable

from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions

HELP = "/image PATH adds an image, /reset starts a new chat, /help shows this; an empty line or end of input quits."


def terminal_chat(
    chat: Chat,
    options: GenerationOptions,
    image: str | None = None,
    read: Callable[[str], str] = input,
    is_interactive: bool = False,
) -> None:
    """Reads questions and commands until the input ends; answers are streamed.

    Args:
        chat: answers.
        options: how.
        image: a file to start with.
        read: shows a prompt and returns the next line.
        is_interactive: whether a person types, who gets a prompt, the help and a line history.
    """
    if is_interactive:
        import readline  # noqa: F401  input() then edits lines and has a history

        sys.stdout.write(f"{HELP}\n")
    conv, images = chat.template.copy(), []
    if image:
        chat.upload_img(image, conv, images)
    while True:
        try:
            line = read("> " if is_interactive else "").strip()
        except EOFError:
            line = ""
        if not line:
            return
        command, _, argument = line.partition(" ")
        before = conv.copy(), list(images)
        try:
            if command == "/image":
                sys.stdout.write(chat.upload_img(argument.strip(), conv, images) + "\n")
            elif command == "/reset":
                conv, images = chat.template.copy(), []
            elif command == "/help":
                sys.stdout.write(f"{HELP}\n")
            else:
                chat.ask(line, conv)
                write_answer(chat, conv, images, options)
        except UserError as error:
            conv, images = before  # the chat continues without the refused question
            sys.stderr.write(f"error: {error}\n")
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # ends the answer, not the chat
        sys.stdout.flush()


def write_answer(chat: Chat, conv: Conversation, images: list[Tensor], options: GenerationOptions) -> None:
    """Streams the answer to the last question to standard output."""
    for piece in chat.stream_answer(conv, images, options=options):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
