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
from webdataset.tariterators import tar_file_expander, url_opener

from minigpt4.common.errors import UserError
from minigpt4.datasets.datasets import ShardDataset
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.datasets.datasets.tar_files import expand_shards, read_files
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
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_forms_of_tar_files(tmp_path, form, mode):
    """Long and foreign names, folders, links, webdataset's own records: what tarfile itself would give."""
    long = "a" * 90 + "/" + "b" * 60
    with tarfile.open(tmp_path / "0.tar", mode, format=form) as tar:
        for name, data in [(f"{long}.jpg", picture(1)), (f"{long}.txt", b"x"), ("图/1.txt", b"y"), ("__meta__", b"z")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)

    def fail(error):
        raise error

    path = str(tmp_path / "0.tar")
    found = list(read_files([path], fail))
    assert [file.get("fname") for file in found] == [f"{long}.jpg", f"{long}.txt", "图/1.txt", None]
    assert found == list(tar_file_expander(url_opener([{"url": path}], handler=fail), handler=fail))


def test_a_damaged_header_ends_a_shard(tmp_path, shards):
    data = bytearray(Path(shards[0]).read_bytes())
    start = data.index(b"00004.jpg")
    data[start + 124] ^= 1  # of the size, so that the sum no longer fits
    (tmp_path / "0.tar").write_bytes(data)
    skipped = Counter()
    found = captions(ShardDataset("x", [str(tmp_path / "0.tar"), shards[1]], EVAL).iter_eval(WORKER, skipped))
    assert found[:4] == ["c0", "c1", "c2", "c3"] and found[-8:] == [f"c{n}" for n in range(8, 16)]
    assert len(found) == 12


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
