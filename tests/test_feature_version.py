"""The version of feature caches: the numbers and the file format that it stands for."""

import json

import numpy
import pytest
import torch
from behaviour import load_config, write_config
from PIL import Image
from safetensors import safe_open

from minigpt4.datasets.feature_cache import VERSION
from minigpt4.tasks import setup_task

# Of the golden weights: the first two numbers of the first query, of three images in two random crops each. If a change
# of code moves them, caches made before are wrong: increase VERSION in feature_cache.py and record them anew.
RECORDED = {
    2: [1.789, 1.305, 1.734, 1.523, 2.063, 1.656, 2.438, 1.547, 2.359, -0.063, 1.945, 1.656],
}


@pytest.fixture
def part(tmp_path):
    """The one file of a cache of three images."""
    y, x = numpy.mgrid[:40, :56]
    rows = []
    for number in range(3):
        planes = [(x * (4 + number)) % 256, (y * 6) % 256, ((x + y) * (2 + number)) % 256]
        Image.fromarray(numpy.stack(planes, 2).astype(numpy.uint8)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "caption": f"c{number}", "instruction": "Why?"}))
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    section = {
        "build_info": {"storage": str(tmp_path / "own.jsonl")},
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": 28}},
    }
    run = {"feature_cache": str(tmp_path / "cache"), "feature_crops": 2, "seed": 1}
    cfg = load_config(write_config(tmp_path / "run.yaml", run, {"image_text": section}))
    (file,) = setup_task(cfg).build_datasets(cfg)["image_text"]["train"].files
    return file


def test_numbers_and_format_of_this_version(part):
    with safe_open(part, "pt") as opened:
        features, texts, ends = (opened.get_tensor(name) for name in ("features", "texts", "text_ends"))
    assert features.shape == (3, 2, 8, 48) and features.dtype == torch.bfloat16
    assert bytes(texts) == b'["c0", "Why?"]["c1", "Why?"]["c2", "Why?"]' and ends.tolist() == [14, 28, 42]
    found = features[:, :, 0, :2].flatten().tolist()
    assert found == pytest.approx(RECORDED[VERSION], abs=2e-2), "see the comment at RECORDED"
    assert json.loads((part.parent / "fingerprint.json").read_text())["version"] == VERSION
