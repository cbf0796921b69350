"""Checkpoints to resume from and feature caches that somebody prepared: refused in a line."""

import pytest
import torch
from confined import told
from hostile_weights import PROJECTION, written
from safetensors.torch import save_file

from minigpt4.datasets.feature_cache import FeatureDataset, check_fingerprint

pytestmark = pytest.mark.usefixtures("confined")

RESUMED = {
    "no epoch": ({"optimizer": {}}, "weights only"),
    "no optimizer": ({"epoch": 1}, "weights only"),
    "an empty optimizer": ({"optimizer": {}, "epoch": 1}, "cannot resume from"),
    "an optimizer as a list": ({"optimizer": [], "epoch": 1}, "cannot resume from"),
    "an epoch as a text": ({"epoch": "1"}, "cannot resume from"),
    "a state as a list": ({"state": [1]}, "cannot resume from"),
    "a state of other fields": ({"state": {"evil": 1}}, "cannot resume from", "evil"),
    "ranks as a number": ({"ranks": 5}, "cannot resume from"),
    "ranks of nothing": ({"ranks": [{}]}, "cannot resume from"),
    "losses as a text": ({"bad_losses": "many"}, "cannot resume from"),
    "gradients of texts": ({"gradients": ["a"]}, "cannot resume from"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_from(model, tmp_path, case):
    from minigpt4.common.schema import RunConfig
    from minigpt4.runners.progress import EpochProgress
    from minigpt4.runners.runner_base import RunnerBase
    from minigpt4.runners.updater import Updater

    content, *words = RESUMED[case]
    device = torch.device("cpu")
    runner = object.__new__(RunnerBase)
    runner.model, runner.output_dir, runner.iters_per_epoch, runner.device = model, tmp_path / "run", 1, device
    runner.updater = Updater(model, RunConfig(), device, torch.float32)
    runner.progress, runner.train_loader = EpochProgress(device, tracker=None, log_freq=1), None
    whole = {"model": PROJECTION, "optimizer": runner.updater.optimizer.state_dict(), "epoch": 1} | content
    if "weights only" in words:
        whole = {"model": PROJECTION} | content
    told(lambda: runner.load_checkpoint(written(tmp_path / "c.pth", whole)), "run.resume_ckpt_path", "c.pth", *words)


# caches of features


def cached(folder, **changes):
    """A part of a cache with one sample."""
    text = b'["a", null]'
    content = {
        "features": torch.ones(1, 1, 3, 2, dtype=torch.bfloat16),
        "texts": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        "text_ends": torch.tensor([len(text)]),
    }
    save_file(content | changes, folder / "part.safetensors")
    return folder / "part.safetensors"


def text_of(data):
    return {"texts": torch.frombuffer(bytearray(data), dtype=torch.uint8), "text_ends": torch.tensor([len(data)])}


PARTS = {
    "no sample": ({"features": torch.ones(0, 1, 3, 2), "text_ends": torch.zeros(0).long()}, "no usable sample"),
    "no crop": ({"features": torch.ones(1, 0, 3, 2)}, "damaged"),
    "flat features": ({"features": torch.ones(6)}, "damaged"),
    "fewer texts": ({"text_ends": torch.zeros(0, dtype=torch.int64)}, "damaged"),
    "more texts": ({"text_ends": torch.tensor([1, 2])}, "damaged"),
    "a text beyond the end": ({"text_ends": torch.tensor([10**12])}, "damaged"),
    "a text below zero": ({"text_ends": torch.tensor([-1])}, "damaged"),
    "a text that is no JSON": (text_of(b"a dog"), "damaged"),
    "a text that is deep": (text_of(b"[" * 10**6), "damaged"),
    "a text that is a number": (text_of(b"5"), "damaged"),
    "three texts": (text_of(b'["a", "b", "c"]'), "damaged"),
}


@pytest.mark.parametrize("case", PARTS)
def test_part_of_a_cache(tmp_path, case):
    changes, *words = PARTS[case]
    file = cached(tmp_path, **changes)
    told(lambda: FeatureDataset("x", [file])[0], "run.feature_cache", str(tmp_path), *words)


def test_a_good_part_of_a_cache(tmp_path):
    sample = FeatureDataset("x", [cached(tmp_path)])[0]
    assert sample["features"].shape == (3, 2) and (sample["text_input"], sample["instruction"]) == ("a", None)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"[" * 10**6, b'{"weights": 5}', b"\xff"],
    ids=["no bytes", "list", "null", "deep", "number", "not UTF-8"],
)
def test_fingerprint(tmp_path, content):
    (tmp_path / "fingerprint.json").write_bytes(content)
    told(lambda: check_fingerprint(tmp_path, {"weights": "a"}), "run.feature_cache", str(tmp_path))
