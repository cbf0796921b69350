"""Small things without a better home."""

from datetime import datetime


def now() -> str:
    """The present minute as a job id, YYYYMMDDHHMMSS, local time."""
    return datetime.now().strftime("%Y%m%d%H%M%S")
