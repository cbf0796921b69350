"""Shards, listed pairs and loaders: what is read, what is skipped, who gets what, and that a seed repeats it."""

import copy
import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from webdataset.tariterators import tar_file_expander, url_opener

from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.datasets import builders  # noqa: F401  (registers them)
from minigpt4.datasets.datasets import PairDataset, ShardDataset
from minigpt4.datasets.datasets.pairs import Pair, read_align_folder, read_pairs
from minigpt4.datasets.datasets.sample import Place
from minigpt4.datasets.datasets.tar_files import expand_shards, read_files
from minigpt4.datasets.loader import TrainLoader, validation_batches
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor

KEY = "datasets.x.build_info.storage"
EVAL = Blip2ImageEvalProcessor(8)
RANKS, WORKERS = 2, 2


def picture(color, kind="JPEG"):
    buffer = io.BytesIO()
    image = Image.new("RGB", (12, 10), (color % 256, 50, 200))
    image.paste((0, color % 256, 90), (3, 2, 8, 6))
    image.save(buffer, kind)
    return buffer.getvalue()


def shard(path, entries):
    """A tar file of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def good(number):
    return [
        (f"{number:05}.jpg", picture(number * 7)),
        (f"{number:05}.json", json.dumps({"caption": f"c{number}"}).encode()),
    ]


@pytest.fixture
def shards(tmp_path):
    """Three shards of eight samples each, captions c0 to c23."""
    return [
        shard(tmp_path / f"{i:05}.tar", [entry for n in range(8 * i, 8 * i + 8) for entry in good(n)]) for i in range(3)
    ]


@pytest.fixture
def pairs(tmp_path):
    """Twenty-four pairs, captions c0 to c23."""
    made = []
    for number in range(24):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(picture(number * 9))
        made.append(Pair(file, f"c{number}"))
    return made


def captions(samples):
    return [sample["text_input"] for sample in samples]


def places(**settings):
    for rank, worker in itertools.product(range(RANKS), range(WORKERS)):
        yield Place(seed=1, rank=rank, world_size=RANKS, turn=worker, num_workers=WORKERS, **settings)


def everything(number=24):
    return sorted(f"c{n}" for n in range(number))


def same(first, second):
    """Whether two lists of samples or batches are equal, pixels included."""
    return len(first) == len(second) and all(
        a["text_input"] == b["text_input"] and torch.equal(a["image"], b["image"])
        for a, b in zip(first, second, strict=True)
    )


# shards


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
    place = Place(seed=0)
    (sample,) = ShardDataset("x", [path], EVAL).once(place)
    assert sample["text_input"] == "a dog" and sample["instruction"] is None
    assert sample["image"].shape == (3, 8, 8) and not place.skipped


def test_text_stands_in_for_a_json_without_caption(tmp_path):
    entries = [("a.jpg", picture(1)), ("a.json", b'{"caption": null}'), ("a.txt", b"from text")]
    assert captions(ShardDataset("x", [shard(tmp_path / "0.tar", entries)], EVAL).once(Place(seed=0))) == ["from text"]


def test_processors_are_applied(shards):
    samples = list(ShardDataset("x", shards[:1], EVAL, str.upper).once(Place(seed=0)))
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
    place = Place(seed=0)
    found = captions(ShardDataset("x", [str(tmp_path / "0.tar"), shards[1]], EVAL).once(place))
    assert found[:4] == ["c0", "c1", "c2", "c3"] and found[-8:] == [f"c{n}" for n in range(8, 16)]
    assert len(found) == 12


# shards over the network


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture
def serve():
    """Starts a server on this machine from a request handler's do_GET; gives its address."""
    servers = []

    def start(do_get):
        handler = type("Handler", (BaseHTTPRequestHandler,), {"do_GET": do_get, "log_message": lambda *_: None})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def from_folder(folder):
    def do_get(self):
        file = folder / self.path[1:]
        self.send_response(200 if file.is_file() else 404)
        self.end_headers()
        self.wfile.write(file.read_bytes() if file.is_file() else b"not here")

    return do_get


@needs_curl
def test_shards_over_http(tmp_path, shards, serve, caplog):
    address = serve(from_folder(tmp_path))
    urls = expand_shards(address + "/{00000..00003}.tar", KEY)
    place = Place(seed=0)
    assert captions(ShardDataset("x", urls, EVAL).once(place)) == [f"c{n}" for n in range(24)]
    assert place.skipped == {"unreadable shard": 1} and "00003.tar: the program" in caplog.text
    local, remote = (
        list(itertools.islice(ShardDataset("x", paths, EVAL, shuffle_buffer=5).endless(Place(seed=2)), 30))
        for paths in (shards, urls[:3])
    )
    assert same(local, remote)


@needs_curl
def test_a_remote_shard_is_used_while_it_comes(shards, serve):
    data, go_on = Path(shards[0]).read_bytes(), threading.Event()

    def do_get(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        go_on.wait(30)
        self.wfile.write(data[len(data) // 2 :])

    samples = ShardDataset("x", [serve(do_get) + "/0.tar"], EVAL).once(Place(seed=0))
    assert next(samples)["text_input"] == "c0" and not go_on.is_set()
    go_on.set()
    assert captions(samples) == [f"c{n}" for n in range(1, 8)]


@needs_curl
def test_a_remote_shard_may_be_left_halfway(tmp_path, shards, serve):
    big = shard(tmp_path / "big.tar", [("0.jpg", picture(1)), ("0.txt", b"c"), ("1.txt", bytes(10**6)), *good(2)])
    for url in (serve(from_folder(tmp_path)) + "/big.tar", f"pipe:cat {big}"):
        place = Place(seed=0)
        samples = ShardDataset("x", [url], EVAL).once(place)
        next(samples)
        samples.close()
        assert not place.skipped


@pytest.mark.parametrize(("scheme", "client"), [("s3", "aws"), ("gs", "gsutil")])
def test_object_stores_by_their_clients(tmp_path, shards, scheme, client, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match=rf"^{KEY}: '{scheme}://b/.*' is read by the program {client}, which is not"):
        expand_shards(f"{scheme}://b/{{00000..00001}}.tar", KEY)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / client
    script.write_text(
        '#!/bin/sh\nfor word in "$@"; do case "$word" in\n'
        f'    {scheme}://b/*) /bin/cat "{tmp_path}/${{word#{scheme}://b/}}";;\nesac; done\n'
    )
    script.chmod(0o755)
    urls = expand_shards(f"{scheme}://b/{{00000..00001}}.tar", KEY)
    assert captions(ShardDataset("x", urls, EVAL).once(Place(seed=0))) == [f"c{n}" for n in range(16)]


def test_urls_that_nothing_reads():
    with pytest.raises(
        UserError, match=rf"^{KEY}: nothing here reads 'ipfs://x/0.tar'; known are http, https, .*pipe:"
    ):
        expand_shards("ipfs://x/{0..1}.tar", KEY)


def test_a_failing_client_is_counted_and_named(shards, caplog):
    place = Place(seed=0)
    found = captions(ShardDataset("x", ["pipe:cat " + shards[0] + "; exit 3", shards[1]], EVAL).once(place))
    assert found == [f"c{n}" for n in range(16)] and place.skipped == {"unreadable shard": 1}
    assert "ended with status 3" in caplog.text


EMPTY_JSON = [("b5.jpg", picture(1)), ("b5.json", b"{}")]
BAD = {
    "unreadable image": [("b0.jpg", b"no image"), ("b0.txt", b"a"), ("b1.jpg", picture(3)[:200]), ("b1.txt", b"b")],
    "no image": [("b2.txt", b"alone")],
    "no caption": [("b3.jpg", picture(1)), ("b4.jpg", picture(1)), ("b4.txt", b" "), *EMPTY_JSON],
    "unreadable json": [("b6.jpg", picture(1)), ("b6.json", b"{")],
}


def test_corrupt_samples_are_counted_by_kind(tmp_path):
    entries = good(0) + [entry for kind in BAD.values() for entry in kind] + good(1)
    place = Place(seed=0)
    samples = list(ShardDataset("x", [shard(tmp_path / "0.tar", entries)], EVAL).once(place))
    assert captions(samples) == ["c0", "c1"]
    assert place.skipped == {"unreadable image": 2, "no image": 1, "no caption": 3, "unreadable json": 1}


def test_training_goes_on_past_corrupt_samples(tmp_path):
    path = shard(tmp_path / "0.tar", good(0) + BAD["unreadable image"] + good(1))
    place = Place(seed=0)
    samples = itertools.islice(ShardDataset("x", [path], EVAL, shuffle_buffer=4).endless(place), 40)
    assert set(captions(samples)) == {"c0", "c1"}
    assert place.skipped["unreadable image"] > 5


def test_cut_shard_is_counted(tmp_path, shards, caplog):
    with open(shards[1], "r+b") as file:
        file.truncate(5000)
    place = Place(seed=0)
    found = captions(ShardDataset("x", shards, EVAL).once(place))
    assert place.skipped["unreadable shard"] == 1 and "cannot be read on" in caplog.text
    assert {f"c{n}" for n in (*range(8), *range(16, 24))} <= set(found) and len(found) < 24


@pytest.mark.parametrize("kind", [*BAD, "empty shard", "no tar"])
def test_source_without_a_usable_sample(tmp_path, kind):
    path = shard(tmp_path / "0.tar", BAD.get(kind, []))
    if kind == "no tar":
        (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError) as error:
        next(ShardDataset("web", [path], EVAL, shuffle_buffer=10).endless(Place(seed=0)))
    cause = {"empty shard": "empty", "no tar": "unreadable shard"}.get(kind, kind)
    assert all(word in str(error.value) for word in ("web", cause, path, "KEY.jpg"))


def test_shards_once_are_shared_out(shards):
    parts = [captions(ShardDataset("x", shards, EVAL).once(place)) for place in places()]
    assert all(parts) and sorted(itertools.chain(*parts)) == everything()


def test_same_seed_same_shard_samples(shards):
    dataset = ShardDataset("x", shards, Blip2ImageTrainProcessor(8), shuffle_buffer=10)

    def draw(seed=1, **place):
        return list(itertools.islice(dataset.endless(Place(seed=seed, **place)), 30))

    torch.manual_seed(5)
    first = draw()
    torch.manual_seed(6)
    assert same(first, draw())
    others = (draw(2), draw(draw=1), draw(rank=1), draw(turn=1, num_workers=2))
    assert all(captions(other) != captions(first) for other in others)
    assert len(set(captions(first))) > 8  # more than one shard's


def test_random_state_outside_is_left_alone(shards):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(ShardDataset("x", shards, Blip2ImageTrainProcessor(8)).endless(Place(seed=0)))
    assert torch.equal(torch.get_rng_state(), state)


# pairs


def test_pairs_endless_are_shared_out(pairs):
    """Of each pass every pair goes to exactly one worker of one rank, in an order of its own."""
    dataset, passes = PairDataset("x", pairs, EVAL), []
    streams = [dataset.endless(place) for place in places(batch_size=3)]
    for _ in range(2):
        parts = [captions(itertools.islice(stream, 6)) for stream in streams]
        assert sorted(itertools.chain(*parts)) == everything()
        passes.append(parts)
    assert passes[0] != passes[1]


def test_pairs_once_are_shared_out(pairs):
    parts = [captions(PairDataset("x", pairs, EVAL).once(place)) for place in places()]
    assert all(parts) and sorted(itertools.chain(*parts)) == everything()


def test_pairs_that_cannot_be_used_are_replaced(pairs):
    pairs[3].image.write_bytes(b"no image")
    pairs[4].image.unlink()
    pairs[5] = Pair(pairs[5].image, " ")
    place = Place(seed=0)
    found = captions(itertools.islice(PairDataset("x", pairs, EVAL).endless(place), 24))
    assert not {"c3", "c4", "c5"} & set(found) and len(set(found)) == 21
    assert set(place.skipped) == {"unreadable image", "missing image file", "no caption"}
    place = Place(seed=0)
    assert len(list(PairDataset("x", pairs, EVAL).once(place))) == 21
    assert place.skipped == {"unreadable image": 1, "missing image file": 1, "no caption": 1}


def test_pairs_without_a_usable_one(tmp_path):
    with pytest.raises(UserError) as error:
        next(PairDataset("mine", [Pair(tmp_path / "no.jpg", "c")], EVAL).endless(Place(seed=0)))
    assert all(word in str(error.value) for word in ("mine", "1000", "missing image file", "no.jpg"))


def test_align_folder(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "2.jpg").write_bytes(picture(1))
    content = {"annotations": [{"image_id": "2", "caption": "A dog. It sits!"}, {"image_id": 7, "caption": "b"}]}
    (tmp_path / "filter_cap.json").write_text(json.dumps(content))
    folder = tmp_path / "image"
    assert read_align_folder(tmp_path, KEY) == [Pair(folder / "2.jpg", "A dog. It sits!"), Pair(folder / "7.jpg", "b")]
    sizes = {"train": {"name": "blip2_image_eval", "image_size": 8}}
    config = {"build_info": {"storage": str(tmp_path)}, "vis_processor": sizes}
    dataset = registry.get_builder_class("cc_sbu_align")(config, "cc_sbu_align").build_datasets()["train"]
    sample = dataset[0]
    assert sample["text_input"] == "A dog. It sits!"  # as it is: no caption processor here
    assert sample["image"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "filter_cap.json"),
        ("{", "JSON"),
        ("[]", "annotations"),
        ('{"annotations": []}', "annotations"),
        ('{"annotations": [{"image_id": "1"}]}', "caption"),
        ('{"annotations": [{"image_id": "../1", "caption": "a"}]}', "../1"),
    ],
)
def test_bad_align_folder(tmp_path, content, words):
    if content is not None:
        (tmp_path / "filter_cap.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_align_folder(tmp_path, KEY)
    assert KEY in str(error.value) and words in str(error.value)


def test_jsonl(tmp_path):
    rows = [{"image": "a.jpg", "caption": "a"}, {"image": "sub/b.png", "caption": "b", "instruction": "What?"}]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    expected = [Pair(tmp_path / "a.jpg", "a"), Pair(tmp_path / "sub" / "b.png", "b", "What?")]
    assert read_pairs(file, KEY) == read_pairs(tmp_path, KEY) == expected
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.png").write_bytes(picture(1, "PNG"))
    assert PairDataset("x", expected, EVAL)[1]["instruction"] == "What?"


def test_folder_of_images_with_texts(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "no_text.jpg"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a", "b", "deep/c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}\n")
    found = {pair.image.name: pair.caption for pair in read_pairs(tmp_path, KEY)}
    assert found == {"a.jpg": "text of a", "b.PNG": "text of b", "c.webp": "text of deep/c"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ("0 images",)),
        ({"a.jpg": "x"}, ("1 images", ".txt")),
        ({"a.jsonl": "", "b.jsonl": ""}, ("a.jsonl, b.jsonl",)),
        ({"a.jsonl": ""}, ("empty",)),
        ({"a.jsonl": '{"image": "x"}'}, ("line 1", "caption")),
        ({"a.jsonl": '{"image": "x", "caption": "c"}\n{'}, ("line 2", "JSON")),
        ({"a.jsonl": '{"image": "x", "caption": "c", "instruction": 5}'}, ("line 1", "instruction", "5")),
    ],
    ids=range(7),
)
def test_bad_folder_of_ones_own(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_pairs(tmp_path, KEY)
    assert all(word in str(error.value) for word in (KEY, *words))


# builders


def test_shard_builder_and_splits(shards, tmp_path):
    info = {"storage": shards[:2], "val_storage": shards[2]}
    sizes = {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 8}}}
    splits = registry.get_builder_class("laion")({"build_info": info, **sizes}, "laion").build_datasets()
    assert set(splits) == {"train", "val"} and splits["train"].shards == shards[:2]
    assert isinstance(splits["train"].vis_processor, Blip2ImageTrainProcessor)
    assert isinstance(splits["val"].vis_processor, Blip2ImageEvalProcessor)
    assert next(iter(splits["val"].once(Place(seed=0))))["image"].shape == (3, 8, 8)


