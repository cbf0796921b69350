"""Small shards and pairs for the tests of data, and what compares samples and batches."""

import io
import itertools
import json
import tarfile

import pytest
import torch
from PIL import Image

from minigpt4.datasets.datasets.pairs import Pair
from minigpt4.datasets.datasets.sample import WorkerInfo
from minigpt4.datasets.loader import TrainLoader
from minigpt4.processors import Blip2ImageEvalProcessor

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


def texts(batches):
    return [text for batch in batches for text in batch["text_input"]]


def workers():
    for rank, worker in itertools.product(range(RANKS), range(WORKERS)):
        yield WorkerInfo(seed=1, rank=rank, world_size=RANKS, worker_id=worker, num_workers=WORKERS)


def everything(number=24):
    return sorted(f"c{n}" for n in range(number))


def same(first, second):
    """Whether two lists of samples or batches are equal, pixels included."""
    return len(first) == len(second) and all(
        a["text_input"] == b["text_input"] and torch.equal(a["image"], b["image"])
        for a, b in zip(first, second, strict=True)
    )


def make_loader(datasets, ratios=None, **settings):
    settings = {"batch_size": 2, "iters_per_epoch": 8, "num_workers": 0, "seed": 3} | settings
    return TrainLoader(datasets, ratios or {}, **settings)


def be_rank(monkeypatch, rank, world_size):
    """Lets the loaders of this process act as one of several ranks."""
    monkeypatch.setattr("minigpt4.datasets.loader.dist_utils.get_rank", lambda: rank)
    monkeypatch.setattr("minigpt4.datasets.loader.dist_utils.get_world_size", lambda: world_size)
