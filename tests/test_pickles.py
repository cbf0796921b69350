"""Small files of torch that ask for much memory or time: refused before torch reads them, in both of its formats."""

import io
import pickle
import random
import struct
import warnings
import zipfile

import pytest
import torch
from confined import told
from golden_data import TINY

from minigpt4.common.weights import read_file

pytestmark = pytest.mark.usefixtures("confined")
KEY = "model.ckpt"
LEGACY_HEAD = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(name, *arguments):
    """Opcodes that call a function with what the opcodes of the arguments leave."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def storage(size, key="0"):
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(size) + b"tQ"


def tensor(size, shape):
    layout = number(0), number((shape,)), number((1,))
    return call("torch._utils _rebuild_tensor_v2", storage(size), *layout, number(False), EMPTY)


EMPTY = call("collections OrderedDict")
HUGE = number(2**31 - 1)
TUPLES = text("a") + b"\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60  # each holds the one before it twice
DICT = b"}q\x01(" + b"".join(text(f"key {i}") + b"N" for i in range(2000)) + b"u"
PICKLES = {
    "bytearray": (call("builtins bytearray", HUGE), "builtins.bytearray"),
    "bytearray of Python 2": (call("__builtin__ bytearray", HUGE), "__builtin__.bytearray"),
    "a tensor class": (call("torch FloatTensor", HUGE), "torch.FloatTensor"),
    "a tensor class as an object": (b"ctorch\nTensor\n(" + HUGE + b"t\x81", "torch.Tensor"),
    "a storage": (call("torch.storage UntypedStorage", HUGE), "torch.storage.UntypedStorage"),
    "a storage called": (call("torch FloatStorage", HUGE), "FloatStorage"),
    "a parameter": (call("torch.nn.parameter Parameter", HUGE), "torch.nn.parameter.Parameter"),
    "an encoder": (call("_codecs encode", text("a" * 99), text("utf-32")), "_codecs.encode"),
    "a text of 4 GB": (b"X\xff\xff\xff\xff", "cannot be read"),
    "a number of 2 GB": (b"\x8b\xff\xff\xff\x7f", "cannot be read"),
    "bytes of 2^62": (b"\x8e" + struct.pack("<Q", 2**62), "cannot be read"),
    "a byte array of 2^40": (b"\x96" + struct.pack("<Q", 2**40), "cannot be read"),
    "a frame of 2^62": (b"\x95" + struct.pack("<Q", 2**62), "cannot be read"),
    "a storage larger than the file": (storage(10**9), "a storage larger than the file"),
    "storages larger than the file": (
        b"(" + b"".join(storage(300, f"{i}") for i in range(100)) + b"t",
        "a storage larger than the file",
    ),
    "a storage of less than nothing": (storage(-1), "a storage larger than the file"),
    "a tensor larger than its storage": (tensor(2, 2**31 - 1), "a tensor larger than its storage"),
    "tuples in tuples as a name": (b"}" + TUPLES + b"Ns", "odd keys"),
    "copied dicts": (DICT + (b"ccollections\nOrderedDict\nh\x01\x85R") * 5000, "a copied dict"),
    "copied attributes": (DICT + (b"ccollections\nOrderedDict\n)Rh\x01b") * 5000, "attributes"),
    "nothing on the stack": (b"R", "cannot be read"),
    "no memo": (b"h\x05", "cannot be read"),
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", PICKLES)
def test_small_files_that_ask_for_much(tmp_path, monkeypatch, case, is_zip):
    opcodes, word = PICKLES[case]
    content, path = b"\x80\x02" + opcodes + b".", tmp_path / "small.pth"
    if is_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(LEGACY_HEAD + content + pickle.dumps([], 2))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked to read it"))
    told(lambda: read_file(path, KEY), KEY, str(path), "cannot be read as weights", word)


def archive_of(*members):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD, BAD = pickle.dumps({}, 2), b"\x80\x02" + PICKLES["bytearray"][0] + b"."
ARCHIVES = {
    "two pickles of one name": archive_of(("archive/data.pkl", BAD), ("archive/data.pkl", GOOD)),
    "two pickles of nearly one name": archive_of(("archive/DATA.pkl", BAD), ("archive/data.pkl", GOOD)),
    "two folders": archive_of(("a/data.pkl", BAD), ("b/data.pkl", GOOD)),
    "an archive behind another": archive_of(("archive/data.pkl", BAD)) + archive_of(("archive/data.pkl", GOOD)),
    "a pickle before an archive": LEGACY_HEAD + BAD + pickle.dumps([], 2) + archive_of(("archive/data.pkl", GOOD)),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_that_can_be_read_in_two_ways(tmp_path, monkeypatch, case):
    (tmp_path / "two.pth").write_bytes(ARCHIVES[case])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch was asked to read it"))
    told(lambda: read_file(tmp_path / "two.pth", KEY), KEY, "cannot be read as weights")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_checkpoints_and_state_dicts_are_read(tmp_path, is_zip):
    """All that runs and other programs write: optimizers of several groups, shared tensors, views, random states."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    groups = [{"params": [parameter], "lr": 0.1} for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(groups)
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    shared = torch.arange(10.0)
    content = {
        "model": module.state_dict(),
        "parameters": dict(module.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "views": {"a": shared[2:4], "b": shared[::2], "c": shared.view(5, 2).T, "again": shared, "empty": shared[:0]},
        "config": {"list": [1, 2.5, None, True, "text", (1, (2, 3)), -(2**70)], "empty": [{}, [], ()]},
        "random": [random.getstate(), torch.get_rng_state()],
        "dtypes": [torch.ones(2, 2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.bool)],
        "scalar": torch.tensor(1.5),
        5: "a number as a name",
    }
    torch.save(content, tmp_path / "all.pth", _use_new_zipfile_serialization=is_zip)
    found = read_file(tmp_path / "all.pth", KEY)
    expected = torch.load(tmp_path / "all.pth", weights_only=True)
    torch.testing.assert_close(found["views"], content["views"])
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("name", ["checkpoint_1.pth", "minigpt4_ckpt.pth", "llama/pytorch_model.bin"])
def test_golden_files_are_read(name):
    assert read_file(TINY / name, KEY)
