"""The recipe that trains the quickstart's backbones, run for two steps into a folder of its own."""

import hashlib
import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minigpt4.models.llama_tokenizer import load_tokenizer
from quickstart import pretrain, text_side


def digests(folder):
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def shapes(file):
    return {name: (tuple(value.shape), value.dtype) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def published():
    """The weights of the repository, which no run of the recipe below may change."""
    before = digests(pretrain.WEIGHTS)
    yield pretrain.WEIGHTS
    assert digests(pretrain.WEIGHTS) == before


def run(folder, *arguments):
    pretrain.main([*arguments, "--steps", "2", "--weights", str(folder)])
    return json.loads((folder / "pretraining.json").read_text())


def test_text_recipe_writes_a_language_model_like_the_published_one(published, tmp_path):
    report = run(tmp_path, "text")
    assert report["text"]["steps"] == 2 and 0 <= report["text"]["ceiling on held-out objects"] < 0.1
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "llama" / name).read_bytes() == (published / "llama" / name).read_bytes()
    model = Path("llama/model.safetensors")
    assert shapes(tmp_path / model) == shapes(published / model)
    first = digests(tmp_path)
    assert run(tmp_path, "text", "--again")["text"]["steps"] == 4
    assert digests(tmp_path)[tmp_path / model] != first[tmp_path / model]


def test_vision_recipe_writes_weights_like_the_published_ones_and_continues_from_them(published, tmp_path):
    assert run(tmp_path, "vision")["vision"]["steps"] == 2
    first = digests(tmp_path)
    assert run(tmp_path, "vision", "--again")["vision"]["steps"] == 4
    for name in ("eva_vit.safetensors", "qformer.safetensors"):
        assert shapes(tmp_path / name) == shapes(published / name)
        assert digests(tmp_path)[tmp_path / name] != first[tmp_path / name]


def test_ceilings_of_the_published_language_model(published):
    model = AutoModelForCausalLM.from_pretrained(published / "llama", dtype=torch.float32).eval()
    rows = text_side.TrainingRows(load_tokenizer(published / "llama"), Random(1))
    assert text_side.measure_ceiling(model, rows, Random(2), num_scenes=20) == 1.0
    assert text_side.measure_yes_no(model, rows, Random(3), num_scenes=100) > 0.9
