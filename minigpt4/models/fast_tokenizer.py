"""Fast tokenizers, which are written in Rust: their panics become errors, and what would abort the process is refused.

An allocation that fails in Rust ends the process, so a pipeline whose text may grow without bounds is refused before it
is built.
"""

import base64
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from minigpt4.common.errors import UserError
from minigpt4.common.utils import read_json_object

MAX_GROWTH = 100  # of a text in characters; usual tokenizers have 1 to 20
# Growth by kind of step: what Unicode's forms do to the worst character, and spaces around each character.
_GROWTHS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12, "ByteLevel": 4}
_GROWTHS |= {"BPEDecoder": 2, "CTC": 2}
_DIRECTIONS = (("normalizer", "pre_tokenizer"), ("decoder",))  # of a text, and of tokens
_TRIAL = "A trial of 12 words:\n\t\xe9 \u4e2d\u6587 \U0001f600 <s> </s>"


def load(folder: Path, key: str) -> Any:
    """Loads the tokenizer of a folder without tokenizer.model; ``key`` names the folder in messages."""
    config = read_json_object(folder / "tokenizer_config.json", key)
    for name in {"tokenizer.json", *map(str, config.get("fast_tokenizer_files") or ())}:
        content = read_json_object(folder / name, key)
        growth = max(max_growth([content.get(section) for section in sections]) for sections in _DIRECTIONS)
        if growth > MAX_GROWTH:
            problem = f"{folder / name} may make a text {growth:.3g} times longer; at most {MAX_GROWTH} is accepted"
            raise UserError(f"{key}: {problem}. Take the tokenizer files of another source.")
    with _panics_as_errors(folder, key):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    methods = ("__call__", "decode", "batch_decode")
    guarded = {name: _guard(getattr(type(tokenizer), name), folder, key) for name in methods}
    tokenizer.__class__ = type(type(tokenizer).__name__, (type(tokenizer),), guarded)
    tokenizer.decode(tokenizer(_TRIAL, add_special_tokens=False).input_ids)
    return tokenizer


def max_growth(part: Any) -> float:
    """The most by which the steps of a pipeline, or of a part of it, make a text longer."""
    if isinstance(part, list):
        return functools.reduce(lambda product, value: product * max_growth(value), part, 1.0)
    if not isinstance(part, dict):
        return 1.0
    kind, own = part.get("type"), 1
    if kind == "Replace":
        literal, length = part["pattern"].get("String"), len(part["content"])
        own = length / len(literal) if literal else 1 + length  # a regular expression may match between characters
    elif kind == "Prepend":
        own = 1 + len(part["prepend"])
    elif kind == "Precompiled":
        data = base64.b64decode(part["precompiled_charsmap"])
        replacements = data[4 + int.from_bytes(data[:4], "little") :]  # behind a trie and its size
        own = max(map(len, replacements.split(b"\0")))
    return max(own, _GROWTHS.get(kind, 1.0)) * max_growth([value for value in part.values() if isinstance(value, list)])


@contextlib.contextmanager
def _panics_as_errors(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:  # a panic is no Exception, and its class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        cause = str(error).split("\n")[0][:200]
        raise UserError(f"{key}: the tokenizer in {folder} panicked ({cause}); copy its files again.") from error


def _guard(method: Callable[..., Any], folder: Path, key: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _panics_as_errors(folder, key):
            return method(*args, **kwargs)

    return call
