"""The exception for mistakes that users can correct."""

import difflib
from collections.abc import Iterable

_MAX_LENGTH = 1500  # characters of a message, which may quote values of any length


class UserError(ValueError):
    """A mistake in a file, a key or a value; entry scripts print its one line, escaped and shortened if necessary."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_shortened("".join(map(_printable, _shortened(message)))))


class ContextTooLong(UserError):
    """A question that does not fit into the language model's context beside the answer."""


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 500]} […] {text[-490:]}"


def _printable(character: str) -> str:
    escaped = " " if character.isspace() else character.encode("unicode_escape").decode()
    return character if character.isprintable() else escaped


def see(anchor: str) -> str:
    """Returns `` See docs/TROUBLESHOOTING.md#anchor.``, the last sentence of messages about frequent problems."""
    return f" See docs/TROUBLESHOOTING.md#{anchor}."


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    return "".join(
        f" Did you mean '{match}'?" for match in difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    )
