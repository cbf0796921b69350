"""What the tests of weight files share: the golden parts, and a copy of the tiny LM to be damaged."""

import functools
import json
import shutil

import pytest
import torch
from conftest import TINY_CONFIG
from golden_data import GOLDEN, TINY, read_json, read_tensors
from safetensors.torch import load_file, save_file

from minigpt4.models import MiniGPT4

VIT = load_file(TINY / "eva_vit.safetensors")
Q_FORMER = load_file(TINY / "qformer.safetensors")
PROJECTION = torch.load(TINY / "minigpt4_ckpt.pth", weights_only=True)["model"]
VISION = read_tensors("vision")
PARTS = {"vit_weights": VIT, "q_former_model": Q_FORMER, "ckpt": {"model": PROJECTION}}
FULL = read_json("full_scale_keys.json", GOLDEN)


def written(file, content):
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, file)
    else:
        torch.save(content, file)
    return str(file)


@functools.cache
def golden_output():
    """What the model of the golden weights encodes the golden images to, here."""
    model = MiniGPT4.from_config(TINY_CONFIG, device=torch.device("cpu"))
    with torch.no_grad():
        return model.encode_img(VISION["image"])[0]


def encodes_alike(model):
    with torch.no_grad():
        return torch.equal(model.encode_img(VISION["image"])[0], golden_output())


@pytest.fixture
def llama(tmp_path):
    """A copy of the tiny LM's folder, safetensors only, to be damaged."""
    return shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("*.bin"))


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def sharded(folder, state, pattern):
    """Writes tensors as three shards with an index, the language model's in the last one; returns the shards' names."""
    others = sorted(name for name in state if not name.startswith("language_"))
    groups = others[::2], others[1::2], [name for name in state if name not in others]
    shards = [pattern.format(f"-{number:05}-of-00003") for number in (1, 2, 3)]
    for shard, group in zip(shards, groups, strict=True):
        written(folder / shard, {name: state[name] for name in group})
    weight_map = {name: shard for shard, group in zip(shards, groups, strict=True) for name in group}
    (folder / f"{pattern.format('')}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards
