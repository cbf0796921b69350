"""The exception for mistakes that users can correct."""

import difflib
from collections.abc import Iterable

_MAX_LENGTH = 1500  # characters of a message, which may quote values of any length


class UserError(ValueError):
    """A mistake in a file, a key or a value; entry scripts print its one line without a traceback.

    Messages may quote untrusted text: line ends become spaces, control characters are escaped, and a very long message
    is shortened in the middle.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_shortened("".join(map(_printable, _shortened(message)))))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 500]} […] {text[-490:]}"


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()


def see(anchor: str) -> str:
    """Returns `` See docs/TROUBLESHOOTING.md#anchor.``, the last sentence of messages about frequent problems."""
    return f" See docs/TROUBLESHOOTING.md#{anchor}."


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