@pytest.mark.parametrize("name", ["laion", "cc_sbu", "cc_sbu_align", "image_text"])
def test_builder_without_data(name):
    builder = registry.get_builder_class(name)
    assert builder.default_config_path("default").is_file()
    with pytest.raises(UserError, match=rf"datasets\.{name}\.build_info\.storage is not set"):
        builder({}, name).build_datasets()
    with pytest.raises(UserError, match=rf"datasets\.{name}\.build_info\.storage.*placeholder"):
        builder({"build_info": {"storage": "/path/to/data.tar"}}, name).build_datasets()


# loaders


def make_loader(sources, ratios=None, **settings):
    settings = {"batch_size": 2, "iters_per_epoch": 8, "num_workers": 0, "seed": 3} | settings
    return TrainLoader(sources, ratios or {}, **settings)


def test_workers_do_not_change_what_pairs_give(pairs):
    dataset = PairDataset("x", pairs, Blip2ImageTrainProcessor(8))
    none, two = (list(make_loader({"x": dataset}, num_workers=number).epoch(0)) for number in (0, 2))
    assert same(none, two) and len(none) == 8
    assert none[0]["image"].shape == (2, 3, 8, 8) and none[0]["source"] == "x"


def test_same_seed_same_batches(pairs, shards):
    def batches(seed, epoch):
        sources = {
            "pairs": PairDataset("pairs", pairs, Blip2ImageTrainProcessor(8)),
            "shards": ShardDataset("shards", shards, Blip2ImageTrainProcessor(8), shuffle_buffer=5),
        }
        return list(make_loader(sources, seed=seed).epoch(epoch))

    first = batches(3, 1)
    assert same(first, batches(3, 1)) and {batch["source"] for batch in first} == {"pairs", "shards"}
    assert not same(first, batches(4, 1)) and not same(first, batches(3, 0))


