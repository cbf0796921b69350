"""Shards, pictures, captions and lists that somebody prepared: what is good is read, the rest is counted or refused."""

import json
import os
import random
from collections import Counter

import hostile_data
import pytest
from confined import Hangs, bounded, told
from hostile_data import PICTURE, PICTURES, SHARDS, archive, good, unended

from minigpt4.common.errors import UserError
from minigpt4.conversation.images import read_image
from minigpt4.datasets.datasets import PairDataset, ShardDataset, tar_files
from minigpt4.datasets.datasets.pairs import Pair, read_align_folder, read_pairs
from minigpt4.datasets.datasets.sample import SkipSample, WorkerInfo
from minigpt4.datasets.datasets.tar_files import expand_shards
from minigpt4.datasets.loader import TrainLoader, eval_batches
from minigpt4.processors import Blip2ImageEvalProcessor, BlipCaptionProcessor

pytestmark = pytest.mark.usefixtures("confined")
KEY = "datasets.x.build_info.storage"
EVAL = Blip2ImageEvalProcessor(8)


def read(path, text_processor=str):
    """Captions of the samples of one shard, and what was counted."""
    skipped = Counter()
    samples = list(ShardDataset("x", [str(path)], EVAL, text_processor).iter_eval(WorkerInfo(seed=0), skipped))
    assert all(sample["image"].shape == (3, 8, 8) for sample in samples)
    return [sample["text_input"] for sample in samples], {kind: count for kind, count in skipped.items() if count}


def read_pairs_once(pairs):
    """The same for pairs."""
    batches = eval_batches("x", PairDataset("x", pairs, EVAL), batch_size=3, num_workers=0, seed=0)
    return [text for batch in batches for text in batch["text_input"]], batches.skipped


def train(dataset, num_batches=1):
    loader = TrainLoader({dataset.name: dataset}, {}, 8, num_batches, num_workers=0, seed=0)
    return [text for batch in loader.iter_epoch(0) for text in batch["text_input"]]


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
    told(lambda: train(dataset), "web", "unreadable shard", "0.tar", "KEY.jpg")


def test_a_large_file_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_files, "MAX_FILE_BYTES", 5000)
    large = [("b.jpg", b"\0" * 6000), ("b.txt", b"b")]
    (tmp_path / "0.tar").write_bytes(archive(*good("a"), *large, *good("z")))
    assert read(tmp_path / "0.tar") == (["caption a", "caption z"], {"file too large in a shard": 1, "no image": 1})


def test_key_and_suffix():
    assert tar_files.key_and_suffix("d.d/a.b.JPG") == ("d.d/a", "b.JPG")
    assert tar_files.key_and_suffix("/a.jpg") == ("/a", "jpg")
    for name in ("", "a", ".jpg", "d/.jpg", "a/", ".", ".."):
        assert tar_files.key_and_suffix(name) == (None, None)


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
    "UTF-16": ('{"caption": "狗"}'.encode("utf-16"), "狗"),
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
        (b"caf\xe9", "caf\ufffd"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"a\0", "a\0"),
        (b"a" * 10**7, None),
    ],
    ids=["empty", "blanks", "latin-1", "no letters", "zero byte", "10 MB"],
)
def test_caption_as_text(tmp_path, data, expected):
    (tmp_path / "0.tar").write_bytes(archive(("b.jpg", PICTURE), ("b.txt", data)))
    captions, skipped = read(tmp_path / "0.tar")
    assert captions == ([expected] if expected else [])
    assert bool(skipped) == (expected is None)


# filter_cap.json


def annotations(*entries):
    return json.dumps({"annotations": entries}).encode()


