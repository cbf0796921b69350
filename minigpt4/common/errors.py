"""The one exception for what a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a file, a key or a value, told in one message; entry scripts print it without a traceback."""


def see(anchor: str) -> str:
    """Returns `` See docs/TROUBLESHOOTING.md#anchor.``, the end of messages about what users meet most."""
    return f" See docs/TROUBLESHOOTING.md#{anchor}."


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
