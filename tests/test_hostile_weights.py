"""Weight files that somebody prepared: refused in a line, nothing run, nothing half loaded."""

import functools
import io
import json
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch
from confined import told
from golden_data import TINY
from hostile_weights import PROJECTION, written
from safetensors.torch import load_file, save, save_file

from minigpt4.common import weights
from minigpt4.common.files import locate

pytestmark = pytest.mark.usefixtures("confined")
KEY = "model.ckpt"
Q_FORMER = load_file(TINY / "qformer.safetensors")


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(data, name="data.pkl", method=zipfile.ZIP_STORED):
    """A file in torch's form whose pickle is what is given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for member, content in ((name, data), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{member}", content)
    return buffer.getvalue()


def safe(header, data=b""):
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


GOOD = saved({"model": PROJECTION})
GOOD_SAFE = save({"a": torch.ones(2)})
FILES = {  # what cannot be read as weights: suffix, bytes, words
    "no bytes": (".pth", b""),
    "one byte": (".pth", b"\x80"),
    "a text": (".pth", b"not weights at all"),
    "a page": (".bin", b"<!doctype html>"),
    "a pointer of git": (".bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "an empty zip": (".pth", b"PK\x05\x06" + b"\0" * 18),
    "a zip of something else": (".pth", zipped(b"a", "readme.txt")),
    "a changed zip": (".pth", GOOD[:1000] + b"\xff" * 200 + GOOD[1200:-100]),
    "a pickle of nothing": (".pth", zipped(b"")),
    "a pickle cut short": (".pth", zipped(pickle.dumps({"a": 1}, 2)[:-3])),
    "a pickle without end": (".pth", zipped(b"\x80\x02" + b"]" * 1000)),
    "a pickle of an unknown protocol": (".pth", zipped(b"\x80\x63.")),
    "a zip that unpacks to 200 MB": (".pth", zipped(b"\x80\x02N." + b"\0" * 2 * 10**8, method=zipfile.ZIP_DEFLATED)),
    "a call of os.system": (".pth", saved({"a": Runs(os.system, "touch ran")})),
    "a call of eval": (".pth", saved({"a": Runs(eval, "open('ran', 'w')")})),
    "a call of open": (".pt", saved({"a": Runs(open, "ran", "w")})),
    "a call in a bare pickle": (".bin", pickle.dumps(Runs(os.system, "touch ran"), 2)),
    "a call in an old file": (".bin", saved({"a": Runs(os.mkdir, "ran")}, _use_new_zipfile_serialization=False)),
    "a call by name": (".pth", zipped(b"cos\nsystem\n(S'touch ran'\ntR.")),
    "a call of getattr": (".pth", zipped(b"cbuiltins\ngetattr\n(cos\nS'system'\ntR.")),
    "a call of torch.load": (".pth", saved({"a": Runs(torch.load, "other.pth")})),
    "a module": (".pth", saved({"model": torch.nn.Linear(2, 2)})),
    "a partial": (".pth", saved({"a": functools.partial(os.system, "touch ran")})),
    "safetensors of no bytes": (".safetensors", b""),
    "safetensors header of 2^60": (".safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "safetensors header beyond the end": (".safetensors", struct.pack("<Q", 1000) + b"{}"),
    "safetensors header that is no JSON": (".safetensors", safe(b"nothing")),
    "safetensors header that is no UTF-8": (".safetensors", safe(b"\xff\xfe{}")),
    "safetensors header as a list": (".safetensors", safe([])),
    "safetensors header that is deep": (".safetensors", safe(b"[" * 100_000)),
    "safetensors of an unknown type": (".safetensors", safe(entry("F99"), b"\0" * 8)),
    "safetensors offsets below zero": (".safetensors", safe(entry(offsets=(-8, 0)), b"\0" * 8)),
    "safetensors offsets beyond the end": (".safetensors", safe(entry(offsets=(0, 800), shape=(200,)), b"\0" * 8)),
    "safetensors offsets in reverse": (".safetensors", safe(entry(offsets=(8, 0)), b"\0" * 8)),
    "safetensors of a shape that does not fit": (".safetensors", safe(entry(shape=(3,)), b"\0" * 8)),
    "safetensors of a shape of 2^62": (".safetensors", safe(entry(shape=(2**62, 2**62)), b"\0" * 8)),
    "safetensors with a gap": (".safetensors", safe(entry(offsets=(8, 16)), b"\0" * 16)),
    "safetensors with more behind": (".safetensors", GOOD_SAFE + b"more"),
    "safetensors cut short": (".safetensors", GOOD_SAFE[:-1]),
    "torch's form as safetensors": (".safetensors", GOOD),
    "safetensors as torch's form": (".pth", GOOD_SAFE),
    "another suffix": (".zip", GOOD, ".safetensors"),
}


@pytest.mark.parametrize("case", FILES)
def test_file(tmp_path, case):
    suffix, data, *words = FILES[case]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    told(lambda: weights.read_state_dict(path, KEY), KEY, str(path), *(words or ["cannot be read as weights", "again"]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "old .bin"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_file_cut_at(tmp_path, suffix, share):
    path = tmp_path / f"weights{suffix.split()[-1]}"
    if suffix == ".safetensors":
        save_file(PROJECTION, path)
    else:
        torch.save({"model": PROJECTION}, path, _use_new_zipfile_serialization="old" not in suffix)
    os.truncate(path, int(path.stat().st_size * share))
    told(lambda: weights.read_state_dict(path, KEY), KEY, str(path), "cannot be read as weights")


CONTENTS = {
    "a list": ([torch.ones(1)], "holds a list"),
    "a tensor": (torch.ones(1), "holds a Tensor"),
    "a number": (5, "holds a int"),
    "null": (None, "holds a NoneType"),
    "a number as a name": ({5: torch.ones(1)}, "'5'"),
    "null as a name": ({None: torch.ones(1)}, "'None'"),
    "a tuple as a name": ({("a", 1): torch.ones(1)}, "('a', 1)"),
    "a text as a value": ({"a": "b"}, "'a'", "str"),
    "null as a value": ({"a": None}, "'a'", "NoneType"),
    "a list as a value": ({"a": [torch.ones(1)]}, "'a'", "list"),
    "a dict in a dict": ({"a": {"b": torch.ones(1)}}, "'a'", "dict"),
    "a model in a model": ({"model": {"model": {"a": torch.ones(1)}}}, "'model'", "dict"),
    "a line end in a name": ({"a\nb": None}, "'a b'"),
    "a name of a megabyte": ({"a" * 10**6: None}, "'aaa", "[…]"),
    "a sparse tensor": ({"a": torch.ones(2, 2).to_sparse()}, "_rebuild_sparse_tensor"),
    "a tensor of rows": ({"a": torch.ones(2, 2).to_sparse_csr()}, "_rebuild_sparse_tensor"),
    "a tensor on no device": ({"a": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
    "complex numbers": ({"a": torch.ones(2, dtype=torch.complex64)}, "'a'", "complex64"),
    "eighths": ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "_rebuild_tensor_v3"),
    "quantised": ({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "_rebuild_qtensor"),
    "bytes": ({"a": torch.ones(2, dtype=torch.uint8)}, "'a'", "uint8"),
}


def test_an_archive_that_swells_is_not_unpacked_to_tell_what_it_is(tmp_path, confined, monkeypatch):
    from minigpt4.common.weights import identify_file

    suffix, content, *_ = FILES["a zip that unpacks to 200 MB"]
    (tmp_path / f"x{suffix}").write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    assert identify_file(tmp_path / f"x{suffix}") == "no file of weights"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONTENTS)
def test_content(tmp_path, case):
    content, *words = CONTENTS[case]
    torch.save(content, tmp_path / "weights.pth")
    told(lambda: weights.read_state_dict(tmp_path / "weights.pth", KEY), KEY, "weights.pth", *words)


def test_a_tensor_that_claims_more_than_there_is(tmp_path):
    """Of one stored number, a trillion: whoever copies it runs out of memory."""
    torch.save({"pos_embed": torch.ones(1).expand(1, 10**12 + 1, 48)}, tmp_path / "weights.pth")
    told(lambda: weights.read_state_dict(tmp_path / "weights.pth", KEY), "'pos_embed'")


@pytest.mark.parametrize("kind", ["pipe", "folder in a folder", "device"])
def test_what_is_no_weight_file(tmp_path, kind):
    path = tmp_path / "folder" / "model.safetensors"
    path.parent.mkdir()
    make = {"pipe": os.mkfifo, "folder in a folder": os.mkdir, "device": lambda at: os.symlink("/dev/zero", at)}
    make[kind](path)
    told(lambda: weights.read_state_dict(path.parent, KEY), KEY, str(path))


@pytest.mark.parametrize(
    "spec", ["absent.pth", "a\0b.pth", "a" * 5000, "~nobody-of-this-name/a.pth", "", " ", "\ud800.pth"]
)
def test_odd_path(spec):
    told(lambda: locate(spec, KEY), KEY)


# into the model


def changed(**changes):
    return {"model": PROJECTION | {f"llama_proj.{name}": value for name, value in changes.items()}}


MISFITS = {
    "nothing": ({"model": {}}, "no llama_proj.weight", "without tensors"),
    "another file": ({"model": {n: v for n, v in Q_FORMER.items() if v.ndim}}, "no llama_proj.weight"),
    "no bias": ({"model": {"llama_proj.weight": PROJECTION["llama_proj.weight"]}}, "no llama_proj.bias"),
    "13B": (changed(weight=torch.zeros(5120, 48), bias=torch.zeros(5120)), "13B"),
    "Llama 2": (changed(weight=torch.zeros(4096, 5632)), "Llama-2"),
    "a number as weight": (changed(weight=torch.tensor(1.0)), "[]", "[64, 48]"),
    "no rows": (changed(weight=torch.zeros(0, 48)), "[0, 48]"),
    "three dimensions": (changed(weight=torch.zeros(1, 64, 48)), "[1, 64, 48]"),
    "bias of another width": (changed(bias=torch.zeros(63)), "llama_proj.bias", "[63]"),
    "NaN": (changed(bias=torch.full((64,), torch.nan)), "llama_proj.bias", "NaN"),
    "infinity": (changed(weight=torch.full((64, 48), -torch.inf)), "llama_proj.weight", "infinity"),
    "whole numbers": (changed(weight=torch.ones(64, 48, dtype=torch.int64)), "llama_proj.weight", "int64"),
    "truths": (changed(bias=torch.ones(64, dtype=torch.bool)), "llama_proj.bias", "bool"),
    "a stranger": (changed(extra=torch.ones(1)), "llama_proj.extra"),
    "part of the language model": (
        {"model": PROJECTION | {"llama_model.lm_head.weight": torch.ones(600, 64)}},
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_checkpoint_that_does_not_fit(model, tmp_path, case):
    content, *words = MISFITS[case]
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("llama_proj")}
    told(lambda: model.load_checkpoint(written(tmp_path / "c.pth", content)), "model.ckpt", "c.pth", *words)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1, 8, 48),
        torch.ones(2, 5, 48),
        torch.ones(5, 48),
        torch.ones(1, 1, 48),
        torch.ones(1, 0, 48),
        torch.ones(()),
    ],
    ids=lambda value: str(list(value.shape)),
)
def test_positions_that_are_no_grid(build, tmp_path, value):
    from minigpt4.models.eva_vit import interpolate_pos_embed

    assert interpolate_pos_embed(value, 5) is value
    state = load_file(TINY / "eva_vit.safetensors") | {"pos_embed": value}
    told(lambda: build(vit_weights=str(written(tmp_path / "v.pth", state))), "model.vit_weights", "v.pth", "pos_embed")


@pytest.mark.parametrize(
    "value", [torch.ones(2), torch.ones(0), torch.ones(()), torch.ones(2, 3)], ids=lambda v: str(list(v.shape))
)
def test_bias_of_a_twin_that_is_no_three(value):
    name = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    assert list(weights.published_names({name: value})) == ["blocks.0.attn.qkv.bias"]  # to be refused as unknown


def test_whole_numbers_in_the_tower(build, tmp_path):
    state = load_file(TINY / "eva_vit.safetensors")
    state["cls_token"] = state["cls_token"].long()
    message = told(
        lambda: build(vit_weights=str(written(tmp_path / "v.pth", state))), "'cls_token'", "int64", "float32"
    )
    assert message.startswith("model.vit_weights")


def test_random_bytes_are_no_weights(tmp_path):
    rng = random.Random(0)
    for suffix in (".pth", ".safetensors"):
        for size in (1, 7, 64, 4096):
            (tmp_path / f"w{suffix}").write_bytes(rng.randbytes(size))
            told(lambda suffix=suffix: weights.read_file(tmp_path / f"w{suffix}", KEY), "cannot be read")
