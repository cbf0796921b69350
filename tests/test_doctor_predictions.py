"""Memory predicted for cards that are not present, and for weights that are not on this machine."""
# ruff: noqa: F811  (fixtures are imported by name)

import random
import shutil
import sys

import huggingface_hub.constants
import pytest
from doctor_world import WEIGHTS, diagnose, errors_of, world  # noqa: F401
from safetensors.torch import load_file

from minigpt4.common import device as devices
from minigpt4.doctor.__main__ import num_bytes, parse_args
from minigpt4.doctor.findings import ERROR, OK, WARNING

TRAINING, CHAT = "memory, training", "memory, chat"
URL = "https://127.0.0.1:1/none.pth"


CACHE = {}


@pytest.fixture
def whole(diagnose):
    """The findings where all files are here."""
    if not CACHE:
        CACHE.update(diagnose())
    return CACHE


def test_a_card_that_is_not_present(diagnose, monkeypatch):
    """It computes in half precision, whatever this machine does, and a tenth of it is not available to tensors."""
    monkeypatch.setattr(devices, "_has_native_bf16", lambda: False)
    found = diagnose(memory=80e9)
    tensors = load_file(WEIGHTS / "llama" / "model.safetensors").values()
    assert found[TRAINING].numbers["language model"] == pytest.approx(sum(2 * t.numel() for t in tensors), rel=1e-3)
    assert "of 72 GB (80 GB less 10% for the card itself)" in found[TRAINING].evidence
    assert found[TRAINING].verdict == OK and "less 10%" in found[CHAT].evidence
    needed = sum(found[TRAINING].numbers.values())
    assert diagnose(memory=needed / 0.9 * 0.99)[TRAINING].verdict == ERROR


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("24 gib", 24 * 2**30), ("512MB", 512e6), ("1.5GB", 1.5e9)])
def test_sizes(text, size):
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "much", "2 4GB", "1.2.3GB", ""])
def test_what_is_no_size(monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["doctor", "--cfg-path", "x.yaml", "--memory", text])
    with pytest.raises(SystemExit, match="2"):
        parse_args()
    assert f"'{text}' is no size; expected one such as 24GB or 24GiB" in capsys.readouterr().err


def test_predictions_do_not_depend_on_the_prompt_that_is_drawn(diagnose, monkeypatch, whole):
    monkeypatch.setattr(random, "choice", lambda prompts: min(prompts, key=len))
    assert diagnose()[TRAINING].numbers == whole[TRAINING].numbers


# weights that are elsewhere


def numbers_of(found):
    return {check: found[check].numbers for check in (TRAINING, CHAT)}


def test_vision_weights_that_are_downloaded_later(diagnose, whole):
    found = diagnose(f"model.vit_weights={URL}", f"model.q_former_model={URL}")
    assert not errors_of(found) and numbers_of(found) == numbers_of(whole)


def test_a_language_model_of_which_only_the_configuration_is_here(diagnose, whole, tmp_path):
    ignored = shutil.ignore_patterns("*.safetensors")
    folder = shutil.copytree(WEIGHTS / "llama", tmp_path / "llama", ignore=ignored)
    found = diagnose(f"model.llama_model={folder}")
    assert list(errors_of(found)) == ["model.llama_model"] and numbers_of(found) == numbers_of(whole)
    assert "holds no model.safetensors" in found["model.llama_model"].evidence


def test_a_repository_of_which_only_the_configuration_is_in_the_cache(diagnose, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--llama"
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(WEIGHTS / "llama", repository / "snapshots" / "abc", ignore=ignored)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    found = diagnose("model.llama_model=someone/llama")
    assert not errors_of(found) and found["model.llama_model"].verdict == WARNING
    assert numbers_of(found) == numbers_of(whole)


@pytest.mark.parametrize("spec", ["someone/unknown", "/path/to/vicuna/"])
def test_a_language_model_of_which_nothing_is_here(diagnose, whole, spec):
    """The sizes of the vision side follow from the configuration."""
    found = diagnose(f"model.llama_model={spec}")
    assert TRAINING not in found and CHAT not in found
    vision = found["memory, vision"]
    assert vision.numbers["vision"] == whole[TRAINING].numbers["vision"] and vision.numbers["activations"] > 0
    assert "the language model, which is unknown, comes on top" in vision.evidence and "config.json" in vision.remedy