ALIGN = {
    "no bytes": (b"", "JSON"),
    "null": (b"null", "annotations"),
    "a number": (b"5", "annotations"),
    "a text": (b'"a"', "annotations"),
    "a list in place of the dict": (b'[{"image_id": "1", "caption": "a"}]', "annotations"),
    "no annotations": (b"{}", "annotations"),
    "annotations as null": (b'{"annotations": null}', "annotations"),
    "annotations as a dict": (b'{"annotations": {"image_id": "1", "caption": "a"}}', "annotations"),
    "annotations as a text": (b'{"annotations": "a"}', "annotations"),
    "none of them": (b'{"annotations": []}', "annotations"),
    "cut": (b'{"annotations": [{"image_id": "1"', "JSON"),
    "not UTF-8": (b'{"annotations": [{"image_id": "1", "caption": "\xe9"}]}', "JSON"),
    "deep": (b"[" * 10**6, "JSON"),
    "deep annotation": (b'{"annotations": [' + b"[" * 10**5 + b"]" * 10**5 + b"]}", "JSON"),
    "5000 digits": (b'{"annotations": ' + b"9" * 5000 + b"}", "JSON", "digits"),
    "an entry as null": (annotations(None), "annotation 0", "image_id"),
    "an entry as a list": (annotations({"image_id": "1", "caption": "a"}, ["2", "b"]), "annotation 1", "['2', 'b']"),
    "an entry as a text": (annotations("image_id caption"), "annotation 0"),
    "no image_id": (annotations({"caption": "a"}), "annotation 0", "image_id"),
    "no caption": (annotations({"image_id": "1"}), "annotation 0", "caption"),
    "an id that leads up": (annotations({"image_id": "../1", "caption": "a"}), "'../1'", "image/"),
    "an absolute id": (annotations({"image_id": "/etc/passwd", "caption": "a"}), "'/etc/passwd'"),
    "an id of Windows": (annotations({"image_id": "..\\1", "caption": "a"}), "'..\\1'"),
    "an empty id": (annotations({"image_id": "", "caption": "a"}), "''"),
    "dots as an id": (annotations({"image_id": "..", "caption": "a"}), "'..'"),
    "an id of a megabyte": (annotations({"image_id": "../" + "x" * 10**6, "caption": "a"}), "'../xxx"),
    "a line end in an id": (annotations({"image_id": "a/\nb", "caption": "a"}), "'a/ b'"),
    "an entry of a megabyte": (annotations({"caption": "a" * 10**6}), "annotation 0", "aaa"),
}
SKIPPED_PAIRS = {  # entries of which one sample beside a good one comes out
    "an unknown id": ({"image_id": "nothing", "caption": "a"}, "missing image file"),
    "a number as an id": ({"image_id": 17, "caption": "a"}, "missing image file"),
    "null as an id": ({"image_id": None, "caption": "a"}, "missing image file"),
    "a list as an id": ({"image_id": [1], "caption": "a"}, "missing image file"),
    "a zero byte in an id": ({"image_id": "a\0b", "caption": "a"}, "missing image file"),
    "half a surrogate pair in an id": ({"image_id": "\ud800", "caption": "a"}, "missing image file"),
    "an id of 10,000 letters": ({"image_id": "a" * 10_000, "caption": "a"}, "missing image file"),
    "null as a caption": ({"image_id": "1", "caption": None}, "no caption"),
    "a number as a caption": ({"image_id": "1", "caption": 1.5}, "no caption"),
    "a list as a caption": ({"image_id": "1", "caption": ["a"]}, "no caption"),
    "a dict as a caption": ({"image_id": "1", "caption": {}}, "no caption"),
    "an empty caption": ({"image_id": "1", "caption": " \n"}, "no caption"),
    "a caption of 10 MB": ({"image_id": "1", "caption": "a" * 10**7}, "caption too long"),
}


@pytest.mark.parametrize("case", ALIGN)
def test_filter_cap(tmp_path, case):
    content, *words = ALIGN[case]
    (tmp_path / "filter_cap.json").write_bytes(content)
    told(lambda: read_align_folder(tmp_path, KEY), KEY, str(tmp_path / "filter_cap.json"), *words)


