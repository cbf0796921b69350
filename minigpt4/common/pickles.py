"""Checks the pickles of torch's files before they are unpickled, so that a small file cannot take much memory or time.

``torch.load(weights_only=True)`` runs no code of a file, but it calls classes that allocate any number of bytes
(``bytearray``, tensors, storages) and believes the sizes that a file names. ``check`` interprets the opcodes without
creating their objects, and accepts what state dicts and checkpoints consist of: plain values, lists, tuples, dicts with
plain keys, and tensors within storages that are no larger than the file. ``load_plain`` reads pickles of plain values,
as annotation files are.
"""

import io
import mmap
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUM_ITEMS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "APPEND": 1}  # the others take all after a mark
_TENSOR_FUNCTIONS = tuple(f"torch._utils _rebuild_{name}" for name in ("tensor", "tensor_v2", "parameter"))
_STORAGE_TYPE = re.compile(r"torch \w+Storage")
_NUM_LEGACY_PICKLES = 5  # of a file from before torch 1.6: magic number, version, system, content, order of storages
_MAX_BUILDS = 100  # each copies a dict into attributes; a state dict has one, for the versions of its modules
_PLAIN = (str, int, float, bool, type(None))
_DICT, _LIST, _TENSOR = object(), object(), object()
_PLAIN_OPCODE = re.compile(
    "PROTO|FRAME|STOP|MARK|NONE|NEWTRUE|NEWFALSE|(BIN)?(INT|FLOAT|STRING|UNICODE|PUT|GET|BYTES)8?|BININT[12]|LONG[14]?"
    "|SHORT_BIN(STRING|UNICODE|BYTES)|LONG_BIN(PUT|GET)|MEMOIZE|(EMPTY_)?(LIST|DICT|TUPLE)|TUPLE[123]|(APPEND|SETITEM)S?"
)


class _Global(NamedTuple):
    name: str  # module and name of a function or class


class _Storage(NamedTuple):
    num_elements: int


def check(path: Path) -> bool:
    """Returns whether a file of ``torch.save`` is a zip archive; raises an exception if it holds other things."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's own criterion
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                for _ in range(_NUM_LEGACY_PICKLES):
                    _Interpreter(num_bytes).run(content)
            return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        pickles = [member for member in members if member.filename.lower().endswith("/data.pkl")]
        # torch's own reader of archives may choose another member where there are two, or where the zip begins later.
        is_ambiguous = len({member.filename.lower() for member in members}) < len(members) or len(pickles) != 1
        if is_ambiguous or min(member.header_offset for member in members) > 0:
            raise ValueError("it is no archive as torch writes it")
        if sum(member.file_size for member in members) > num_bytes:  # torch does not compress
            raise ValueError("it unpacks to more than it holds")
        _Interpreter(num_bytes).run(io.BytesIO(archive.read(pickles[0])))
    return True


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it holds {module}.{name}, which is code")


def load_plain(path: Path) -> Any:
    """Returns the texts, numbers, lists and dicts of a pickle, of Python 2, too; nothing in it is executed.

    Raises ValueError if it holds anything else, such as classes and functions, which pickles may call; other exceptions
    if it is damaged.
    """
    content = path.read_bytes()
    for opcode, argument, _ in pickletools.genops(content):
        if not _PLAIN_OPCODE.fullmatch(opcode.name):
            name = str(argument).replace(" ", ".") if opcode.name in ("GLOBAL", "INST") else f"the opcode {opcode.name}"
            raise ValueError(f"it holds {name}, which is code")
        if opcode.name.endswith("PUT") and int(argument) > len(content):  # the memo would get as many entries
            raise ValueError("it is damaged")
    return _PlainUnpickler(io.BytesIO(content), encoding="utf-8", errors="replace").load()


class _Interpreter:
    """A pickle machine with placeholders for objects; all storages together may have ``max_elements``."""

    def __init__(self, max_elements: int) -> None:
        self.num_left, self.num_builds = max_elements, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, content: Any) -> None:
        """Interprets the next pickle of a file-like object."""
        for opcode, argument, _ in pickletools.genops(content):
            self._step(opcode.name, argument)

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES or name in _CONSTANTS:
            stack.append(argument if name in _VALUES else _CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append(_DICT if name == "EMPTY_DICT" else _LIST)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name.startswith("TUPLE"):
            items = self._pop(name)
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            self._pop(name)
            _expect(stack[-1] is _LIST, name)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop(name)
            _expect(stack[-1] is _DICT and all(map(_is_plain_key, items[::2])), "a dict with odd keys")
        elif name == "GLOBAL":
            is_known = argument in ("collections OrderedDict", *_TENSOR_FUNCTIONS) or _STORAGE_TYPE.fullmatch(argument)
            _expect(is_known, argument.replace(" ", "."))
            stack.append(_Global(argument))
        elif name == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function.name, *arguments))
        elif name == "BUILD":
            stack.pop()
            self.num_builds += 1
            _expect(stack[-1] is _DICT and self.num_builds <= _MAX_BUILDS, "attributes")
        else:
            _expect(name in ("PROTO", "STOP"), f"the opcode {name}")

    def _pop(self, name: str) -> list[Any]:
        start = len(self.stack) - _NUM_ITEMS[name] if name in _NUM_ITEMS else self.marks.pop()
        items = self.stack[max(0, start) :]
        del self.stack[max(0, start) :]
        return items

    def _storage(self, kind: str, _type: _Global, key: str, _location: str, size: int, view: None = None) -> _Storage:
        _expect(kind == "storage" and type(key) is str and type(size) is int and view is None, "odd storages")
        if key not in self.storages:
            self.num_left -= size
            _expect(size >= 0 and self.num_left >= 0, "a storage larger than the file")
            self.storages[key] = _Storage(size)
        return self.storages[key]


def _is_plain_key(key: Any) -> bool:
    return type(key) in _PLAIN or (type(key) is tuple and all(type(item) in _PLAIN for item in key))


def _call(function: str, *arguments: Any) -> Any:
    """The placeholder of what a function returns."""
    if function == "collections OrderedDict":
        _expect(not arguments, "a copied dict")
        return _DICT
    _expect(function in _TENSOR_FUNCTIONS, function)
    if function != "torch._utils _rebuild_parameter":
        storage, offset, shape, strides, *_ = arguments
        end = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        is_within = min((offset, *shape, *strides)) >= 0 and (0 in shape or end <= storage.num_elements)
        _expect(is_within, "a tensor larger than its storage")
    return _TENSOR


def _expect(condition: Any, found: str) -> None:
    if not condition:
        raise ValueError(f"it holds {found}, which is no part of a file of tensors")
