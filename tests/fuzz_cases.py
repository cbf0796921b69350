"""How the cases of the properties in fuzz_*.py are made, and the table of these properties."""

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from minigpt4.common.errors import UserError

LLAMA = Path(__file__).parent / "golden" / "tiny" / "llama"
_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")  # gone with the process
ROOM = Path(_FOLDER.name)
IMAGE_PLACEHOLDER = "<ImageHere>"
SEEDS = st.integers(0, 2**64 - 1)
HEAD = {"model": {"arch": "mini_gpt4", "model_type": "pretrain_vicuna"}}


class Target:
    """A property of one drawn value: it returns, or raises what is wrong."""

    def __init__(self, strategy: st.SearchStrategy, check: Callable[[Any], None], share: float) -> None:
        self.strategy = strategy
        self.check = check
        self.share = share  # of all cases; slower targets get fewer


TARGETS: dict[str, Target] = {}


def target(strategy: st.SearchStrategy, share: float = 1.0) -> Callable:
    def register(check: Callable[[Any], None]) -> Callable[[Any], None]:
        TARGETS[check.__name__] = Target(strategy, check, share)
        return check

    return register


def or_told(call: Callable[[], Any]) -> Any:
    """The result of a call, or None where it was refused in one line."""
    try:
        return call()
    except UserError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) <= 1500, repr(message)
    return None


def written(name: str, data: bytes) -> Path:
    path = ROOM / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


# ---- how cases are made ----------------------------------------------------------------------------------------------

ODD = [
    b"\0",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff" * 8,
    b"-1",
    b"999999999999",
    b"{",
    b"[",
    b'"',
    b"\\ud800",
    b"null",
    b"1e999",
]


def changed(data: bytes, rng: random.Random) -> bytes:
    """Some bytes replaced, put in, taken out, doubled or cut off."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 200)), len(data) - at)
        way = rng.randrange(7)
        if way == 0:
            data = data[:at] + rng.randbytes(length) + data[at + length :]
        elif way == 1:
            data = data[:at] + bytes([byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]]) + data[at + 1 :]
        elif way == 2:
            data = data[:at] + rng.choice(ODD) + data[at + rng.choice((0, length)) :]
        elif way == 3:
            data = data[:at] + data[at + length :]
        elif way == 4:
            data = data[:at] + data[at : at + length] * rng.choice((2, 3, 100)) + data[at + length :]
        elif way == 5:
            other = rng.randrange(len(data) + 1)
            data = data[:at] + data[other : other + length] + data[at:]
        elif rng.random() < 0.3:
            data = data[:at]
    return data


def from_files(*files: bytes) -> Callable[[int], bytes]:
    def make(seed: int) -> bytes:
        rng = random.Random(seed)
        return changed(rng.choice(files), rng)

    return make


WORDS = [IMAGE_PLACEHOLDER, "</s>", "<s>", "<unk>", "###", "Human: ", " ", "a dog", "</Img>", "\n", "狗"]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from(' \t\n.!"()*#:;~aB<>/sé狗\0\ud800'), max_size=60),
    st.lists(
        st.sampled_from(
            [IMAGE_PLACEHOLDER, "</s>", "<s>", "<unk>", "###", "Human: ", " ", "a dog", "</Img>", "\n", "狗"]
        ),
        max_size=8,
    ).map("".join),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def with_seed(strategy: st.SearchStrategy) -> st.SearchStrategy:
    """Bytes of a JSON value, changed in half of the cases."""
    return st.tuples(strategy, SEEDS).map(
        lambda pair: changed(dumped(pair[0]), random.Random(pair[1])) if pair[1] % 2 else dumped(pair[0])
    )
