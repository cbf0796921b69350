"""The one exception for what a user can mend."""

import difflib
from collections.abc import Iterable

_LONGEST = 1500  # characters of a message; what is quoted in it may be of any length


class UserError(ValueError):
    """A mistake in a file, a key or a value, told in one line; entry scripts print it without a traceback.

    What a message quotes may come from anybody: line ends become spaces, control characters are written out, and the
    middle of a very long one is left out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_shortened("".join(map(_shown, _shortened(message)))))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 500]} […] {text[-490:]}"


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() else character.encode("unicode_escape").decode()


def see(anchor: str) -> str:
    """Returns `` See docs/TROUBLESHOOTING.md#anchor.``, the end of messages about what users meet most."""
    return f" See docs/TROUBLESHOOTING.md#{anchor}."


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
