"""Shards: which there are, what is read, what is skipped, which worker gets what, and that a seed repeats it."""

import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_samples import EVAL, KEY, captions, everything, good, picture, same, shard, workers
from PIL import Image

from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets import ShardDataset
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.datasets.datasets.shard_urls import expand_shards
from minigpt4.processors import Blip2ImageTrainProcessor

WORKER = WorkerInfo(seed=0)


@pytest.mark.parametrize("form", ["brace", "glob", "folder", "list", "list of patterns", "file"])
def test_ways_to_name_shards(tmp_path, shards, form):
    storage = {
        "brace": f"{tmp_path}/{{00000..00002}}.tar",
        "glob": f"{tmp_path}/*.tar",
        "folder": str(tmp_path),
        "list": shards,
        "list of patterns": [f"{tmp_path}/{{00000..00001}}.tar", f"{tmp_path}/*2.tar"],
        "file": shards[1],
    }[form]
    assert expand_shards(storage, KEY) == (shards if form != "file" else [shards[1]])


def test_urls_and_pipes_pass_through():
    storage = ["https://host/{0..1}.tar", "pipe:cat x.tar"]
    assert expand_shards(storage, KEY) == ["https://host/0.tar", "https://host/1.tar", "pipe:cat x.tar"]


def test_missing_shards(tmp_path, shards, caplog):
    assert expand_shards(f"{tmp_path}/{{00000..00004}}.tar", KEY) == shards
    assert "2 of 5 shards are missing" in caplog.text and "00003.tar" in caplog.text
    with pytest.raises(UserError, match=KEY) as error:
        expand_shards("/path/to/laion/{00000..00002}.tar", KEY)
    assert "placeholder" in str(error.value)
    with pytest.raises(UserError, match="no shard"):
        expand_shards(str(tmp_path / "absent.tar"), KEY)


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize(
    "text", [("json", b'{"caption": "a dog", "url": "x"}'), ("txt", b"a dog\n")], ids=lambda text: text[0]
)
def test_kinds_of_samples(tmp_path, kind, suffix, text):
    path = shard(tmp_path / "0.tar", [(f"a.{suffix}", picture(90, kind)), (f"a.{text[0]}", text[1])])
    skipped = Counter()
    (sample,) = ShardDataset("x", [path], EVAL).iter_eval(WORKER, skipped)
    assert sample["text_input"] == "a dog" and sample["instruction"] is None
    assert sample["image"].shape == (3, 8, 8) and not skipped


def test_text_stands_in_for_a_json_without_caption(tmp_path):
    entries = [("a.jpg", picture(1)), ("a.json", b'{"caption": null}'), ("a.txt", b"from text")]
    assert captions(ShardDataset("x", [shard(tmp_path / "0.tar", entries)], EVAL).iter_eval(WORKER)) == ["from text"]


