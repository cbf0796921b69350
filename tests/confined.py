"""What the tests of hostile input share: bounds of time, memory and disk, and what a refusal has to look like."""

import os
import resource
import signal

import pytest

from minigpt4.common.errors import UserError

SECONDS = 20
BYTES = 3 * 2**29  # beyond what the process has when a test begins


class Hangs(BaseException):
    """Past everything that catches an Exception, as the readers do with those of the libraries below them."""


def bounded(seconds=SECONDS):
    """Ends what hangs by ``Hangs`` and what takes too much memory by a MemoryError; a generator for fixtures."""

    def stop(*_):
        raise Hangs(f"still at it after {seconds} s")

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def time_limit():
    """Ends a test that hangs."""

    def stop(*_):
        raise Hangs("still at it after 60 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def confined(tmp_path_factory, monkeypatch):
    """A test within bounds, in a folder beside which and in which nothing may be written."""
    outer = tmp_path_factory.mktemp("outer")
    (outer / "inner").mkdir()
    monkeypatch.chdir(outer / "inner")
    yield from bounded()
    assert [path.name for path in outer.rglob("*")] == ["inner"], "something was written"


def told(call, *words):
    """The message with which a call is refused: a UserError of one line of bounded length that has the words."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert message.isprintable() and len(message) <= 1500, message
    assert not [word for word in words if word not in message], message
    return message
