"""Shards, pictures and captions that somebody prepared: what is good is read, the rest is counted or refused."""

import json
import os
import random
from collections import Counter

import hostile_data
import pytest
from confined import Hangs, bounded, told
from data_samples import EVAL, KEY, make_loader, texts
from hostile_data import PICTURE, SHARDS, archive, good, unended
from hostile_images import PICTURES, with_metadata

from minigpt4.common.errors import UserError
from minigpt4.common.images import read_image
from minigpt4.datasets.datasets import PairDataset, ShardDataset, shard_urls
from minigpt4.datasets.datasets.pairs import Pair
from minigpt4.datasets.datasets.sample import SkipSample, WorkerInfo, decode_image
from minigpt4.datasets.datasets.shard_urls import expand_shards
from minigpt4.datasets.datasets.shards import key_and_suffix
from minigpt4.processors import BlipCaptionProcessor

METADATA = with_metadata()
pytestmark = pytest.mark.usefixtures("confined")


def read(path, text_processor=str):
    """Captions of the samples of one shard, and what was counted."""
    skipped = Counter()
    samples = list(ShardDataset("x", [str(path)], EVAL, text_processor).iter_eval(WorkerInfo(seed=0), skipped))
    assert all(sample["image"].shape == (3, 8, 8) for sample in samples)
    return [sample["text_input"] for sample in samples], {kind: count for kind, count in skipped.items() if count}


# shards


@pytest.mark.parametrize("case", SHARDS)
def test_shard(tmp_path, case, caplog):
    data, captions, counted = SHARDS[case]
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    found, skipped = read(path)
    assert found == captions or captions is None
    assert skipped == counted
    assert all("\n" not in record.getMessage() for record in caplog.records)
    if "unreadable shard" in counted:
        assert str(path) in caplog.text


CUT = archive(*good(*"abcdefgh"))
SAMPLE = len(unended(*good("a")))