def test_processors_are_applied(shards):
    samples = list(ShardDataset("x", shards[:1], EVAL, str.upper).iter_eval(WORKER))
    assert captions(samples) == [f"C{n}" for n in range(8)]
    expected = EVAL(Image.open(io.BytesIO(picture(7))))
    assert torch.equal(samples[1]["image"], expected)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_forms_of_tar_files(tmp_path, form, mode):
    """Long and foreign names, folders, links and webdataset's own records, compressed or not."""
    long = "a" * 90 + "/" + "b" * 60
    files = [(f"{long}.jpg", picture(1)), (f"{long}.txt", b"x"), ("图/1.txt", b"y"), ("图/1.png", picture(2, "PNG"))]
    with tarfile.open(tmp_path / "0.tar", mode, format=form) as tar:
        for name, data in [*files, ("__meta__", b"z")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    skipped = Counter()
    first, second = ShardDataset("x", [str(tmp_path / "0.tar")], EVAL).read([str(tmp_path / "0.tar")], skipped)
    assert not skipped and first["__key__"] == long and (first["txt"], second["txt"]) == (b"x", b"y")
    assert second["__key__"] == "图/1" and second["png"] == files[3][1]


def large_shard(path, number=60):
    return Path(shard(path, [entry for n in range(number) for entry in good(n)]))


def test_a_damaged_header_is_counted(tmp_path, shards, caplog):
    path = large_shard(tmp_path / "0.tar")
    data = bytearray(path.read_bytes())
    start = data.index(b"00004.jpg")
    data[start + 124] ^= 1  # of the size, so that the sum no longer fits
    path.write_bytes(data)
    skipped = Counter()
    found = captions(ShardDataset("x", [str(path), shards[1]], EVAL).iter_eval(WORKER, skipped))
    assert found == ["c0", "c1", "c2", "c3", *(f"c{n}" for n in range(8, 16))]
    assert skipped == {"unreadable shard": 1} and "a header is damaged" in caplog.text


def test_an_archive_behind_another_is_counted(tmp_path):
    """As ``cat`` joins them; readers stop at the end of the first."""
    path = large_shard(tmp_path / "0.tar")
    path.write_bytes(path.read_bytes() * 2)
    skipped = Counter()
    assert len(list(ShardDataset("x", [str(path)], EVAL).iter_eval(WORKER, skipped))) == 60
    assert skipped == {"unreadable shard": 1}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_padding_behind_an_archive_is_not_counted(tmp_path, mode):
    with tarfile.open(tmp_path / "0.tar", mode) as tar:
        for name, data in [entry for n in range(60) for entry in good(n)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with (tmp_path / "0.tar").open("ab") as file:
        file.write(b"\0" * 2**20)
    skipped = Counter()
    assert len(list(ShardDataset("x", [str(tmp_path / "0.tar")], EVAL).iter_eval(WORKER, skipped))) == 60
    assert not skipped


EMPTY_JSON = [("b5.jpg", picture(1)), ("b5.json", b"{}")]
BAD = {
    "unreadable image": [("b0.jpg", b"no image"), ("b0.txt", b"a"), ("b1.jpg", picture(3)[:200]), ("b1.txt", b"b")],
    "no image": [("b2.txt", b"alone")],
    "no caption": [("b3.jpg", picture(1)), ("b4.jpg", picture(1)), ("b4.txt", b" "), *EMPTY_JSON],
    "unreadable json": [("b6.jpg", picture(1)), ("b6.json", b"{")],
}


def test_corrupt_samples_are_counted_by_kind(tmp_path):
    entries = good(0) + [entry for kind in BAD.values() for entry in kind] + good(1)
    skipped = Counter()
    samples = list(ShardDataset("x", [shard(tmp_path / "0.tar", entries)], EVAL).iter_eval(WORKER, skipped))
    assert captions(samples) == ["c0", "c1"]
    assert skipped == {"unreadable image": 2, "no image": 1, "no caption": 3, "unreadable json": 1}


def test_training_goes_on_past_corrupt_samples(tmp_path):
    path = shard(tmp_path / "0.tar", good(0) + BAD["unreadable image"] + good(1))
    skipped = Counter()
    samples = itertools.islice(
        ShardDataset("x", [path], EVAL, shuffle_buffer=4).iter_train(WORKER, skipped=skipped), 40
    )
    assert set(captions(samples)) == {"c0", "c1"}
    assert skipped["unreadable image"] > 5


def test_cut_shard_is_counted(tmp_path, shards, caplog):
    with open(shards[1], "r+b") as file:
        file.truncate(5000)
    skipped = Counter()
    found = captions(ShardDataset("x", shards, EVAL).iter_eval(WORKER, skipped))
    assert skipped["unreadable shard"] == 1 and "cannot be read any further" in caplog.text
    assert {f"c{n}" for n in (*range(8), *range(16, 24))} <= set(found) and len(found) < 24


@pytest.mark.parametrize("kind", [*BAD, "empty shard", "no tar"])
def test_source_without_a_usable_sample(tmp_path, kind):
    path = shard(tmp_path / "0.tar", BAD.get(kind, []))
    if kind == "no tar":
        (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError) as error:
        next(ShardDataset("web", [path], EVAL, shuffle_buffer=10).iter_train(WORKER))
    cause = {"empty shard": "empty", "no tar": "unreadable shard"}.get(kind, kind)
    assert all(word in str(error.value) for word in ("web", cause, path, "KEY.jpg"))


def test_shards_once_are_shared_out(shards):
    parts = [captions(ShardDataset("x", shards, EVAL).iter_eval(worker)) for worker in workers()]
    assert all(parts) and sorted(itertools.chain(*parts)) == everything()


def test_same_seed_same_shard_samples(shards):
    dataset = ShardDataset("x", shards, Blip2ImageTrainProcessor(8), shuffle_buffer=10)

    def draw(shuffle_key=0, **worker):
        return list(itertools.islice(dataset.iter_train(WorkerInfo(**{"seed": 1} | worker), shuffle_key), 30))

    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(6)
    assert same(first, draw())
    others = (draw(seed=2), draw(shuffle_key=1), draw(rank=1), draw(worker_id=1, num_workers=2))
    assert all(captions(other) != captions(first) for other in others)
    assert len(set(captions(first))) > 8  # more than one shard's


def test_streams_leave_the_random_state_outside_alone(shards):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(ShardDataset("x", shards, Blip2ImageTrainProcessor(8)).iter_train(WORKER))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "entries",
    [
        [("a.image.jpg", picture(1)), ("a.caption.txt", b"a dog")],
        [("a.1.jpg", picture(1)), ("a.1.json", b'{"caption": "a dog"}')],
        [("a.jpg", picture(1)), ("a.json", b'{"text": "a dog", "url": "x"}')],
        [("a.tiff", picture(1, "TIFF")), ("a.TXT", b"a dog")],
        [("a.jpg", picture(1)), ("a.seg.png", picture(2, "PNG")), ("a.txt", b"a dog")],
    ],
    ids=["compound keys", "a dot in the key", "caption as text", "other extensions", "further images"],
)
def test_layouts_that_are_read(tmp_path, entries):
    (sample,) = ShardDataset("x", [shard(tmp_path / "0.tar", entries)], EVAL).iter_eval(WORKER)
    assert sample["text_input"] == "a dog"


OTHER_LAYOUTS = {
    "unsorted": (
        [("a.jpg", picture(1)), ("b.jpg", picture(2)), ("a.txt", b"a"), ("b.txt", b"b")],
        "begins with a.jpg, b.jpg, a.txt, b.txt. Expected KEY.jpg beside KEY.json",
    ),
    "dotted keys": (
        [(f"a.{number}.{kind}", data) for number in range(2) for kind, data in (("jpg", picture(1)), ("txt", b"a"))],
        "begins with a.0.jpg, a.0.txt, a.1.jpg, a.1.txt. Expected KEY.jpg beside",
    ),
    "a list as caption": (
        [("a.jpg", picture(1)), ("a.json", b'{"url": "x", "caption": ["a", "b"]}')],
        "begins with a.jpg, a.json; a JSON file has url of type str, caption of type list. Expected",
    ),
    "another key": (
        [("a.jpg", picture(1)), ("a.json", b'{"url": "x", "title": "a"}')],
        "begins with a.jpg, a.json; a JSON file has url of type str, title of type str. Expected",
    ),
    "no images": ([("a.cls", b"1"), ("a.npy", b"2")], "begins with a.cls, a.npy. Expected"),
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_what_a_shard_of_another_layout_holds_is_told(tmp_path, layout):
    entries, words = OTHER_LAYOUTS[layout]
    path = shard(tmp_path / "0.tar", entries)
    with pytest.raises(UserError) as error:
        next(ShardDataset("web", [path], EVAL, shuffle_buffer=10).iter_train(WORKER))
    assert f"{path}, which {words}" in str(error.value)
