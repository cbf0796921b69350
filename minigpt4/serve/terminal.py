"""A chat in the terminal, or over a pipe."""

import sys
from collections.abc import Callable

from torch import Tensor

from minigpt4.common.errors import UserError
from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.conversation.generation import GenerationOptions
from minigpt4.conversation.stopping import hold_back_partial_stop

HELP = "/image PATH shows a picture, /reset starts anew, /help tells this, an empty line or end of input leaves."


def terminal_chat(
    chat: Chat,
    options: GenerationOptions,
    picture: str | None = None,
    read: Callable[[str], str] = input,
    is_person: bool = False,
) -> None:
    """Reads questions and commands until the input ends; answers appear word by word.

    Args:
        chat: answers.
        options: how.
        picture: a file to start with.
        read: gives the next line, from the prompt that it is to show.
        is_person: whether somebody types, who gets a prompt, help and a line history.
    """
    if is_person:
        import readline  # noqa: F401  input() then edits lines and has a history

        sys.stdout.write(f"{HELP}\n")
    conv, images = chat.template.copy(), []
    if picture:
        chat.upload_img(picture, conv, images)
    while True:
        try:
            line = read("> " if is_person else "").strip()
        except EOFError:
            return
        if not line:
            return
        command, _, rest = line.partition(" ")
        before = conv.copy(), list(images)
        try:
            if command == "/image":
                sys.stdout.write(chat.upload_img(rest.strip(), conv, images) + "\n")
            elif command == "/reset":
                conv, images = chat.template.copy(), []
            elif command == "/help":
                sys.stdout.write(f"{HELP}\n")
            else:
                chat.ask(line, conv)
                write_answer(chat, conv, images, options)
        except UserError as error:
            conv, images = before  # a refused question leaves no trace in the chat
            sys.stderr.write(f"error: {error}\n")
        except KeyboardInterrupt:
            sys.stdout.write("\n")  # the answer stops, the chat goes on
        sys.stdout.flush()


def write_answer(chat: Chat, conv: Conversation, images: list[Tensor], options: GenerationOptions) -> None:
    """Writes the answer to the last question to standard output as it grows."""
    written = ""
    for answer in chat.stream(conv, images, options):
        shown = hold_back_partial_stop(answer.text, [conv.stop_string]) if answer.finish_reason is None else answer.text
        if shown.startswith(written):
            sys.stdout.write(shown[len(written) :])
            sys.stdout.flush()
            written = shown
    sys.stdout.write("\n")
