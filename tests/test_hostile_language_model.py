"""Language model folders that somebody prepared: refused in a line, nothing run, nothing half loaded."""

import json
import os
import shutil

import pytest
import torch
from confined import told
from golden_data import TINY
from hostile_weights import replaced
from safetensors.torch import load_file, save_file

from minigpt4.models.language_model import load_language_model
from minigpt4.models.packed_attention import NAME
from minigpt4.tools.apply_delta import read_folder

pytestmark = pytest.mark.usefixtures("confined")
LLAMA = load_file(TINY / "llama" / "model.safetensors")


@pytest.fixture
def llama(tmp_path):
    return shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("*.bin"))


def configured(**changes):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )


def indexed(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def spoiled(name, change):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        state[name] = change(state[name])
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


REMOTE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
FOLDERS = {
    "config.json of no bytes": (replaced("config.json", b""), "config.json", "JSON"),
    "config.json as a list": (replaced("config.json", b"[]"), "config.json"),
    "config.json as a text": (replaced("config.json", b'"llama"'), "config.json"),
    "config.json that is deep": (replaced("config.json", b"[" * 10**6), "config.json", "JSON"),
    "config.json that is no UTF-8": (replaced("config.json", b'{"a": "\xff"}'), "config.json", "JSON"),
    "config.json of nothing": (replaced("config.json", b"{}"), "cannot be loaded"),
    "an unknown architecture": (configured(model_type="evil"), "cannot be loaded"),
    "an architecture of pictures": (configured(model_type="vit", architectures=["ViTModel"]), "cannot be loaded"),
    "code of its own": (configured(model_type="evil", auto_map=REMOTE), "cannot be loaded"),
    "a kernel of its own": (configured(attn_implementation="evil/kernel", model_type="evil"), "cannot be loaded"),
    "a billion layers": (configured(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "layers below zero": (configured(num_hidden_layers=-1), "num_hidden_layers -1"),
    "no layers": (configured(num_hidden_layers=0), "num_hidden_layers 0"),
    "layers as a text": (configured(num_hidden_layers="two"), "cannot be loaded"),
    "no heads": (configured(num_attention_heads=0), "cannot be loaded"),
    "a width of a billion": (configured(hidden_size=10**9), "llama"),
    "a vocabulary of 2^70": (configured(vocab_size=2**70), "cannot be loaded"),
    "one layer more": (configured(num_hidden_layers=9), "missing", "model.layers."),
    "one layer less": (configured(num_hidden_layers=1), "unknown", "model.layers.1"),
    "another width": (configured(hidden_size=32), "in the model"),
    "an index of no bytes": (indexed(""), "index.json", "JSON"),
    "an index as a list": (indexed([]), "index.json", "weight_map"),
    "an index without a map": (indexed({}), "weight_map"),
    "an index with an empty map": (indexed({"weight_map": {}}), "weight_map"),
    "an index with a list": (indexed({"weight_map": ["a"]}), "weight_map"),
    "an index of numbers": (indexed({"weight_map": {"a": 5}}), "1 of 1 files", "5"),
    "an index of lists": (indexed({"weight_map": {"a": ["b"]}}), "1 of 1 files"),
    "an index that is deep": (indexed("[" * 10**6), "JSON"),
    "an index that leads up": (
        indexed({"weight_map": {"a": "../evil.safetensors"}}),
        "'../evil.safetensors'",
        "beside it",
    ),
    "an index of an absolute name": (indexed({"weight_map": {"a": "/etc/passwd"}}), "'/etc/passwd'", "beside it"),
    "an index of the folder": (indexed({"weight_map": {"a": "."}}), "'.'"),
    "an index with an empty name": (indexed({"weight_map": {"a": ""}}), "index.json"),
    "an index with a name of 5000 letters": (indexed({"weight_map": {"a": "a" * 5000}}), "1 of 1 files"),
    "an index with a zero byte": (indexed({"weight_map": {"a": "a\0b"}}), "1 of 1 files"),
    "NaN": (spoiled("lm_head.weight", lambda value: value * torch.nan), "lm_head.weight", "NaN"),
    "whole numbers": (spoiled("lm_head.weight", lambda value: value.to(torch.int64)), "lm_head.weight", "in the model"),
    "eighths": (spoiled("lm_head.weight", lambda value: value.to(torch.float8_e4m3fn)), "lm_head.weight"),
    "a flat matrix": (spoiled("lm_head.weight", lambda value: value.flatten()), "lm_head.weight", "in the model"),
    "weights cut short": (
        lambda folder: os.truncate(folder / "model.safetensors", 900_000),
        "cannot be read as weights",
    ),
    "weights that are a pipe": (
        lambda folder: ((folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_language_model(llama, case, monkeypatch):
    change, *words = FOLDERS[case]
    change(llama)
    (llama / "evil.py").write_text("open('ran', 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked agrees
    told(lambda: load_language_model(llama, torch.float32), "model.llama_model", str(llama), *words)


def test_a_number_as_a_name_in_the_language_model(llama):
    (llama / "model.safetensors").unlink()
    torch.save(LLAMA | {5: torch.ones(1)}, llama / "pytorch_model.bin")
    told(lambda: load_language_model(llama, torch.float32), "'5'", "no tensor")


def test_a_kernel_that_a_config_names_is_not_asked_for(llama):
    configured(attn_implementation="evil/kernel")(llama)
    assert load_language_model(llama, torch.float32).config._attn_implementation == NAME


@pytest.mark.parametrize(
    ("content", "word"),
    [({"a": "b"}, "no tensor"), ({5: torch.ones(1)}, "no tensor"), ({"a": torch.ones(2).to_sparse()}, "sparse")],
    ids=["text", "number", "sparse"],
)
def test_delta_of_other_things(llama, content, word):
    (llama / "model.safetensors").unlink()
    torch.save(content, llama / "pytorch_model.bin")
    told(lambda: read_folder(llama, "--delta"), "--delta", "pytorch_model.bin", word)