@pytest.mark.parametrize("offset", random.Random(7).sample(range(8 * SAMPLE), 100))
def test_shard_cut_at(tmp_path, offset):
    (tmp_path / "0.tar").write_bytes(CUT[:offset])
    found, skipped = read(tmp_path / "0.tar")
    assert found == [f"caption {key}" for key in "abcdefgh"[: len(found)]]
    assert skipped.pop("unreadable shard") == 1
    assert skipped in ({}, {"no caption": 1})  # a picture whose text was cut off
    assert len(found) in (offset // SAMPLE, (offset + 511) // SAMPLE)  # what fills the last block up need not be there


def test_a_shard_that_is_all_bad_ends_the_run_with_a_line(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"rubbish" * 500)
    dataset = ShardDataset("web", [str(tmp_path / "0.tar")], EVAL)
    told(lambda: texts(make_loader({"web": dataset}).iter_epoch(0)), "web", "unreadable shard", "0.tar", "KEY.jpg")


def test_a_file_too_large_for_memory_ends_its_shard(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shard_urls, "MAX_FILE_BYTES", 50_000)
    large = [("b.bin", b"\0" * 70_000), ("b.txt", b"b")]
    (tmp_path / "0.tar").write_bytes(archive(*good("a"), *large, *good("z")))
    assert read(tmp_path / "0.tar") == (["caption a"], {"unreadable shard": 1})
    assert "has more than 50,000 bytes" in caplog.text
    (tmp_path / "1.tar").write_bytes(archive(*good(*map(str, range(100)))))  # many files are not one large file
    assert len(read(tmp_path / "1.tar")[0]) == 100


def test_key_and_suffix():
    assert key_and_suffix("d.d/a.b.JPG") == ("d.d/a", "b.JPG")
    assert key_and_suffix("/a.jpg") == ("/a", "jpg")
    for name in ("", "a", ".jpg", "d/.jpg", "a/", ".", ".."):
        assert key_and_suffix(name) == (None, None)


def test_a_file_named_as_a_command_is_read_and_not_run(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("pipe:touch ran;.tar", "file:x.tar", "-.tar"):
        (folder / name).write_bytes(archive(*good("a")))
    monkeypatch.chdir(folder)
    for storage in (".", "*.tar", "pipe[:]*.tar"):
        shards = expand_shards(storage, KEY)
        assert shards
        for shard in shards:
            assert read(shard) == (["caption a"], {})
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
@pytest.mark.parametrize("storage", ["{}", "{}/*.tar", "{}/0.tar"])
def test_what_is_no_shard(tmp_path, kind, storage):
    file = tmp_path / "0.tar"
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "dangling link": lambda path: os.symlink("/absent", path)}
    make[kind](file)
    told(lambda: expand_shards(storage.format(tmp_path), KEY), KEY, "no shard")


@pytest.mark.parametrize(
    "storage",
    ["a{0..", "{", "}", "a\0b.tar", "*\0b.tar", "\ud800/*.tar", "", "~", "{a,b", "[", ["absent.tar", 5, None]],
    ids=repr,
)
def test_odd_storage(storage):
    told(lambda: expand_shards(storage, KEY), KEY)


# pictures


@pytest.mark.parametrize("case", PICTURES)
def test_picture_in_a_shard(tmp_path, case):
    data, kind = PICTURES[case]
    (tmp_path / "0.tar").write_bytes(archive(*good("a"), ("b.jpg", data), ("b.txt", b"b"), *good("z")))
    assert read(tmp_path / "0.tar") == (["caption a", "caption z"], {kind: 1})


@pytest.mark.parametrize("case", PICTURES)
def test_picture_in_a_chat(tmp_path, case):
    data, kind = PICTURES[case]
    (tmp_path / "b.jpg").write_bytes(data)
    for source in (data, tmp_path / "b.jpg"):
        name = "the image" if isinstance(source, bytes) else "b.jpg"
        told(lambda source=source: read_image(source), name, *(["pixels", "100,000,000"] if "large" in kind else []))


@pytest.mark.parametrize("case", METADATA)
def test_metadata_is_not_read(case):
    for decode in (read_image, decode_image):
        assert decode(METADATA[case]).size in ((12, 10), (10, 10))


FILES = {  # what may lie in a folder where a picture is expected
    "pipe": (os.mkfifo, "missing image file"),
    "folder": (os.mkdir, "missing image file"),
    "device without end": (lambda path: os.symlink("/dev/zero", path), "missing image file"),
    "link to itself": (lambda path: os.symlink(path, path), "missing image file"),
    "dangling link": (lambda path: os.symlink("/absent", path), "missing image file"),
    "a terabyte of nothing": (lambda path: (path.touch(), os.truncate(path, 2**40)), "unreadable image"),
}


@pytest.mark.parametrize("case", FILES)
def test_what_is_no_picture_file(tmp_path, case):
    make, kind = FILES[case]
    make(tmp_path / "b.jpg")
    with pytest.raises(SkipSample, match=f"^{kind}$"):
        PairDataset("x", [Pair(tmp_path / "b.jpg", "b")], EVAL)[0]
    told(lambda: read_image(tmp_path / "b.jpg"), "b.jpg", "cannot be read as an image")


# captions

CAPTIONS = {
    "null": (b'{"caption": null}', "no caption"),
    "a number": (b'{"caption": 5}', "no caption"),
    "NaN": (b'{"caption": NaN}', "no caption"),
    "a truth": (b'{"caption": true}', "no caption"),
    "a list": (b'{"caption": ["a"]}', "no caption"),
    "a dict": (b'{"caption": {"a": "b"}}', "no caption"),
    "empty": (b'{"caption": ""}', "no caption"),
    "blanks": (b'{"caption": " \\t\\n\\u3000 "}', "no caption"),
    "absent": (b"{}", "no caption"),
    "10 MB": (json.dumps({"caption": "a dog " * 1_700_000}).encode(), "caption too long"),
    "10 MB in a word": (json.dumps({"caption": "a" * 10**7}).encode(), "caption too long"),
    "10 MB of blanks": (json.dumps({"caption": " " * 10**7}).encode(), "no caption"),
    "not UTF-8": (b'{"caption": "caf\xe9"}', "unreadable json"),
    "UTF-16": ('{"caption": "狗"}'.encode("utf-16"), "unreadable json"),
    "half a letter": ('{"caption": "é"}'.encode()[:-3] + b'"}', "unreadable json"),
    "no JSON": (b"a dog", "unreadable json"),
    "no bytes": (b"", "unreadable json"),
    "cut": (b'{"caption": "a do', "unreadable json"),
    "single quotes": (b"{'caption': 'a dog'}", "unreadable json"),
    "two values": (b'{"caption": "a"} {"caption": "b"}', "unreadable json"),
    "control characters": (b'{"caption": "a\x01\n"}', "unreadable json"),
    "a list outside": (b'[{"caption": "a"}]', "no caption"),
    "a text outside": (b'"a dog"', "no caption"),
    "a number outside": (b"5", "no caption"),
    "deep": (b"[" * 10**6, "unreadable json"),
    "deep in a caption": (b'{"caption": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "unreadable json"),
    "5000 digits": (b'{"caption": "a", "width": ' + b"9" * 5000 + b"}", "unreadable json"),
}
READ_CAPTIONS = {
    "twice": (b'{"caption": "a", "caption": "b"}', "b"),
    "a byte order mark": (b'\xef\xbb\xbf{"caption": "a"}', "a"),
    "zero byte": (b'{"caption": "a\\u0000b"}', "a\0b"),
    "half a surrogate pair": (b'{"caption": "a \\ud83d"}', "a \ud83d"),
    "marks": (b'{"caption": "</s><ImageHere>###"}', "</s><ImageHere>###"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_caption_in_a_shard(tmp_path, case):
    data, kind = CAPTIONS[case]
    (tmp_path / "0.tar").write_bytes(archive(*good("a"), ("b.jpg", PICTURE), ("b.json", data), *good("z")))
    assert read(tmp_path / "0.tar") == (["caption a", "caption z"], {kind: 1})


@pytest.mark.parametrize("case", READ_CAPTIONS)
def test_odd_caption_that_is_read(tmp_path, case, model):
    data, caption = READ_CAPTIONS[case]
    (tmp_path / "0.tar").write_bytes(archive(*good("a"), ("b.jpg", PICTURE), ("b.json", data), *good("z")))
    assert read(tmp_path / "0.tar") == (["caption a", caption, "caption z"], {})
    rows = model.tokenize_rows([caption, BlipCaptionProcessor()(caption)], ["<ImageHere>"] * 2)
    assert all(max(row.labels) >= 0 for row in rows)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", None),
        (b" \n", None),
        (b"caf\xe9", None),
        (b"\xff\xfe", None),
        (b"\xef\xbb\xbfa dog", "a dog"),
        (b"a\0", "a\0"),
        (b"a" * 10**7, None),
    ],
    ids=["empty", "blanks", "latin-1", "no letters", "byte order mark", "zero byte", "10 MB"],
)
def test_caption_as_text(tmp_path, data, expected):
    (tmp_path / "0.tar").write_bytes(archive(("b.jpg", PICTURE), ("b.txt", data)))
    captions, skipped = read(tmp_path / "0.tar")
    assert captions == ([expected] if expected else [])
    assert bool(skipped) == (expected is None)


def test_the_bounds_bite(tmp_path):
    """What protects the tests themselves: a hang and a large allocation do end."""
    with pytest.raises(MemoryError):
        bytearray(2**40)
    bounds = bounded(1)
    next(bounds)
    try:
        with pytest.raises(Hangs):
            while True:
                pass
    finally:
        bounds.close()
    assert hostile_data.SHARDS and issubclass(UserError, ValueError)