def test_epochs_go_on_through_the_passes(pairs):
    loader = make_loader({"x": PairDataset("x", pairs, EVAL)}, iters_per_epoch=6)
    both = [text for epoch in range(2) for batch in loader.epoch(epoch) for text in batch["text_input"]]
    assert sorted(both) == everything()


def test_sources_are_mixed_by_ratio(pairs):
    sources = {name: PairDataset(name, pairs, lambda image: torch.zeros(1)) for name in ("a", "b", "c")}
    loader = make_loader(sources, {"a": 3, "b": 1, "c": 0}, batch_size=1, iters_per_epoch=400)
    counts = Counter(batch["source"] for batch in loader.epoch(0))
    assert set(counts) == {"a", "b"} and 260 < counts["a"] < 340
    assert make_loader(sources, {"a": None}).weights == [1, 1, 1]


@pytest.mark.parametrize("ratios", [{"a": 0}, {"a": -1}])
def test_bad_ratios(ratios):
    with pytest.raises(UserError, match="sample_ratio of a"):
        make_loader({"a": None}, ratios)


def test_no_source():
    with pytest.raises(UserError, match="train_splits"):
        make_loader({})


def test_skipped_samples_arrive_with_the_batches(pairs):
    pairs[0].image.write_bytes(b"no image")
    batches = list(make_loader({"x": PairDataset("x", pairs, EVAL)}, iters_per_epoch=12).epoch(0))
    assert sum((Counter(batch["skipped"]) for batch in batches), Counter()) == {"unreadable image": 1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_in_a_worker_arrives_as_it_is(tmp_path, num_workers):
    dataset = PairDataset("mine", [Pair(tmp_path / "no.jpg", "c")], EVAL)
    with pytest.raises(UserError, match=r"^Data set mine gives no usable sample"):
        list(make_loader({"mine": dataset}, num_workers=num_workers).epoch(0))


def test_an_exception_ends_the_process_and_its_workers(shards):
    program = (
        "from minigpt4.datasets.datasets import ShardDataset\n"
        "from minigpt4.datasets.loader import TrainLoader\n"
        "from minigpt4.processors import Blip2ImageEvalProcessor\n"
        f"dataset = ShardDataset('x', {shards}, Blip2ImageEvalProcessor(8))\n"
        "batches = TrainLoader({'x': dataset}, {}, 2, iters_per_epoch=99, num_workers=1, seed=0).epoch(0)\n"
        "next(batches)\n"
        "raise RuntimeError('something else')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr.rstrip().endswith("RuntimeError: something else")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_sees_every_sample_once(pairs, shards, num_workers):
    for dataset in (PairDataset("x", pairs, EVAL), ShardDataset("x", shards, EVAL)):
        batches = list(validation_batches("x", dataset, batch_size=5, num_workers=num_workers, seed=0))
        assert sorted(text for batch in batches for text in batch["text_input"]) == everything()
        assert max(len(batch["image"]) for batch in batches) == 5


# going on in the middle


def mixed(pairs, shards, num_workers, **settings):
    sources = {
        "pairs": PairDataset("pairs", pairs, Blip2ImageTrainProcessor(8)),
        "shards": ShardDataset("shards", shards, Blip2ImageTrainProcessor(8), shuffle_buffer=11),
    }
    return make_loader(sources, {"shards": 3}, num_workers=num_workers, iters_per_epoch=14, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("first", [1, 5, 12, 14])
def test_an_epoch_goes_on_at_any_iteration(pairs, shards, first, num_workers):
    bad = shard(shards[0], [*good(0), ("bad.jpg", b"no image"), ("bad.txt", b"c"), *good(1)])
    whole = mixed(pairs, [bad, *shards[1:]], num_workers)
    expected, state = [], None
    for i, batch in enumerate(whole.epoch(1), 1):
        expected.append(batch)
        if i == first:
            state = copy.deepcopy(whole.state_dict())
    again = mixed(pairs, [bad, *shards[1:]], num_workers)
    again.load_state_dict([state], 1, first)
    assert same(list(again.epoch(1, first)), expected[first:])
    assert again.state_dict() == whole.state_dict()
    assert same(list(again.epoch(2)), list(whole.epoch(2)))


def test_a_shard_that_changed_meanwhile_is_named(pairs, shards):
    whole = mixed(pairs, shards, 0)
    batches = whole.epoch(0)
    for _ in range(13):
        next(batches)
    state = whole.state_dict()
    for path in shards:
        shard(path, good(1))
    again = mixed(pairs, shards, 0)
    again.load_state_dict([state], 0, 13)
    with pytest.raises(UserError, match="no longer holds the samples that it held when the run was left"):
        list(again.epoch(0, 13))


def test_listed_pairs_go_on_with_another_number_of_ranks(pairs, monkeypatch, caplog):
    def loader(rank, world, **settings):
        monkeypatch.setattr("minigpt4.datasets.loader.dist_utils.get_rank", lambda: rank)
        monkeypatch.setattr("minigpt4.datasets.loader.dist_utils.get_world_size", lambda: world)
        return make_loader({"x": PairDataset("x", pairs, EVAL)}, iters_per_epoch=12, **settings)

    seen, states = [], []
    for rank in range(2):
        two = loader(rank, 2)
        batches = two.epoch(0)
        seen += [text for _ in range(3) for text in next(batches)["text_input"]]
        states.append(two.state_dict())
    one = loader(0, 1, batch_size=3)
    one.load_state_dict(states, 0, 3)
    batches = one.epoch(0, 3)
    seen += [text for _ in range(4) for text in next(batches)["text_input"]]
    assert sorted(seen) == everything()
    assert "written by 2 ranks with 0 loader workers and batches of 2, this run has 1, 0 and 3" in caplog.text


def test_shards_are_drawn_anew_with_another_number_of_workers(pairs, shards):
    whole = mixed(pairs, shards, 2)
    batches = whole.epoch(0)
    for _ in range(5):
        next(batches)
    again = mixed(pairs, shards, 1)
    again.load_state_dict([whole.state_dict()], 0, 5)
    rest = list(again.epoch(0, 5))
    state, later = again.state_dict(), mixed(pairs, shards, 1)
    assert len(rest) == 9 and not same(rest[:3], list(mixed(pairs, shards, 1).epoch(0))[:3])
    later.load_state_dict([{**state, "given": whole.state_dict()["given"], "positions": {}}], 0, 5)
    assert same(list(later.epoch(0, 5)), rest)
