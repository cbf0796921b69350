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
    """Streams answers to questions and runs commands until the input ends.

    ``image`` is a file to start with; ``read`` shows a prompt and returns the next line. With ``is_interactive``, there
    are a prompt, the help and a line history.
    """
    if is_interactive:
        import readline  # noqa: F401  input() then edits lines and has a history

        print(HELP)
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
                print(chat.upload_img(argument.strip(), conv, images), flush=True)
            elif command == "/reset":
                conv, images = chat.template.copy(), []
            elif command == "/help":
                print(HELP, flush=True)
            else:
                chat.ask(line, conv)
                write_answer(chat, conv, images, options)
        except UserError as error:
            conv, images = before  # the chat continues without the refused question
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(flush=True)  # ends the answer, not the chat


def write_answer(chat: Chat, conv: Conversation, images: list[Tensor], options: GenerationOptions) -> None:
    """Streams the answer to the last question to standard output."""
    for piece in chat.stream_answer(conv, images, options=options):
        print(piece, end="", flush=True)
    print(flush=True)