@pytest.mark.parametrize("case", SKIPPED_PAIRS)
def test_pair(tmp_path, case):
    entry, kind = SKIPPED_PAIRS[case]
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "1.jpg").write_bytes(PICTURE)
    (tmp_path / "filter_cap.json").write_bytes(annotations({"image_id": "1", "caption": "good"}, entry))
    found = read_align_folder(tmp_path, KEY)
    assert read_pairs_once(found) == (["good"], {kind: 1})
    assert train(PairDataset("x", found, EVAL)) == ["good"] * 8


def test_a_picture_may_have_two_captions(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "1.jpg").write_bytes(PICTURE)
    (tmp_path / "filter_cap.json").write_bytes(annotations(*[{"image_id": "1", "caption": c} for c in "aab"]))
    assert Counter(read_pairs_once(read_align_folder(tmp_path, KEY))[0]) == {"a": 2, "b": 1}


# one's own pictures

ROW = '{"image": "a.jpg", "caption": "a"}'
LISTS = {
    "no bytes": (b"", "empty"),
    "blank lines": (b"\n \n\r\n", "empty"),
    "no JSON": (b"a.jpg,a dog", "line 1", "JSON"),
    "one JSON of all rows": (f"[{ROW},\n{ROW}]".encode(), "line 1", "JSON"),
    "a list as a row": (b'["a.jpg", "a"]', "line 1", "image and caption"),
    "null as a row": (f"{ROW}\nnull".encode(), "line 2"),
    "a text as a row": (b'"image caption"', "line 1"),
    "no image": (b'{"caption": "a"}', "line 1"),
    "no caption": (b'{"image": "a.jpg"}', "line 1"),
    "an image as a number": (b'{"image": 5, "caption": "a"}', "line 1"),
    "an image as null": (b'{"image": null, "caption": "a"}', "line 1"),
    "a caption as null": (b'{"image": "a.jpg", "caption": null}', "line 1"),
    "a caption as a list": (b'{"image": "a.jpg", "caption": ["a"]}', "line 1"),
    "a row cut off": (f"{ROW}\n{ROW[:-5]}".encode(), "line 2", "JSON"),
    "not UTF-8": (b'{"image": "a.jpg", "caption": "caf\xe9"}', "line 1", "JSON"),
    "UTF-16": (f"{ROW}\n{ROW}".encode("utf-16"), "JSON"),
    "deep": (b"[" * 10**6, "line 1", "JSON"),
    "zeros": (b"\0" * 1000, "line 1", "JSON"),
    "an instruction as a number": (b'{"image": "a", "caption": "a", "instruction": 5}', "line 1", "instruction", "5"),
    "an instruction as a list": (b'{"image": "a", "caption": "a", "instruction": ["b"]}', "line 1", "['b']"),
    "an instruction with an image": (
        b'{"image": "a", "caption": "a", "instruction": "<Img><ImageHere></Img> b"}',
        "line 1",
        "without <ImageHere>",
    ),
    "an instruction of a megabyte": (
        json.dumps({"image": "a", "caption": "a", "instruction": ["b" * 10**6]}).encode(),
        "line 1",
        "bbb",
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_list_of_ones_own(tmp_path, case):
    content, *words = LISTS[case]
    (tmp_path / "own.jsonl").write_bytes(content)
    told(lambda: read_pairs(tmp_path / "own.jsonl", KEY), KEY, str(tmp_path / "own.jsonl"), *words)


@pytest.mark.parametrize(
    "image", ["absent.jpg", "../absent.jpg", "a\0b.jpg", "\ud800.jpg", "x" * 10_000, "", ".", "/dev/zero"]
)
def test_image_of_ones_own_that_is_none(tmp_path, image):
    rows = [json.dumps({"image": name, "caption": name or "a"}) for name in ("good.jpg", image)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "good.jpg").write_bytes(PICTURE)
    assert read_pairs_once(read_pairs(tmp_path, KEY)) == (["good.jpg"], {"missing image file": 1})


def test_nothing_but_bad_pairs_ends_the_run_with_a_line(tmp_path):
    dataset = PairDataset("mine", [Pair(tmp_path / "a\0b.jpg", "a")], EVAL)
    told(lambda: train(dataset), "mine", "missing image file")


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
